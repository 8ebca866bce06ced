"""Tables and plots of docs/performance.md about log-probs, prefix sharing, packing, steps and pushes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
VERDICT = {True: "met", False: "**missed**", None: ""}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def where(d: dict[str, Any]) -> str:
    m = d["machine"]
    return (
        f"{m['cpu']}, {m['cores']} cores, {m['capability']}, "
        f"{'with' if m['bfloat16_arithmetic'] else 'without'} bfloat16 arithmetic, "
        f"torch {m['versions']['torch']}, load before {m['load']}"
    )


def bars(name: str, title: str, labels: list[str], series: dict[str, list[float | None]], unit: str) -> str:
    """A bar for each label and series, side by side; returns the page's link to the picture."""
    figure, axes = plt.subplots(figsize=(9, 0.32 * len(labels) * len(series) + 1.6))
    height = 0.8 / len(series)
    for i, (what, values) in enumerate(series.items()):
        places = [place + i * height for place, value in enumerate(values) if value is not None]
        axes.barh(places, [v for v in values if v is not None], height, label=what)
    axes.set_yticks([place + 0.4 - height / 2 for place in range(len(labels))], labels, fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.set_title(title, fontsize=10)
    axes.axvline(1, color="grey", linewidth=0.8)
    if len(series) > 1:
        axes.legend(fontsize=8)
    figure.tight_layout()
    IMAGES.mkdir(parents=True, exist_ok=True)
    figure.savefig(IMAGES / f"{name}.png", dpi=110, metadata={"Software": None})
    plt.close(figure)
    return f"![{title}](images/{name}.png)"


def logprob(d: dict[str, Any]) -> str:
    parts, labels, ratios = [], [], []
    for case in d["results"]:
        title = (
            f"{case['dtype']}, {case['rows']} x {case['width']} x {case['vocab']}, "
            f"{case['threads']} thread{'s' * (case['threads'] > 1)}"
        )
        rows = []
        for r in case["rows_of_table"]:
            limit = r["workspace_gate"]
            rows.append(
                [
                    r["contender"],
                    str(r["rows"]),
                    f"{r['ratio']:.2f}",
                    f"{r['gate']:.2f} {VERDICT[r['passed']]}" if r["gate"] else "",
                    f"{r['workspace_mb']:.0f} MB",
                    f"{limit:.0f} MB {VERDICT[r['workspace_passed']]}" if limit else "",
                    f"{max(r['errors'].values()):.1e}",
                ]
            )
            if case["case"] == "main":
                labels.append(f"{r['contender']}, {case['dtype']}")
                ratios.append(r["ratio"])
        head = [title, "rows", "over bare products", "gate", "workspace", "gate", "largest error"]
        parts.append(table(head, rows))
    picture = bars("logprob", "time over the bare matrix products", labels, {"": ratios}, "times")
    return (
        f"Time over the bare matrix products of the same round ({where(d)}). Where bfloat16 products are "
        "emulated, the yardstick of bfloat16 rows is float32 products, and others' paths are left out.\n\n"
        + "\n\n".join(parts)
        + f"\n\n{picture}\n\nThe Triton kernels are correct under the interpreter; their speed on a GPU is "
        "**unmeasured**."
    )


def workspace(d: dict[str, Any]) -> str:
    sizes = list(d["logits_mb"])
    rows = [
        [r["contender"], *(f"{r['workspace_mb'][n]:.0f} MB" for n in sizes), VERDICT[r["passed"]]]
        for r in d["results"]
    ]
    rows.append(["the logits alone", *(f"{d['logits_mb'][n]:,} MB" for n in sizes), ""])
    note = f"Memory beyond inputs and gradients, width {d['width']}, vocabulary {d['vocabulary']}, float32."
    head = ["rows", *sizes, f"flat within {d['flat']:.2f}x"]
    return f"{note}\n\n{table(head, rows)}"


def prefix(d: dict[str, Any]) -> str:
    rows, labels = [], []
    for r in d["results"]:
        labels.append(f"p {r['prompt']}, {r['generations']} x {r['completion']}")
        rows.append(
            [
                labels[-1],
                f"{r['gain']:.2f}",
                f"{r['bound']:.2f}",
                f"{r['of_bound']:.0%}",
                VERDICT[r["passed"]] if r["share"] else "not shared by the cost model",
                f"{r['peak_mb']['shared']:.0f} / {r['peak_mb']['padded']:.0f} MB",
                f"{max(r['errors'].values()):.1e}",
            ]
        )
    gains = {"gain": [r["gain"] for r in d["results"]], "bound": [r["bound"] for r in d["results"]]}
    picture = bars("prefix", "sharing a prompt: gain and bound", labels, gains, "times faster than padded")
    head = [
        "prompt, completions",
        "gain",
        "bound",
        "of it",
        "gate: 90 %",
        "peak shared / padded",
        "largest error",
    ]
    return (
        "Forward and backward of the base transformer, a prompt computed once against padded rows "
        f"({where(d)}). The bound counts operations; padded rows also wait for more "
        "memory, which is how a gain comes above it.\n\n"
        f"{table(head, rows)}\n\n{picture}"
    )


def combined(d: dict[str, Any]) -> str:
    rows = [
        [
            r["variant"],
            f"{r['gain']:.2f}",
            f"{r['seconds']:.2f} s",
            f"{r['peak_mb']:.0f} MB",
            f"{r['errors']['gradient']:.1e}",
        ]
        for r in d["results"]
    ]
    return (
        f"All at once: {d['together']:.2f} of a product of {d['product']:.2f}, {d['of_product']:.0%}; "
        f"gate 85 %: {VERDICT[d['passed']]}. ({where(d)})\n\n"
        + table(["", "gain", "time", "peak memory", "largest error of a gradient"], rows)
    )


def packing(d: dict[str, Any]) -> str:
    rows = []
    for r in d["results"]:
        shared = "shared_gain" in r
        rows.append(
            [
                r["profile"],
                str(r["sequences"]),
                str(r["tokens"]),
                f"{r['packed_gain']:.2f}",
                f"{r['fill']:.0%}",
                f"{r['waste']:.0%}",
                f"{r['shared_gain']:.2f}" if shared else "",
                f"{r['shared_bound']:.2f} ({r['of_bound']:.0%}) {VERDICT[r['passed']]}" if shared else "",
                f"{r['paper_gain_8xH100']:.2f}" if "paper_gain_8xH100" in r else "",
                f"{r['errors']['packed gradient']:.1e}",
            ]
        )
    plan = d["planning"]
    head = ["profile", "sequences", "tokens", "packed over padded", "budget filled", "padding",
            "shared over packed", "bound", "paper, 8 H100", "largest error"]  # fmt: skip
    return (
        f"Micro-batches of {d['budget']} tokens ({where(d)}). The six named sets are pairs at the median "
        "length and the median ratio that arXiv:2410.20305 states (no histograms there); the paper's gains "
        "are of other models on other machines.\n\n"
        f"{table(head, rows)}\n\nPlanning {plan['sequences']:,} sequences for {plan['ranks']} ranks: "
        f"{plan['seconds']:.2f} s, {plan['fill']:.1%} filled, imbalance {plan['imbalance']:.2%}."
    )


def train_step(d: dict[str, Any]) -> str:
    rows = []
    for r in d["results"]:
        peer = "trl" in r["seconds"]
        gate = f", gate {r['gate']:.1f}" if r["gate"] else ", at least as fast"
        rows.append(
            [
                r["algorithm"],
                f"{r['tokens']} ({r['packed_tokens']})",
                f"{r['seconds']['rft']:.2f} s",
                f"{r['seconds']['trl']:.2f} s" if peer else "not run",
                f"{r['gain']:.2f}{gate} {VERDICT[r['passed']]}" if peer else "",
                " / ".join(f"{v:.0f}" for v in r["peak_mb"].values()) + " MB",
                f"{r['errors']['gradient norm']:.1e}" if peer else "",
            ]
        )
    head = [
        "",
        "tokens (after packing)",
        "rft",
        "TRL",
        "gain",
        "peak of the process, rft / TRL",
        "gradient norms differ by",
    ]
    return (
        f"Whole steps, one thread, Qwen3-0.6B's width with {d['layers']} layers and {d['vocabulary']:,} "
        f"tokens of vocabulary, random weights, float32 ({where(d)}). rft's process also holds earlier "
        "rows' memory.\n\n" + table(head, rows)
    )


def sync(d: dict[str, Any]) -> str:
    rows = [
        [
            r["transport"],
            f"{r['bytes'] / 1e6:.1f} MB",
            f"{r['seconds'] * 1000:.0f} ms",
            f"{r['GB_per_s']:.2f} GB/s",
            f"{r['errors']['log-prob gap']:.1e}",
        ]
        for r in d["results"]
    ]
    head = ["transport", "bytes", "push", "rate", "largest log-prob gap after it"]
    return f"Pauses included, one vLLM replica ({where(d)}).\n\n{table(head, rows)}"
