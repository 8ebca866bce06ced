"""Tables and plots of docs/performance.md about log-probs, prefix sharing, packing, steps and pushes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
Row = dict[str, Any]
VERDICT = {True: "met", False: "**missed**", None: ""}


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def columns(results: list[Row], cells: dict[str, Callable[[Row], str]]) -> str:
    """A table with a line for every result and a column for every cell."""
    return table(list(cells), [[cell(r) for cell in cells.values()] for r in results])


def worst(r: Row) -> str:
    """The largest error of a result."""
    return f"{max(r['errors'].values()):.1e}" if r.get("errors") else ""


def verdict(r: Row) -> str:
    return VERDICT[r["passed"]]


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
    axes.margins(y=0.02)
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
                    worst(r),
                ]
            )
            if case["case"] == "main":
                labels.append(f"{r['contender']}, {case['dtype']}")
                ratios.append(r["ratio"])
        head = [title, "rows", "over bare products", "gate", "workspace", "gate", "largest error"]
        parts.append(table(head, rows))
    picture = bars("logprob", "time over the bare matrix products", labels, {"": ratios}, "times")
    return (
        "Log-probs of rows of hidden states under a head, and their gradients, without the logits of all "
        "rows: *recompute* takes any loss; *loss-known* one whose gradient to the log-probs is known in the "
        "forward (SFT, a policy gradient stepped on once); *frozen head* gives a gradient to the hidden "
        "states only (LoRA). Sizes are rows x width x vocabulary. "
        f"Time over the bare matrix products of the same round ({where(d)}). Where bfloat16 products are "
        "emulated, the baseline of bfloat16 rows is float32 products, and others' paths are left out.\n\n"
        + "\n\n".join(parts)
        + f"\n\n{picture}\n\nThe Triton kernels, and Liger's as a backend, are correct under the "
        "interpreter; their speed on a GPU is **unmeasured**."
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
    results = d["results"]
    labels = [f"p {r['prompt']}, {r['generations']} x {r['completion']}" for r in results]
    gains = {"gain": [r["gain"] for r in results], "bound": [r["bound"] for r in results]}
    picture = bars("prefix", "sharing a prompt: gain and bound", labels, gains, "times faster than padded")
    found = columns(
        [r | {"label": label} for r, label in zip(results, labels, strict=True)],
        {
            "prompt, completions": lambda r: r["label"],
            "gain": lambda r: f"{r['gain']:.2f}",
            "bound": lambda r: f"{r['bound']:.2f}",
            "of it": lambda r: f"{r['of_bound']:.0%}",
            "gate: 90 %": lambda r: verdict(r) if r["share"] else "not shared by the cost model",
            "peak shared / padded": lambda r: " / ".join(f"{v:.0f}" for v in r["peak_mb"].values()) + " MB",
            "largest error": worst,
        },
    )
    return (
        "Forward and backward of the base transformer, a prompt computed once against padded rows "
        f"({where(d)}). The bound counts operations; padded rows also wait for more "
        f"memory, which is how a gain comes above it.\n\n{found}\n\n{picture}"
    )


def sessions(d: dict[str, Any]) -> str:
    found = columns(
        d["results"],
        {
            "prompt, turns x (sampled + read)": lambda r: (
                f"{r['prompt']}, {r['turns']} x ({r['sampled']} + {r['observation']})"
            ),
            "layers": lambda r: str(r["layers"]),
            "tokens, rows / trie": lambda r: f"{r['tokens']['rows']} / {r['tokens']['trie']}",
            "gain": lambda r: f"{r['gain']:.2f}",
            "bound": lambda r: f"{r['bound']:.2f}",
            "of it": lambda r: f"{r['of_bound']:.0%}",
            "gate: 90 %": verdict,
            "largest error": worst,
        },
    )
    return (
        "Forward and backward, with the head, of a session whose every turn branches off (the template "
        "writes the end of each answer otherwise): its token trie against one packed row for each call, at "
        f"the widths of SmolLM2-135M ({where(d)}).\n\n{found}"
    )


def session_cache(d: dict[str, Any]) -> str:
    found = columns(
        d["results"],
        {
            "turn": lambda r: str(r["turn"]),
            "calls": lambda r: str(r["calls"]),
            "tokens of a prompt, mean": lambda r: f"{r['prompt_tokens']:.0f}",
            "from the cache": lambda r: f"{r['cached_share']:.1%}",
            "bound": lambda r: "-" if r["bound"] is None else f"{r['bound']:.1%}",
        },
    )
    return (
        "SmolLM2-135M with vLLM, two tries with feedback (`examples/smollm2_retry.yaml`), "
        f"{d['sessions_at_a_time']} sessions at a time: the share of each turn's prompt tokens that the "
        f"engine had in its prefix cache ({where(d)}). The bound is the part that the turn before has "
        f"computed, in whole blocks of {d['block']} tokens; the first turn may find the prompt of the "
        f"group's other samples.\n\n{found}"
    )


def combined(d: dict[str, Any]) -> str:
    found = columns(
        d["results"],
        {
            "": lambda r: r["variant"],
            "gain": lambda r: f"{r['gain']:.2f}",
            "time": lambda r: f"{r['seconds']:.2f} s",
            "peak memory": lambda r: f"{r['peak_mb']:.0f} MB",
            "largest error of a gradient": worst,
        },
    )
    return (
        "Log-probs of groups' completions, forward and backward, from a plain trainer (padded rows, "
        "all logits) to everything at once. Sharing's gain is the one over packing, which it needs; "
        "checkpointing trades time for memory. "
        f"All at once: {d['together']:.2f} of a product of {d['product']:.2f}, {d['of_product']:.0%}; "
        f"gate 85 %: {verdict(d)} ({where(d)}).\n\n{found}"
    )


def packing(d: dict[str, Any]) -> str:
    def bound(r: Row) -> str:
        unshared = "" if r["share"] else "not shared by the cost model"
        return f"{r['shared_bound']:.2f} ({r['of_bound']:.0%}) {verdict(r) or unshared}"

    found = columns(
        d["results"],
        {
            "profile": lambda r: r["profile"],
            "sequences": lambda r: str(r["sequences"]),
            "tokens": lambda r: str(r["tokens"]),
            "packed over padded": lambda r: f"{r['packed_gain']:.2f}",
            "budget filled": lambda r: f"{r['fill']:.0%}",
            "padding": lambda r: f"{r['waste']:.0%}",
            "shared over packed": lambda r: f"{r['shared_gain']:.2f}" if "shared_gain" in r else "",
            "bound, gate: 90 %": lambda r: bound(r) if "shared_gain" in r else "",
            "paper, 8 H100": lambda r: f"{r['paper_gain_8xH100']:.2f}" if "paper_gain_8xH100" in r else "",
            "largest error": worst,
        },
    )
    plan = d["planning"]
    return (
        f"Micro-batches of {d['budget']} tokens ({where(d)}). The six named sets are pairs at the median "
        "length and the median ratio that arXiv:2410.20305 states (no histograms there); the paper's gains "
        "are of other models on other machines.\n\n"
        f"{found}\n\nPlanning {plan['sequences']:,} sequences for {plan['ranks']} ranks: "
        f"{plan['seconds']:.2f} s, {plan['fill']:.1%} filled, imbalance {plan['imbalance']:.2%}."
    )


def train_step(d: dict[str, Any]) -> str:
    shape = d["shape"]
    found = columns(
        d["results"],
        {
            "": lambda r: r["algorithm"],
            "prompt, completion": lambda r: f"{r['prompt']}, {r['completion']}",
            "tokens (after packing)": lambda r: f"{r['tokens']} ({r['packed_tokens']})",
            "rft": lambda r: f"{r['seconds']['rft']:.2f} s",
            "TRL": lambda r: f"{r['seconds']['trl']:.2f} s" if "gain" in r else "not run",
            "gain": lambda r: f"{r['gain']:.2f}" if "gain" in r else "",
            "at least": lambda r: f"{r['gate']:.1f} {verdict(r)}" if "gain" in r else "",
            "peak, rft / TRL": lambda r: " / ".join(f"{v:.0f}" for v in r["peak_mb"].values()) + " MB",
            "gradient norms differ by": worst,
        },
    )
    peers = {f"{name} {v}" for r in d["results"] for name, v in r.get("peers", {}).items()}
    return (
        f"Whole steps with Qwen3-0.6B's widths, {shape['layers']} layers and {shape['vocabulary']:,} "
        f"tokens of vocabulary, random weights, float32, {d['machine']['threads']} thread"
        f"{'s' * (d['machine']['threads'] > 1)}, in turns with {', '.join(sorted(peers)) or 'no peer'} "
        f"({where(d)}). Prompts and completions in tokens; SFT's and DPO's vary by half around them, GRPO's "
        f"groups are of 8. Peaks are of the whole processes.\n\n{found}"
    )


def sync(d: dict[str, Any]) -> str:
    found = columns(
        d["results"],
        {
            "transport": lambda r: r["transport"],
            "changed by a step": lambda r: f"{100 * r['changed_share']:.2f}%",
            "bytes": lambda r: f"{r['bytes'] / 1e6:.1f} MB",
            "push": lambda r: f"{r['seconds'] * 1000:.0f} ms",
            "rate": lambda r: f"{r['GB_per_s']:.2f} GB/s",
            "largest log-prob gap after it": worst,
        },
    )
    return (
        f"Pauses included, one vLLM replica with weights in {d['results'][0]['dtype']}, a float32 learner at "
        f"a learning rate of 1e-6 ({where(d)}).\n\n{found}"
    )


def whole(d: dict[str, Any]) -> str:
    rows = [[f"`{command}`", f"{seconds:.0f} s"] for command, seconds in d["seconds"].items()]
    call = f"rft bench all{' --peers' * d['peers']}"
    return (
        f"The scripts of `{call}` took {d['minutes']:.1f} minutes together on {d['machine']['cores']} cores; "
        "a call that was interrupted goes on where it stopped.\n\n" + table(["script", "time"], rows)
    )
