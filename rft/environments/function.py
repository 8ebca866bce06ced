"""Kind `function`: an async function `(row, session) -> float | dict | None` that owns its loop."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rft.environments.rewards import read_reward
from rft.environments.types import ContextFull, Ending, Episode, PolicyLimit, Row, Session
from rft.rewards.load import SpecError, checked_options

if TYPE_CHECKING:
    from rft.environments.runner import Remote
    from rft.environments.zygote import Spec


class Host:
    """Operations in the worker."""

    session: Any = None

    def __init__(self, spec: Spec) -> None:
        assert spec.path is not None
        target: Any = spec.resolve(spec.path)
        options = checked_options(spec.path, target, spec.options, strict=False)
        self.path = spec.path
        made = isinstance(target, type)
        self.function: Any = target(**options) if made else functools.partial(target, **options)
        called = getattr(self.function, "__call__", None) if made else target  # noqa: B004
        if not inspect.iscoroutinefunction(called):
            raise SpecError(
                f"{spec.path} must be an async function: `async def {target.__name__}(row, session)`"
            )
        given = [n for n in inspect.signature(called).parameters if n not in options]
        if len(given) < 2:
            raise SpecError(f"{spec.path} must take a row and a session: `(row, session)`; it takes {given}")

    def describe(self) -> dict[str, Any]:
        return {"tools": [], "gives_reward": True}

    async def run(self, row: Mapping[str, Any]) -> dict[str, Any]:
        reward, scores = read_reward(await self.function(row, self.session), self.path)
        return {"reward": reward, "scores": scores}


async def play(row: Row, session: Session, remote: Remote) -> Episode:
    """Play one episode. If the function lets a PolicyLimit pass, the rewards given so far count."""
    ending, given = Ending.finished, dict[str, Any](reward=None, scores={})
    try:
        given = await remote.call("run", row, setup=True)
    except PolicyLimit as limit:
        ending = Ending.context_full if isinstance(limit, ContextFull) else Ending.turn_limit
    reward = given["reward"]
    if reward is None and (remote.given or ending is not Ending.finished):
        reward = sum(remote.given)
    scores = {**remote.scores, **given["scores"]}
    return Episode(reward, ending, scores, remote.messages, remote.start)
