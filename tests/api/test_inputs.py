"""Arguments of the Python API become a config and files; mistakes are ConfigErrors that name them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

import rft
from rft import run_dir
from rft.api.inputs import Arguments, Resolved, resolve
from rft.config.load import load_config
from rft.data import load_rows

ROWS = [{"prompt": f"{a}+1=", "answer": str(a + 1)} for a in range(8)]


def made(config: Any = None, *, sections: dict[str, Any] | None = None, **arguments: Any) -> Resolved:
    return resolve(config, Arguments(**{"algorithm": "grpo", **arguments}, sections=sections or {}))


def message(action: Callable[[], object]) -> str:
    with pytest.raises(rft.ConfigError) as caught:
        action()
    return "\n".join(caught.value.problems)


# -- sections ------------------------------------------------------------------------------------------


def test_yaml_and_python_give_the_same_config(tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(
        "name: x\nmodel: {path: tiny, options: {layers: 2}}\ndata: {kind: arithmetic, limit: 64}\n"
        "algorithm: {name: grpo, epsilon_high: 0.28}\ntrain: {steps: 60, batch_size: 8}\n"
        "rewards: [{function: math}, format]\nrollout: {dtype: bfloat16, sampling: {temperature: 0.9}}\n"
        "learner: {learning_rate: 1.0e-5}\n"
    )
    python = made(
        model={"path": "tiny", "options": {"layers": 2}},
        data={"kind": "arithmetic", "limit": 64},
        algorithm=rft.algorithms.GRPO(epsilon_high=0.28),
        rewards=["math", {"function": "format"}],
        sections={
            "name": "x",
            "steps": 60,
            "batch_size": 8,
            "learner": {"learning_rate": 1e-5},
            "rollout": {"dtype": "bfloat16"},
            "temperature": 0.9,
        },
    )
    assert python.config == rft.Config.load(file) == load_config(file)
    assert python.config.to_dict() == made(file, algorithm=None).config.to_dict()
    assert made(python.config, algorithm=None, sections={"steps": 61}).config == rft.Config.load(
        file, "train.steps=61"
    )


def test_arguments_lie_over_a_config() -> None:
    base = {"rollout": {"dtype": "float32", "sampling": {"temperature": 0.5}}, "rewards": ["math"]}
    config = made(base, sections={"max_completion_length": 9, "learner.kernels.logprob": "chunked"}).config
    assert config.rollout.sampling.temperature == 0.5 and config.rollout.sampling.max_completion_length == 9
    weighted = made({"rewards": ["math", "format"]}, sections={"rewards.1.weight": 0.1}).config
    assert [c.weight for c in weighted.rewards.functions] == [1.0, 0.1]
    assert config.learner.kernels.logprob == "chunked" and config.rewards.functions[0].function == "math"
    assert base == {"rollout": {"dtype": "float32", "sampling": {"temperature": 0.5}}, "rewards": ["math"]}


def test_a_typed_section_sets_the_keys_that_it_was_given() -> None:
    from rft.config.schema import TrainConfig

    config = made({"train": {"batch_size": 4}}, sections={"train": TrainConfig(steps=7)}).config
    assert (config.train.steps, config.train.batch_size) == (7, 4)


def test_replace_changes_values_by_key_and_keeps_passed_functions() -> None:
    config = rft.Config(algorithm="grpo", rewards=[{"function": lambda completions: [1.0], "name": "one"}])
    changed = config.replace({"train.steps": 60, "rewards.0.weight": 2})
    assert changed.train.steps == 60 and changed.rewards.functions[0].weight == 2
    assert changed.rewards.functions[0].payload == config.rewards.functions[0].payload is not None
    assert "unknown key (did you mean 'steps'?)" in message(lambda: config.replace({"train.stepz": 1}))


@pytest.mark.parametrize(
    ("action", "said"),
    [
        (lambda: rft.Config(), "algorithm: required"),
        (lambda: rft.Config(algorithm="grpo", learnr={}), "learnr: unknown key (did you mean 'learner'?)"),
        (lambda: made(sections={"learnr": {}}), "learnr: unknown argument (did you mean 'learner'?)"),
        (lambda: made(sections={"stepz": 3}), "stepz: unknown argument (did you mean 'steps'?)"),
        (lambda: made(sections={"learner": {"learning_rat": 1}}), "did you mean 'learning_rate'?"),
        (lambda: made(sections={"steps": 1, "train": {"steps": 2}}), "train.steps is given twice"),
        (lambda: made(sections={"steps": 1, "train.steps": 2}), "train.steps is given twice"),
        (lambda: made(3), "config: expected a Config, a dict or the path of a YAML file, got an int"),
        (lambda: made("nowhere.yaml"), "config nowhere.yaml: No such file"),
        (lambda: made(algorithm="grop"), "unknown algorithm 'grop' (did you mean"),
        (lambda: made(environment={"kind": "tols"}), "environment.kind: input should be 'tools'"),
    ],
)
def test_a_mistake_is_a_config_error(action: Callable[[], object], said: str) -> None:
    assert said in message(action)


# -- data ----------------------------------------------------------------------------------------------


def test_rows_in_memory_become_a_file_of_the_run_folder(tmp_path: Path) -> None:
    of_list = made(data=ROWS, eval_data=ROWS[:3], sections={"output_dir": str(tmp_path), "name": "x"})
    again = made(
        data=datasets.Dataset.from_list(ROWS),
        eval_data=[dict(row) for row in ROWS[:3]],
        sections={"output_dir": str(tmp_path), "name": "x"},
    )
    assert of_list == again and len(of_list.files) == 2  # the name is a hash of the content
    data = of_list.config.data
    assert Path(str(data.path)).parent == Path(str(data.eval_path)).parent == tmp_path / "x" / "data"
    assert made(data=ROWS[1:]).config.data.path != made(data=ROWS).config.data.path
    with run_dir.with_files(of_list.files, keep=False):
        assert list(load_rows(data)) == ROWS and list(load_rows(data, "test")) == ROWS[:3]
    assert not (tmp_path / "x").exists()


def test_a_dataset_dict_brings_both_splits() -> None:
    both = datasets.DatasetDict(
        {"train": datasets.Dataset.from_list(ROWS), "test": datasets.Dataset.from_list(ROWS[:2])}
    )
    assert made(data=both) == made(data=ROWS, eval_data=ROWS[:2])
    assert made(data=both, eval_data="x.jsonl").config.data.eval_path == "x.jsonl"
    assert "no split 'train' (rows)" in message(lambda: made(data=datasets.DatasetDict(rows=both["train"])))


def test_rows_keep_how_the_config_reads_them() -> None:
    base = {"data": {"kind": "reasoning_gym", "task": "chain_sum", "template": "{prompt}?"}}
    data = made(base, data=ROWS).config.data
    assert data.template == "{prompt}?" and data.task is None and str(data.path).endswith(".jsonl")
    named = made(data={"rows": [{"q": "1"}], "columns": {"prompt": "q"}}).config.data
    assert named.columns == {"prompt": "q"} and str(named.path).endswith(".jsonl")


def test_values_of_numpy_and_torch_are_written_as_numbers() -> None:
    rows = [{"prompt": "1", "weight": np.float32(0.5), "ids": np.arange(3)}]
    (content,) = made(data=rows).files.values()
    assert json.loads(content) == {"prompt": "1", "weight": 0.5, "ids": [0, 1, 2]}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (iter(ROWS), "data: a list_iterator cannot be saved with the run; pass a list of dicts"),
        (datasets.Dataset.from_list(ROWS).to_iterable_dataset(), "data: an IterableDataset cannot be saved"),
        (datasets.Dataset.from_list(ROWS).to_pandas(), 'pass its rows: data.to_dict("records")'),
        ([{"prompt": b"1"}], "data, row 1, column 'prompt': a bytes cannot be written as JSON"),
        ([{"prompt": "1"}, "2"], "data, row 2: must be a dict of columns, not a str"),
        ([], "data: no rows were given"),
    ],
)
def test_data_that_cannot_be_saved_is_refused(data: Any, said: str) -> None:
    assert said in message(lambda: made(data=data))


SMALL: dict[str, Any] = {"model": "tiny", "algorithm": "grpo", "rollout": {"engine": "hf"}, "batch_size": 4}


def test_a_dataset_without_the_columns_is_one_message(tmp_path: Path) -> None:
    small = {**SMALL, "rewards": "math", "eval_data": ROWS, "output_dir": str(tmp_path)}
    other = datasets.Dataset.from_list([{"question": "1", "answer": "2"}] * 8)
    with pytest.raises(rft.ConfigError) as caught:
        rft.check(data=other, **small)
    (problem,) = caught.value.problems
    assert "column 'prompt': no such column; the columns are 'question', 'answer'" in problem
    with pytest.raises(rft.ConfigError) as caught:
        rft.check(data=[{"prompt": "1", "gold": "2"}] * 8, **small)
    (problem,) = caught.value.problems
    assert "needs the column 'answer'; the training data has gold" in problem
    assert [p.name for p in tmp_path.iterdir()] == [".cache"]  # a check leaves no run folder


def test_a_model_that_does_not_exist_is_one_message(tmp_path: Path) -> None:
    small = {**SMALL, "data": ROWS, "eval_data": ROWS, "rewards": "math", "output_dir": str(tmp_path)}
    with pytest.raises(rft.ConfigError) as caught:
        rft.check(**{**small, "model": "tinny"})
    (problem,) = caught.value.problems
    assert problem.startswith("model.path: 'tinny' is neither") and "the built-in model 'tiny'?" in problem


def test_a_plan_can_be_read(tmp_path: Path) -> None:
    plan = rft.check(data=ROWS, eval_data=ROWS[:4], rewards="math", output_dir=str(tmp_path), **SMALL)
    assert "8 prompts from" in str(plan) and "4 held-out prompts" in repr(plan)


def test_callbacks_that_are_none_are_named() -> None:
    said = message(lambda: rft.train(algorithm="grpo", callbacks=[len, rft.Callback]))  # type: ignore[list-item]
    assert "callbacks[0]: <built-in function len> is not a callback" in said
    assert "callbacks[1]: pass an instance: Callback()" in said
