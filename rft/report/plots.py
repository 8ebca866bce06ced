"""Learning-curve figures of one or several runs, and plotting helpers shared with the charts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from rft.report.history import Run
from rft.utils.terminal import printable

Numbers = NDArray[np.float64]

BLUE, GREEN, ORANGE, PURPLE = "#2f6bd8", "#1b9e77", "#e08214", "#7b5cc4"
RED, TEAL, GREY, INK = "#d1495b", "#2aa1b3", "#8a94a6", "#2b3445"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, TEAL, RED, GREY)

STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "rft",  # the same figure gives identical bytes
    "font.family": "sans-serif",
    "font.size": 9.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#c9d0db",
    "axes.labelcolor": "#5b6577",
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e8ecf2",
    "xtick.color": "#5b6577",
    "ytick.color": "#5b6577",
    "xtick.major.size": 0.0,
    "ytick.major.size": 0.0,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
}


def smooth(values: Sequence[float], weight: int) -> Numbers:
    """Return a centred running mean over at most `weight` neighbours; shorter at the ends, so that no values
    are extrapolated."""
    x = np.asarray(values, dtype=np.float64)
    half = min(weight, max(1, len(x))) // 2
    total = np.concatenate([[0.0], np.cumsum(x)])
    index = np.arange(len(x))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(x))
    mean: Numbers = (total[high] - total[low]) / (high - low)
    return mean


def smoothing(length: int) -> int:
    """Return the window of the running mean: a twentieth of the run, 50 steps at most."""
    return min(50, max(1, length // 20))


def curve(axes: Axes, steps: Sequence[float], values: Sequence[float], color: str, label: str = "") -> None:
    """Draw a noisy series: pale values, with their running mean on top; a single value as a dot."""
    weight = smoothing(len(values))
    if weight > 1:
        axes.plot(steps, values, color=color, alpha=0.22, linewidth=0.8)
    marker = "o" if len(values) == 1 else ""
    axes.plot(steps, smooth(values, weight), color=color, label=label or None, marker=marker, markersize=3.5)


def plot_learning_curve(run_dirs: Sequence[Path | str], out_png: Path | str) -> Path:
    """Plot reward and held-out accuracy over steps, one line per run (seeds overlaid), as a PNG.

    Raises:
        rft.report.history.NoRun: a folder is not a run folder.
        ValueError: no folder is given, or none of the runs has a reward or an accuracy yet.
    """
    runs = [Run(path) for path in run_dirs]
    panels = [
        (title, name)
        for title, name in (("reward", "reward/mean"), ("held-out accuracy", "eval/accuracy"))
        if any(run.series(name)[0] for run in runs)
    ]
    if not panels:
        raise ValueError(f"nothing to plot: no reward and no accuracy in {[str(p) for p in run_dirs]}")
    with rc_context(STYLE):
        figure = Figure(figsize=(4.6 * len(panels), 3.1), layout="constrained")
        for index, (title, name) in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), index + 1)
            for run, color in zip(runs, COLORS * (len(runs) // len(COLORS) + 1), strict=False):
                _learning_line(axes, run, name, color)
            axes.set_title(title, loc="left", color=INK, fontsize=11, fontweight="bold")
            axes.set_xlabel("step")
            if name == "eval/accuracy":
                axes.set_ylim(0, 1.02)
                axes.yaxis.set_major_formatter("{x:.0%}")
        if len(runs) > 1 or panels[-1][1] == "eval/accuracy":
            axes.legend(loc="lower right", labelcolor=INK)
        out = Path(out_png)
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=160, facecolor="white")
    return out


def name_of(run: Run) -> str:
    """Return a run's name as a label, with dollar signs escaped: they would start a formula."""
    return printable(run.name).replace("$", r"\$")


def _learning_line(axes: Axes, run: Run, name: str, color: str) -> None:
    steps, values = run.series(name)
    if not values:
        return
    if name == "eval/accuracy":
        label = f"{name_of(run)}: {values[0]:.0%} → {values[-1]:.0%}"
        axes.plot(steps, values, color=color, marker="o", markersize=3.5, label=label)
    else:
        curve(axes, steps, values, color, name_of(run))
