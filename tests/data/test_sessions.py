"""Collected sessions as training data: the same tokens, masks and branches, chosen as the config says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from rft.batch import Batch, Completion, Group, Prompt
from rft.config.data import DataConfig
from rft.config.load import parse_config
from rft.data import DataError, GroupSet, load_groups
from rft.data.sessions import line_of, tokenizer_id
from rft.errors import ConfigError
from rft.plan import make_plan
from rft.rollout.calls import Call, lay_out
from tests.data.conftest import make_tokenizer

SHARED = (5, 6, 7)


def call(prompt: tuple[int, ...], *sampled: int, **options: Any) -> Call:
    return Call(prompt, sampled, (-0.5,) * len(sampled), "stop", ((0, 0, len(sampled)),), **options)


SESSIONS = {
    "one call": [call(SHARED, 10, 11)],
    "turns": [call(SHARED, 10, 11), call((*SHARED, 10, 11, 20), 12, reward=0.5)],
    "a branch": [call(SHARED, 10, 11, 12), call((*SHARED, 10, 99), 13)],
    "leaves the prompt": [call((5, 6, 9), 10), call((8,), 11), call(SHARED, 12)],
    "an untrained call": [call(SHARED, 10, 11), call((*SHARED, 30), 31, trained=False)],
}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


def line(tokenizer: Any, name: str, prompt: int = 0, sample: int = 0, **judged: Any) -> dict[str, Any]:
    reward, success = judged.get("reward", 1.0), judged.get("success", True)
    c = replace(lay_out(SHARED, SESSIONS[name]), reward=reward, text="said")
    row = line_of(
        Prompt(prompt, SHARED, "What?", {"answer": "4"}), sample, c, success, tokenizer_id(tokenizer)
    )
    loaded: dict[str, Any] = json.loads(json.dumps(row))
    return loaded


def loaded(
    path: Path,
    lines: Sequence[dict[str, Any]],
    tokenizer: Any,
    kind: Any = "sft",
    split: Any = "train",
    **data: Any,
) -> GroupSet:
    file = path / "sessions.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    return load_groups(DataConfig(path=str(file), **{"sessions": {}, **data}), tokenizer, kind, split)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", SESSIONS)
def test_the_batch_has_the_tokens_that_were_sampled(
    name: str, share: bool, tokenizer: Any, tmp_path: Path
) -> None:
    (group,) = loaded(tmp_path, [line(tokenizer, name)], tokenizer)
    sampled = Batch.build(
        [Group(Prompt(0, SHARED, ""), (lay_out(SHARED, SESSIONS[name]),))], share_prefix=share
    )
    trained = Batch.build([group], share_prefix=share)
    for field in ("tokens", "mask", "positions", "source", "segment", "parent", "sequence"):
        assert torch.equal(getattr(trained, field), getattr(sampled, field)), field
    assert trained.rewards is not None and trained.rewards.tolist() == [1.0]


def test_a_line_says_what_was_sampled(tokenizer: Any) -> None:
    row = line(tokenizer, "turns")
    assert row["row"] == {"answer": "4", "prompt": "What?"} and row["prompt_ids"] == list(SHARED)
    assert row["messages"] == [
        {"role": "user", "content": "What?"},
        {"role": "assistant", "content": "said"},
    ]
    assert row["ids"] == [10, 11, 20, 12] and row["logprobs"] == [-0.5, -0.5, None, -0.5]
    assert [(t["start"], t["end"], t["reward"]) for t in row["turns"]] == [(0, 2, None), (3, 4, 0.5)]


# -- what is trained on ----------------------------------------------------------------------------------


def judged(tokenizer: Any) -> list[dict[str, Any]]:
    """Two prompts: the first with rewards 0, 0.5, 1, 1, the second with two equal failures and one lost."""
    rows = [
        line(tokenizer, "one call", 3, k, reward=r, success=r == 1.0)
        for k, r in enumerate((0.0, 0.5, 1.0, 1.0))
    ]
    lost = line(tokenizer, "one call", 9, 2, reward=None, success=None)
    return [*rows, *(line(tokenizer, "turns", 9, k, reward=0.0, success=False) for k in range(2)), lost]


@pytest.mark.parametrize(
    ("sessions", "rows"),
    [
        ({}, [2, 3]),
        ({"keep": "best"}, [2, 4]),
        ({"keep": "best", "min_reward": 0.5}, [2]),
        ({"keep": "all"}, [0, 1, 2, 3, 4, 5]),
        ({"keep": "all", "min_reward": 0.5}, [1, 2, 3]),
    ],
)
def test_demonstrations(sessions: dict[str, Any], rows: list[int], tokenizer: Any, tmp_path: Path) -> None:
    groups = loaded(tmp_path, judged(tokenizer), tokenizer, sessions=sessions)
    assert [g.prompt.id for g in groups] == rows
    assert sum(groups.skipped.values()) == 7 - len(rows) and groups.skipped["without a reward"] == 1


@pytest.mark.parametrize(("pairs", "count"), [(1, 1), (9, 2)])
def test_pairs(pairs: int, count: int, tokenizer: Any, tmp_path: Path) -> None:
    rows = judged(tokenizer)
    groups = loaded(tmp_path, rows, tokenizer, "preference", sessions={"pairs": pairs})
    assert [[c.reward for c in g.completions] for g in groups] == [[1.0, 0.0]] * count
    assert groups.skipped["prompts without a pair of different rewards"] == 1


def test_successes_and_failures(tokenizer: Any, tmp_path: Path) -> None:
    groups = loaded(tmp_path, judged(tokenizer), tokenizer, "unpaired")
    assert [g.completions[0].reward for g in groups] == [0.0, 0.0, 1.0, 1.0, 0.0, 0.0]


def test_the_sessions_of_a_prompt_stay_on_one_side(tokenizer: Any, tmp_path: Path) -> None:
    rows = [line(tokenizer, "one call", prompt, k) for prompt in range(8) for k in range(3)]
    train = loaded(tmp_path, rows, tokenizer, holdout=2)
    test = loaded(tmp_path, rows, tokenizer, split="test", holdout=2)
    assert len(train) == 18 and len(test) == 6
    assert {g.prompt.id // 3 for g in train}.isdisjoint({g.prompt.id // 3 for g in test})
    assert len(loaded(tmp_path, rows, tokenizer, limit=2)) == 6


# -- what is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": []}, "`ids` is empty"),
        ({"ids": [10, 99999]}, "`ids` has 99999, not a token id below"),
        ({"ids": "10"}, "`ids` must be a list"),
        ({"turns": []}, "no turn sampled a token"),
        ({"turns": [{"start": 1, "end": 3}]}, "`turns` has .*, not a part of the 2 `ids`"),
        ({"branches": [[0, 9]]}, "`branches` has"),
        ({"branches": [[1, 0]]}, "must ascend from 0"),
        ({"reward": "high"}, "`reward` must be a finite number"),
        ({"success": 1}, "`success` must be true, false or null"),
        ({"tokenizer": "other"}, "sampled with another tokenizer"),
    ],
)
def test_bad_lines(change: dict[str, Any], message: str, tokenizer: Any, tmp_path: Path) -> None:
    rows = [line(tokenizer, "one call"), line(tokenizer, "one call", 1) | change]
    with pytest.raises(DataError, match=message) as error:
        loaded(tmp_path, rows, tokenizer)
    assert "1 row (2)" in str(error.value)
    assert len(loaded(tmp_path, rows, tokenizer, bad_rows="skip")) == 1


def test_long_sessions(tokenizer: Any, tmp_path: Path) -> None:
    rows = [line(tokenizer, "one call"), line(tokenizer, "turns", 1)]
    with pytest.raises(DataError, match="longer than max_length=6 tokens"):
        loaded(tmp_path, rows, tokenizer, max_length=6)
    assert len(loaded(tmp_path, rows, tokenizer, max_length=6, overlong="skip")) == 1
    with pytest.raises(ValidationError, match="write `skip` or `reject`"):
        DataConfig(path="a.jsonl", sessions={}, overlong="truncate")  # type: ignore[arg-type]


def test_other_data_and_other_settings(tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="row 1: not a session of `rft collect`"):
        loaded(tmp_path, [{"prompt": "a", "completion": "b"}], tokenizer)
    with pytest.raises(DataError, match="this algorithm trains on ranked data"):
        loaded(tmp_path, [line(tokenizer, "turns")], tokenizer, "ranked")
    with pytest.raises(DataError, match=r"no session is left to train on \(1: not kept"):
        loaded(tmp_path, [line(tokenizer, "turns", success=False)], tokenizer)
    with pytest.raises(ValidationError, match="`template` does not apply to `sessions`"):
        DataConfig(path="a.jsonl", sessions={}, template="{prompt}")  # type: ignore[arg-type]


def test_the_plan_names_an_algorithm_that_samples_itself(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "s.jsonl").write_text("{}\n")
    raw = {
        "algorithm": "grpo",
        "model": {"path": str(tiny_folder)},
        "data": {"path": str(tmp_path / "s.jsonl"), "sessions": {}},
        "rewards": ["math"],
    }
    with pytest.raises(ConfigError, match=r"data.sessions: grpo samples completions itself"):
        make_plan(parse_config(raw), starts=False)


def test_messages_can_be_encoded_afresh(tokenizer: Any, tmp_path: Path) -> None:
    """Without `sessions` the file is an ordinary one of conversations."""
    from tests.data.conftest import PLAIN_TEMPLATE

    (group,) = loaded(tmp_path, [line(tokenizer, "turns")], make_tokenizer(PLAIN_TEMPLATE), sessions=None)
    assert isinstance(group.completions[0], Completion) and group.completions[0].text == "said<|end|>"
