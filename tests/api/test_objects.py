"""Rewards that are Python objects: what identifies them, and that every kind runs in the reward workers."""

from __future__ import annotations

import functools
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rft
from rft.api.inputs import Arguments, resolve
from rft.config.rewards import RewardConfig, RewardsConfig
from rft.plan import make_plan
from rft.rewards.runner import RewardRunner
from rft.utils.objects import NotPicklable, identify, pickled

ROOT = Path(__file__).parents[2]
UNIT = 2.0
GRPO = Arguments(algorithm="grpo")


class Scaled:
    """A reward with state."""

    def __init__(self, scale: float, table: Any = None) -> None:
        self.scale, self.table = scale, table

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        return [self.scale * len(c) for c in completions]

    def half(self, completions: list[str]) -> list[float]:
        return [self.scale * len(c) / 2 for c in completions]


def closure(limit: int) -> Any:
    def short(completions: list[str], answer: list[str]) -> list[float]:
        return [UNIT * (len(c) < limit) for c in completions]

    return short


async def waits(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(len(p) + len(c)) for p, c in zip(prompts, completions, strict=True)]


async def test_every_kind_of_function_runs_in_the_workers() -> None:
    functions: list[Any] = [
        {"function": closure(3), "name": "closure"},
        {"function": lambda completions: [float(len(c)) for c in completions], "name": "lambda"},
        {"function": Scaled(0.5), "name": "instance"},
        {"function": Scaled(0.5).half, "name": "method"},
        {"function": functools.partial(Scaled(1.0), other=1), "name": "partial"},
        {"function": Scaled, "name": "class", "options": {"scale": 3.0}},
        waits,
        "not_truncated",
    ]
    async with RewardRunner(RewardsConfig(functions=functions)) as runner:
        rewards = await runner.score(
            ["1+1="] * 2, ["22", "4444"], {"answer": ["2", "4"]}, {"truncated": [False, True]}
        )
    got = {label: [r.scores[label].value for r in rewards] for label in rewards[0].scores}
    assert got == {
        "closure": [2.0, 0.0],
        "lambda": [2.0, 4.0],
        "instance": [1.0, 2.0],
        "method": [0.5, 1.0],
        "partial": [2.0, 4.0],
        "class": [6.0, 12.0],
        "waits": [6.0, 8.0],
        "not_truncated": got["not_truncated"],
    }


def test_an_object_is_identified_by_its_source_and_its_values() -> None:
    assert identify(closure(3)) == identify(closure(3))
    assert identify(closure(3)).sha256 != identify(closure(4)).sha256
    assert identify(closure(3)).values == {"limit": "3", "UNIT": "2.0"}
    assert "len(c) < limit" in identify(closure(3)).source
    array = np.arange(4.0)
    assert identify(Scaled(1.0, array)) == identify(Scaled(1.0, array.copy()))
    assert identify(Scaled(1.0, array)).sha256 != identify(Scaled(1.0, array + 1)).sha256
    assert identify(Scaled(1.0)).sha256 != identify(Scaled(1.0).half).sha256
    cycle: list[Any] = []
    cycle.append(cycle)
    assert identify(Scaled(1.0, cycle)).sha256 == identify(Scaled(1.0, cycle)).sha256
    one, other = lambda completions: [1.0], lambda completions: [2.0]
    assert identify(one).sha256 != identify(other).sha256


def test_a_helper_of_the_same_module_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    before = identify(closure(3)).sha256
    monkeypatch.setitem(globals(), "UNIT", 3.0)
    assert identify(closure(3)).sha256 != before


def test_the_hash_is_the_same_in_another_process() -> None:
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "from tests.api.test_objects import Scaled, closure, waits\n"
        "from rft.utils.objects import identify\n"
        "values = {'b': {3, 1, 2}, 'a': frozenset('xyz')}\n"
        "print([identify(o).sha256 for o in (closure(3), Scaled(1.0, values), waits)])\n"
    )
    seen = {
        subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            check=True,
            cwd=ROOT,
            env={"PYTHONHASHSEED": seed, "PATH": ""},
        ).stdout
        for seed in ("1", "2")
    }
    assert len(seen) == 1


def test_what_cannot_be_pickled_is_named() -> None:
    lock = threading.Lock()

    def locked(completions: list[str]) -> list[float]:
        with lock:
            return [1.0 for _ in completions]

    with pytest.raises(NotPicklable, match=r"cannot pickle '_thread\.lock' object"):
        pickled(lock)
    with pytest.raises(rft.ConfigError) as caught:
        rft.Config(algorithm="grpo", rewards=[locked])
    (problem,) = caught.value.problems
    assert "rewards.functions.0: the reward locked cannot be sent to the reward workers" in problem
    assert "(in 'lock')" in problem and "inside the function" in problem


def test_a_passed_function_is_recorded_and_its_pickle_is_not() -> None:
    config = rft.Config(algorithm="grpo", rewards=[closure(3), "math"])
    first, second = config.to_dict()["rewards"]["functions"]
    assert first["function"] == "python:short" and first["passed"]["values"] == {"limit": "3", "UNIT": "2.0"}
    assert second["passed"] is None and "payload" not in str(first)
    read = rft.Config(**config.to_dict())
    assert read.rewards.functions[0].payload is None and read.to_dict() == config.to_dict()


def test_a_typed_section_keeps_its_function() -> None:
    typed = RewardsConfig(functions=[RewardConfig.model_validate(closure(3))], workers=1)
    for config in (resolve({"rewards": typed}, GRPO), resolve(None, replace(GRPO, rewards=typed))):
        assert config.config.rewards.functions[0].payload is not None and config.config.rewards.workers == 1


def test_an_export_does_not_need_the_function(tmp_path: Path) -> None:
    config = rft.Config(
        algorithm="grpo",
        rewards=[closure(3)],
        data={"kind": "arithmetic", "limit": 64},
        rollout={"engine": "hf"},
        output_dir=str(tmp_path),
    )
    read = rft.Config(**config.to_dict())
    assert make_plan(read, starts=False).config.rewards == read.rewards
    with pytest.raises(rft.ConfigError, match=r"rewards.functions\[0\] \(short\): it was passed from Python"):
        make_plan(read)


def test_two_functions_of_one_name_need_names_of_their_own() -> None:
    with pytest.raises(rft.ConfigError, match="two rewards are called 'lambda'"):
        rft.Config(algorithm="grpo", rewards=[lambda completions: [1.0], lambda completions: [2.0]])


def test_a_file_cannot_name_a_passed_function() -> None:
    with pytest.raises(rft.ConfigError, match="refers to an object passed from Python"):
        rft.Config(algorithm="grpo", rewards=["python:mine"])
    assert RewardConfig(function="math").payload is None
