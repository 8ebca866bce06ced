"""The real controller against simulated engines and a simulated learner: 8 to 4096 replicas.

    python benchmarks/scale_sim.py [--replicas 8 64 512 4096] [--steps 4] [--profile]

Real: Controller, SlotBuffer, Fleet, RolloutPool, WeightChannel, the reward runner's bookkeeping, batch
building, metrics, run log, tokenizer. Simulated: the actors (engines, learner) and the
reward workers. What an answer costs the receiving process is paid: every group of completions is unpickled,
every batch pickled. Ray's own cost of a call is not, and neither is the writing to reward workers' pipes.

Time is virtual where nothing happens and real where something is computed: the loop's clock is this
process's CPU time plus the waits, and a wait costs nothing, since the clock jumps to the next timer. So a
busy controller delays everything that waits for it, as it would in a run, and other programs on the machine
do not. The CPU time of a step is all that this process used, the simulation's own random draws and timers
included: an upper bound of the controller's.

Latencies: a completion's seconds are lognormal (median 20 s, sigma 0.7: mean 26 s, one in a thousand beyond
170 s); a group ends with its last completion. A step of the learner takes 20 s, a push 2 s.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import pickle
import random
import resource
import selectors
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, write_result

from rft.config.load import parse_config
from rft.loops.online import Controller, Parts
from rft.metrics import Progress, RunLog
from rft.plan import Plan, make_plan
from rft.rewards.runner import RewardRunner
from rft.rewards.types import Outcome, Score
from rft.rollout.engine import Generated, Request
from rft.rollout.pool import Member, RolloutPool
from rft.sync.channel import WeightChannel
from rft.sync.spec import Link, Sent
from rft.utils.deadlines import within

GENERATION = 16  # completions of a group
TEMPLATES = 64
SETTINGS: dict[int, dict[str, int]] = {
    # replicas: groups a step for each replica, tokens of a completion (median)
    8: {"groups": 8, "tokens": 256},
    64: {"groups": 2, "tokens": 256},
    512: {"groups": 1, "tokens": 256},
    4096: {"groups": 1, "tokens": 32},
}
LEARNER_SECONDS, PUSH_SECONDS, REWARD_SECONDS = 20.0, 2.0, 0.05


# -- time ----------------------------------------------------------------------------------------------


class Jump(selectors.DefaultSelector):  # type: ignore[misc, valid-type]
    """A selector that does not wait for timers: it moves the clock on."""

    jumped = 0.0

    def select(self, timeout: float | None = None) -> Any:
        ready = super().select(0)
        if ready or (timeout is not None and timeout <= 0):
            return ready
        if timeout is None:  # no timer either: only another thread could wake the loop
            ready = super().select(10)
            if not ready:
                raise RuntimeError("the simulation stands still: nothing is due and nothing runs")
            return ready
        self.jumped += timeout
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock is CPU time plus skipped waits."""

    def __init__(self) -> None:
        self.jump = Jump()
        super().__init__(self.jump)

    def time(self) -> float:
        return time.process_time() + self.jump.jumped


# -- what is simulated -----------------------------------------------------------------------------------


class Remote:
    """An actor's handle: `handle.method.remote(*args)` gives an awaitable."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._target, name)
        return type("Method", (), {"remote": staticmethod(method)})


class SimReplica:
    """An engine's latencies. Methods as in rft.rollout.pool.Replica."""

    def __init__(self, index: int, templates: list[bytes]) -> None:
        self.dice, self.templates, self.held = random.Random(index), templates, -1

    async def whereabouts(self) -> tuple[str, int]:
        return "simulated", 0

    async def start(self) -> None: ...

    async def generate(self, request: Request) -> list[Generated]:
        pickle.dumps(request)
        draws = (self.dice.lognormvariate(3.0, 0.7) for _ in range(request.sampling.n))
        await asyncio.sleep(max(draws))
        answer: list[Generated] = pickle.loads(self.dice.choice(self.templates))
        return answer

    async def join(self, link: Link) -> None: ...

    async def begin_update(self, in_flight: str) -> None: ...

    async def receive(self, update: dict[str, Any]) -> None:
        await asyncio.sleep(PUSH_SECONDS)
        self.held = update["version"]

    async def finish_update(self, version: int) -> int:
        return self.held

    async def health(self, *_: Any) -> int:
        return 0

    def cancel(self, request_id: str) -> None: ...

    async def close(self) -> None: ...


@dataclass
class SimLearner:
    """A learner's latencies, and a mark for every step. Methods as in LearnerActor."""

    marks: list[tuple[float, float, int]] = field(default_factory=list)  # virtual, CPU seconds, sequences

    async def open_channel(self, link: Link) -> None: ...

    async def reserve_address(self) -> tuple[str, int]:
        return "simulated", 0

    async def announce(self, version: int) -> dict[str, Any]:
        return {"version": version}

    async def send_weights(self) -> Sent:
        await asyncio.sleep(PUSH_SECONDS)
        return Sent(1, 1, {})

    async def step(self, batch: Any, step: int) -> dict[str, float]:
        pickle.dumps(batch, 5)
        self.marks.append((asyncio.get_running_loop().time(), time.process_time(), batch.num_sequences))
        await asyncio.sleep(LEARNER_SECONDS)
        return {"train/loss": 0.0, "train/grad_norm": 1.0, "policy/entropy": 1.0}

    async def pop_messages(self) -> list[str]:
        return []

    async def begin_save(self, *_: Any) -> None: ...

    async def finish_save(self, *_: Any) -> str:
        return "simulated"


class SimPool(RolloutPool):
    """The real pool, with simulated actors."""

    templates: list[bytes]

    async def _start(self, index: int) -> None:
        self.members[index] = Member(Remote(SimReplica(index, self.templates)), next(self._serials))

    def kill(self, index: int) -> None:
        self.members.pop(index, None)


class SimRewards(RewardRunner):
    """The real runner, with simulated workers."""

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def _score_one(self, c: Any, prompts: Any, completions: Any, columns: Any) -> list[Score]:
        await asyncio.sleep(REWARD_SECONDS)
        return [Score(float(i % 2), Outcome.correct if i % 2 else Outcome.wrong) for i in range(len(prompts))]


def answers(plan: Plan, median_tokens: int) -> Iterator[bytes]:
    """Pickled groups, as they would come from an actor."""
    dice, ids = random.Random(0), list(range(10, plan.shape.vocab))
    for _ in range(TEMPLATES):
        group = []
        for _ in range(GENERATION):
            n = min(max(1, int(dice.lognormvariate(0, 0.5) * median_tokens)), 4 * median_tokens)
            logps = tuple(-dice.random() for _ in range(n))
            group.append(Generated(tuple(dice.choices(ids, k=n)), logps, "stop", ((0, 0, n),)))
        yield pickle.dumps(group, 5)


# -- one size --------------------------------------------------------------------------------------------


def make(replicas: int, steps: int, work: Path) -> Plan:
    groups = SETTINGS[replicas]["groups"] * replicas
    return make_plan(
        parse_config(
            {
                "name": f"replicas-{replicas}",
                "output_dir": str(work),
                "algorithm": "grpo",
                "data": {"kind": "arithmetic", "limit": max(2 * groups, 256)},
                "rewards": [{"function": "math"}],
                "train": {"steps": steps, "batch_size": groups, "num_generations": GENERATION},
                "rollout": {
                    "engine": "hf",
                    "replicas": replicas,
                    "staleness": 1,
                    "health_every_s": 30,
                    "generate_timeout_s": 1e6,
                },
                "eval": {"every": 0},
                "sync": {"timeout_s": 600},
                "checkpoint": {"every": 0},
                "tracking": {"display": "plain"},
            }
        )
    )


async def simulate(plan: Plan, tokens: int, work: Path, profile: cProfile.Profile | None) -> dict[str, Any]:
    config = plan.config
    SimPool.templates = list(answers(plan, tokens))
    pool = SimPool(plan.engine_spec())
    learner = SimLearner()
    channel = WeightChannel(learner, pool, plan.channel_spec(), "keep")
    log = RunLog(work / config.name, config.train.steps, config.tracking, config=config.to_dict())
    with Progress(config.train.steps, config.name, display="quiet") as progress:
        rewards = SimRewards(config.rewards, work)
        parts = Parts(learner, pool, channel, rewards, log, progress)
        await pool.start()
        controller = Controller(plan, parts, work / "checkpoints")
        if profile is not None:
            profile.enable()
        await within(1e9, "the simulation", controller.run(None))
        if profile is not None:
            profile.disable()
    log.close("done")
    return summary(plan, learner.marks, tokens)


def summary(plan: Plan, marks: list[tuple[float, float, int]], tokens: int) -> dict[str, Any]:
    """Figures of the steps after the first, each from one call of the learner to the next."""
    (start, cpu_start, _), (end, cpu_end, _) = marks[0], marks[-1]
    steps, groups = len(marks) - 1, plan.config.train.batch_size
    cpu, wall = (cpu_end - cpu_start) / steps, (end - start) / steps
    return {
        "replicas": plan.config.rollout.replicas,
        "groups_in_flight": 2 * groups,
        "requests_in_flight": 2 * groups * GENERATION,
        "groups_a_step": groups,
        "completions_a_step": groups * GENERATION,
        "median_tokens": tokens,
        "step_s": round(wall, 2),
        "controller_cpu_s": round(cpu, 3),
        "controller_share": round(cpu / wall, 4),
        "groups_per_cpu_s": round(groups / cpu, 1),
        "completions_per_cpu_s": round(groups * GENERATION / cpu, 0),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 0),
        "steps": steps,
    }


def one(replicas: int, steps: int, profile: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    recorder = cProfile.Profile() if profile else None
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        loop = VirtualLoop()
        try:
            plan = make(replicas, steps, work)
            row = loop.run_until_complete(simulate(plan, SETTINGS[replicas]["tokens"], work, recorder))
        finally:
            loop.close()
    if recorder is not None:
        import pstats

        pstats.Stats(recorder).sort_stats("tottime").print_stats(35)
    print(row, flush=True)
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--replicas", type=int, nargs="+", default=list(SETTINGS), choices=list(SETTINGS))
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS / "scale-sim.json")
    args = parser.parse_args()
    rows = []
    for replicas in sorted(args.replicas):
        rows.append(one(replicas, args.steps, args.profile))
        if not args.profile:  # finished sizes are kept if a larger one does not end in time
            write_result(args.out, {"what": (__doc__ or "").split("\n\n", 2)[2], "results": rows})


if __name__ == "__main__":
    main()
