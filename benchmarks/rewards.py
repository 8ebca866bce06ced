"""How often the math reward errs and how fast it is, against math-verify in the same run.

    python benchmarks/rewards.py [--peers] [--sandbox]        # writes benchmarks/results/rewards.json

One process, one thread. Cases: GSM8K and MATH-500 gold solutions with their own and with perturbed
answers, solutions written by models, and labelled pairs of spellings. Each contestant sees the same
(completion, answer) strings. With `--peers` TRL's `accuracy_reward` runs too, from its own
environment. Then the overhead of the worker pool, and the sandbox against the one
before `rft.sandbox` (from the repository's history).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "rewards")]

import math_cases  # noqa: E402
from common import RESULTS, machine, peer_versions, use_peer, write_result  # noqa: E402
from equivalences import CASES  # noqa: E402
from math_cases import Case  # noqa: E402

from rft.config.rewards import RewardConfig, RewardsConfig  # noqa: E402
from rft.rewards import load_reward  # noqa: E402
from rft.rewards.math import gold_answer, warm_up  # noqa: E402
from rft.rewards.runner import RewardRunner  # noqa: E402

Judge = Callable[[Sequence[str], Sequence[str]], list[float | None]]


def rft_math() -> Judge:
    reward: Any = load_reward("math")
    warm_up()
    return lambda completions, answers: [
        s.value for s in reward.score([""] * len(completions), completions, answer=answers)
    ]


def math_verify() -> Judge:
    """As its documentation uses it: parse both, verify; the gold in dollars where it is bare LaTeX."""
    from math_verify import parse, verify

    def one(completion: str, answer: str) -> float:
        gold = parse(answer) if "####" in answer or "$" in answer else parse(f"${answer}$")
        return float(verify(gold, parse(completion)))

    return lambda completions, answers: [one(c, a) for c, a in zip(completions, answers, strict=True)]


def trl_accuracy() -> Judge:
    """TRL's reward takes messages and a column `solution`. It reads answers in LaTeX only, so it cannot
    see a completion's `#### 18`; the suite `gsm8k_boxed` is within its terms."""
    use_peer("trl")
    from trl.rewards import accuracy_reward

    def judge(completions: Sequence[str], answers: Sequence[str]) -> list[float | None]:
        messages = [[{"role": "assistant", "content": c}] for c in completions]
        golds = [f"${gold_answer(a)}$" for a in answers]  # it reads LaTeX only
        return list(accuracy_reward(messages, golds))

    return judge


def measure(judge: Judge, cases: Sequence[Case]) -> dict[str, float]:
    """Error counts, and calls per second of CPU time (one core; the load of the machine drops out)."""
    completions, answers = [c.completion for c in cases], [c.answer for c in cases]
    start = time.process_time()
    values = judge(completions, answers)
    seconds = time.process_time() - start
    pairs = list(zip(cases, values, strict=True))
    return {
        "cases": len(cases),
        "false_negatives": sum(c.right and v != 1 for c, v in pairs),
        "false_positives": sum(not c.right and v == 1 for c, v in pairs),
        "calls_per_second": round(len(cases) / seconds, 1),
    }


def suites() -> dict[str, list[Case]]:
    gsm_right, gsm_wrong = math_cases.gsm8k()
    math_right, math_wrong = math_cases.math500()
    return {
        "gsm8k_gold": gsm_right[-1319:],
        "gsm8k_perturbed": gsm_wrong[-2 * 1319 :],
        "gsm8k_boxed": [
            Case(rf"So the answer is $\boxed{{{gold_answer(c.answer)}}}$.", c.answer, True)
            for c in gsm_right[-1319:]
        ],
        "gsm8k_models": math_cases.model_solutions(),
        "math500_gold": math_right,
        "math500_perturbed": math_wrong,
        "spellings": [Case(rf"So it is $\boxed{{{a}}}$.", g, same) for _, g, a, same in CASES],
    }


async def pool_overhead(n: int = 256, rounds: int = 20) -> dict[str, float]:
    """Seconds for a step's worth of short completions, through two workers and in process."""
    completions, columns = ["The answer is 12."] * n, {"answer": ["12"] * n}
    start = time.perf_counter()
    async with RewardRunner(RewardsConfig(functions=[RewardConfig(function="math")])) as runner:
        await runner.start()
        started = time.perf_counter() - start
        times = []
        for _ in range(rounds):
            begin = time.perf_counter()
            await runner.score(["p"] * n, completions, columns)
            times.append(time.perf_counter() - begin)
    reward = load_reward("math")
    begin = time.perf_counter()
    reward(prompts=["p"] * n, completions=completions, answer=["12"] * n)
    inside = time.perf_counter() - begin
    return {
        "start_s": started,
        "pool_s": sorted(times)[rounds // 2],
        "in_process_s": inside,
        "completions": n,
    }


BASELINE = "1a308a4"  # the last commit with the sandbox before `rft.sandbox`
ASKED = """
import sys, time
from {module} import Sandbox
sandbox = Sandbox({options})
requests = {{
    "run": lambda: sandbox.run("print(1)"),
    "test": lambda: sandbox.test("def f(x):\\n    return x + 1\\n", ["assert f(1) == 2"]),
}}
for line in sys.stdin:
    begin = time.perf_counter()
    requests[line.strip()]()
    print(time.perf_counter() - begin, flush=True)
"""


def sandbox_speed(rounds: int = 4, n: int = 80) -> dict[str, Any]:
    """Milliseconds of a request, and the throughput as a share of the old sandbox's, in this run.

    The contestants answer by turns, request by request, so that the load of the machine is the same for all.
    """
    with tempfile.TemporaryDirectory() as old, contextlib.ExitStack() as stack:
        archive = subprocess.run(
            ["git", "archive", BASELINE, "rft"], cwd=ROOT, check=True, capture_output=True
        )
        subprocess.run(["tar", "x", "-C", old], input=archive.stdout, check=True)
        contestants = {BASELINE: _contestant(stack, Path(old), "rft.rewards.sandbox", "")}
        for backend in ("native", "bubblewrap"):
            if backend == "native" or shutil.which("bwrap"):
                contestants[backend] = _contestant(stack, ROOT, "rft.sandbox", f"backend={backend!r}")
        result: dict[str, Any] = {"load_average": os.getloadavg()[0]}
        for request in ("run", "test"):
            medians: dict[str, list[float]] = {name: [] for name in contestants}
            for _ in range(rounds):
                times: dict[str, list[float]] = {name: [] for name in contestants}
                for _ in range(n):
                    for name, process in contestants.items():
                        times[name].append(_asked(process, request))
                for name, values in times.items():
                    medians[name].append(statistics.median(values))
            result[request] = {
                name: {
                    "ms": [round(1000 * m, 2) for m in values],
                    "throughput_of_baseline": round(
                        statistics.median(
                            old_ms / m for old_ms, m in zip(medians[BASELINE], values, strict=True)
                        ),
                        3,
                    ),
                }
                for name, values in medians.items()
            }
    return result


def _contestant(stack: contextlib.ExitStack, root: Path, module: str, options: str) -> subprocess.Popen[str]:
    process = stack.enter_context(
        subprocess.Popen(
            [sys.executable, "-c", ASKED.format(module=module, options=options)],
            cwd=root,
            env={**os.environ, "PYTHONPATH": str(root)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
    )
    stack.callback(process.kill)
    for request in ("run", "test") * 5:
        _asked(process, request)
    return process


def _asked(process: subprocess.Popen[str], request: str) -> float:
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(request + "\n")
    process.stdin.flush()
    return float(process.stdout.readline())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--peers", action="store_true", help="also TRL, from its own environment")
    parser.add_argument("--sandbox", action="store_true", help="only the sandbox; the other results stay")
    args = parser.parse_args()
    if args.sandbox:
        earlier = json.loads((RESULTS / "rewards.json").read_text())
        speed = {"machine": machine(), **sandbox_speed()}
        print(json.dumps(speed, indent=1))
        (RESULTS / "rewards.json").write_text(json.dumps({**earlier, "sandbox": speed}, indent=1) + "\n")
        return
    logging.disable(logging.WARNING)
    contestants: dict[str, Judge] = {"rft": rft_math(), "math-verify": math_verify()}
    if args.peers:
        contestants["trl accuracy_reward"] = trl_accuracy()
    result: dict[str, Any] = {"math": {}}
    print(f"{'suite':18s} {'judge':20s} {'cases':>6s} {'missed':>7s} {'fooled':>7s} {'calls/s':>9s}")
    for suite, cases in suites().items():
        result["math"][suite] = {}
        for name, judge in contestants.items():
            row = measure(judge, cases)
            result["math"][suite][name] = row
            print(
                f"{suite:18s} {name:20s} {row['cases']:6.0f} {row['false_negatives']:7.0f} "
                f"{row['false_positives']:7.0f} {row['calls_per_second']:9.0f}",
                flush=True,
            )
    result["pool"] = asyncio.run(pool_overhead())
    result["sandbox"] = sandbox_speed()
    print(json.dumps({k: result[k] for k in ("pool", "sandbox")}, indent=1))
    if args.peers:
        result["peers"] = peer_versions("trl", "trl")
    write_result(RESULTS / "rewards.json", result, "math-verify")


if __name__ == "__main__":
    main()
