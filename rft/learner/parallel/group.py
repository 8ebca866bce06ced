"""The learner's ranks as one: the same handle for one actor and for many.

    learner = LearnerGroup(spec, channel)
    metrics = await call(learner.step.remote(batch, 3), 600, "step")

Every call goes to every rank, in the same order, so that their collectives meet; the answer is rank 0's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rft.errors import LearnerError, TransferError, lost_a_peer
from rft.learner.actor import LearnerActor
from rft.learner.spec import LearnerSpec
from rft.sync.spec import ChannelSpec
from rft.utils.actors import ActorDied

GRACE_S = 5.0  # for the other ranks to end a call that failed on one


class LearnerGroup:
    """`ranks` learner actors, packed on as few machines as hold them. Attributes are remote methods of
    `LearnerActor`.

    A rank that dies, or fails where the others do not end their part of the call, ends the group: all
    ranks are killed, and this and every later call raises what happened, with the rank's number.
    """

    def __init__(self, spec: LearnerSpec, channel: ChannelSpec) -> None:
        self._bundles: PlacementGroup | None = None
        self._ended: ActorDied | None = None
        ranks = spec.config.ranks
        if spec.config.threads is None and spec.device == "cpu" and not spec.config.cores:
            spec = replace(spec, threads=max(1, spec.threads // ranks))
        if ranks > 1:
            self._bundles = _place(spec)
        self._actors = [self._start(spec, channel, rank) for rank in range(ranks)]
        place = self._actors[0].meet.remote() if spec.config.parallel != "single" else None
        self._loaded: list[Any] | None = [actor.load.remote(place) for actor in self._actors]

    def _start(self, spec: LearnerSpec, channel: ChannelSpec, rank: int) -> Any:
        env = {"OMP_NUM_THREADS": str(spec.threads), "OMP_WAIT_POLICY": "PASSIVE"}
        gpus = channel.gpu_share if spec.device == "cuda" else 0
        options: dict[str, Any] = {"num_gpus": gpus, "num_cpus": gpus, "runtime_env": {"env_vars": env}}
        if self._bundles is not None:
            options["num_cpus"] = 1
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._bundles, placement_group_bundle_index=rank
            )
        return ray.remote(LearnerActor).options(**options).remote(spec, channel, rank)

    def __getattr__(self, method: str) -> Method:
        if method.startswith("_"):
            raise AttributeError(method)
        return Method(self, method)

    def kill(self) -> None:
        """End all ranks at once and free what they held."""
        for actor in self._actors:
            ray.kill(actor)
        if self._bundles is not None:
            remove_placement_group(self._bundles)
            self._bundles = None
        if self._ended is None:
            self._ended = ActorDied("the learner was ended")

    # -- calls ---------------------------------------------------------------------------------------

    def _submit(self, method: str, args: tuple[Any, ...]) -> list[Any]:
        if self._ended is not None:
            raise self._ended
        if len(self._actors) > 1:
            args = tuple(ray.put(value) for value in args)  # once, not once a rank
        return [getattr(actor, method).remote(*args) for actor in self._actors]

    async def _collect(self, method: str, answers: list[Any]) -> Any:
        if self._loaded is not None:
            loaded, self._loaded = self._loaded, None
            await self._all("load", loaded)
        return (await self._all(method, answers))[0]

    async def _all(self, method: str, answers: list[Any]) -> list[Any]:
        """All ranks' answers; raises the culprit's error."""
        waiting = [asyncio.ensure_future(_plain(answer)) for answer in answers]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
            if not any(_failed(task) for task in waiting):
                return [task.result() for task in waiting]
            await asyncio.wait(waiting, timeout=GRACE_S)
            raise self._verdict(method, waiting)
        finally:
            for task in waiting:
                task.cancel()

    def _verdict(self, method: str, waiting: list[asyncio.Task[Any]]) -> BaseException:
        """The error to raise; ends the group unless all ranks have ended the call and live."""
        errors = {rank: task.exception() for rank, task in enumerate(waiting) if _failed(task)}
        busy = [rank for rank, task in enumerate(waiting) if not task.done()]
        rank, error = min(errors.items(), key=lambda item: (_blame(item[1]), item[0]))
        assert error is not None
        dead = isinstance(error, RayActorError)
        if len(waiting) == 1 and not dead:
            return _cause(error)
        torn = any(_blame(e) == 2 for e in errors.values())  # a rank left in the middle of a collective
        if not dead and not busy and not torn:
            return _named(_cause(error), rank, len(waiting))
        name = "the learner" if len(waiting) == 1 else f"learner rank {rank} of {len(waiting)}"
        self._ended = ActorDied(f"{name} {_story(error)} in {method}; all its ranks were ended")
        self.kill()
        return self._ended if dead else _named(_cause(error), rank, len(waiting))


class Method:
    """A remote method of all ranks."""

    def __init__(self, group: LearnerGroup, name: str) -> None:
        self.group, self.name = group, name

    def remote(self, *args: Any) -> Answer:
        """Start the call on every rank; await the result."""
        return Answer(self.group, self.name, self.group._submit(self.name, args))


class Answer:
    """What all ranks return, once awaited: rank 0's value. Raises a failed rank's own error, or ActorDied."""

    def __init__(self, group: LearnerGroup, name: str, answers: list[Any]) -> None:
        self.group, self.name, self.answers = group, name, answers

    def __await__(self) -> Generator[Any, None, Any]:
        return self.group._collect(self.name, self.answers).__await__()


def _place(spec: LearnerSpec) -> PlacementGroup:
    """A bundle for each rank. Raises LearnerError where the cluster has not got what they need."""
    kind, ranks = ("GPU" if spec.device == "cuda" else "CPU"), spec.config.ranks
    there = int(ray.cluster_resources().get(kind, 0))
    if there < ranks:
        raise LearnerError(f"learner.ranks: {ranks} ranks need {ranks} {kind}s, the Ray cluster has {there}")
    bundle = {"CPU": 1.0, "GPU": 1.0} if kind == "GPU" else {"CPU": 1.0}
    return placement_group([dict(bundle) for _ in range(ranks)], strategy="PACK")


async def _plain(answer: Any) -> Any:
    return await answer


def _failed(task: asyncio.Task[Any]) -> bool:
    return task.done() and not task.cancelled() and task.exception() is not None


def _blame(error: BaseException | None) -> int:
    """0: died. 1: failed by itself. 2: failed because another one did."""
    if isinstance(error, RayActorError):
        return 0
    if error is None or isinstance(_cause(error), TransferError):  # an engine's fault, whatever it says
        return 1
    return 2 if lost_a_peer(_cause(error)) else 1


def _cause(error: BaseException) -> BaseException:
    """The rank's own error, with its traceback as the cause."""
    if not isinstance(error, RayTaskError):
        return error
    own: BaseException = error.cause
    own.__cause__ = error
    return own


def _named(error: BaseException, rank: int, ranks: int) -> BaseException:
    error.add_note(f"raised on learner rank {rank} of {ranks}")
    return error


def _story(error: BaseException) -> str:
    if isinstance(error, RayActorError):
        return f"died ({str(error).strip().splitlines()[0]})"
    return f"failed ({type(_cause(error)).__name__}: {_cause(error)})"
