"""Training on samples of top-p, top-k and min-p: log-probs are over the tokens that could be sampled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from rft.algorithms import ALGORITHMS
from rft.batch import Batch, Completion, Group, Prompt
from rft.cli import main
from rft.config.schema import Config
from rft.config.validate import problems
from rft.learner.learner import Learner
from rft.rollout.engine import Sampling
from rft.rollout.hf import _draw
from tests.specs import facts, needs_vllm
from tests.test_learner import Watched, spec

SETTINGS: list[dict[str, Any]] = [
    {"top_p": 0.7},
    {"top_k": 5},
    {"min_p": 0.3},
    {"top_p": 0.9, "top_k": 20, "min_p": 0.05},
]
TEMPERATURE = 0.8


def kept(logits: Tensor, settings: dict[str, Any]) -> Tensor:
    """The tokens that may be sampled, [V] bool, written out: min-p, then top-k, then top-p."""
    p = logits.softmax(-1)
    keep = p >= settings.get("min_p", 0.0) * p.max()
    if settings.get("top_k"):
        keep &= logits >= logits.masked_fill(~keep, -torch.inf).topk(settings["top_k"]).values[-1]
    p = logits.masked_fill(~keep, -torch.inf).softmax(-1)
    total = 0.0
    for token in p.argsort(descending=True).tolist():
        keep[token] &= total < settings.get("top_p", 1.0)
        total += float(p[token])
    return keep


@torch.no_grad()
def sample(folder: Path, settings: dict[str, Any]) -> Batch:
    """Two groups of two completions, drawn token by token as the hf engine does."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    options = Sampling(1, 8, temperature=TEMPERATURE, **settings)
    groups = []
    for number in range(2):
        prompt = (5 + number, 7, 9)
        sides = []
        for reward in (0.0, 1.0):
            ids, logps = list(prompt), []
            for _ in range(6):
                logits = model(torch.tensor([ids])).logits[:, -1].float()
                token, logp = _draw(logits, options, generator)
                ids.append(int(token))
                logps.append(float(logp))
            sides.append(Completion(tuple(ids[3:]), logps=tuple(logps), reward=reward))
        groups.append(Group(Prompt(number, prompt, ""), tuple(sides)))
    batch = Batch.build(groups)
    return batch.with_(version=torch.where(batch.mask, 0, -1))


def plain_logps(learner: Learner, sets: Learner, batch: Batch, settings: dict[str, Any]) -> Tensor:
    """The log-probs of the masked-in tokens over the sets kept by the model of `sets`, with gradient, [K]."""
    out = []
    for tree in range(batch.num_sequences):
        one = batch.select([tree])
        logits, before = (each.policy.model(one.tokens[None]).logits[0] for each in (learner, sets))
        rows = one.source[one.mask]
        logits, before = logits[rows] / TEMPERATURE, before[rows] / TEMPERATURE
        outside = torch.stack([~kept(row.detach(), settings) for row in before])
        logps = logits.masked_fill(outside, -torch.inf).log_softmax(-1)
        out.append(logps.gather(1, one.tokens[one.mask][:, None])[:, 0])
    return torch.cat(out)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_a_step_takes_the_log_probs_and_the_gradient_over_the_kept_tokens(
    tiny_folder: Path, settings: dict[str, Any]
) -> None:
    batch = sample(tiny_folder, settings)
    learner = Watched(spec(tiny_folder, temperature=TEMPERATURE, **settings))
    metrics = learner.step(batch, 0)
    assert metrics["sync/logp_gap"] < 1e-4 and metrics["policy/ratio"] == pytest.approx(1, abs=1e-6)
    # The whole vocabulary gives other log-probs: the comparison above can fail.
    plain = Learner(spec(tiny_folder, temperature=TEMPERATURE))
    assert (plain.score(batch)["logps"] - batch.sampler_logps)[batch.mask].abs().max() > 0.01
    prepared = ALGORITHMS["grpo"]().prepare(batch)
    logps = plain_logps(plain, plain, batch, settings)
    torch.testing.assert_close(logps.detach(), batch.sampler_logps[batch.mask], rtol=0, atol=1e-4)
    (-(prepared.advantages[batch.mask] * logps).mean()).backward()
    for (name, parameter), got in zip(plain.policy.model.named_parameters(), learner.seen[0], strict=True):
        torch.testing.assert_close(got, parameter.grad, rtol=2e-3, atol=2e-5, msg=name)


def test_later_updates_and_the_reference_keep_the_sets_of_the_policy_that_sampled(
    tiny_folder: Path,
) -> None:
    settings = {"top_p": 0.7}
    batch = sample(tiny_folder, settings)
    first = Learner(spec(tiny_folder, temperature=TEMPERATURE))
    learner = Learner(
        spec(
            tiny_folder,
            settings=ALGORITHMS["grpo"](beta=0.1),
            temperature=TEMPERATURE,
            num_iterations=2,
            **settings,
        )
    )
    seen: list[Tensor] = []
    scorings: list[frozenset[str]] = []
    score = learner.score

    def counted(batch: Batch, **kwargs: Any) -> Any:
        scorings.append(kwargs.get("outputs", frozenset()))
        return score(batch, **kwargs)

    learner.score = counted  # type: ignore[method-assign]
    run = learner.policy.run

    def watched(micro: Batch, *args: Any, **kwargs: Any) -> Any:
        out = run(micro, *args, **kwargs)
        seen.append(out.logps.detach()[micro.mask])
        return out

    learner.policy.run = watched  # type: ignore[method-assign]
    metrics = learner.step(batch, 0)
    assert metrics["sync/logp_gap"] < 1e-4 and metrics["policy/kl_ref"] >= 0
    assert scorings == [{"support"}, frozenset()], (
        "old log-probs and sets are of one forward, then the reference"
    )
    learner.policy.run = run  # type: ignore[method-assign]
    # The last forward was the second update's: the weights had moved, the sets had not.
    assert not torch.allclose(seen[-1], seen[0], atol=1e-3)
    settings_of_algorithm = ALGORITHMS["grpo"](beta=0.1)
    moved = Learner(spec(tiny_folder, settings=settings_of_algorithm, temperature=TEMPERATURE, **settings))
    moved.step(batch, 0)
    torch.testing.assert_close(
        seen[-1], plain_logps(moved, first, batch, settings).detach(), rtol=0, atol=1e-3
    )


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"rollout": {"staleness": 1, "sampling": {"top_p": 0.9}}}, "rollout.staleness: 0"),
        (
            {"algorithm": {"name": "grpo", "beta": 0.1, "kl_estimator": "full"}},
            "compares whole distributions",
        ),
        ({"algorithm": "nash_md"}, "not sampled from the policy alone"),
        ({"learner": {"kernels": {"logprob": "triton"}}}, "auto or chunked"),
    ],
)
def test_what_cannot_be_exact_is_refused(config: dict[str, Any], words: str) -> None:
    base = {"rollout": {"sampling": {"top_k": 20}}, "rewards": [{"function": "math"}], "algorithm": "grpo"}
    found = problems(Config(**{**base, **config}), facts(device="cuda", gpus=2))
    assert any("top_p, top_k and min_p" in problem and words in problem for problem in found)


@pytest.mark.slow
@needs_vllm
@pytest.mark.timeout(550)
def test_a_run_with_vllm(tiny_folder: Path, tmp_path: Path, ray_here: None) -> None:
    """The engine's log-probs are the learner's, over the same tokens, in each step and after each update."""
    reward = tmp_path / "varied.py"
    reward.write_text("def varied(completions, **columns): return [len(c) % 2 for c in completions]\n")
    config = {
        "name": "run",
        "output_dir": str(tmp_path),
        "algorithm": {"name": "grpo", "beta": 0.05},
        "model": {"path": str(tiny_folder)},
        "data": {"kind": "arithmetic", "limit": 32},
        "rewards": [{"function": "math"}, {"function": f"{reward}:varied"}],
        "train": {"steps": 3, "batch_size": 4, "num_generations": 4, "minibatches": 2},
        "rollout": {
            "engine": "vllm",
            "threads": 1,
            "dtype": "float32",
            "sampling": {
                "top_p": 0.8,
                "top_k": 40,
                "min_p": 0.02,
                "temperature": 0.9,
                "max_completion_length": 24,
            },
        },
        "learner": {"learning_rate": 1e-3, "threads": 1, "dtype": "float32"},
        "eval": {"every": 0},
        "tracking": {"display": "off"},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert main(["train", str(tmp_path / "run.yaml")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "train/loss" in row]
    assert len(trained) == 3
    # Over the whole vocabulary the log-probs would differ by -log(0.8) = 0.2 or more.
    assert all(row["sync/logp_gap"] < 2e-3 for row in trained), [row["sync/logp_gap"] for row in trained]
    assert trained[-1]["policy/kl_ref"] > 0
