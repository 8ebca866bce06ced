"""The results of benchmarks/learning.py: from run folders to numbers, and from numbers to page and plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from claims_report import summary
from learning_when import EXPLORATION, OTHERS
from matplotlib import rc_context
from matplotlib.figure import Figure

from rft.report.plots import BLUE, COLORS, GREY, INK, ORANGE, STYLE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "learning.json"
PAGE = ROOT / "docs" / "learning.md"
PLOT = ROOT / "docs" / "images" / "learning.png"
EXPLORATION_PLOT = ROOT / "docs" / "images" / "learning_exploration.png"
SECONDS = "seconds"  # a file of a start: how long it took to train
DIVERSITY = ("pass@8", "distinct_answers", "distinct")  # held-out metrics of section `exploration`
AGAIN = "grpo_again"  # GRPO from the same starts, with other samples: how far runs differ by chance
BIN = 5  # steps that a point of a reward curve is the mean of

SECTIONS = {
    "online": (
        "Online algorithms",
        "Each is `examples/online/NAME.yaml`: 60 steps of 256 completions from a model that was trained on a "
        "mixture of clean and hasty demonstrations.",
    ),
    "hard": (
        "A start near zero",
        "The start has seen hasty solutions whose every step is wrong. There are demonstrations in the "
        "same format, of whose steps three in ten are wrong. SFT imitates them all, GRPO has next to no "
        "right sample to begin with, Prefix-RFT and LUFFY blend the two and keep what is rewarded. 100 steps "
        "of 32 prompts each; SFT sees as many. Chains of four and of seven numbers were tried as well: where "
        "a skill itself has to come from clean demonstrations, SFT stayed ahead of Prefix-RFT at this size.",
    ),
    "exploration": (
        "Exploration",
        "Accuracy and what it costs in diversity, from a start whose warm start ended after 800 of 2600 "
        "steps: that of seed 1 solves a third of the problems at the first attempt and 93 % in eight, those "
        "of seeds 2 and 3 a fifth and 80 %. 40 steps of 256 completions, at the examples' settings. 256 "
        "held-out problems x 16 samples at temperature 1, every 20 steps: pass@8 is the unbiased chance that "
        "one of eight samples is right, answers the number of different answers of 16, distinct the share of "
        "different completions. An algorithm that only sharpens the policy raises accuracy and not pass@8. "
        "*pass@8 over `grpo`* compares runs of one seed at the highest accuracy that both reach, on the "
        "lines between their evaluations. `grpo_again` is GRPO itself from the same starts with other "
        "samples: it has 1.8, 0.4 and 2.5 points more than `grpo` in the three seeds, so such differences "
        "are chance. None has clearly more: `mml` 1.2 points in the mean of three seeds, the fixed "
        "entropy bonus -1.2, the adaptive one -0.3, the rest 1.6 or less with one or two seeds. That entropy "
        "control or MML raises pass@8 over GRPO's at equal accuracy is **not shown** on this task. What "
        "differs beyond chance is that `strong_entropy_bonus` keeps 64 % of completions distinct, against "
        "about 40 %, and ends eight points of accuracy lower (one seed).",
    ),
    "agents": (
        "Agents",
        "Sessions of several turns in an environment. `calculator` is `examples/calculator.yaml`: sums of "
        "four numbers of two digits, which the model cannot do in its head, and the built-in tool; one "
        "demonstration in four calls it. `calculator_short` has 40 steps of 64 sessions, 2,560 in all, and "
        "`calculator_program` the same from the same start with `examples/agents/calculator.yaml`: a program "
        "with OpenAI's client for each session. `guess` is `examples/guess.yaml`, where each guess is "
        "credited with its own reward, and `guess_no_credit` the same without `turn_returns`: "
        "the player finds a number from 1 to 20 within 5 guesses, each answered by `higher` or `lower`. "
        "Three in four guesses of the demonstrations ignore the answers: such players find the number in 33 "
        "% of games, those who guess any number that is still possible in 70 %, and halving the range always "
        "finds it. Accuracy is the share of held-out sums that "
        "are right, over 256 sums x 2 samples (128 x 2 in the short runs), and of games that end with the "
        "number, over 256 games. Turns and tool calls are means over the sessions that were trained on, in "
        "the first and in the last five steps. The minutes are those of reinforcement learning; those of the "
        "warm start are in the remark.",
    ),
    "echo": (
        "Echo Chamber",
        "The start writes in two formats (`lines` and `chain`), and reinforcement learning settles on one. "
        "Shares are of the sampled completions, in the first and in the last five steps.",
    ),
}
# What a reader should know about a line of the table, learnt from looking at the run.
_OLD_PPO = "measured with lam: 1.0 and value_clip: null, before PPO's defaults were changed"
REMARKS: dict[tuple[str, str], str] = {
    ("online", "raft"): "no prompt was without a right answer, so a threshold changes nothing",
    ("online", "reward_difference"): "minutes of a shared machine: not comparable with the others",
    ("hard", "prefix_rft"): "measured when the share fell from 95 % to 5 % instead of being drawn",
    ("online", "ppo_head"): "a head on the policy's trunk, at its learning rate, is too slow for 60 steps; "
    + _OLD_PPO,
    ("echo", "ppo"): _OLD_PPO,
    (
        "agents",
        "calculator",
    ): "seeds 1 to 3: 99.0, 92.8 and 98.4 % after. The three ran at once on two "
    "cores, which the minutes show: alone, seed 1 took 4.9 minutes with its warm start. After 60 steps "
    "seed 2 was at 75 %: it called the tool too rarely",
    ("agents", "calculator_program"): (
        "samples what `calculator_short` does: tokens and log-probs of the first 38 steps are equal to the "
        "bit. In step 39 one session wrote a malformed call, which the loop in process answers with an "
        "error and the program takes for the answer. A step takes 8 s, in process 0.5 s"
    ),
    (
        "agents",
        "guess",
    ): "the start plays as one who ignores all answers (23 %). Seeds 1 to 3: 59.0, 58.6 and "
    "56.2 % after; after 80 steps 48.8, 55.9 and 50.8 %. Other programs ran beside seeds 1 and 2; seed 3 "
    "took 5.4 minutes",
    ("agents", "guess_no_credit"): "`guess` without `turn_returns`. Seeds 1 to 3: 53.5, 32.4 and 20.3 % "
    "after: without credit for turns seed 2 gained 12 points, seed 3 one",
    ("online", "prefix_rft"): "the data come with clean demonstrations; its held-out problems are others",
    ("online", "luffy"): "the data come with clean demonstrations; its held-out problems are others",
    ("online", "dpa"): "judged over all directions: accuracy is half of its aim, and its start has seen the "
    "directions; see *Directions in the prompt* below",
    ("online", "nash_md"): "half the prompts per step: the plain engine samples",
    ("online", "cory"): "the first of the two copies, answering alone",
    ("online", "distill"): "the teacher is the model that `grpo` made of the same start",
}

Row = dict[str, Any]


def summarise(run: Path, section: str, case: str, seed: int, config: str, overrides: Sequence[str]) -> Row:
    """One finished run as plain numbers."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    curve = [[r["step"], r["eval/accuracy"]] for r in rows if r.get("eval/accuracy") is not None]
    after = rows[-1]
    if (run / "eval.json").exists():
        after = json.loads((run / "eval.json").read_text())
        curve.append([rows[-1]["step"], after["eval/accuracy"]])
    steps = [r for r in rows if r["step"] > 0]
    found: Row = {
        "section": section,
        "case": case,
        "seed": seed,
        "config": config,
        "overrides": list(overrides),
        "steps": rows[-1]["step"],
        "minutes": round((rows[-1]["time/wall"] - rows[0]["time/wall"]) / 60, 2),
        "after": after["eval/accuracy"],
        "stderr": after.get("eval/accuracy_stderr"),
        "greedy": after.get("eval/greedy_accuracy"),
        "curve": curve,
        "reward": _binned(steps, "reward/mean"),
        "entropy": _ends(steps, "policy/entropy"),
    }
    if curve[0][0] == 0:
        found["before"] = curve[0][1]
    if _binned(steps, "critic/explained_variance"):
        late = [r.get("critic/explained_variance") for r in steps[len(steps) // 2 :]]
        found["explained_variance"] = round(statistics.fmean(x for x in late if x is not None), 3)
    for name in DIVERSITY:
        if after.get(f"eval/{name}") is not None:
            found.setdefault("diversity", {})[name] = [
                [r["step"], r[f"eval/{name}"]] for r in rows if r.get(f"eval/{name}") is not None
            ]
    shares = {
        s: _ends(steps, f"reward/{s}/mean") for s in ("lines", "chain") if f"reward/{s}/mean" in steps[-1]
    }
    if shares:
        found["styles"] = shares
    if "session/turns" in steps[-1]:
        found["session"] = {n: _ends(steps, f"session/{n}") for n in ("turns", "tool_calls")}
    return found


def _binned(steps: Sequence[Row], name: str) -> list[list[float]]:
    """Return [step, mean over the `BIN` steps up to it] where the metric was logged."""
    parts = [steps[i : i + BIN] for i in range(0, len(steps), BIN)]
    means = [(p[-1]["step"], [r[name] for r in p if r.get(name) is not None]) for p in parts]
    return [[step, round(statistics.fmean(values), 4)] for step, values in means if values]


def _ends(steps: Sequence[Row], name: str) -> list[float | None]:
    """The mean of the first and of the last `BIN` steps."""
    curve = _binned(steps[:BIN], name) + _binned(steps[-BIN:], name)
    return [curve[0][1], curve[-1][1]] if curve else [None, None]


def load() -> list[Row]:
    return json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []


def merge(row: Row) -> None:
    """Put a run's numbers into the results, in place of an earlier run of the same case and seed."""

    def key(r: Row) -> tuple[str, str, int]:
        return r["section"], r["case"], r["seed"]

    rows = [r for r in load() if key(r) != key(row)] + [row]
    note = "Two cores, shared with other programs at times: minutes are an upper bound."
    text = json.dumps({"note": note, "runs": sorted(rows, key=key)}, indent=1)
    RESULTS.write_text(text + "\n")


# -- the page ------------------------------------------------------------------------------------------


def write_page(known: Sequence[tuple[str, str]]) -> None:
    """Write the table of every known case, run or not, and the plot."""
    rows = load()
    parts = [
        "# What each algorithm learns\n\nMade by `python benchmarks/learning.py` from "
        "`benchmarks/results/learning.json`. Accuracy is over 256 held-out problems x 4 samples at "
        "temperature 1; with several seeds, mean ± standard deviation over seeds, and minutes of "
        "the fastest. Offline algorithms have "
        "a separate page, [learning_offline.md](learning_offline.md)."
    ]
    if rows:
        parts.append("![learning](images/learning.png)")
        plot(rows)
        plot_exploration(rows)
    for section, (title, text) in SECTIONS.items():
        cases = [case for s, case in known if s == section]
        if cases:
            parts.append(f"## {title}\n\n{text}\n\n{_table(section, cases, rows)}")
        if section == "exploration":
            parts.append("![exploration](images/learning_exploration.png)")
            parts += [f"### When to use which\n\n{EXPLORATION}"]
    parts.append(
        "## Claims of papers\n\nChecked on the embedded tasks; experiments, tables and sources are in "
        f"[claims](claims.md).\n\n{summary()}"
    )
    parts.append(f"## When to use the others\n\n{OTHERS}")
    PAGE.write_text("\n\n".join(parts) + "\n")


def _table(section: str, cases: Sequence[str], rows: Sequence[Row]) -> str:
    head = ["algorithm", "seeds", "before", "after", "gain", "greedy", "steps", "minutes", "remark"]
    if section == "echo":
        head[5:5] = ["share of `lines`", "share of `chain`", "entropy"]
    if section == "agents":
        head[5:5] = ["turns", "tool calls"]
    if section == "exploration":
        head[5:5] = ["pass@8", "pass@8 over `grpo`", "answers", "distinct", "entropy"]
    lines = [head, ["---"] * len(head)]
    for case in cases:
        runs = [r for r in rows if (r["section"], r["case"]) == (section, case)]
        usual = {r["seed"]: r for r in rows if (r["section"], r["case"]) == (section, "grpo")}
        lines.append(_line(section, case, runs, usual, len(head)))
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _line(section: str, case: str, runs: Sequence[Row], usual: Mapping[int, Row], width: int) -> list[str]:
    """The cells of one case. usual: the runs of `grpo` in this section, by seed."""
    remark = REMARKS.get((section, case), "")
    if not runs:
        return [f"`{case}`", "0", *[""] * (width - 3), f"**not run.** {remark}".strip()]
    explained = [r["explained_variance"] for r in runs if r.get("explained_variance") is not None]
    if explained:
        remark = f"explained variance in the second half {_mean(explained, '.2f')}. {remark}".strip()
    started = [r["start_minutes"] for r in runs if r.get("start_minutes") is not None]
    if section == "agents" and started:
        remark = f"warm start {min(started):.1f} minutes. {remark}".strip()
    before = [r.get("before") for r in runs]
    gains = [r["after"] - r["before"] for r in runs if r.get("before") is not None]
    cells = [
        f"`{case}`",
        str(len(runs)),
        _mean(before, ".1%"),
        _mean([r["after"] for r in runs], ".1%"),
        _mean(gains, "+.1%"),
    ]
    if section == "echo":
        cells += [_change([r["styles"][s] for r in runs], ".0%") for s in ("lines", "chain")]
        cells.append(_change([r["entropy"] for r in runs], ".2f"))
    if section == "exploration":
        cells += [
            _first_and_last(runs, "pass@8", ".1%"),
            "" if case == "grpo" else _mean([over(r, usual.get(r["seed"]), "pass@8") for r in runs], "+.1%"),
            _first_and_last(runs, "distinct_answers", ".1f"),
            _first_and_last(runs, "distinct", ".0%"),
            _change([r["entropy"] for r in runs], ".2f"),
        ]
    if section == "agents":
        cells += [_change([r["session"][n] for r in runs], ".2f") for n in ("turns", "tool_calls")]
    cells += [
        _mean([r.get("greedy") for r in runs], ".1%"),
        _mean([r["steps"] for r in runs], ".0f"),
        f"{min(r['minutes'] for r in runs):.1f}",
        remark,
    ]
    return cells


def _mean(values: Sequence[float | None], form: str) -> str:
    numbers = [v for v in values if v is not None]
    if not numbers:
        return ""
    spread = statistics.stdev(numbers) if len(numbers) > 1 else 0.0
    shown = f"{statistics.fmean(numbers):{form}}"
    return f"{shown} ± {spread:{form.lstrip('+')}}" if spread else shown


def _first_and_last(runs: Sequence[Row], name: str, form: str) -> str:
    curves = [r["diversity"][name] for r in runs]
    return _change([[curve[0][1], curve[-1][1]] for curve in curves], form)


def over(run: Row, other: Row | None, name: str) -> float | None:
    """By how much a run has more of a measure of diversity than another of the same seed, at the highest
    accuracy that both reach; None without the other run, or where one of them gains no accuracy."""
    if other is None:
        return None
    equal = min(max(accuracy for _, accuracy in r["curve"]) for r in (run, other))
    ours, theirs = (at_accuracy(r, name, equal) for r in (run, other))
    return None if ours is None or theirs is None else ours - theirs


def at_accuracy(run: Row, name: str, accuracy: float) -> float | None:
    """A measure of diversity where the run's accuracy first reaches a value, linearly between evaluations;
    None where it never does."""
    points = list(zip([a for _, a in run["curve"]], [v for _, v in run["diversity"][name]], strict=True))
    for (low, before), (high, after) in pairwise(points):
        if low < accuracy <= high:
            return float(before + (after - before) * (accuracy - low) / (high - low))
    return None


def _change(pairs: Sequence[Sequence[float | None]], form: str) -> str:
    return " → ".join(_mean([pair[i] for pair in pairs], form) for i in (0, 1))


# -- the plot ------------------------------------------------------------------------------------------


def plot(rows: Sequence[Row]) -> None:
    """Reward curves of the four that were run with several seeds, and every algorithm before and after."""
    online = [r for r in rows if r["section"] == "online"]
    with rc_context(STYLE):
        names = sorted({r["case"] for r in online}, key=lambda n: _after(online, n))
        figure = Figure(figsize=(10.5, max(3.6, 0.19 * len(names) + 1)), layout="constrained")
        curves, bars = figure.subplots(1, 2, width_ratios=(1.1, 1))
        for name, color in zip(("ppo", "grpo", "raft", "prefix_rft"), COLORS, strict=False):
            _curve(curves, [r for r in online if r["case"] == name], name, color)
        curves.set_title("reward in training", loc="left", color=INK, fontsize=11, fontweight="bold")
        curves.set_xlabel("step (line: mean over seeds, band: lowest to highest)")
        curves.legend(loc="lower right", labelcolor=INK)
        before = [r["before"] for r in online if r.get("before") is not None]
        for y, name in enumerate(names):
            after = [r["after"] for r in online if r["case"] == name]
            mean = statistics.fmean(after)
            bars.barh(y, mean, color=BLUE, height=0.65)
            if len(after) > 1:
                bars.errorbar(mean, y, xerr=statistics.stdev(after), color=INK, capsize=2, linewidth=1)
        if before:
            bars.axvline(statistics.fmean(before), color=GREY, linestyle="--", linewidth=1)
        bars.set_yticks(range(len(names)), names, fontsize=7)
        bars.set_xlim(0, 1)
        bars.xaxis.set_major_formatter("{x:.0%}")
        bars.set_title("held-out accuracy after (dashed: before)", loc="left", color=INK, fontsize=11)
        figure.savefig(PLOT, dpi=150, facecolor="white")


def plot_exploration(rows: Sequence[Row]) -> None:
    """Runs of several seeds over their course, and what each algorithm has over GRPO at equal accuracy."""
    runs = [r for r in rows if r["section"] == "exploration"]
    usual = {r["seed"]: r for r in runs if r["case"] == "grpo"}
    gains: dict[str, list[float]] = {}
    for run in runs:
        gain = over(run, usual.get(run["seed"]), "pass@8")
        if run["case"] != "grpo" and gain is not None:
            gains.setdefault(run["case"], []).append(gain)
    if not gains:
        return
    names = sorted(gains, key=lambda name: statistics.fmean(gains[name]))
    several = [
        n for n in ("grpo", "mml", "max_rl", "entropy_bonus", "entropy_target") if n in {*gains, "grpo"}
    ]
    with rc_context(STYLE):
        figure = Figure(figsize=(10.5, max(3.6, 0.24 * len(names) + 1)), layout="constrained")
        curves, dots = figure.subplots(1, 2)
        for name, color in zip(several, COLORS, strict=False):
            for i, run in enumerate(r for r in runs if r["case"] == name):
                x, y = [a for _, a in run["curve"]], [v for _, v in run["diversity"]["pass@8"]]
                label = name if i == 0 else None
                curves.plot(x, y, color=color, marker="o", markersize=3, linewidth=1.2, label=label)
        curves.set_xlabel("held-out accuracy")
        curves.set_title(
            "pass@8 in the course of runs", loc="left", color=INK, fontsize=11, fontweight="bold"
        )
        curves.xaxis.set_major_formatter("{x:.0%}")
        curves.yaxis.set_major_formatter("{x:.0%}")
        curves.legend(loc="lower right", labelcolor=INK)
        dots.axvline(0, color=GREY, linestyle="--", linewidth=1)
        for y, name in enumerate(names):
            color = ORANGE if name == AGAIN else BLUE
            dots.plot(gains[name], [y] * len(gains[name]), "o", color=color, markersize=4, alpha=0.7)
            dots.plot(statistics.fmean(gains[name]), y, "|", color=INK, markersize=11)
        dots.set_yticks(range(len(names)), names, fontsize=7)
        dots.xaxis.set_major_formatter(lambda share, _: f"{100 * share:+.1f}")
        dots.set_xlabel("pass@8 over grpo at equal accuracy, in points (line: mean)", fontsize=9)
        figure.savefig(EXPLORATION_PLOT, dpi=150, facecolor="white")


def _after(rows: Sequence[Row], name: str) -> float:
    return statistics.fmean(r["after"] for r in rows if r["case"] == name)


def _curve(axes: Any, runs: Sequence[Row], name: str, color: str) -> None:
    if not runs:
        return
    length = min(len(r["reward"]) for r in runs)
    steps = [point[0] for point in runs[0]["reward"][:length]]
    table = [[r["reward"][i][1] for r in runs] for i in range(length)]
    axes.plot(steps, [statistics.fmean(v) for v in table], color=color, label=f"{name} ({len(runs)})")
    if len(runs) > 1:
        axes.fill_between(steps, [min(v) for v in table], [max(v) for v in table], color=color, alpha=0.15)
