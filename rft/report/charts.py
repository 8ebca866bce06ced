"""The charts of a report, each an inline SVG. Charts whose metrics the run does not have are left out."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rft.report.history import Run
from rft.report.plots import BLUE, COLORS, GREEN, GREY, ORANGE, PURPLE, RED, STYLE, TEAL, Numbers, curve

POINTS = 800  # more than a chart has pixels; longer runs are averaged down to this many points
OUTCOMES = {
    "correct": GREEN,
    "wrong": RED,
    "unparseable": ORANGE,
    "timeout": PURPLE,
    "error": "#5b1020",
    "abstain": GREY,
}
PHASES = {
    "rollout": BLUE,
    "reward": ORANGE,
    "reference": TEAL,
    "train": GREEN,
    "sync": PURPLE,
    "eval": GREY,
    "checkpoint": RED,
    "data": "#c2a83e",
}


@dataclass(frozen=True)
class Chart:
    """A rendered chart: title, one-sentence caption, the SVG element."""

    title: str
    caption: str
    svg: str


def thin(steps: Sequence[float], values: Sequence[float]) -> tuple[Numbers, Numbers]:
    """Return at most `POINTS` points, each the mean of equally many rows."""
    x, y = np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)
    if len(x) <= POINTS:
        return x, y
    edges = np.linspace(0, len(x), POINTS + 1).astype(int)
    count = np.diff(edges)
    return np.add.reduceat(x, edges[:-1]) / count, np.add.reduceat(y, edges[:-1]) / count


def _series(run: Run, name: str) -> tuple[Numbers, Numbers]:
    return thin(*run.series(name))


def _line(axes: Axes, run: Run, name: str, color: str, label: str = "", *, noisy: bool = True) -> bool:
    """Draw a metric if the run has it; return whether it does."""
    steps, values = _series(run, name)
    if not len(steps):
        return False
    if noisy:
        curve(axes, steps.tolist(), values.tolist(), color, label)
    else:
        axes.plot(steps, values, color=color, label=label or None, marker="o", markersize=3)
    return True


def _lines(axes: Axes, run: Run, wanted: dict[str, str]) -> bool:
    """Draw several metrics, name -> label, in the palette's colours."""
    pairs = zip(wanted.items(), COLORS, strict=False)
    drawn = [_line(axes, run, name, color, label) for (name, label), color in pairs]
    return any(drawn)


def _columns(run: Run, names: Sequence[str]) -> tuple[Numbers, list[Numbers]]:
    """Return steps and each metric's values, 0 where a row lacks it; thinned together."""
    rows = [row for row in run.metrics if any(row.get(name) is not None for name in names)]
    steps = [row["step"] for row in rows]
    columns = [thin(steps, [row.get(name) or 0.0 for row in rows])[1] for name in names]
    return thin(steps, steps)[0], columns


def _stack(axes: Axes, run: Run, parts: dict[str, tuple[str, str]]) -> bool:
    """Draw a stacked area, name -> (label, colour), of the metrics that the run has."""
    have = set(run.names())
    parts = {name: part for name, part in parts.items() if name in have}
    if not parts:
        return False
    steps, columns = _columns(run, list(parts))
    labels, colors = zip(*parts.values(), strict=True)
    axes.stackplot(steps, *columns, labels=labels, colors=colors, alpha=0.85, linewidth=0)
    return True


def _as_share(axes: Axes, top: float | None = 1.02) -> None:
    """Use percents from 0 to `top` (None: the data's maximum)."""
    axes.set_ylim(0, top)
    axes.yaxis.set_major_formatter("{x:.0%}")


def _lines_as_share(axes: Axes, run: Run, names: dict[str, str], top: float | None = 1.02) -> bool:
    """Draw metrics that are shares; returns whether there was any data."""
    drawn = _lines(axes, run, names)
    _as_share(axes, top)
    return drawn


# -- one function per chart: draws, and returns whether there was any data ----------------------


def _reward(axes: Axes, run: Run) -> bool:
    steps, mean = _series(run, "reward/mean")
    if not len(steps):
        return False
    rows = [r for r in run.metrics if r.get("reward/mean") is not None and r.get("reward/std") is not None]
    if rows:
        x, middle = thin([r["step"] for r in rows], [r["reward/mean"] for r in rows])
        spread = thin([r["step"] for r in rows], [r["reward/std"] for r in rows])[1]
        axes.fill_between(x, middle - spread, middle + spread, color=BLUE, alpha=0.08, linewidth=0)
    curve(axes, steps.tolist(), mean.tolist(), BLUE)
    return True


def _accuracy(axes: Axes, run: Run) -> bool:
    rows = [row for row in run.metrics if row.get("eval/accuracy") is not None]
    if not rows:
        return False
    steps = [row["step"] for row in rows]
    value = np.array([row["eval/accuracy"] for row in rows])
    error = np.array([_stderr(row) for row in rows])
    axes.fill_between(
        steps,
        np.clip(value - 1.96 * error, 0, 1),
        np.clip(value + 1.96 * error, 0, 1),
        color=GREEN,
        alpha=0.18,
        linewidth=0,
    )
    axes.plot(steps, value, color=GREEN, marker="o", markersize=3, label="sampled, 95 % interval")
    _line(axes, run, "eval/greedy_accuracy", BLUE, "greedy", noisy=False)
    for name, color in zip(
        sorted(n for n in run.names() if re.fullmatch(r"eval/pass@\d+", n)), COLORS[1:], strict=False
    ):
        _line(axes, run, name, color, name.removeprefix("eval/"), noisy=False)
    _as_share(axes)
    return True


def _examples(axes: Axes, run: Run) -> bool:
    names = {"loss": "loss", "nll": "-log p per token", "score_error": "score error"}
    return _lines(axes, run, {f"eval/{name}": label for name, label in names.items()})


def _preferences(axes: Axes, run: Run) -> bool:
    names = ("preference_accuracy", "label_accuracy", "step_accuracy")
    drawn = _lines(axes, run, {f"eval/{name}": name.replace("_", " ") for name in names})
    _as_share(axes)
    return drawn


def _margins(axes: Axes, run: Run) -> bool:
    names = {"preference_margin": "of pairs", "reward_good": "good responses", "reward_bad": "bad responses"}
    return _lines(axes, run, {f"eval/{name}": label for name, label in names.items()})


def _named_sets(axes: Axes, run: Run) -> bool:
    """Draw the accuracy of each named held-out set; of sets that are not sampled, the loss."""
    names = [n for n in run.names() if re.fullmatch(r"eval/[\w\-]+/accuracy", n)]
    share = bool(names)
    names = names or [n for n in run.names() if re.fullmatch(r"eval/[\w\-]+/loss", n)]
    for name, color in zip(names, COLORS, strict=False):
        _line(axes, run, name, color, name.split("/")[1], noisy=False)
    if share:
        _as_share(axes)
    return bool(names)


def _negative_flips(axes: Axes, run: Run) -> bool:
    """Draw the negative flips of every held-out set, and the positive ones of the unnamed set."""
    sets = {n: n.split("/")[1] for n in run.names() if re.fullmatch(r"eval/[\w\-]+/negative_flips", n)}
    names = {"eval/negative_flips": "broken", "eval/positive_flips": "solved"}
    return _lines_as_share(axes, run, names | {n: f"broken: {name}" for n, name in sets.items()}, top=None)


def _eval_diversity(axes: Axes, run: Run) -> bool:
    names = {
        "distinct": "completions",
        "distinct_1": "tokens",
        "distinct_2": "pairs",
        "distinct_3": "triples",
    }
    return _lines_as_share(axes, run, {f"eval/{name}": label for name, label in names.items()})


def _stderr(row: dict[str, float]) -> float:
    """Return the row's standard error, or the binomial one if the row has the number of problems."""
    if row.get("eval/accuracy_stderr") is not None:
        return float(row["eval/accuracy_stderr"])
    p, n = row["eval/accuracy"], row.get("eval/problems")
    return float((max(0.0, p * (1 - p)) / n) ** 0.5) if n else 0.0


def _kl(axes: Axes, run: Run) -> bool:
    return _lines(
        axes,
        run,
        {
            "policy/kl_ref": "to the reference",
            "policy/kl": "to the policy that sampled",
            "policy/mismatch_kl": "learner to sampler",
        },
    )


def _entropy(axes: Axes, run: Run) -> bool:
    drawn = _line(axes, run, "policy/entropy", PURPLE)
    axes.set_ylim(bottom=0)
    return drawn


def _length(axes: Axes, run: Run) -> bool:
    rows = [r for r in run.metrics if r.get("completion/length_max") is not None]
    if rows:
        x, top = thin([r["step"] for r in rows], [r["completion/length_max"] for r in rows])
        low = thin([r["step"] for r in rows], [r.get("completion/length_min") or 0.0 for r in rows])[1]
        axes.fill_between(x, low, top, color=TEAL, alpha=0.1, linewidth=0, label="shortest to longest")
    drawn = _line(axes, run, "completion/length_mean", TEAL, "mean")
    axes.set_ylim(bottom=0)
    return drawn


def _shares(axes: Axes, run: Run) -> bool:
    drawn = _lines(
        axes,
        run,
        {
            "completion/truncated": "truncated",
            "group/degenerate_share": "groups without signal",
            "policy/clip_fraction": "clipped tokens",
            "policy/corrected_away": "corrected tokens",
        },
    )
    _as_share(axes, top=None)
    return drawn


def _outcomes(axes: Axes, run: Run) -> bool:
    parts = {f"reward/outcome/{name}": (name, color) for name, color in OUTCOMES.items()}
    drawn = _stack(axes, run, parts)
    _as_share(axes, top=1)
    return drawn


def _time(axes: Axes, run: Run) -> bool:
    return _stack(axes, run, {f"time/{name}": (name, color) for name, color in PHASES.items()})


def _age(axes: Axes, run: Run) -> bool:
    ages = sorted(
        (int(match[1]), match[0]) for n in run.names() if (match := re.fullmatch(r"rollout/age/(\d+)", n))
    )
    shades = dict(zip([a for a, _ in ages], COLORS * (len(ages) // len(COLORS) + 1), strict=False))
    if _stack(axes, run, {name: (f"{age} old", shades[age]) for age, name in ages}):
        _as_share(axes, top=1)
        return True
    return _lines(axes, run, {"rollout/age_mean": "mean", "rollout/age_max": "oldest"})


def _changed(axes: Axes, run: Run) -> bool:
    names = {"": "all", "_min": "least changed matrix", "_max": "most changed matrix"}
    return _lines_as_share(axes, run, {f"sync/changed_share{part}": label for part, label in names.items()})


def _diversity(axes: Axes, run: Run) -> bool:
    wanted = {
        "completion/distinct_2": "distinct pairs of tokens",
        "completion/duplicates": "repeats in a group",
        "completion/shared": "repeats across prompts",
    }
    return _lines_as_share(axes, run, wanted)


def _gap(axes: Axes, run: Run) -> bool:
    names = {
        "sync/proof_gap": "fixed tokens, largest",
        "sync/proof_gap_mean": "fixed tokens, mean",
        "sync/logp_gap": "fresh samples, largest",
        "sync/logp_gap_mean": "fresh samples, mean",
    }
    drawn = _lines(axes, run, names)
    if drawn and all(v > 0 for n in names for v in run.series(n)[1]):
        axes.set_yscale("log")
    return drawn


def _single(name: str, color: str) -> Callable[[Axes, Run], bool]:
    return lambda axes, run: _line(axes, run, name, color)


CHARTS: tuple[tuple[str, str, Callable[[Axes, Run], bool]], ...] = (
    ("Reward", "Mean reward of each step's completions; the band is one standard deviation.", _reward),
    ("Held-out accuracy", "On problems that are never trained on.", _accuracy),
    ("Named held-out sets", "Accuracy; of sets that are not sampled, the loss.", _named_sets),
    ("Broken problems", "Problems solved at step 0 and failed now, and the other way.", _negative_flips),
    ("Held-out diversity", "Distinct parts as a share, within a problem's samples.", _eval_diversity),
    ("Held-out examples", "Of the dataset, never trained on.", _examples),
    ("Held-out preferences", "Share that implicit or learned rewards get right.", _preferences),
    ("Held-out reward margins", "How far rewards of held-out responses lie apart.", _margins),
    ("Outcomes", "How the rewards judged the completions.", _outcomes),
    ("KL divergence", "Nats a token.", _kl),
    ("Entropy", "Nats a token. Near zero, the policy no longer explores.", _entropy),
    ("Completion length", "Tokens.", _length),
    ("Output diversity", "Of each step's completions.", _diversity),
    ("Shares", "Shares without a gradient, or with a bounded one.", _shares),
    ("Loss", "Of the whole batch. Around zero for policy gradients; it does not measure learning.",
     _single("train/loss", BLUE)),
    ("Gradient norm", "Before clipping.", _single("train/grad_norm", ORANGE)),
    ("Changed weights", "Share whose bfloat16 bits a step changed (sync.measure_changes).", _changed),
    ("Where the time goes", "Seconds a step. Parts that overlap are counted in each.", _time),
    ("Throughput", "Tokens a second.", _single("throughput/tokens_per_s", TEAL)),
    ("Staleness", "Policy versions between sampling and training.", _age),
    ("Proof of the push", "Engine's log-probs against the learner's, nats, for the same tokens.", _gap),
)  # fmt: skip


def draw_all(run: Run, most: int | None = None) -> list[Chart]:
    """Draw every chart that the run has data for (most: the first few only), with its resumes and faults
    marked."""
    charts: list[Chart] = []
    for title, caption, draw in CHARTS:
        if len(charts) == most:
            break
        with rc_context(STYLE):
            figure = Figure(figsize=(4.3, 2.2), layout="constrained")
            axes = figure.add_subplot()
            if not draw(axes, run):
                continue
            _marks(axes, run)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7))
            axes.margins(x=0.01)
            _legend(figure, axes)
            charts.append(Chart(title, caption, to_svg(figure)))
    return charts


def _legend(figure: Figure, axes: Axes) -> None:
    """Place the legend above the chart, in one row if the labels are short."""
    labels = axes.get_legend_handles_labels()[1]
    if labels:
        figure.legend(
            loc="outside upper left",
            ncols=3 if max(map(len, labels)) > 11 else 5,
            fontsize=8,
            handlelength=1.2,
            columnspacing=1.2,
            borderaxespad=0.1,
            labelcolor="#5b6577",
        )


def _marks(axes: Axes, run: Run) -> None:
    """Mark resumes as dashed grey lines, faults as dotted red ones."""
    for event in run.resumes():
        axes.axvline(run.step_at(event), color=GREY, linestyle=(0, (4, 3)), linewidth=0.9, zorder=1)
    for event in run.faults():
        axes.axvline(run.step_at(event), color=RED, linestyle=(0, (1, 2)), linewidth=0.9, zorder=1)


def to_svg(figure: Figure) -> str:
    """Render the figure as an `<svg>` element that fits its container, without prolog and metadata."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", svg, count=1)
