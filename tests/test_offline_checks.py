"""Offline configs that cannot work are refused by the plan; those that can are described by it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rft.config.load import parse_config
from rft.data import GroupStream
from rft.errors import ConfigError
from rft.plan import Plan, make_plan
from rft.report.plan_text import plan_lines

ROWS = [{"prompt": f"{a}+1=", "chosen": str(a + 1), "rejected": str(a)} for a in range(12)]


@pytest.fixture
def raw(tmp_path: Path, tiny_folder: Path) -> dict[str, Any]:
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return {
        "output_dir": str(tmp_path),
        "model": {"path": str(tiny_folder)},
        "data": {"path": str(tmp_path / "rows.jsonl")},
        "algorithm": "dpo",
        "train": {"batch_size": 4},
    }


def plan_of(raw: dict[str, Any], **changes: Any) -> Plan:
    return make_plan(parse_config({**raw, **changes}))


def refused(raw: dict[str, Any], **changes: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        plan_of(raw, **changes)
    return "\n".join(caught.value.problems)


def test_no_held_out_rows_is_said(raw: dict[str, Any]) -> None:
    assert "evaluation   none: there are no held-out rows" in "\n".join(plan_lines(plan_of(raw)))
    data = {**raw["data"], "holdout": 4}
    assert "evaluation   4 groups" in "\n".join(plan_lines(plan_of(raw, data=data)))
    assert "evaluation" not in "\n".join(plan_lines(plan_of(raw, data=data, eval={"every": 0})))


def test_a_folder_s_test_split_is_held_out(raw: dict[str, Any], tmp_path: Path) -> None:
    folder = tmp_path / "split"
    folder.mkdir()
    for name, part in (("train", ROWS[:8]), ("test", ROWS[8:])):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, part)))
    offline = plan_of(raw, data={"path": str(folder)}).data
    assert offline.held_out is not None
    assert [len(offline.sample), len(offline.held_out)] == [8, 4]
    (folder / "test.jsonl").write_text('{"prompt": "1+1=", "chosen": "2", "rejected": "2"}')
    told = refused(raw, data={"path": str(folder)})
    assert "held-out rows" in told and "are equal" in told and "set eval.every: 0" in told
    (folder / "test.jsonl").unlink()
    offline = plan_of(raw, data={"path": str(folder)}).data
    assert offline.held_out is None


def test_a_column_that_the_algorithm_reads_is_asked_for(raw: dict[str, Any]) -> None:
    assert 'columns["margin"]' in refused(raw, algorithm={"name": "reward_model", "margin": True})
    told = refused(
        {**raw, "data": {"kind": "arithmetic_pairs", "limit": 8}},
        algorithm={"name": "reward_regression", "heads": 3},
    )
    assert "each row has 2 targets, but the model has 3 heads" in told
    assert 'columns["weight"]' in refused({**raw, "data": {"limit": 8}}, algorithm="c_rlft")


@pytest.mark.parametrize("streaming", [False, True])
def test_preferences_may_be_ranked_lists(raw: dict[str, Any], tmp_path: Path, streaming: bool) -> None:
    rows = [{"prompt": f"{a}=", "completions": [f"{a}", f"{a}{a}", "no"]} for a in range(8)]
    (tmp_path / "ranked.jsonl").write_text("\n".join(map(json.dumps, rows)))
    data = {"path": str(tmp_path / "ranked.jsonl"), "streaming": streaming}
    offline = plan_of(raw, data=data).data
    assert [c.reward for c in offline.sample[0].completions] == [2.0, 1.0, 0.0]


def test_kto_needs_two_responses_in_a_step(raw: dict[str, Any]) -> None:
    pairs = {**raw, "data": {"kind": "arithmetic_pairs", "limit": 8}, "train": {"batch_size": 1}}
    assert "KTO needs at least two examples per step" in refused(pairs, algorithm="kto")


def test_generation_needs_rewards_and_a_policy(raw: dict[str, Any]) -> None:
    pairs = {**raw, "data": {"kind": "arithmetic_pairs", "limit": 8}}
    assert "completions are scored by rewards" in refused(pairs, eval={"generate": True})
    math = [{"function": "math"}]
    told = refused(pairs, algorithm="reward_model", eval={"generate": True}, rewards=math)
    assert "which generates nothing" in told
    plan = plan_of(pairs, eval={"generate": True, "problems": 6}, rewards=math)
    assert [len(s.prompts) for s in plan.eval_sets] == [6]


def test_reward_models_are_trained_as_a_whole(raw: dict[str, Any]) -> None:
    told = refused(raw, algorithm="reward_model", learner={"adapter": {"r": 4}})
    assert "learner.adapter: reward_model trains a whole reward model" in told


def test_references_that_cannot_be_cached_or_are_not_read(raw: dict[str, Any], tmp_path: Path) -> None:
    cached = {"reference_logps": "cached"}
    assert plan_of(raw, learner=cached).config.learner.reference_logps == "cached"
    tasks = {**raw, "data": {"limit": 16}}
    for algorithm, words in (
        ("sft", "sft does not use a reference"),
        ("asft", "compares whole distributions"),
        ({"name": "ss_token", "refresh_reference": 2}, "updates its reference"),
    ):
        assert words in refused(tasks, algorithm=algorithm, learner=cached)
    kto = {**raw, "data": {"kind": "arithmetic_pairs", "limit": 16}, "learner": cached}
    assert "draws new mismatched pairs in each epoch" in refused(kto, algorithm="kto")
    assert plan_of(kto, algorithm={"name": "kto", "baseline": "zero"})
    stream = {**raw["data"], "streaming": True}
    assert "a streamed dataset cannot be scored before training" in refused(raw, data=stream, learner=cached)
    model = {**raw["model"], "reference": raw["model"]["path"]}
    free = {"name": "dpo", "reference_free": True}
    assert "model.reference: dpo does not use a reference" in refused(raw, algorithm=free, model=model)
    assert "is neither a model folder" in refused(raw, model={**model, "reference": str(tmp_path / "no")})


def test_a_reference_with_another_vocabulary_is_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    config = json.loads((Path(raw["model"]["path"]) / "config.json").read_text())
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.json").write_text(json.dumps({**config, "vocab_size": 99}))
    told = refused(raw, model={**raw["model"], "reference": str(other)})
    assert "has a vocabulary of 99" in told


def test_rows_longer_than_the_model_reads_are_refused(raw: dict[str, Any], tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text("\n".join(json.dumps({**row, "prompt": "1+" * 1100}) for row in ROWS))
    assert "tokens, and the model 2048 positions" in refused(raw, data={"path": str(long)})


def test_streams_are_read_in_the_preflight_and_not_for_online_runs(raw: dict[str, Any]) -> None:
    data = {**raw["data"], "streaming": True}
    plan = plan_of(raw, data=data)
    assert isinstance(plan.data.train, GroupStream)
    assert "streamed from" in "\n".join(plan_lines(plan))
    assert "no such column" in refused(raw, data=data, algorithm="sft")
    online = {**raw, "algorithm": "grpo", "rewards": [{"function": "math"}]}
    assert "online training loads all of its prompts" in refused(online, data=data)
