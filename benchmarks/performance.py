"""Write docs/performance.md from benchmarks/results/*.json: python benchmarks/performance.py

Every figure comes from a results file; what was not measured is said to be so.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict[str, Any] | None:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def demo(d: dict[str, Any]) -> str:
    rows = [
        [
            str(r["seed"]),
            f"{r['before']:.1%}",
            f"{r['after']:.1%}",
            f"{r['greedy_before']:.1%}",
            f"{r['greedy_after']:.1%}",
            f"{r['largest_gap']:.1e}",
            f"{r['step_seconds']:.2f} s",
        ]
        for r in d["runs"]
    ]
    head = [
        "seed",
        "accuracy before",
        "after",
        "greedy before",
        "after",
        "largest log-prob gap",
        "median step",
    ]
    note = (
        f"Held-out accuracy over {d['problems']} problems x {d['samples']} samples at temperature 1, "
        f"{d['steps']} GRPO steps of {d['completions']} completions. Machine: {d['machine']}. {d['note']}"
    )
    return f"{note}\n\n{table(head, rows)}\n\n![learning curves](images/arithmetic.png)"


def step_time(d: dict[str, Any]) -> str:
    seconds, best = d["seconds_per_step"], d["trl_best"]
    rows = [
        [n, f"{s:.3f} s", f"{s / seconds['rft']:.2f}", f"{d['completion_length'][n]:.1f}"]
        for n, s in seconds.items()
    ]
    verdict = "met" if d["ratio"] >= 2 else "**missed**"
    parts = d["rft_parts"][-1]
    where = ", ".join(f"{k} {v:.3f} s" for k, v in parts.items() if k != "step")
    return (
        f"Seconds per GRPO step on the demo's sizes, interleaved in one run on {d['machine']['cpu']}, "
        f"{d['machine']['cores']} cores, TRL {d['versions']['trl']}. "
        f"rft is {d['ratio']:.2f}x as fast as {best}; "
        f"aim 2.0: {verdict}. Where rft's step goes: {where}.\n\n"
        + table(["", "a step", "over rft", "tokens per completion"], rows)
    )


def logprob(d: dict[str, Any]) -> str:
    parts = []
    for case in d["results"]:
        rows = [
            [
                r["contender"],
                f"{r['ratio']:.2f}",
                f"{r['gate']:.2f}" if r.get("gate") else "",
                {True: "met", False: "**missed**"}.get(r.get("passed"), ""),
                f"{r['workspace_mb']:.0f} MB",
                f"{max(r['errors'].values()):.1e}",
            ]
            for r in case["rows_of_table"]
        ]
        size = f"{case['rows']} x {case['width']} x {case['vocab']}"
        title = f"{case['dtype']}, {size}, {case['threads']} thread(s)"
        head = [title, "over bare products", "gate", "", "workspace", "largest error"]
        parts.append(table(head, rows))
    m = d["machine"]
    where = f"{m['processor']}, {m['capability']}, bfloat16 arithmetic: {m['bfloat16_arithmetic']}"
    return (
        f"Time over the bare matrix products of the same round ({where}).\n\n"
        + "\n\n".join(parts)
        + "\n\nThe Triton kernels are correct under the interpreter; their speed on a GPU is **unmeasured**."
    )


def parity(d: dict[str, Any]) -> str:
    rows = [[r["loss"], str(r["inputs"]), f"{r['difference']:.1e}", r["reason"] or ""] for r in d["rows"]]
    return f"Identical tensors to both, {', '.join(d['peer'])}, float32, bound {d['bound']:g}.\n\n" + table(
        ["loss", "inputs", "largest relative difference", "reason where above"], rows
    )


def rewards(d: dict[str, Any]) -> str:
    rows = [
        [
            suite,
            who,
            str(r["cases"]),
            str(r["false_negatives"]),
            str(r["false_positives"]),
            f"{r['calls_per_second']:,.0f}",
        ]
        for suite, contestants in d["math"].items()
        for who, r in contestants.items()
    ]
    return table(["cases", "", "number", "false negatives", "false positives", "calls/s"], rows)


SECTIONS: list[tuple[str, str, str, Callable[[dict[str, Any]], str]]] = [
    ("The demo", "demo", "python benchmarks/demo.py RUN...", demo),
    ("A GRPO step against TRL", "step-time-cpu", "python benchmarks/step_time.py", step_time),
    ("Fused log-probs on CPU", "logprob-cpu", "python benchmarks/logprob.py", logprob),
    ("Math rewards", "rewards", "python benchmarks/rewards.py", rewards),
    ("Parity with TRL's losses", "parity-trl", "python benchmarks/parity_trl.py", parity),
]


def page() -> str:
    out = ["# Performance", "", "Made by `python benchmarks/performance.py` from `benchmarks/results/`.", ""]
    for title, name, command, render in SECTIONS:
        found = load(name)
        body = render(found) if found else f"**Unmeasured.** `{command}` measures it."
        out += [f"## {title}", "", f"`{command}`", "", body, ""]
    out += ["## GPUs", "", "**Unmeasured**: no figure on this page comes from a GPU.", ""]
    return "\n".join(out)


if __name__ == "__main__":
    (ROOT / "docs" / "performance.md").write_text(page())
    print(ROOT / "docs" / "performance.md")
