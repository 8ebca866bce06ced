"""Every name is documented once, and the page of the documentation is not stale."""

from __future__ import annotations

import re
import tokenize
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from rft.metrics import is_documented, is_documented_event
from rft.metrics.names import EVENTS, METRICS, is_reproducible
from rft.tools import metric_docs as docs

ROOT = Path(__file__).parents[2]
FIRST_PARTS = {name.split("/")[0] for name in METRICS if "/" in name}
EVENT_PARTS = {kind.split("/")[0] for kind in EVENTS}


def test_the_page_is_what_the_tables_say() -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    assert page == docs.markdown(), "stale: run `python -m rft.tools.metric_docs > docs/metrics.md`"


@pytest.mark.parametrize(
    "name",
    ["step", "reward/mean", "reward/outcome/correct", "reward/math/mean", "eval/pass@8", "rollout/age/3",
     "policy/kl", "sync/logp_gap", "time/rollout", "memory/device/push"],
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


# Modules that read what a run wrote; all others write it.
READERS = (
    "metrics/names.py", "metrics/progress.py", "metrics/guards.py", "metrics/trackers.py",
    "config/metrics.py", "tools/metric_docs.py", "report",
)  # fmt: skip

# Names that are put together: the words that a template's last `*` stands for are strings of these modules.
WORDS = {
    "eval/*": (
        "algorithms",
        "learner/learner.py",
        "rollout/align.py",
        "rollout/episodes.py",
        "loops/evaluate.py",
        "metrics/evaluation.py",
    ),
    "session/*": ("rollout/episodes.py",),
    "environment/workers/*": ("environments/runner.py",),
    "environment/endpoint/*": ("endpoint/server.py",),
    "data/*": ("rollout/buffer.py",),
    "data/*/*": ("data/mixture.py",),
    "reward/*/*": ("rewards/types.py",),
    "reward/workers/*": ("rewards/runner.py",),
    "memory/device/*": ("sync/ipc.py",),
}


def _literals(path: Path) -> set[str]:
    """The strings of a module, a `*` in the place of whatever an f-string fills in.

    Not by `ast.parse`: beside other threads it fails now and then in CPython 3.11 (AST constructor recursion
    depth mismatch).
    """
    found = set()
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type == tokenize.STRING:
                text = re.sub(r"^[rbfu]*", "", token.string, flags=re.IGNORECASE).strip("\"'")
                found.add(re.sub(r"\{[^{}]*(\{[^{}]*\}[^{}]*)*\}", "*", text))
    return found


def _modules(*places: str) -> list[Path]:
    paths = [ROOT / "rft" / place for place in places]
    return [file for path in paths for file in (path.rglob("*.py") if path.is_dir() else [path])]


def _written() -> dict[str, set[Path]]:
    """What the code writes, as names or patterns of names, with the modules that do."""
    found: dict[str, set[Path]] = {}
    for path in sorted({*_modules(".")} - {*_modules(*READERS)}):
        for text in _literals(path):
            if (
                re.fullmatch(r"[a-z]+/[\w@/*]*[\w*]", text)
                and text.split("/")[0] in FIRST_PARTS | EVENT_PARTS
            ):
                found.setdefault(text, set()).add(path)
    guards = ROOT / "rft" / "metrics" / "guards.py"  # reads metrics, and writes its events
    return found | {text: {guards} for text in _literals(guards) if text.startswith("guard/")}


def _put_together(template: str) -> set[str]:
    """The names that a template stands for; itself where its holes stay open."""
    if template not in WORDS:
        return {template}
    words = {word for path in _modules(*WORDS[template]) for word in _literals(path)}
    return {template[:-1] + word for word in words if re.fullmatch(r"[\w/@*]+", word)}


def test_every_name_in_the_code_is_documented() -> None:
    written = _written()
    assert len(written) > 100
    unknown = {
        f"{sorted(str(p.relative_to(ROOT)) for p in paths)}: {name}"
        for name, paths in written.items()
        if name not in WORDS and not (is_documented(name) or is_documented_event(name))
    }
    assert not unknown, f"add these to rft/metrics/names.py: {sorted(unknown)}"


def test_every_documented_name_is_written_by_some_code() -> None:
    written = {name for template in _written() for name in _put_together(template)}
    written |= {"step"}  # by RunLog.log, beside the metrics
    lacking = [
        name
        for name in (*METRICS, *EVENTS)
        if not any(name == other or fnmatchcase(other, name) for other in written)
    ]
    assert not lacking, f"nothing writes these: delete them from rft/metrics/names.py: {lacking}"


def test_what_displays_read_is_documented() -> None:
    """A chart of a name that is gone would stay empty for ever."""
    readers = [path for path in _modules(*READERS) if path.stem not in ("names", "metric_docs")]
    parts = FIRST_PARTS - {"data"}
    read = {
        f"{path.name}: {text}"
        for path in readers
        for text in _literals(path)
        if re.fullmatch(r"[a-z]+/[\w@]*\w", text) and text.split("/")[0] in parts
        if not (is_documented(text) or is_documented_event(text))
    }
    assert not read, f"nothing writes these: {sorted(read)}"
