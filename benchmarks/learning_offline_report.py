"""The results of benchmarks/learning_offline.py as a page and a plot."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from rft.report.plots import BLUE, GREY, ORANGE, STYLE

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "learning_offline.json"
PAGE = ROOT / "docs" / "learning_offline.md"
PLOT = ROOT / "docs" / "images" / "learning_offline.png"
Row = dict[str, Any]

SECTIONS: dict[str, tuple[str, str, dict[str, str]]] = {
    "pairs": (
        "Preference losses, verified pairs of the embedded task",
        "30 steps of 32 pairs. Whether the policy finds the right solution of a held-out problem likelier "
        "than the wrong one, by how many nats, and how many of 256 held-out problems one sample solves; "
        "*against the start*: whether training raised the right one's log-prob more (DPO's implicit reward).",
        {
            "reward_accuracy": "against the start",
            "accuracy": "pairs right",
            "accuracy_per_token": "per token",
            "margin": "margin",
            "task": "problems solved",
        },
    ),
    "gsm8k": (
        "Preference losses, GSM8K solutions",
        "50 steps of 16 pairs, from a model that imitated the 400 right training solutions for 120 steps; on "
        "187 held-out pairs. It has 0.2 M parameters: it can learn the look of right and wrong "
        "solutions, not the reason, and the whole log-prob mostly shows which of the two is shorter. Losses "
        "of log-probs per token (`ipo`, `length`, `simpo`) are judged per token. `apo_zero`, `apo_down` "
        "and `kto` move each response by itself, and have a third of the others' learning rate here.",
        {
            "reward_accuracy": "against the start",
            "accuracy_per_token": "pairs right per token",
            "accuracy": "in all",
            "margin": "margin",
        },
    ),
    "slips": (
        "Demonstrations of which a share is wrong",
        "150 steps of 32 demonstrations, three of ten steps wrong. KL over the vocabulary, mean over the "
        "tokens of clean solutions, in nats: of the policy to the start, and of the start to the policy. "
        "`logit_distill` and `token_cleaning-taught` have a teacher (`model.reference`): the start after 150 "
        "steps on clean demonstrations. `mft` against `sft` on two sources: [claims](claims.md).",
        {"task": "problems solved", "kl": "KL(policy, start)", "kl_forward": "KL(start, policy)"},
    ),
    "sources": (
        "Sources of mixed quality",
        "600 steps of 32 demonstrations, from the untrained model; two fifths are careful, the others hasty "
        "and mostly wrong. C-RLFT knows which is which, and is asked to be careful.",
        {"task": "problems solved"},
    ),
    "rewards": (
        "Reward models",
        "150 steps on judged solutions of the embedded task; held-out measures of each, and its loss.",
        {
            "preference_accuracy": "pairs right",
            "step_accuracy": "steps right",
            "score_error": "error of scores",
            "loss": "loss",
        },
    ),
    "loop": (
        "A reward model as the only reward",
        "The model of 150 steps on judged pairs, then 40 steps of GRPO with nothing but its scores as the "
        "reward, from the same start.",
        {"task": "problems solved", "score": "mean score"},
    ),
    "learner": (
        "Methods of the learner",
        "Supervised tuning on right solutions in the hasty format (`chain`), of which the start has seen "
        "half of the steps wrong: 100 steps of 32 demonstrations for every method. The KL, as above, is on "
        "the careful solutions (`lines`), which are not trained: it shows how much of them is forgotten. "
        "*Trained* is a share of the start's parameters, *memory* that of weights, gradients and optimizer "
        "state in the last step. `loram` trains an adapter on the start with a share of its MLP neurons, and "
        "is measured as the whole model after `rft merge loram`. `private` is `lora` with DP-SGD, with the "
        "epsilon at a delta of 1e-5. {rates}",
        {
            "task": "problems solved",
            "kl": "KL(policy, start)",
            "kl_forward": "KL(start, policy)",
            "trained": "trained",
            "megabytes": "memory in MB",
            "epsilon": "epsilon",
        },
    ),
}
# What a reader should know about a line, learnt from looking at the runs.
REMARKS = {
    "dpo-apo_down": "lowers both responses by design, the rejected one more",
    "dpo-discopop": "with its own tau of 0.05 the slope is positive at a margin of 0, where all start",
    "loram": "the paper trains the pruned model on general text first, which is left out. With half of the "
    "neurons the start solves 11 % (with nine tenths 48 %, seed 1): the adapter probably learns to make up "
    "for that, which the whole model does not need",
    "token_cleaning": "selects the tokens whose log-prob it has raised itself, and the others drift; with a "
    "teacher that has seen clean data (`token_cleaning-taught`) the same loss learns",
}
SHARES = {
    "reward_accuracy",
    "accuracy",
    "accuracy_per_token",
    "task",
    "trained",
    "preference_accuracy",
    "step_accuracy",
}


def load() -> list[Row]:
    """The rows of all runs so far."""
    found: list[Row] = json.loads(RESULTS.read_text())["runs"] if RESULTS.exists() else []
    return found


def merge(row: Row) -> None:
    """Put a run's numbers into the results, in place of an earlier run of the same case and seed."""

    def key(r: Row) -> tuple[str, str, int]:
        return r["section"], r["case"], r["seed"]

    rows = sorted([*(r for r in load() if key(r) != key(row)), row], key=key)
    note = "Two cores, shared with other programs: seconds are an upper bound."
    RESULTS.write_text(json.dumps({"note": note, "runs": rows}, indent=1) + "\n")


def write_page(known: Sequence[tuple[str, str]]) -> None:
    """The table of every known case, run or not, and the plot."""
    rows = load()
    parts = [
        "# What each offline algorithm learns\n\nMade by `python benchmarks/learning_offline.py` from "
        "`benchmarks/results/learning_offline.json`. All start from the warm start of "
        "`examples/arithmetic.yaml`, where nothing else is said. With several seeds (of the data and their "
        "order), mean ± standard deviation; of the start over all runs, which were made on several machines."
    ]
    if any(r["section"] == "pairs" for r in rows):
        parts.append("![margins before and after](images/learning_offline.png)")
        _plot(rows, known)
    for section, (title, text, measures) in SECTIONS.items():
        names = [case for s, case in known if s == section]
        text = text.replace("{rates}", _rates(rows))
        parts.append(f"## {title}\n\n{text}\n\n{_table(rows, section, names, measures)}")
    PAGE.write_text("\n\n".join(parts) + "\n")


def _table(rows: list[Row], section: str, names: list[str], measures: dict[str, str]) -> str:
    found = [r for r in rows if r["section"] == section]
    shown = {k: v for k, v in measures.items() if any(k in r["after"] for r in found)}
    lines = ["| algorithm | settings | " + " | ".join(shown.values()) + " | seeds |"]
    notes = [f"`{name}`: {REMARKS[name]}." for name in names if name in REMARKS]
    lines.append("|---" * (len(shown) + 3) + "|")
    if found:
        cells = [_cell([r["before"].get(k) for r in found], k) for k in shown]
        if section != "rewards":
            lines.append("| *the start* | | " + " | ".join(cells) + " | |")
    for name in names:
        runs = [r for r in found if r["case"] == name]
        if not runs:
            lines.append(f"| `{name}` | *not run* |" + " |" * (len(shown) + 1))
            continue
        settings = ", ".join(f"{k}: {_flow(v)}" for k, v in runs[0]["settings"].items())
        cells = [_cell([r["after"].get(k) for r in runs], k) for k in shown]
        lines.append(f"| `{name}` | {settings} | " + " | ".join(cells) + f" | {len(runs)} |")
    return "\n".join([*lines, *([""] if notes else []), *notes])


def _flow(value: Any) -> str:
    """Format a setting as in a config file, on one line."""
    if not isinstance(value, dict):
        return str(value)
    return "{" + ", ".join(f"{k}: {_flow(v)}" for k, v in value.items()) + "}"


def _rates(rows: list[Row]) -> str:
    """List the learning rates that were tried for each method, as a sentence."""
    tried = [r for r in rows if r["section"] == "rates"]
    methods: dict[str, list[str]] = {}
    for row in sorted(tried, key=lambda r: r["settings"]["learning_rate"]):
        rate = f"{row['settings']['learning_rate']:g}: {100 * row['after']['task']:.0f}"
        methods.setdefault(row["case"].rsplit("-", 1)[0], []).append(rate)
    listed = "; ".join(f"`{name}` {', '.join(rates)}" for name, rates in methods.items())
    if not listed:
        return ""
    return (
        "Each method has the learning rate that solved most problems on a further seed (rate: problems "
        f"solved in %): {listed}."
    )


def _cell(values: Sequence[float | None], name: str) -> str:
    """Mean, and with several seeds its standard deviation."""
    known = [v for v in values if v is not None]
    if not known:
        return ""
    scale, form, unit = (100, ".1f", " %") if name in SHARES else (1, ".3g", "")
    text = format(scale * statistics.fmean(known), form)
    if len(known) > 1:
        text += f" ± {format(scale * statistics.stdev(known), form)}"
    return text + unit


def _plot(rows: list[Row], known: Sequence[tuple[str, str]]) -> None:
    """Held-out margins before and after, on both sets of pairs."""
    with rc_context(STYLE):
        figure = Figure(figsize=(9.5, 5.2), layout="constrained")
        for axes, section in zip(figure.subplots(1, 2), ("pairs", "gsm8k"), strict=True):
            names = [case for s, case in known if s == section]
            for place, name in enumerate(reversed(names)):
                runs = [r for r in rows if (r["section"], r["case"]) == (section, name)]
                if not runs:
                    continue
                after = [r["after"]["margin"] for r in runs]
                spread = statistics.stdev(after) if len(after) > 1 else 0.0
                axes.barh(place, statistics.fmean(after), xerr=spread, color=BLUE, height=0.6)
                axes.plot([runs[0]["before"]["margin"]] * 2, [place - 0.4, place + 0.4], color=ORANGE)
            axes.set_yticks(range(len(names)), list(reversed(names)), fontsize=7)
            axes.axvline(0, color=GREY, linewidth=0.8)
            axes.set_title({"pairs": "verified pairs", "gsm8k": "GSM8K"}[section], fontsize=9)
            axes.set_xlabel("margin in nats: chosen over rejected; orange: before")
        PLOT.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(PLOT, dpi=130)
