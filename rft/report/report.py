"""`rft report RUN`: one self-contained HTML page about a run."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import zip_longest
from pathlib import Path

import jinja2
from matplotlib import rc_context
from matplotlib.figure import Figure

from rft.metrics.evaluation import flips, read_evaluation
from rft.metrics.progress import duration
from rft.report.charts import draw_all, to_svg
from rft.report.events import as_text, notable_events, outcome_of
from rft.report.history import Row, Run
from rft.report.page import PAGE
from rft.report.plots import BLUE, GREEN, GREY, ORANGE, RED, STYLE
from rft.report.transcript import transcript
from rft.utils.terminal import printable

MAX_PAIRS = 8
UNITS = ((86400, "days"), (3600, "hours"), (60, "minutes"))


@dataclass(frozen=True)
class Fact:
    """A headline number: label, value, short comment."""

    label: str
    value: str
    remark: str = ""


@dataclass(frozen=True)
class Pair:
    """One prompt's completions at the first and the last kept step; None if a side has none."""

    prompt: str
    before: Row | None
    after: Row | None


def write_report(run_dir: Path | str, out: Path | str | None = None) -> Path:
    """Write the report of a run, finished or not, and return its path (default: RUN/report.html).

    Raises rft.report.history.NoRun if `run_dir` is not a run folder.
    """
    run = Run(run_dir)
    path = Path(out) if out is not None else run.path / "report.html"
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"text": as_text, "outcome": outcome_of, "transcript": transcript}
    html = environment.from_string(PAGE).render(
        name=printable(run.name),
        state=printable(run.state()),
        damaged_lines=run.damaged_lines(),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        algorithm=_algorithm(run),
        facts=facts(run),
        charts=draw_all(run),
        timeline=timeline(run),
        events=notable_events(run),
        pairs=before_and_after(run.samples),
        broken=broken_problems(run),
        config=as_text(run.config_text()),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    return path


def _algorithm(run: Run) -> str:
    config = run.config()
    algorithm = config.get("algorithm")
    model = config.get("model")
    name = algorithm.get("name", "") if isinstance(algorithm, dict) else ""
    of = model.get("path") or model.get("name") or "" if isinstance(model, dict) else ""
    return " · ".join(printable(str(part)) for part in (name, of) if part)


# -- the head --------------------------------------------------------------------------------------


def facts(run: Run) -> list[Fact]:
    """Return the headline numbers of the run; quantities that were not measured are left out."""
    headline = [Fact("steps", f"{run.step:,}", f"of {run.total_steps:,}")]
    for label, name, form in (
        ("held-out accuracy", "eval/accuracy", "{:.1%}"),
        ("greedy accuracy", "eval/greedy_accuracy", "{:.1%}"),
        ("preference accuracy", "eval/preference_accuracy", "{:.1%}"),
        ("preference margin", "eval/preference_margin", "{:.3f}"),
        ("held-out loss", "eval/loss", "{:.4f}"),
        ("reward", "reward/mean", "{:.3f}"),
    ):
        first, last = run.first(name), run.last(name)
        if first is not None and last is not None:
            headline.append(Fact(label, form.format(last), "from " + form.format(first)))
    headline += _named_sets(run)
    if (broken := run.last("eval/negative_flips")) is not None:
        solved = run.last("eval/positive_flips")
        headline.append(Fact("broken problems", f"{broken:.1%}", f"{solved or 0:.1%} solved, since step 0"))
    if len(run.metrics) > 1:
        seconds = run.metrics[-1]["time/wall"] - run.metrics[0]["time/wall"]
        step = run.series("time/step")[1]
        remark = f"{duration(sorted(step)[len(step) // 2])} a step" if step else ""
        headline.append(Fact("time", duration(seconds), remark))
    speed = run.series("throughput/tokens_per_s")[1]
    if speed:
        headline.append(Fact("tokens a second", f"{sum(speed) / len(speed):,.0f}", "mean over steps"))
    for name, label in (("sync/proof_gap", "proof of pushes"), ("sync/logp_gap", "log-prob gap")):
        gaps = run.series(name)[1]
        if gaps:
            headline.append(Fact(label, f"{max(gaps):.1e}", "largest, nats"))
    resumes, faults = len(run.resumes()), len(run.faults())
    headline.append(
        Fact(
            "interruptions", str(resumes + faults), f"{_count(resumes, 'resume')}, {_count(faults, 'fault')}"
        )
    )
    return headline


def _named_sets(run: Run) -> list[Fact]:
    """Return the accuracy of named held-out sets, and their loss where they are not sampled."""
    headline = []
    for name in run.names():
        match = re.fullmatch(r"eval/([\w\-]+)/(accuracy|loss)", name)
        first, last = run.first(name), run.last(name)
        if match and first is not None and last is not None:
            form = "{:.1%}" if match[2] == "accuracy" else "{:.4f}"
            headline.append(Fact(f"{match[1]}: {match[2]}", form.format(last), "from " + form.format(first)))
    return headline


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


# -- the time line ---------------------------------------------------------------------------------


def timeline(run: Run) -> str | None:
    """Draw wall time from left to right: each process as a bar, with checkpoints, faults and guards on it."""
    sessions = _sessions(run)
    if not sessions:
        return None
    start = sessions[0][0]
    span = max(end for _, end in sessions) - start
    unit, word = next((pair for pair in UNITS if span > 2 * pair[0]), (1, "seconds"))
    with rc_context(STYLE):
        figure = Figure(figsize=(10.6, 1.25), layout="constrained")
        axes = figure.add_subplot()
        for began, ended in sessions:
            axes.barh(
                0, (ended - began) / unit, left=(began - start) / unit, height=0.5, color=BLUE, alpha=0.22
            )
        for kinds, marker, color, label in (
            (("checkpoint/saved",), "|", GREEN, "checkpoint"),
            (("guard/",), "D", ORANGE, "guard"),
            (("fault/", "engine/lost", "run/failed"), "X", RED, "fault"),
        ):
            times = [(event["time"] - start) / unit for event in run.of_kind(*kinds)]
            if times:
                axes.scatter(times, [0] * len(times), marker=marker, color=color, s=34, label=label, zorder=3)
        resumed = [(event["time"] - start) / unit for event in run.resumes()]
        if resumed:
            axes.scatter(resumed, [0] * len(resumed), marker=">", color=GREY, s=40, label="resume", zorder=3)
        axes.set_ylim(-0.5, 0.5)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.grid(False)
        axes.margins(x=0.01)
        axes.set_xlabel(word)
        if axes.get_legend_handles_labels()[0]:
            figure.legend(
                loc="outside upper left", ncols=4, fontsize=8, labelcolor="#5b6577", handletextpad=0.3
            )
        return to_svg(figure)


def _sessions(run: Run) -> list[tuple[float, float]]:
    """Return (start, end) of each process that wrote; the end is its last record."""
    starts = [event["time"] for event in run.of_kind("run/opened")]
    stamps = sorted([e["time"] for e in run.events] + [row["time/wall"] for row in run.metrics])
    ends = [max((t for t in stamps if t < after), default=start) for start, after in
            zip(starts, [*starts[1:], float("inf")], strict=True)]  # fmt: skip
    return list(zip(starts, ends, strict=True))


# -- samples ---------------------------------------------------------------------------------------


def before_and_after(samples: Sequence[Row]) -> list[Pair]:
    """Pair completions of the first and the last kept step. Held-out prompts that both steps answered are
    paired by prompt; without any, training samples are shown side by side."""
    for split in ("eval", "train"):
        rows = [row for row in samples if row.get("split") == split]
        if not rows:
            continue
        first, last = rows[0]["step"], rows[-1]["step"]
        early = [row for row in rows if row["step"] == first]
        late = [row for row in rows if row["step"] == last] if last != first else []
        before, after = _by_prompt(early), _by_prompt(late)
        matched = [Pair(key[0], row, after[key]) for key, row in before.items() if key in after]
        if matched:
            return matched[:MAX_PAIRS]
        if split == "train":
            return [Pair("", *sides) for sides in zip_longest(early, late)][:MAX_PAIRS]
    return []


def broken_problems(run: Run) -> list[Pair]:
    """Return problems that the start solved and the last evaluation fails, with both completions."""
    start, last = read_evaluation(run.path, 0), read_evaluation(run.path)
    if start is None or last is None or last.step == 0:
        return []
    pairs = []
    for name in last.same(start):
        before, after = ({p.id: p for p in one.sets[name]} for one in (start, last))
        for row in flips(start.sets[name], last.sets[name]).negative:
            sides = [
                {"step": one.step, "completion": problem.text, "outcome": {"": outcome}}
                for one, problem, outcome in (
                    (start, before[row], "correct"),
                    (last, after[row], "wrong"),
                )
            ]
            pairs.append(Pair(before[row].prompt, *sides))
    return pairs[:MAX_PAIRS]


def _by_prompt(rows: Sequence[Row]) -> dict[tuple[str, int], Row]:
    """Return the rows by the prompt's text and a number, as the episodes of a game may all begin alike."""
    seen: Counter[str] = Counter()
    result: dict[tuple[str, int], Row] = {}
    for row in rows:
        text = as_text(row.get("prompt"))
        result[text, seen[text]] = row
        seen[text] += 1
    return result
