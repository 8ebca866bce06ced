"""The results of benchmarks/claims.py as a page: a table and a verdict for each claim."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "claims.json"
PAGE = ROOT / "docs" / "claims.md"
SMALL = 1000  # examples below which supervised tuning alone is said to be best
SPARSE = (0.05, 0.3)  # share of the weights that reinforcement learning is said to change
Row = dict[str, Any]
Verdict = Callable[[list[Row]], Iterator[str]]


@dataclass(frozen=True)
class Claim:
    """One section: the claim with its source, the experiment, the columns, and how it is judged."""

    title: str
    claim: str
    experiment: str
    columns: dict[str, str]
    judge: Verdict


def load() -> list[Row]:
    """The rows of all runs so far."""
    rows: list[Row] = json.loads(RESULTS.read_text())["results"] if RESULTS.exists() else []
    return rows


# -- verdicts ------------------------------------------------------------------------------------------


def difference(rows: Sequence[Row], better: str, worse: str, key: str, sign: int = 1) -> str:
    """Judge `better` against `worse` by the differences within each seed: it holds, or is contradicted, where
    all seeds agree. sign: -1 where less is better."""
    values = {(r["case"], r["seed"]): r[key] for r in rows if r.get(key) is not None}
    seeds = sorted({s for c, s in values if c == better} & {s for c, s in values if c == worse})
    compared = f"`{better}` against `{worse}`, {MEASURES[key]}"
    if not seeds:
        return f"{compared}: **not run.**"
    gaps = [sign * (values[better, s] - values[worse, s]) for s in seeds]
    verdict = "holds" if min(gaps) > 0 else "contradicted" if max(gaps) < 0 else "undecided"
    scale, unit = (100, " points") if key in SHARES else (1, " nats")
    mean = sign * statistics.fmean(gaps) * scale
    spread = f" ± {statistics.stdev(gaps) * scale:.2g}" if len(gaps) > 1 else ""
    count = f"{len(gaps)} seed{'s' if len(gaps) > 1 else ''}"
    return f"{compared}: **{verdict}** ({mean:+.2g}{spread}{unit}, {count})."


def _budget(rows: list[Row]) -> Iterator[str]:
    for examples in sorted({r["examples"] for r in rows if "examples" in r}):
        small = examples < SMALL
        better = "supervised tuning is best" if small else "preferences pay"
        yield f"{examples:,} examples ({'below' if small else 'above'} {SMALL:,}), {better}:"
        for other in ("dpo", "half"):
            pair = (f"sft-{examples}", f"{other}-{examples}")
            yield difference(rows, *(pair if small else pair[::-1]), "stories")


def _forgetting(rows: list[Row]) -> Iterator[str]:
    yield "Accuracy that is left on the task that was not trained:"
    for better in ("grpo", "grpo-kl"):
        for worse in ("sft", "sft-fast", "sft-chains"):
            yield difference(rows, better, worse, "products")
    yield "And the KL penalty:"
    yield difference(rows, "grpo-kl", "grpo", "products")


def _weights(rows: list[Row]) -> Iterator[str]:
    for case in ("grpo", "grpo-kl", "sft", "sft-fast", "sft-chains"):
        of_case = [r for r in rows if r["case"] == case]
        if not of_case:
            yield f"`{case}`: **not run.**"
            continue
        low, high = (f(r["changed"] for r in of_case) for f in (min, max))
        inside = SPARSE[0] <= low and high <= SPARSE[1]
        judged = "" if case.startswith("sft") else f": 5 to 30 % **{'holds' if inside else 'contradicted'}**"
        lift = statistics.fmean(r["overlap"] / r["chance"] for r in of_case)
        yield (
            f"`{case}` changes {low:.1%} to {high:.1%} of the weights{judged}; the masks of two seeds share "
            f"{lift:.2f} times as much as by chance."
        )


def _mft(rows: list[Row]) -> Iterator[str]:
    yield difference(rows, "mft", "sft", "mean")
    yield difference(rows, "mft", "sft", "loss", sign=-1)
    yield difference(rows, "mft", "sft", "long")


def _cory(rows: list[Row]) -> Iterator[str]:
    yield difference(rows, "cory", "ppo", "stories")
    yield difference(rows, "cory", "grpo", "stories")


def _mixtures(rows: list[Row]) -> Iterator[str]:
    for other in ("proportional", "uniform"):
        yield difference(rows, "aioli", other, "mean")
        yield difference(rows, "aioli", other, "loss", sign=-1)


def _wise(rows: list[Row]) -> Iterator[str]:
    for name in ("grpo", "sft-chains"):
        means: dict[float, list[float]] = {}
        for row in rows:
            if row["case"].startswith(f"{name}-"):
                means.setdefault(row["alpha"], []).append(row["mean"])
        if not means:
            yield f"`{name}`: **not run.**"
            continue
        best = max(means, key=lambda alpha: statistics.fmean(means[alpha]))
        inside = 0 < best < 1
        yield (
            f"`{name}`: the mean over both tasks is highest at alpha {best:g}: a model between the two is "
            f"better than both, **{'holds' if inside else 'contradicted'}**."
        )


# -- the sections --------------------------------------------------------------------------------------

MEASURES = {
    "stories": "stories solved",
    "products": "products solved",
    "long": "long stories solved",
    "mean": "mean of the three",
    "loss": "mean loss",
}
SHARES = {"stories", "products", "long", "mean", "changed", "overlap", "chance", "rank"}
SOURCES = {"stories": "stories", "products": "products", "long": "long", "mean": "mean", "loss": "mean loss"}
CLAIMS: dict[str, Claim] = {
    "budget": Claim(
        "Demonstrations or preferences",
        "With fewer than 1,000 annotated examples, supervised tuning alone is best; preferences pay beyond "
        "(Raghavendra et al. 2025, arXiv:2502.11284).",
        "N examples, two passes: `sft` on N right solutions, `dpo` on N pairs of a right and a wrong one, "
        "`half` on N/2 solutions and then N/2 pairs of other problems.",
        {"stories": "stories solved"},
        _budget,
    ),
    "forgetting": Claim(
        "What is forgotten",
        "Reinforcement learning forgets less than supervised tuning. Without a KL penalty as well (Lai et "
        "al. 2025, arXiv:2507.05386), since it finds the solution that is nearest to the start (Shenfeld et "
        "al. 2025, arXiv:2509.04259).",
        "40 steps of 32 stories; products are what the start knew and what is not trained. `sft` imitates "
        "clean solutions in one of the start's formats at the learning rate of `grpo`, `sft-fast` at three "
        "times that, `sft-chains` in the format that reinforcement learning gives up. `grpo-kl`: `beta: "
        "0.05`. Loss and KL(policy, start) are those of clean solutions of products, nats per token.",
        {
            "stories": "stories solved",
            "products": "products solved",
            "products_loss": "loss on products",
            "kl": "KL on products",
        },
        _forgetting,
    ),
    "weights": Claim(
        "Which weights change",
        "Reinforcement learning changes 5 to 30 % of the weights in bfloat16, and other seeds change much "
        "the same ones (Mukherjee et al. 2025, arXiv:2505.11711).",
        "The models of *What is forgotten* against their start, by `rft compare`'s rule: values that differ "
        "by more than 1e-5 after rounding to bfloat16. *Overlap*: the share of a seed's changed weights that "
        "the next seed changed too; *chance*: what it would be if those were spread at random. *Rank*: of "
        "the update, relative to the full one. Weights of 0.2 M parameters move much further at a learning "
        "rate of 3e-4 than those of large models at the paper's rates of about 1e-6.",
        {"changed": "changed", "overlap": "overlap", "chance": "chance", "rank": "rank"},
        _weights,
    ),
    "mft": Claim(
        "Sources that count equally",
        "Multi-task fine-tuning with a loss that weighs all sources equally is better over all of them than "
        "SFT on the mixed data (MFTCoder, Liu et al. 2023, arXiv:2311.02303).",
        "120 steps of 32 rows, drawn in proportion to 6,400 stories, 1,200 products and 400 stories of five "
        "numbers (*long*), which the start has not seen; all are solved line by line, without slips. Loss: "
        "-log p of such solutions. A first try had the stories solved in chains, unlike the others: both "
        "ended below the start's mean of 52 %, SFT at 39 to 41 % and MFT at 26 to 29 % (three seeds).",
        SOURCES,
        _mft,
    ),
    "cory": Claim(
        "Two copies that cooperate",
        "Two copies of a policy that cooperate end higher than one that is trained by PPO (CORY, Ma et al. "
        "2024, arXiv:2410.06101).",
        "40 steps of 256 completions of stories, by the examples; half of CORY's completions are of each "
        "copy, and its first copy is measured, answering alone. `cory` has the advantages and learning rate "
        "of `grpo`, which is in the table for that reason.",
        {"stories": "stories solved"},
        _cory,
    ),
    "mixtures": Claim(
        "Rates that are learned",
        "Rates learned during training are better than fixed ones (Aioli, Chen et al. 2024, "
        "arXiv:2411.05735).",
        "SFT for 120 steps on the sources of the section before: drawn in proportion to their rows, equally "
        "often, and at rates that `mixing: aioli` learns in rounds of 40 steps.",
        SOURCES,
        _mixtures,
    ),
    "wise": Claim(
        "Between start and tuned model",
        "Interpolated weights trade what was learned against what was forgotten, and a point between the two "
        "can be better than both ends (WiSE-FT, Wortsman et al. 2022, arXiv:2109.01903).",
        "`rft merge wise-ft START TUNED --alpha ALPHA` of the models of *What is forgotten*; alpha is the "
        "last part of the name.",
        {"stories": "stories solved", "products": "products solved", "mean": "mean"},
        _wise,
    ),
}


# -- the page ------------------------------------------------------------------------------------------


def summary() -> str:
    """The verdicts of all claims, as a list for another page."""
    rows = load()
    lines = []
    for name, claim in CLAIMS.items():
        judged = claim.judge([r for r in rows if r["section"] == name])
        lines.append(f"- {claim.title}: {' '.join(line for line in judged if line[0] == '`')}")
    return "\n".join(lines)


def write_page() -> None:
    """Write the tables and verdicts of all sections, run or not."""
    rows = load()
    parts = [
        "# Claims of papers, checked\n\nMade by `python benchmarks/claims.py` from "
        "`benchmarks/results/claims.json`. All runs start from one model of 0.2 M parameters, which solves "
        "half of the embedded stories (its demonstrations have slips) and most products (clean ones). Shares "
        "are of 256 held-out problems, one sample each at temperature 1, so that one share has a standard "
        "error of up to 3 points. Mean ± standard deviation over seeds of data and order. A claim *holds* or "
        "is *contradicted* where all seeds agree, and is *undecided* otherwise: at this size and on this "
        "task, not in general."
    ]
    for name, claim in CLAIMS.items():
        of_section = [r for r in rows if r["section"] == name]
        verdicts = "\n".join(
            f"- {line}" if line[0] == "`" else f"\n{line}\n" for line in claim.judge(of_section)
        )
        parts.append(
            f"## {claim.title}\n\n*Claim.* {claim.claim}\n\n*Experiment* (`--only {name}`). "
            f"{claim.experiment}\n\n{_table(of_section, claim.columns)}\n\n{verdicts.strip()}"
        )
    PAGE.write_text("\n\n".join(parts).replace("\n\n\n", "\n\n") + "\n")


def _table(rows: list[Row], columns: dict[str, str]) -> str:
    lines = [f"| case | {' | '.join(columns.values())} | seeds |", "|---" * (len(columns) + 2) + "|"]
    for case in dict.fromkeys(r["case"] for r in rows):
        runs = [r for r in rows if r["case"] == case]
        seeds = "" if case == "start" else str(len(runs))
        cells = " | ".join(_cell([r.get(key) for r in runs], key) for key in columns)
        lines.append(f"| `{case}` | {cells} | {seeds} |")
    return "\n".join(lines) if rows else "**Not run.**"


def _cell(values: Sequence[float | None], key: str) -> str:
    known = [v for v in values if v is not None]
    if not known:
        return ""
    scale, form, unit = (100, ".1f", " %") if key in SHARES else (1, ".3g", "")
    spread = statistics.stdev(known) if len(known) > 1 else 0.0
    shown = format(scale * statistics.fmean(known), form)
    return shown + (f" ± {format(scale * spread, form)}" if spread else "") + unit
