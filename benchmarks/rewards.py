"""How often the math reward errs and how fast it is, against math-verify in the same run.

    python benchmarks/rewards.py [--peers]        # writes benchmarks/results/rewards.json

One process, one thread. Cases: GSM8K and MATH-500 gold solutions with their own and with perturbed
answers, solutions written by models, and labelled pairs of spellings. Each contestant sees the same
(completion, answer) strings. With `--peers` TRL's `accuracy_reward` runs too, from its own
environment. Then the overhead of the worker pool, and the sandbox.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "rewards")]

import math_cases  # noqa: E402
from common import RESULTS, peer_versions, use_peer, write_result  # noqa: E402
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


def sandbox_speed(n: int = 30) -> dict[str, Any]:
    from rft.sandbox import Sandbox

    with Sandbox() as sandbox:
        begin = time.perf_counter()
        for _ in range(n):
            sandbox.test("def f(x):\n    return x + 1\n", ["assert f(1) == 2"])
        return {
            "programs_per_second": round(n / (time.perf_counter() - begin), 1),
            "protections": sandbox.protections,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--peers", action="store_true", help="also TRL, from its own environment")
    args = parser.parse_args()
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
