"""Play sessions exactly as a run does, and record each operation of the environment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rft.algorithms.base import Rollout
from rft.batch import Prompt
from rft.config.environment import EnvironmentConfig
from rft.data.chat import Renderer
from rft.environments.runner import KINDS, EnvironmentRunner, Remote, Worker
from rft.environments.types import Ending, EnvironmentFault, Episode, Reply, Row
from rft.rewards.runner import RewardRunner
from rft.rollout.calls import Call
from rft.rollout.engine import Sampling
from rft.rollout.episodes import EpisodeSampler
from rft.rollout.session import Budget, Session
from rft.tools.env_check.policies import Policy
from rft.utils.process import memory_of_trees


@dataclass(frozen=True)
class Operation:
    """An operation of the environment's worker. seconds: without the model calls in it. tool: the name of
    the tool that it called. error: as the policy reads it; traceback: of the user's code, "" if none."""

    name: str
    seconds: float
    tool: str = ""
    error: str = ""
    traceback: str = ""


@dataclass
class Run:
    """One session that was played. seed: of its row; the seed of the session follows from it.

    start_s, end_s: until its worker was ready, and from the end of the episode until the worker was free.
    memory: bytes of the worker beside those that it shares. state: hashes of the variables that the session
    found (`hosts.py`). reward: as it would be trained on; None: none, or the session failed.
    """

    policy: str
    prompt: Prompt
    name: str
    seed: int
    episode: Episode = field(default_factory=lambda: Episode(None, Ending.environment_error))
    calls: Sequence[Call] = ()
    operations: list[Operation] = field(default_factory=list)
    start_s: float = 0.0
    end_s: float = 0.0
    memory: int = 0
    state: dict[str, str] = field(default_factory=dict)
    reward: float | None = None
    failed_rewards: dict[str, str] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return self.episode.failed

    @property
    def context(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max((len(c.prompt) + len(c.sampled) for c in self.calls), default=0)


class WatchedRunner(EnvironmentRunner):
    """A runner of episodes that records them in `runs`, by the name of the session.

    reuse: give a session's worker to the next one, as a run does; otherwise each session gets a new process.
    states: record the state that sessions find.
    """

    def __init__(self, config: EnvironmentConfig, base_dir: Path) -> None:
        super().__init__(config, base_dir)
        host = KINDS[config.kind].replace(".", "__")
        self.spec = replace(self.spec, host=f"rft.tools.env_check.hosts.{host}")
        self.runs: dict[str, Run] = {}
        self.policies: dict[str, Policy] = {}
        self.reuse = self.states = False

    async def run(self, row: Row, session: Any) -> Episode:
        run, policy = self.runs[session.name], self.policies[session.name]
        try:
            run.episode = await super().run(row, Noticed(session, policy))
        except EnvironmentFault as fault:  # it would stop a run: here the others go on
            run.episode = Episode(None, Ending.environment_error, detail=str(fault))
        run.calls = session.calls
        return run.episode

    async def _play(self, row: Row, session: Any, remote: Remote) -> Episode:
        watched = WatchedRemote(self, session, self.runs[session.name])
        try:
            return await super()._play(row, session, watched)
        finally:
            await asyncio.shield(watched.finish())

    async def give_back(self, worker: Worker, *, clean: bool) -> None:
        await super().give_back(worker, clean=clean and self.reuse)

    def memory_of(self, pid: int) -> int:
        """Return the bytes of a worker with its children, beside those that it shares with its zygote."""
        assert self._zygote is not None
        return memory_of_trees([pid], shared_with=self._zygote.process.pid)[pid]


class Noticed(Session):
    """The same session, which also records the tools that an environment passes with a call."""

    def __init__(self, session: Session, policy: Policy) -> None:
        self.__dict__ = vars(session)  # one state
        self.policy = policy

    async def chat(self, messages: Sequence[Any], *, tools: Any = None, **more: Any) -> Reply:
        self.policy.notice(self.name, tools or ())
        return await super().chat(messages, tools=tools, **more)


class WatchedRemote(Remote):
    """The worker of one episode, whose operations are recorded."""

    def __init__(self, runner: WatchedRunner, session: Any, run: Run) -> None:
        super().__init__(runner, session)
        self.watcher, self.run = runner, run

    async def _begin(self) -> None:
        """Start the worker, and measure it."""
        begin = time.perf_counter()
        await super().call("ready", setup=True)
        self.run.start_s = time.perf_counter() - begin
        if self.watcher.states and self.runner.config.kind in ("tools", "function"):
            self.run.state = await super().call("state")

    async def call(self, operation: str, *arguments: Any, setup: bool = False) -> Any:
        tool = arguments[0] if operation == "call" else ""
        error = traceback = ""
        if self._worker is None and not self.run.operations:
            await self._begin()
        before = self.seconds
        try:
            result = await super().call(operation, *arguments, setup=setup)
            if tool and "error" in result:
                error, traceback = result["error"], result.get("traceback", "")
        except Exception as problem:
            error = str(problem) or type(problem).__name__
            raise
        finally:
            spent = self.seconds - before
            self.run.operations.append(Operation(operation, spent, tool, error, traceback))
        if operation == "reset" and self.watcher.states:
            self.run.state = await super().call("state")
        return result

    async def finish(self) -> None:
        if self._worker is None:
            return
        self.run.memory = self.watcher.memory_of(self._worker.pid)
        begin = time.perf_counter()
        await self.release()
        self.run.end_s = time.perf_counter() - begin


@dataclass
class Player:
    """Play rows with a policy, through the code of a run."""

    config: EnvironmentConfig
    render: Renderer
    budget: Budget
    parser: str | None
    rewards: RewardRunner | None

    async def play(
        self, runner: WatchedRunner, policy: Policy, prompt: Prompt, name: str, n: int, seed: int
    ) -> list[Run]:
        """Play `n` sessions of a row. The seeds of sessions follow from `seed` alone."""
        budget = replace(self.budget, tokens_per_turn=min(self.budget.tokens_per_turn, policy.longest))
        once = self.config.model_copy(update={"max_retries": 0})
        sampler = EpisodeSampler(runner, policy.generate, self.render, once, budget, self.parser)
        runs = [Run(policy.name, prompt, f"{name}-{place}", seed) for place in range(n)]
        for run in runs:
            runner.runs[run.name], runner.policies[run.name] = run, policy
            policy.begin(run.name, prompt, runner.tools)
        sampling = Sampling(n, self.budget.tokens_per_turn, seed=seed)
        played = await sampler.sample(name, prompt, [Rollout()] * n, sampling)
        kept = [run for run in runs if not run.failed and any(c.sampled for c in run.calls)]
        judged = await sampler.judge(played, self.rewards)
        for run, reward in zip(kept, judged.rewards, strict=True):
            run.reward = reward.value
            run.failed_rewards = {k: s.detail for k, s in reward.scores.items() if s.failed}
        return runs
