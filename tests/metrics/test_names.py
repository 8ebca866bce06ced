"""Every name is documented once, and the page of the documentation is not stale."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import CodeType

import pytest

from rft.metrics import docs, is_documented, is_documented_event
from rft.metrics.names import EVENTS, METRICS, is_reproducible

ROOT = Path(__file__).parents[2]
FIRST_PARTS = {name.split("/")[0] for name in METRICS if "/" in name}


def test_the_page_is_what_the_tables_say() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert page == docs.markdown(), "stale: run `python -m rft.metrics.docs > docs/metrics.md`"


@pytest.mark.parametrize(
    "name",
    ["step", "reward/mean", "reward/outcome/correct", "reward/math/mean", "eval/pass@8", "rollout/age/3",
     "policy/kl", "sync/logp_gap", "time/rollout", "memory/learner_rss"],
)  # fmt: skip
def test_known_names_are_documented(name: str) -> None:
    assert is_documented(name)


@pytest.mark.parametrize(
    "name", ["reward/maen", "policy/entropie", "eval/pass@", "", "Step", "xstep", "step/x"]
)
def test_unknown_names_are_not(name: str) -> None:
    assert not is_documented(name)


def test_events_have_a_table_of_their_own() -> None:
    assert is_documented_event("fault/engine") and is_documented_event("run/opened")
    assert not is_documented_event("fault/") and not is_documented_event("reward/mean")


def test_every_entry_says_something() -> None:
    for name, metric in METRICS.items():
        assert len(metric.meaning) > 3, name
    for kind, meaning in EVENTS.items():
        assert meaning, kind


def test_times_are_not_compared_between_runs() -> None:
    assert is_reproducible("reward/mean") and is_reproducible("sync/logp_gap")
    assert not is_reproducible("time/step") and not is_reproducible("throughput/tokens_per_s")


def _strings(constants: Iterable[object]) -> Iterator[str]:
    """Strings in the constants of compiled code. Not by `ast.parse`: beside other threads it fails now and
    then in CPython 3.11 (AST constructor recursion depth mismatch)."""
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, CodeType):
            yield from _strings(constant.co_consts)
        elif isinstance(constant, tuple | frozenset):
            yield from _strings(constant)


def _written_names(path: Path) -> set[str]:
    """String literals of a module that look like metrics: a first part of the table, a slash, a word."""
    words = _strings(compile(path.read_text(), path, "exec").co_consts)
    return {w for w in words if re.fullmatch(r"[a-z]+/[\w@/]*\w", w) and w.split("/")[0] in FIRST_PARTS}


def test_every_name_in_the_code_is_documented() -> None:
    modules = [path for path in (ROOT / "rft").rglob("*.py") if "metrics" not in path.parts]
    assert modules
    unknown = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in modules
        for name in _written_names(path)
        if not (is_documented(name) or is_documented_event(name))
    }
    assert not unknown, f"add these to rft/metrics/names.py: {sorted(unknown)}"
