"""Run rewards in Ray actors, on another machine or on a dedicated GPU."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any

from rft.rewards.load import load_spec
from rft.rewards.pool import Loaded, Logged, Spec
from rft.rewards.types import Outcome, RewardError, Score, Text, TrainerState
from rft.rewards.worker import Call, decode, encode
from rft.utils.signals import STOP_SIGNALS


class RewardActor:
    """Ray actor that loads one reward function and scores with it."""

    def __init__(self, function: str, options: dict[str, Any], base_dir: str, payload: bytes | None) -> None:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # for the reward's children; see worker.py
        os.environ.pop("PYTHONSAFEPATH", None)  # meant for rft's processes, not for a reward's children
        self.reward: Any = load_spec(function, options, base_dir, payload)

    def loaded(self) -> tuple[Any, ...]:
        """Return the fields of `Loaded`, and the process id."""
        r = self.reward
        return r.columns, r.required, r.any_of, r.per_sample, r.reads_environments, os.getpid()

    def score(
        self,
        prompts: Any,
        completions: Any,
        columns: dict[str, Any],
        batch: int,
        state: TrainerState | None,
    ) -> tuple[list[Any], Logged]:
        """Return the encoded scores of a call, and the values passed to `log_metric`.

        An exception of the function gives its samples the outcome `error`.
        """
        scores: list[Score] = []
        logged: Logged = {}
        call = Call(lambda first, part: scores.extend(part), lambda index: None, logged.update)
        call.run(self.reward, prompts, completions, columns, batch, state)
        return encode(scores), logged


class ActorPool:
    """One Ray actor with the interface of `WorkerPool`.

    The actor is replaced after a crash or a call that exceeds its deadline. Needs `ray.init` before `start`.
    """

    def __init__(self, spec: Spec, num_cpus: float, num_gpus: float, start_timeout_s: float = 120.0) -> None:
        self.spec = spec
        self.num_cpus, self.num_gpus = num_cpus, num_gpus
        self.start_timeout_s = start_timeout_s
        self.counts = {"started": 0, "killed": 0, "crashed": 0, "recycled": 0}
        self.loaded: list[Loaded] = []
        self.pids: list[int] = []
        self._actor: Any = None
        self._making = asyncio.Lock()
        self._one_call = asyncio.Lock()  # one call at a time: waiting for others must not use up the deadline

    async def start(self) -> None:
        """Create the actor and wait until it has loaded the reward. Raises RewardError on failure."""
        async with self._making:
            if self._actor is None:
                await self._make()

    async def _make(self) -> None:
        import ray

        if not ray.is_initialized():
            raise RewardError("a reward with `actor` needs Ray: call ray.init() before the rewards start")
        remote = ray.remote(RewardActor).options(num_cpus=self.num_cpus, num_gpus=self.num_gpus)
        spec = self.spec
        actor: Any = remote.remote(spec.function, dict(spec.options), str(spec.base_dir), spec.payload)
        try:
            *facts, pid = await asyncio.wait_for(actor.loaded.remote(), self.start_timeout_s)
        except TimeoutError:
            ray.kill(actor)
            wanted = f"{self.num_cpus:g} CPUs, {self.num_gpus:g} GPUs"
            waited = f"{self.start_timeout_s:g} s"
            raise RewardError(
                f"the actor of {self.spec.function} ({wanted}) was not ready within {waited}"
            ) from None
        except ray.exceptions.RayError as error:
            raise RewardError(f"the actor of {self.spec.function} could not load it:\n{error}") from None
        self.loaded, self.pids, self._actor = [Loaded(*facts)], [pid], actor
        self.counts["started"] += 1

    async def score(
        self,
        spec: int,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        columns: Mapping[str, Sequence[Any]],
        state: TrainerState | None = None,
        logged: Logged | None = None,
    ) -> list[Score]:
        """Return one Score per completion. A hang is a `timeout` of the whole call, a crash an `error`."""
        if not completions:
            return []
        given_up = asyncio.Event()
        judging = self._judge(
            list(prompts), list(completions), columns, state, {} if logged is None else logged, given_up
        )
        try:
            return await asyncio.shield(asyncio.create_task(judging))
        except asyncio.CancelledError:
            given_up.set()  # a call that has started keeps its deadline: the next one waits for the actor
            raise

    async def _judge(
        self,
        prompts: list[Text],
        completions: list[Text],
        columns: Mapping[str, Sequence[Any]],
        state: TrainerState | None,
        logged: Logged,
        given_up: asyncio.Event,
    ) -> list[Score]:
        import ray

        async with self._one_call:
            if given_up.is_set():
                return []
            await self.start()
            wanted = self.loaded[0].columns
            given = {k: v for k, v in columns.items() if wanted is None or k in wanted}
            actor, batch = self._actor, self.spec.batch_size or len(completions)
            try:
                reply = actor.score.remote(prompts, completions, given, batch, state)
                rows, new = await asyncio.wait_for(reply, self.spec.timeout_s)
                for name, values in new.items():
                    logged.setdefault(name, []).extend(values)
                return decode(rows)
            except TimeoutError:
                self.counts["killed"] += 1
                await self._drop(actor)
                detail = f"no result within timeout_s = {self.spec.timeout_s:g} s; its actor was killed"
                return [Score(None, Outcome.timeout, detail)] * len(completions)
            except ray.exceptions.RayActorError as error:
                self.counts["crashed"] += 1
                await self._drop(actor)
                detail = f"the reward's actor died in this call: {error}"
                return [Score(None, Outcome.error, detail)] * len(completions)

    async def _drop(self, actor: Any) -> None:
        import ray

        async with self._making:
            if self._actor is actor:
                self._actor = None
                ray.kill(actor)

    async def close(self) -> None:
        if self._actor is not None:
            await self._drop(self._actor)
