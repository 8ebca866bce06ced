"""A learner of this process behind the typed handle that the loops call, for tests and benchmarks."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Concatenate, ParamSpec, TypeVar

from rft.learner.spec import LearnerSpec
from rft.learner.workers import LearnerActor, LearnerGroup
from rft.sync.spec import ChannelSpec

P = ParamSpec("P")
R = TypeVar("R")


class InProcessLearner(LearnerGroup):
    """One rank without Ray: a call runs, and raises, when it is awaited. No deadlines."""

    def __init__(self, spec: LearnerSpec, channel: ChannelSpec) -> None:
        self.actor = LearnerActor(spec, channel)
        self.actor.load(None)
        self.step_timeout_s = self.push_timeout_s = 0.0

    def submit(
        self,
        method: Callable[Concatenate[LearnerActor, P], R],
        seconds: float,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Awaitable[R]:
        async def answer() -> R:
            result: R = getattr(self.actor, method.__name__)(*args, **kwargs)
            return result

        return answer()

    def kill(self) -> None: ...
