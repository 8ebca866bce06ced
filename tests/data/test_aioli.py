"""Learned rates of a mixture: the equations by hand, what a sweep draws, resume to the bit, mistakes."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rft.config.data import DataConfig
from rft.config.facts import Facts
from rft.config.load import parse_config
from rft.config.mixture import AioliConfig
from rft.config.validate import mixture_checks
from rft.data import DataError
from rft.data.aioli import Aioli, gain_matrix, updated
from rft.errors import ConfigError, RunStopped
from rft.metrics.names import is_documented
from rft.plan import Plan, make_plan
from tests.test_offline import Run, weights


def test_the_gains_by_hand() -> None:
    """Shares (3/4, 1/4) and (1/4, 3/4): 0.6 = 0.75 * 0.8 and 0.2 = 0.25 * 0.8; 0.1 and 0.3 likewise."""
    gains = gain_matrix(np.array([[0.6, 0.2], [0.1, 0.3]]), 0.75)
    assert gains == pytest.approx(np.array([[0.8, 0.0], [0.0, 0.4]]))
    assert gain_matrix(np.array([[0.6, 0.2], [0.1, 0.3]]), 1.0) == pytest.approx(
        np.array([[0.6, 0.2], [0.1, 0.3]])
    )


def test_the_update_by_hand() -> None:
    gains = np.array([[0.8, 0.0], [0.0, 0.4]])  # of sum 1.2: columns 2/3 and 1/3
    new = updated(np.array([0.5, 0.5]), gains, 3.0)
    assert new == pytest.approx(np.array([math.e**2, math.e]) / (math.e**2 + math.e))
    again = updated(new, gains, 3.0)
    assert again[0] / again[1] == pytest.approx(math.e**2), "factors multiply over rounds"
    # A negative entry shifts all: (0, 0.4; 0.3, 0.5), of sum 1.2, columns 0.25 and 0.75.
    shifted = updated(np.array([0.2, 0.8]), np.array([[-0.1, 0.3], [0.2, 0.4]]), 2.0)
    assert shifted[1] / shifted[0] == pytest.approx(4 * math.exp(2 * 0.5))
    assert updated(np.array([0.3, 0.7]), np.zeros((2, 2)), 1.0) == pytest.approx(np.array([0.3, 0.7]))


def test_a_round_sweeps_then_trains() -> None:
    learned = Aioli(AioliConfig(every=10, steps=2, focus=0.75, eta=3.0), ["a", "b"], seed=1)
    assert [step for step in range(20) if learned.due(step)] == [0, 2, 4, 10, 12, 14]
    order = learned.order(0)
    assert sorted(order) == [0, 1]
    losses = {"a": 2.0, "b": 1.0}
    learned.observe(0, losses)
    drops = {0: {"a": 0.6, "b": 0.1}, 1: {"a": 0.2, "b": 0.3}}  # of the matrix by hand, by swept source
    for place, source in enumerate(order, 1):
        assert learned.rates()["ab"[source]] == 0.75
        losses = {name: losses[name] - drops[source][name] for name in losses}
        learned.observe(2 * place, losses)
        assert not learned.due(2 * place)
    a = math.e**2 / (math.e**2 + math.e)
    assert learned.rates() == pytest.approx({"a": a, "b": 1 - a})
    assert learned.metrics() == pytest.approx({"data/a/rate": a, "data/b/rate": 1 - a})
    other = Aioli(learned.config, ["a", "b"], seed=1)
    other.load_state_dict(json.loads(json.dumps(learned.state_dict())))
    assert other.rates() == learned.rates() and [s for s in range(20) if other.due(s)] == [10, 12, 14]
    learned.observe(10, losses)
    assert max(learned.rates().values()) == 0.75
    assert learned.metrics()["data/a/rate"] == pytest.approx(a), "a sweep does not change what was learned"
    with pytest.raises(DataError, match="they were learned for a, b, this run has a, c"):
        Aioli(learned.config, ["a", "c"], seed=1).load_state_dict(learned.state_dict())


def plan_of(tiny_folder: Path, where: Path, algorithm: str = "sft", **changes: Any) -> Plan:
    sources = {}
    for name, letter in (("easy", "a"), ("hard", "q")):
        rows = [
            {
                "prompt": f"{letter}{i}=",
                "completion": letter * 3 if name == "easy" else str(i * 7919 % 1000),
                "chosen": letter,
                "rejected": str(i),
            }
            for i in range(24)
        ]
        (where / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        sources[name] = {"path": str(where / f"{name}.jsonl"), "holdout": 4}
    data = {
        "mixture": sources,
        "mixing": "aioli",
        "aioli": {"every": 6, "steps": 2, "eta": 2.0, "rows": 4},
        "chat_template": "never",
    }
    raw: dict[str, Any] = {
        "output_dir": str(where),
        "algorithm": algorithm,
        "model": {"path": str(tiny_folder)},
        "data": {**data, **changes},
        "train": {"steps": 13, "batch_size": 4},
        "learner": {"learning_rate": 3e-3, "threads": 1},
        "eval": {"every": 0},
        "checkpoint": {"every": 1, "keep": 20},
    }
    return make_plan(parse_config(raw))


@pytest.mark.parametrize("cut", [4, 5])
def test_a_resumed_run_has_the_rates_of_the_run_that_never_stopped(
    tiny_folder: Path, tmp_path: Path, cut: int
) -> None:
    """Cut where the rates have just been updated, and after the next step."""
    plan = plan_of(tiny_folder, tmp_path)
    assert "learned, at first 50.0% of the rows drawn" in plan.text
    whole = Run(plan, "whole")
    whole.carry_out()
    first = Run(plan, "cut")
    with pytest.raises(RunStopped):
        first.carry_out(stop_after=cut)
    second = Run(plan, "cut", resume=True)
    second.carry_out()
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(second), strict=True))
    names = [f"data/{name}/{key}" for name in ("easy", "hard") for key in ("rate", "rows")]
    assert [[line.get(n) for n in names] for line in whole.lines] == [
        [line.get(n) for n in names] for line in second.lines
    ]
    steps = {line["step"]: line for line in whole.lines}
    rows = [steps[step]["data/easy/rows"] - steps[step - 1]["data/easy/rows"] for step in range(2, 5)]
    assert {1.0, 3.0} >= set(rows), "a sweep draws three rows of the swept source and one of the other"
    assert steps[4]["data/easy/rate"] == 0.5 != steps[5]["data/easy/rate"]
    assert steps[10]["data/easy/rate"] == steps[6]["data/easy/rate"] != steps[12]["data/easy/rate"]
    assert not {name for line in whole.lines for name in line if not is_documented(name)}


def test_preferences_learn_rates_too(tiny_folder: Path, tmp_path: Path) -> None:
    run = Run(plan_of(tiny_folder, tmp_path, "dpo"), "dpo")
    run.carry_out()
    assert 0 < run.lines[-1]["data/easy/rate"] < 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mixture": {"a": {"path": "a.jsonl"}}}, "needs two sources or more"),
        ({"mixture": {n: {"path": "a.jsonl", "epochs": 1} for n in "ab"}}, "leave out the epochs of a, b"),
        ({"mixture": {n: {"path": "a.jsonl", "rate": 1} for n in "ab"}}, "computes the rates"),
        ({"aioli": {"focus": 0.5}}, "`aioli.focus` must be above 1/2"),
        ({"aioli": {"every": 8}}, "takes 8 steps, and a round has 8"),
        ({"mixing": "proportional", "aioli": {"eta": 2}}, "`aioli` needs `mixing: aioli`"),
    ],
)
def test_mistakes(changes: dict[str, Any], message: str) -> None:
    sources = {n: {"path": f"{n}.jsonl"} for n in "ab"}
    with pytest.raises(ValueError, match=message):
        DataConfig.model_validate({"mixture": sources, "mixing": "aioli", **changes})


def test_where_rates_cannot_be_learned_is_named(tiny_folder: Path, tmp_path: Path) -> None:
    bare = {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("easy", "hard")}
    with pytest.raises(ConfigError, match=r"mixture.easy: `mixing: aioli` measures losses on held-out rows"):
        plan_of(tiny_folder, tmp_path, mixture=bare)
    sources = {n: {"kind": "arithmetic"} for n in "ab"}
    online = {"algorithm": "grpo", "rewards": ["math"], "data": {"mixture": sources, "mixing": "aioli"}}
    facts = Facts("cpu", "hf", True, frozenset(), 0, frozenset({0}), 1)
    told = [text for wrong, text in mixture_checks(parse_config(online), facts) if wrong]
    assert any("an online run does not measure" in text for text in told)
