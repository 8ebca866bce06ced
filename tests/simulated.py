"""An online run without Ray, engines or a model: the real controller, fleet, pool, channel and reward
bookkeeping, with simulated actors behind them. Milliseconds a step."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rft.checkpoint import Checkpoint
from rft.config.load import parse_config
from rft.learner.spec import LearnerInfo
from rft.loops.online import Controller, Parts
from rft.metrics import Progress, RunLog
from rft.metrics.log import read_jsonl
from rft.plan import make_plan
from rft.rewards.runner import RewardRunner
from rft.rewards.types import Outcome, Score
from rft.rollout.engine import Generated, Request
from rft.rollout.hooks import LoopHooks
from rft.rollout.pool import Member, RolloutPool
from rft.sync.channel import WeightChannel
from rft.sync.spec import Link, Sent
from rft.utils.dotted import load_dotted


class Handle:
    """An actor's handle: `handle.method.remote(*args)` starts the call and gives an awaitable."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Any:
        def remote(*args: Any) -> Any:
            return asyncio.ensure_future(getattr(self._target, name)(*args))

        return type("Method", (), {"remote": staticmethod(remote)})


class SimReplica:
    """An engine that answers after `seconds`. Methods as in rft.rollout.pool.Replica."""

    seconds = 0.0

    def __init__(self, index: int) -> None:
        self.index, self.held = index, -1

    async def generate(self, request: Request) -> list[Generated]:
        await asyncio.sleep(self.seconds)
        tokens = (10, 11)
        return [Generated(tokens, (-1.0, -1.0), "stop", ((self.held, 0, 2),))] * request.sampling.n

    async def cancel(self, request_id: str) -> None: ...

    async def join(self, link: Link) -> None: ...

    async def begin_update(self, in_flight: str) -> None: ...

    async def receive(self, update: dict[str, Any]) -> None:
        self.held = update["version"]

    async def finish_update(self, version: int) -> int:
        return self.held

    async def health(self, *_: Any) -> int:
        return 0

    async def close(self) -> None: ...


@dataclass
class SimLearner:
    """Methods as in LearnerActor. `on_step` is called with the step and may raise."""

    on_step: Callable[[int], None] = lambda step: None
    version: int = 0
    saved: list[tuple[int, dict[str, Any]]] = field(default_factory=list)  # step, meta
    batches: list[Any] = field(default_factory=list)

    async def open_channel(self, link: Link) -> None: ...

    async def reserve_address(self) -> tuple[str, int]:
        return "simulated", 0

    async def announce(self, version: int) -> dict[str, Any]:
        return {"version": version}

    async def send_weights(self) -> Sent:
        return Sent(1, 1, {})

    async def describe(self) -> LearnerInfo:
        return LearnerInfo(1, 1, "cpu", 1, "float32", 1, "simulated", self.version)

    async def step(self, batch: Any, step: int) -> dict[str, float]:
        self.on_step(step)
        self.batches.append(batch)
        self.version += 1
        return {"train/loss": 0.0, "train/grad_norm": 1.0, "train/updates": 1.0}

    async def pop_messages(self) -> list[str]:
        return []

    async def begin_save(self, root: str, step: int, keep: int, meta: dict[str, Any], _: Any) -> None:
        self.saved.append((step, meta))

    async def finish_save(self, *_: Any) -> str:
        return "simulated"

    async def restore(self, path: str) -> int:
        self.version = int(Path(path).name)
        return self.version


class SimPool(RolloutPool):
    """The real pool, with simulated actors."""

    replica: type[SimReplica] = SimReplica

    async def _start(self, index: int) -> None:
        self.members[index] = Member(Handle(self.replica(index)), next(self._serials))

    def kill(self, index: int) -> None:
        self.members.pop(index, None)


class SimRewards(RewardRunner):
    """The real runner; `judge(prompt, number of completions)` takes the place of its workers."""

    judge: Callable[[str, int], list[float | None]]

    async def start(self) -> None: ...

    async def close(self) -> None: ...

    async def _score_one(
        self, c: Any, prompts: Any, completions: Any, columns: Any, state: Any, logged: Any
    ) -> list[Score]:
        await asyncio.sleep(0)
        values = self.judge(prompts[0], len(prompts))
        outcomes = {None: Outcome.abstain, 1.0: Outcome.correct}
        return [Score(v, outcomes.get(v, Outcome.wrong)) for v in values]


def alternating(prompt: str, n: int) -> list[float | None]:
    """Every second completion is right."""
    return [float(i % 2) for i in range(n)]


@dataclass
class Run:
    """A run before it is started, and what it left."""

    controller: Controller
    learner: SimLearner
    folder: Path

    @property
    def staleness(self) -> int:
        return self.controller.config.rollout.staleness

    def rows(self) -> list[dict[str, Any]]:
        return read_jsonl(self.folder / "metrics.jsonl")

    def events(self, kind: str) -> list[dict[str, Any]]:
        return [e for e in read_jsonl(self.folder / "events.jsonl") if e["kind"] == kind]

    def go(self, resume: Checkpoint | None = None) -> dict[str, float]:
        async def body() -> dict[str, float]:
            await self.controller.parts.pool.start()
            return await asyncio.wait_for(self.controller.run(resume), 60)

        return asyncio.run(body())


def saved_checkpoint(run: Run) -> Checkpoint:
    """The newest checkpoint of a simulated run."""
    step, meta = run.learner.saved[-1]
    return Checkpoint(Path(str(step)), step, len(run.learner.saved), json.loads(json.dumps(meta)))


@contextmanager
def simulated(
    folder: Path,
    judge: Callable[[str, int], list[float | None]] = alternating,
    replica: type[SimReplica] = SimReplica,
    learner: SimLearner | None = None,
    resumed_at: int | None = None,
    **sections: Any,
) -> Iterator[Run]:
    """A run of the arithmetic task; `sections` are laid over its config. resumed_at: as in RunLog."""
    config: dict[str, Any] = {
        "name": "run",
        "output_dir": str(folder),
        "algorithm": "grpo",
        "data": {"kind": "arithmetic", "limit": 512},
        "rewards": [{"function": "math"}],
        "train": {"steps": 4, "batch_size": 4, "num_generations": 4},
        "rollout": {"engine": "hf"},
        "sync": {"timeout_s": 10},
        "eval": {"every": 0},
        "checkpoint": {"every": 0},
        "tracking": {"display": "off", "trackers": []},
    }
    for name, values in sections.items():
        both = isinstance(values, dict) and isinstance(config.get(name), dict)
        config[name] = {**config[name], **values} if both else values
    plan = make_plan(parse_config(config))
    c = plan.config
    pool = SimPool(plan.engine_spec())
    pool.replica = replica
    learner = learner or SimLearner()
    channel = WeightChannel(learner, pool, plan.channel_spec(), "keep")
    log = RunLog(c.run_dir, c.train.steps, c.tracking, resumed_at=resumed_at, config=c.to_dict())
    rewards = SimRewards(c.rewards, folder)
    rewards.judge = judge
    start = c.algorithm.hooks
    hooks = asyncio.run(load_dotted(start)(c, c.run_dir, None)) if start else LoopHooks()
    with Progress(c.train.steps, c.name, display="off") as progress:
        parts = Parts(learner, pool, channel, rewards, log, progress, hooks)
        yield Run(Controller(plan, parts, folder / "checkpoints"), learner, c.run_dir)
    log.close("done")
