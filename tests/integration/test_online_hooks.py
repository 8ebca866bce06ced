"""What some algorithms ask of a run beyond plain samples, carried out by whole runs with real actors: a
second copy of the model, replayed groups, continuations, a mixture with the reference, a new reference."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.integration.conftest import rft

SMALL = [
    "warm_start=null",
    "rollout.engine=hf",
    "train.batch_size=4",
    "train.num_generations=4",
    "train.minibatches=1",
    "data.limit=32",
    "eval.problems=4",
    "eval.samples=1",
    "eval.every=0",
    "checkpoint={every: 2, background: false}",
]

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture
def digits(tmp_path: Path) -> str:
    """A reward that an untrained model earns some of, so that groups differ."""
    (tmp_path / "digits.py").write_text(
        "def score(prompts, completions, **columns):\n"
        "    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]\n"
    )
    return f"rewards=[{{function: '{tmp_path}/digits.py:score'}}]"


def run(name: str, tmp: Path, *overrides: str) -> list[dict]:
    rft("train", f"examples/online/{name}.yaml", f"output_dir={tmp}", *SMALL, *overrides, timeout=300)
    return [json.loads(line) for line in (tmp / name / "metrics.jsonl").read_text().splitlines()]


def test_two_copies_swap_roles_and_go_on_after_a_stop(tmp_path: Path, digits: str) -> None:
    swap = "algorithm={name: cory, swap_every: 1}"
    run("cory", tmp_path, digits, swap, "train.steps=2")
    rows = run("cory", tmp_path, digits, swap, "train.steps=4")
    assert [r["step"] for r in rows] == list(range(5))
    steps = rows[1:]
    assert all(r["sync/logp_gap"] < 1e-3 and r["copy/sync/logp_gap"] < 1e-3 for r in steps)
    assert all(r["train/grad_norm"] > 0 and r["copy/train/grad_norm"] > 0 for r in steps)
    first, second = (
        (tmp_path / "cory" / n / "model.safetensors").read_bytes() for n in ("model", "model-second")
    )
    assert first != second


def test_expert_iteration_goes_on_with_what_it_remembered(tmp_path: Path, digits: str) -> None:
    """Killing nothing, but stopping half-way: the same losses as in one go."""
    args = (digits, "algorithm={name: expert_iteration, replay: 2}")
    whole = run("expert_iteration", tmp_path / "whole", *args, "train.steps=4", "learner.schedule=constant")
    run("expert_iteration", tmp_path / "halves", *args, "train.steps=2", "learner.schedule=constant")
    halves = run("expert_iteration", tmp_path / "halves", *args, "train.steps=4", "learner.schedule=constant")
    assert [r["train/loss"] for r in whole[1:]] == [r["train/loss"] for r in halves[1:]]
    tokens = [r["train/tokens"] for r in whole[1:]]
    assert tokens[1] > 1.5 * tokens[0] and tokens[2] > 2 * tokens[0]  # one, two and three steps' groups


@pytest.mark.parametrize(
    ("name", "more"),
    [
        ("nash_md", ()),
        ("per_step", ("algorithm={name: per_step, branches: 2, separator: e}",)),
        ("sppo", ()),
        ("ppo", ()),
    ],
)
def test_the_hook_runs_end_to_end(name: str, more: tuple[str, ...], tmp_path: Path, digits: str) -> None:
    rows = run(name, tmp_path, digits, *more, "train.steps=3")
    assert [r["step"] for r in rows] == [0, 1, 2, 3]
    assert all(r["sync/logp_gap"] < 1e-3 for r in rows[1:])
    assert any(r["train/grad_norm"] > 0 for r in rows[1:])
    if name == "sppo":  # the reference stays the first policy for 20 steps
        first, *later = [r["policy/kl_ref"] for r in rows[1:]]
        assert abs(first) < 1e-6 < max(later)
