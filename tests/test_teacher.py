"""A teacher behind a real endpoint: its scores, the divergence over its K most likely tokens, and whole
runs."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from rft.algorithms import ALGORITHMS
from rft.batch import Batch, Branch, Completion, Group, Prompt
from rft.cli import main
from rft.config.load import parse_config
from rft.config.schema import Config
from rft.config.validate import problems
from rft.contrib.teacher import Teacher
from rft.errors import ConfigError, EngineError
from rft.learner.distribution import teacher_divergence
from rft.learner.learner import Learner
from rft.learner.model import Head
from rft.metrics.record import StepRecord, path_of, read, write
from rft.tools.serve import serving
from tests.cases.families import make_tokenizer
from tests.specs import changed, facts, learner_spec
from tests.test_offline import Run, plan_of

HF = ["rollout.engine=hf", "rollout.threads=1"]
ROOT = Path(__file__).parent.parent
# Policy 0.5, 0.25, 0.15, 0.1; of the teacher 0.6 and 0.3 for the tokens 0 and 2, so that 0.1 are left.
POLICY = torch.tensor([[0.5, 0.25, 0.15, 0.1]]).log()
Q, P = (0.5, 0.15, 0.35), (0.6, 0.3, 0.1)
MIXED = [0.25 * p + 0.75 * q for p, q in zip(P, Q, strict=True)]


def kl(a: Any, b: Any) -> float:
    return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"beta": 0.0}, kl(P, Q)),
        ({"beta": 1.0}, kl(Q, P)),
        ({"beta": 0.25}, 0.25 * kl(P, MIXED) + 0.75 * kl(Q, MIXED)),
        ({"beta": 0.0, "skew": 0.25}, kl(P, MIXED)),
        ({"beta": 1.0, "skew": 0.75}, kl(Q, MIXED)),
    ],
)
def test_the_divergence_counts_all_other_tokens_as_one(settings: dict[str, float], expected: float) -> None:
    algorithm = ALGORITHMS["distill"](**settings)
    head = Head(torch.eye(4), None, None, 1.0)
    for ids, top in (([0, 2], [0.6, 0.3]), ([2, 0, -1], [0.3, 0.6, 0.0]), ([0, 9, 2], [0.6, 0.04, 0.3])):
        hidden = POLICY.clone().requires_grad_()
        value = teacher_divergence(
            algorithm, head, hidden, torch.tensor([ids]), torch.tensor([top]).log(), temperature=1.0
        )
        assert float(value.detach()) == pytest.approx(expected, rel=1e-5)
        value.sum().backward()

    def plain(logits: Tensor) -> Tensor:
        q = logits.softmax(-1)[0]
        q = torch.stack([q[0], q[2], q[1] + q[3]]).log()
        return algorithm.divergence(q, torch.tensor(P).log())

    (gradient,) = torch.autograd.grad(plain(z := POLICY.clone().requires_grad_()), z)
    torch.testing.assert_close(hidden.grad, gradient, rtol=1e-5, atol=1e-7)


def test_an_equal_teacher_has_no_divergence_and_a_certain_one_a_finite_one() -> None:
    head = Head(torch.eye(4), None, None, 1.0)
    for beta in (0.0, 0.5, 1.0):
        algorithm = ALGORITHMS["distill"](beta=beta)
        hidden = POLICY.clone().requires_grad_()
        ids = torch.arange(4)[None]
        for width in (1, 3, 4):
            value = teacher_divergence(algorithm, head, hidden, ids[:, :width], POLICY[:, :width], 1.0)
            assert abs(float(value.detach())) < 1e-5
        certain = teacher_divergence(algorithm, head, hidden, ids[:, :1], torch.zeros(1, 1), 1.0)
        certain.sum().backward()
        assert hidden.grad is not None and bool(hidden.grad.isfinite().all())
        assert 0.1 < float(certain.detach()) < 10


def config_of(url: str, folder: Path, **changes: Any) -> Config:
    teacher = {
        "base_url": f"{url}/v1",
        "model": "any",
        "top_k": 5,
        "retries": 0,
        **changes.pop("teacher", {}),
    }
    raw = {"algorithm": {"name": "distill", "beta": 1.0}, "model": {"path": str(folder)}, "rewards": ["math"]}
    return parse_config({**raw, "teacher": teacher, **changes})


def groups() -> list[Group]:
    """Two groups; the last completion is a session whose second call did not extend the first."""
    a, b = Completion((20, 21, 22)), Completion((30, 31), mask=(False, True))
    branching = Completion((40, 41, 50, 51, 52), branches=(Branch(0, 3), Branch(2, 1)))
    return [Group(Prompt(0, (10, 11, 12), ""), (a, b)), Group(Prompt(1, (10, 13, 14, 15), ""), (branching,))]


def expected_rows(folder: Path) -> Tensor:
    """[N, V]: the log-probs in the place of each token of the completions, by separate forwards."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    before_and_tokens = [
        ((10, 11, 12), (20, 21, 22)),
        ((10, 11, 12), (30, 31)),
        ((10, 13, 14, 15), (40, 41)),
        ((10, 13), (50, 51, 52)),
    ]
    rows = []
    for before, tokens in before_and_tokens:
        with torch.no_grad():
            logits = model(torch.tensor([[*before, *tokens]])).logits[0].float()
        rows.append(logits.log_softmax(-1)[len(before) - 1 : -1])
    return torch.cat(rows)


async def closing(teacher: Teacher, work: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await work
    finally:
        await teacher.close()


async def test_scores_of_a_real_server(tiny_folder: Path, ray_here: None, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    async with serving(str(tiny_folder), HF, "127.0.0.1", 0, "", False, print) as url:
        teacher = Teacher(config_of(url, tiny_folder), tokenizer)
        await teacher.check()
        scored = [await teacher.score(group) for group in groups()]
        await teacher.close()
        everything = Teacher(config_of(url, tiny_folder, teacher={"top_k": 4096}), tokenizer)
        whole = [await everything.score(group) for group in groups()]
        await everything.close()
        other = Teacher(config_of(url, tiny_folder), make_tokenizer(""))
        with pytest.raises(ConfigError, match="use a teacher with the policy's tokenizer"):
            await closing(other, other.check())
        silent = Teacher(config_of(f"{url}/none", tiny_folder), tokenizer)
        with pytest.raises(EngineError, match="404"):
            await closing(silent, silent.check())
    rows = expected_rows(tiny_folder)
    completions = [c for g in scored for c in g.completions]
    tokens = torch.tensor([t for c in completions for t in c.tokens])
    logps = torch.tensor([p for c in completions for p in c.ref_logps or ()])
    torch.testing.assert_close(logps, rows.gather(1, tokens[:, None])[:, 0], rtol=0, atol=1e-4)
    top = rows.topk(5)
    ids = torch.cat([torch.from_numpy(c.teacher.ids) for c in completions if c.teacher])
    best = torch.cat([torch.from_numpy(c.teacher.logps) for c in completions if c.teacher])
    assert ids.shape == (10, 5) and torch.equal(ids.long(), top.indices)
    torch.testing.assert_close(best, top.values, rtol=0, atol=1e-4)
    check_learner(tiny_folder, tmp_path, scored, whole)
    # A record of a step contains the scores.
    write(tmp_path, StepRecord(1, scored, [None, None], {}, {}, {}, {"rft": "0"}))
    again = read(path_of(tmp_path, 1)).groups
    assert [c.teacher for g in again for c in g.completions] == [c.teacher for c in completions]


def check_learner(tiny_folder: Path, tmp_path: Path, scored: list[Group], whole: list[Group]) -> None:
    """With all tokens listed, a step is that of the teacher in the learner; with five, its loss is
    smaller."""
    other = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    other.save_pretrained(tmp_path / "policy")
    for file in tiny_folder.glob("tokenizer*"):
        (tmp_path / "policy" / file.name).write_bytes(file.read_bytes())
    for name, algorithm in (
        ("distill", ALGORITHMS["distill"](beta=0.5)),
        ("grpo", ALGORITHMS["grpo"](beta=0.5, kl_estimator="full")),
    ):
        spec = learner_spec(tmp_path / "policy", algorithm)

        def rewarded(group: Group) -> Group:
            return replace(
                group,
                completions=tuple(
                    replace(c, reward=float(i), logps=(-1.0,) * len(c.tokens))
                    for i, c in enumerate(group.completions)
                ),
            )

        steps = {}
        for kind, given, at in (
            ("local", groups(), changed(spec, reference=str(tiny_folder))),
            ("all", whole, replace(spec, teacher=True)),
            ("five", scored, replace(spec, teacher=True)),
        ):
            learner = Learner(at)
            assert (learner.reference is None) == (kind != "local")
            steps[kind] = learner.step(Batch.build([rewarded(g) for g in given]), 0)
        same = {k: pytest.approx(steps["local"][k], rel=2e-3) for k in ("train/loss", "train/grad_norm")}
        assert {k: steps["all"][k] for k in same} == same, name
        if name == "distill":
            divergence = {kind: metrics["policy/divergence"] for kind, metrics in steps.items()}
            assert 0 < divergence["five"] < 0.95 * divergence["local"]


@pytest.mark.slow
def test_a_dataset_is_scored_once(
    tiny_folder: Path, ray_here: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run finds the scores on disk, and needs no server."""

    async def served(*work: Any) -> None:
        async with serving(str(tiny_folder), HF, "127.0.0.1", 0, "", False, print) as url:
            await asyncio.to_thread(work[0], url)

    losses: dict[str, list[float]] = {}

    def run(url: str, name: str = "first") -> None:
        overrides = [f"output_dir={tmp_path}", f"name={name}", f"model.path={tiny_folder}"]
        overrides += [f"teacher.base_url={url}/v1", "teacher.top_k=5", "teacher.retries=0", *LOCAL]
        assert main(["train", str(ROOT / "examples" / "logit_distill_endpoint.yaml"), *overrides]) == 0
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        losses[name] = [row["train/loss"] for row in rows if "train/loss" in row]

    asyncio.run(served(run))
    assert list((tmp_path / ".cache").glob("teacher-*.safetensors"))
    run("http://127.0.0.1:9", "second")
    assert len(losses["first"]) == 2 and losses["first"] == losses["second"]
    # Without the cache the unreachable server ends the run.
    for file in (tmp_path / ".cache").glob("teacher-*"):
        file.unlink()
    overrides = [f"output_dir={tmp_path}", "name=third", f"model.path={tiny_folder}", *LOCAL]
    overrides += ["teacher.base_url=http://127.0.0.1:9/v1", "teacher.retries=0"]
    capsys.readouterr()
    assert main(["train", str(ROOT / "examples" / "logit_distill_endpoint.yaml"), *overrides]) == 76
    assert "did not answer (1 attempts)" in capsys.readouterr().err


LOCAL = [
    "model.options={}",
    "warm_start=null",
    "data.limit=16",
    "train.steps=2",
    "train.batch_size=4",
    "eval.problems=4",
    "checkpoint.every=0",
    "tracking.display=off",
    "learner.threads=1",
    "rollout.threads=1",
    "rollout.engine=hf",
]


@pytest.mark.slow
def test_on_policy(tiny_folder: Path, ray_here: None, tmp_path: Path) -> None:
    async def served() -> None:
        async with serving(str(tiny_folder), HF, "127.0.0.1", 0, "", False, print) as url:
            overrides = [f"output_dir={tmp_path}", f"model.path={tiny_folder}", f"teacher.base_url={url}/v1"]
            overrides += [*LOCAL, "train.num_generations=2", "eval.every=0", "name=online"]
            example = str(ROOT / "examples" / "online" / "distill_endpoint.yaml")
            assert await asyncio.to_thread(main, ["train", example, *overrides]) == 0

    asyncio.run(served())
    rows = [json.loads(line) for line in (tmp_path / "online" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if "train/loss" in row]
    # The teacher is the start: the first step's divergence is that of rounding.
    assert abs(trained[0]["policy/divergence"]) < 1e-4 and trained[0]["time/teacher"] > 0
    assert len(trained) == 2


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"algorithm": "rloo"}, "does not use a reference"),
        ({"model": {"reference": "m"}}, "remove one of them"),
        ({"teacher": {"top_k": 0}}, "teacher.top_k: distill compares distributions"),
        ({"rollout": {"sampling": {"temperature": 0.7}}}, "at temperature 1"),
        ({"rollout": {"sampling": {"top_p": 0.9}}}, "whole vocabulary"),
        ({"algorithm": "nash_md"}, "model.reference"),
        ({"algorithm": {"name": "grpo", "beta": 0.1, "refresh_reference": 5}}, "updates its reference"),
        (
            {"algorithm": "logit_distill", "data": {"path": "rows.jsonl", "streaming": True}},
            "cannot be scored before",
        ),
    ],
)
def test_what_cannot_work_is_refused(config: dict[str, Any], words: str) -> None:
    made = config_of("http://t", Path("tiny"), **config)
    assert any("teacher" in problem and words in problem for problem in problems(made, facts()))


def test_urls() -> None:
    for url, words in (("localhost:8000", "is not a URL"), ("http://u:p@h/v1", "user name or password")):
        with pytest.raises(ConfigError, match=words):
            config_of("", Path("tiny"), teacher={"base_url": url})


def test_scores_and_reference_agree_offline(tiny_folder: Path, tmp_path: Path) -> None:
    """logit_distill trains towards the reference in the learner as well."""
    plan = plan_of(
        tiny_folder,
        tmp_path,
        algorithm={"name": "logit_distill", "alpha": 0.5},
        data={"kind": "arithmetic", "limit": 16},
        eval={"every": 0},
    )
    run = Run(plan, "run")
    run.carry_out()
    first = run.lines[0]
    assert abs(first["policy/divergence"]) < 1e-5  # policy and teacher begin equal
    assert run.lines[-1]["train/loss"] < first["train/loss"]


def test_ranks_are_compared_without_their_tokens() -> None:
    """Policy 0.5, 0.25, 0.15, 0.1 against 0.6, 0.3 and a rest of 0.1: 0.1 + 0.05 + 0.15. Against all of 0.6,
    0.3, 0.06, 0.04: 0.1 + 0.05 + 0.09 + 0.06. A place without a teacher counts nothing."""
    algorithm = ALGORITHMS["distill"](by_rank=True)
    head = Head(torch.eye(4), None, None, 1.0)
    hidden = POLICY.expand(4, 4).clone().requires_grad_()
    top = torch.tensor(
        [[0.6, 0.3, 0, 0, 0], [0.6, 0.3, 0.06, 0.04, 0], [0.4, 0.3, 0.15, 0.1, 0.05], [0.0] * 5]
    )
    ids = torch.full(top.shape, 700)
    value = teacher_divergence(algorithm, head, hidden, ids, top.log(), 1.0)
    # The teacher's fifth outcome has no counterpart: 0.1 + 0.05 + 0 + 0 + 0.05.
    torch.testing.assert_close(value.detach(), torch.tensor([0.3, 0.3, 0.2, 0.0]), rtol=1e-5, atol=1e-6)
    value.sum().backward()
    assert hidden.grad is not None and bool(hidden.grad.isfinite().all()) and not hidden.grad[3].any()
    # d/dz of 0.6 - p1 + 0.3 - p2 + (p3 + p4) - 0.1 with sum p = 1: 2 (p3 + p4) up to a constant.
    p = POLICY.exp()[0]
    expected = 2 * p * (torch.tensor([0.0, 0.0, 1.0, 1.0]) - p[2:].sum())
    torch.testing.assert_close(hidden.grad[0], expected, rtol=1e-4, atol=1e-6)
    whole = algorithm.divergence(POLICY, POLICY.flip(-1))
    assert abs(float(whole)) < 1e-6  # a permutation of the same probabilities


def hinted(row: int) -> Group:
    return Group(Prompt(row, (10, 11), "1 + 1 =", {"answer": "2"}), (Completion((20, 21)),))


async def test_a_teacher_reads_another_prompt_and_other_tokens(tiny_folder: Path, ray_here: None) -> None:
    """The hint changes what the teacher reads before the same tokens. With another tokenizer, the places
    where tokens of both begin have the teacher's distribution after the same text."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    policy_s = make_tokenizer(None)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)

    def rows_of(ids: list[int]) -> Tensor:
        with torch.no_grad():
            rows: Tensor = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        return rows

    async with serving(str(tiny_folder), HF, "127.0.0.1", 0, "", False, print) as url:
        plain = {"data": {"chat_template": "never"}}
        hint = {"template": "{prompt} (it is {answer})"}
        teacher = Teacher(config_of(url, tiny_folder, teacher=hint, **plain), tokenizer)
        scored = await teacher.score(hinted(0))
        with pytest.raises(ConfigError, match="answer"):
            await closing(teacher, teacher.score(replace(hinted(0), prompt=Prompt(0, (1,), "a"))))
        own = config_of(
            url,
            tiny_folder,
            teacher={"tokenizer": str(tiny_folder)},
            algorithm={"name": "distill", "by_rank": True},
            **plain,
        )
        text = "what is 1 + 2?"
        ids = policy_s(text, add_special_tokens=False)["input_ids"]
        crossing = Teacher(own, policy_s)
        await crossing.check()
        prompt = Prompt(0, tuple(policy_s("1 + 1 =")["input_ids"]), "1 + 1 =")
        crossed = await closing(crossing, crossing.score(Group(prompt, (Completion(tuple(ids)),))))
    seen = tokenizer("1 + 1 = (it is 2)")["input_ids"]
    expected = rows_of([*seen, 20, 21])
    assert scored.completions[0].ref_logps == pytest.approx(
        [float(expected[len(seen) - 1, 20]), float(expected[len(seen), 21])], abs=1e-4
    )
    before = tokenizer("1 + 1 =")["input_ids"]
    theirs = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    begins = [a for a, _ in theirs["offset_mapping"]]
    rows = rows_of([*before, *theirs["input_ids"]])
    top = crossed.completions[0].teacher
    ours = policy_s(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    compared = 0
    for place, (begin, _) in enumerate(ours):
        if begin in begins:
            best = rows[len(before) - 1 + begins.index(begin)].topk(5).values
            assert top.logps[place].tolist() == pytest.approx(best.tolist(), abs=1e-4)
            compared += 1
        else:
            assert top.ids[place].tolist() == [-1] * 5
    assert compared > 0


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"teacher": {"tokenizer": "t"}}, "by_rank: true"),
        (
            {
                "teacher": {"template": "{prompt} {answer}"},
                "environment": {"kind": "function", "path": "a.py:a"},
            },
            "teacher.template: a session",
        ),
        ({"algorithm": {"name": "distill", "by_rank": True, "estimator": "sampled"}}, "by_rank needs whole"),
        ({"algorithm": {"name": "distill", "skew": 0.1}}, "skew is defined for"),
        ({"algorithm": {"name": "expert_iteration", "beta": 0.1}}, "earlier samples"),
    ],
)
def test_combinations_that_make_no_sense(config: dict[str, Any], words: str) -> None:
    found = problems(config_of("http://t", Path("tiny"), **config), facts())
    assert any(words in problem for problem in found), found
