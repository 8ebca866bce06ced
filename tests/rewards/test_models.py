"""Model rewards with tiny models made here: scalar, pairwise, per step; and in a Ray actor."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch

from rft.config.rewards import RewardConfig, RewardsConfig
from rft.contrib.rewards.steps import aggregate
from rft.rewards import Outcome, load_reward
from rft.rewards.runner import RewardRunner

pytestmark = pytest.mark.filterwarnings("ignore")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A byte-level tokenizer and a tiny Llama with each head, saved to disk."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        LlamaConfig,
        LlamaForSequenceClassification,
        LlamaForTokenClassification,
        PreTrainedTokenizerFast,
    )

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {c: i for i, c in enumerate(["<pad>", "<unk>", *alphabet])}
    inner = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("", "isolated")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", unk_token="<unk>")
    torch.manual_seed(0)
    paths = {}
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "vocab_size": len(vocab), "pad_token_id": 0}
    for name, kind, labels in (
        ("scalar", LlamaForSequenceClassification, 1),
        ("two", LlamaForSequenceClassification, 2),
        ("steps", LlamaForTokenClassification, 2),
    ):
        path = tmp_path_factory.mktemp(name)
        kind(LlamaConfig(**shape, num_labels=labels)).save_pretrained(path)
        tokenizer.save_pretrained(path)
        paths[name] = str(path)
    return paths


def test_a_scalar_model_scores_alike_in_any_batch(tiny: dict[str, str]) -> None:
    prompts, completions = ["question "] * 5, ["a", "a longer answer", "b", "bb", "something else entirely"]
    batched: Any = load_reward("reward_model", model=tiny["scalar"], batch_size=4)
    single: Any = load_reward("reward_model", model=tiny["scalar"], batch_size=1)
    values = [s.value for s in batched.score(prompts, completions)]
    assert values == pytest.approx([s.value for s in single.score(prompts, completions)], abs=1e-5)
    assert len(set(values)) == 5
    squashed = load_reward("reward_model", model=tiny["scalar"], sigmoid=True)(prompts, completions)
    assert squashed == pytest.approx([torch.tensor(v).sigmoid().item() for v in values], abs=1e-5)


def test_a_principle_conditions_the_score(tiny: dict[str, str]) -> None:
    reward: Any = load_reward("reward_model", model=tiny["scalar"])
    plain, ruled = reward.score(["q", "q"], ["a", "a"], principle=["", "Be brief."])
    assert plain.value != ruled.value


def test_several_labels_need_a_choice(tiny: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="set the option `label`"):
        load_reward("reward_model", model=tiny["two"]).score(["q"], ["a"])  # type: ignore[attr-defined]
    a, b = (load_reward("reward_model", model=tiny["two"], label=k)(["q"], ["a"])[0] for k in (0, 1))
    assert a == pytest.approx(-b, abs=1e-5)


@pytest.mark.parametrize("head", ["pair", "bradley_terry"])
def test_win_rates_of_a_pair_add_up_to_one(tiny: dict[str, str], head: str) -> None:
    reward: Any = load_reward("pairwise_model", model=tiny["scalar"], head=head)
    scores = reward.score(["q1", "q1", "q2"], ["yes", "no way", "alone"])
    assert scores[0].value + scores[1].value == pytest.approx(1.0, abs=1e-5)
    assert 0 < scores[0].value < 1
    assert scores[2].outcome is Outcome.abstain


def test_a_process_model_judges_every_step(tiny: dict[str, str]) -> None:
    reward: Any = load_reward("process_reward_model", model=tiny["steps"], aggregate="min")
    mean: Any = load_reward("process_reward_model", model=tiny["steps"], aggregate="mean")
    scores = reward.score(["q", "q", "q"], ["one\n\ntwo\n\nthree", "one", ""])
    assert scores[0].detail.count(",") == 2
    assert 0 < scores[0].value <= mean.score(["q"], ["one\n\ntwo\n\nthree"])[0].value < 1
    assert scores[2].outcome is Outcome.abstain
    first = float(scores[0].detail.split("[")[1].split(",")[0])
    assert scores[1].value == pytest.approx(
        first, abs=1e-3
    )  # a step's score depends on what precedes it only


def test_any_reward_by_steps() -> None:
    reward: Any = load_reward("process", function="regex", options={"pattern": r"\d"})
    scores = reward.score(["p", "p"], ["1 a\n\nno\n\n3", ""])
    assert scores[0].value == pytest.approx(2 / 3)
    assert scores[1].outcome is Outcome.abstain
    failing: Any = load_reward("process", function="json_schema")
    assert failing.score(["p"], ["{}"])[0].outcome is Outcome.error
    values = [0.5, 0.25, 1.0]
    assert [aggregate(values, how) for how in ("min", "product", "last")] == [0.25, 0.125, 1.0]  # type: ignore[arg-type]


async def test_a_model_in_its_own_worker(tiny: dict[str, str]) -> None:
    config = RewardsConfig(
        functions=[RewardConfig(function="reward_model", options={"model": tiny["scalar"]})]
    )
    direct = load_reward("reward_model", model=tiny["scalar"])(["q"] * 3, ["a", "b", "c"])
    async with RewardRunner(config) as runner:
        rewards = await runner.score(["q"] * 3, ["a", "b", "c"])
        assert len(runner.pids) == 1
    assert [r.value for r in rewards] == pytest.approx(direct, abs=1e-5)


@pytest.mark.slow
async def test_a_reward_in_a_ray_actor(ray_here: None) -> None:
    functions = [
        RewardConfig(function="custom_rewards.py:crashes", name="c", actor={"num_cpus": 0.5}, batch_size=1),
        RewardConfig(function="custom_rewards.py:hangs", name="h", actor={"num_cpus": 0.5}, timeout_s=1.0),
    ]
    config = RewardsConfig(functions=functions, on_error="drop", on_timeout="drop")
    async with RewardRunner(config, HERE) as runner:
        good = await runner.score(["p"] * 2, ["a", "b"])
        assert [r.value for r in good] == [2.0, 2.0]
        bad, hung = await asyncio.gather(runner.score(["p"], ["bad"]), runner.score(["p"], ["hang"]))
        assert bad[0].scores["c"].outcome is Outcome.error
        assert hung[0].scores["h"].outcome is Outcome.timeout
        again = await runner.score(["p"], ["a"])
        assert again[0].value == 2.0
        # A call that hangs harms nobody else, also where its caller has given it up: the others wait
        # until it has reached its deadline, and spend nothing of their own.
        hanging, queued = (asyncio.ensure_future(runner.score(["p"], ["hang"])) for _ in range(2))
        await asyncio.sleep(0.3)
        after = asyncio.ensure_future(runner.score(["p"], ["a"]))
        hanging.cancel()
        queued.cancel()
        assert (await after)[0].value == 2.0
        assert [pool.counts["killed"] for pool in runner._pools] == [0, 2]
