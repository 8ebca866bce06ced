"""Reward models trained here: they learn, transformers loads them, and as a reward they score the same."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from rft.algorithms import ALGORITHMS
from rft.algorithms.extras import score_heads
from rft.algorithms.reward_models.reward_model import response_scores
from rft.batch import Batch, Group
from rft.config.load import parse_config
from rft.data import load_groups
from rft.learner.learner import Learner
from rft.learner.objective import LogpGap, Sums
from rft.plan import make_plan
from rft.rewards import load_reward
from rft.rewards.types import Outcome
from rft.tasks.pairs import ArithmeticPairs

PROMPTS = ["Mia has 4 pens, finds 2. How many now?\n"] * 3
TEXTS = ["4+2=6\n#### 6", "4+2=7\n#### 7", ""]


@dataclass
class Trained:
    learner: Learner
    groups: list[Group]
    before: Sums
    after: Sums
    folder: str


def train(tiny_folder: Path, where: Path, name: str, chat: str = "never", **settings: Any) -> Trained:
    """Thirty steps on sixteen rows: enough to see that the head and the trunk learn them."""
    config = parse_config(
        {
            "name": name,
            "output_dir": str(where),
            "algorithm": {"name": name, **settings},
            "model": {"path": str(tiny_folder)},
            "data": {"kind": "arithmetic_pairs", "limit": 16, "chat_template": chat, "numbers": ["margin"]},
            "train": {"batch_size": 16, "steps": 30},
            "learner": {"learning_rate": 3e-3, "threads": 1},
            "eval": {"every": 0},
        }
    )
    plan = make_plan(config)
    learner = Learner(plan.learner_spec())
    groups = plan.data.sample
    batch = Batch.build(groups, share_prefix=True)
    before = learner.evaluate(batch, 0)
    for step in range(30):
        learner.step(batch, step)
    folder = learner.export(str(where / f"{name}-{chat}"))
    return Trained(learner, groups, before, learner.evaluate(batch, 29), folder)


def mean(sums: Sums, name: str) -> float:
    total, count = sums[name]
    return total / count


@pytest.mark.parametrize("chat", ["auto", "never"])
def test_a_scalar_model_is_the_same_model_everywhere(tiny_folder: Path, tmp_path: Path, chat: str) -> None:
    done = train(tiny_folder, tmp_path, "reward_model", chat, centre=0.01, margin=True)
    assert mean(done.after, "preference_accuracy") >= 0.9 > mean(done.before, "preference_accuracy")
    assert mean(done.after, "loss") < 0.5 * mean(done.before, "loss")
    group = done.groups[0]
    batch = Batch.build([group])
    expected = response_scores(done.learner.policy.run(batch), batch)[:, 0].tolist()

    model = AutoModelForSequenceClassification.from_pretrained(done.folder)  # transformers alone
    ids = [[*group.prompt.tokens, *c.tokens] for c in group.completions]
    alone = [model(torch.tensor([row])).logits.item() for row in ids]
    assert alone == pytest.approx(expected, abs=1e-5)

    reward: Any = load_reward("reward_model", model=done.folder, batch_size=2)
    row = ArithmeticPairs().rows("train", 1, seed=0)[0]
    scores = reward.score([row["prompt"]] * 3, [row["chosen"], row["rejected"], ""])
    assert [s.value for s in scores[:2]] == pytest.approx(expected, abs=1e-5)
    assert scores[0].value > scores[1].value and scores[2].value is not None


def test_every_head_of_a_regression_is_read(tiny_folder: Path, tmp_path: Path) -> None:
    done = train(tiny_folder, tmp_path, "reward_regression", heads=2)
    assert mean(done.after, "score_error") < 0.5 * mean(done.before, "score_error")
    group = done.groups[0]
    batch = Batch.build([group])
    expected = response_scores(done.learner.policy.run(batch), batch)[0].tolist()
    row = ArithmeticPairs().rows("train", 1, seed=0)[0]
    for head in (0, 1):
        reward: Any = load_reward("reward_model", model=done.folder, label=head)
        assert reward([row["prompt"]], [row["completion"]]) == pytest.approx([expected[head]], abs=1e-5)


def test_hardened_predictions_are_those_of_the_policy_before_the_step(
    tiny_folder: Path, tmp_path: Path
) -> None:
    options = {"heads": 2, "objective": "bce", "confidence": 0.5}
    learner, groups = (
        (done := train(tiny_folder, tmp_path, "reward_regression", **options)).learner,
        done.groups,
    )
    batch = Batch.build(groups)
    prepared = learner.prepare(learner.at_step(batch, 29), LogpGap())
    scores = response_scores(learner.policy.run(batch), batch).detach()
    torch.testing.assert_close(prepared.columns["old_scores"], scores, rtol=1e-4, atol=1e-5)
    hardened = prepared.columns["hardened"]
    assert hardened.sum(0).tolist() == [len(scores) // 2] * 2
    for head in (0, 1):
        chosen = hardened[:, head] > 0
        assert scores[chosen, head].min() >= scores[~chosen, head].max() - 1e-5


def test_a_pairwise_model_reads_both_candidates(tiny_folder: Path, tmp_path: Path) -> None:
    done = train(tiny_folder, tmp_path, "pairwise_reward")
    assert mean(done.after, "preference_accuracy") >= 0.9
    batch = Batch.build([done.groups[0]])
    first, second = response_scores(done.learner.policy.run(batch), batch)[:, 0].sigmoid().tolist()
    row = ArithmeticPairs().rows("train", 1, seed=0)[0]
    reward: Any = load_reward("pairwise_model", model=done.folder)
    texts = [row["chosen"], row["rejected"]]
    wins = reward([row["prompt"]] * 2, texts)
    assert wins == pytest.approx([(first + 1 - second) / 2, (second + 1 - first) / 2], abs=1e-5)
    assert reward([row["prompt"]] * 2, texts[:1] * 2) == [0.5, 0.5]


def test_a_process_model_judges_the_steps_it_was_shown(tiny_folder: Path, tmp_path: Path) -> None:
    done = train(tiny_folder, tmp_path, "process_reward")
    assert mean(done.after, "step_accuracy") >= 0.9
    batch = Batch.build([done.groups[0]])
    expected = done.learner.policy.run(batch).scores
    assert expected is not None
    inside = expected[batch.mask, 0].sigmoid().tolist()
    assert AutoModelForTokenClassification.from_pretrained(done.folder).num_labels == 1
    row = ArithmeticPairs().rows("train", 1, seed=0)[0]
    reward: Any = load_reward("process_reward_model", model=done.folder)
    good, empty = reward.score([row["prompt"]] * 2, ["".join(row["completions"]), " "])
    assert good.value == pytest.approx(min(inside), abs=1e-5)
    assert empty.outcome is Outcome.abstain


def test_an_end_token_that_pads_is_not_taken_for_padding(tiny_folder: Path, tmp_path: Path) -> None:
    """Models without a padding token of their own often name the end token: a score would then be read
    before it."""
    folder = tmp_path / "same"
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.pad_token = tokenizer.eos_token
    for file in tiny_folder.iterdir():
        (folder / file.name).parent.mkdir(exist_ok=True)
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["pad_token_id"] = config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    done = train(folder, tmp_path, "reward_model")
    batch = Batch.build([done.groups[0]])
    expected = response_scores(done.learner.policy.run(batch), batch)[:, 0].tolist()
    row = ArithmeticPairs().rows("train", 1, seed=0)[0]
    found = load_reward("reward_model", model=done.folder)(
        [row["prompt"]] * 2, [row["chosen"], row["rejected"]]
    )
    assert found == pytest.approx(expected, abs=1e-5)


def test_a_resumed_reward_model_is_the_same(tiny_folder: Path, tmp_path: Path) -> None:
    done = train(tiny_folder, tmp_path, "reward_model")
    done.learner.capture_state()(tmp_path / "state")
    other = Learner(done.learner.spec)
    other.read_state(tmp_path / "state")
    batch = Batch.build(done.groups)
    assert other.step(batch, 29)["train/loss"] == done.learner.step(batch, 29)["train/loss"]


def test_every_offline_score_algorithm_is_tested_here() -> None:
    names = {name for name, kind in ALGORITHMS.items() if not kind.online and score_heads(kind())}
    assert names == {"reward_model", "reward_regression", "pairwise_reward", "process_reward"}


def test_held_out_rows_are_loaded_like_training_rows(tiny_folder: Path, tmp_path: Path) -> None:
    raw = {"algorithm": "reward_model", "model": {"path": str(tiny_folder)}, "output_dir": str(tmp_path)}
    raw |= {"data": {"kind": "arithmetic_pairs", "limit": 64}, "eval": {"problems": 24}}
    plan = make_plan(parse_config(raw))
    assert plan.data.held_out is not None
    assert len(plan.data.held_out) == 24
    expected = load_groups(plan.config.data, plan.tokenizer, "preference", "test").groups[:24]
    assert list(plan.data.held_out) == expected
