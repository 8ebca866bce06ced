"""Kind `function`: an async function `(row, session) -> float | dict | None` that owns its loop, or AReaL's
`run(data, base_url=, api_key=, http_client=)`, which calls the policy by HTTP."""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rft.environments.loop import first_messages
from rft.environments.rewards import read_reward, refuse_text
from rft.environments.types import ContextFull, Ending, Episode, OperationFailed, PolicyLimit, Row, Session
from rft.rewards.load import SpecError, checked_options
from rft.utils.dotted import load_dotted

if TYPE_CHECKING:
    from rft.environments.runner import Remote
    from rft.environments.zygote import Spec

OPEN_SESSION = "rft.endpoint.calls.open_session"
ADDRESS = ("base_url", "api_key", "http_client")


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
        if made and not inspect.iscoroutinefunction(called) and hasattr(target, "run"):
            self.function = called = getattr(self.function, "run")  # noqa: B009
        if not inspect.iscoroutinefunction(called):
            raise SpecError(
                f"{spec.path} must be an async function: `async def {target.__name__}(row, session)`"
            )
        refuse_text(called, spec.path)
        self.over_http = takes_address(called, options)
        if self.over_http:
            if find_spec("aiohttp") is None:
                raise SpecError(f"{spec.path}: agents over HTTP need aiohttp, which is not installed: "
                                "pip install 'rft[agents]'")  # fmt: skip
            return
        given = [n for n in inspect.signature(called).parameters if n not in options]
        if len(given) < 2:
            raise SpecError(f"{spec.path} must take a row and a session: `(row, session)`; it takes {given}")

    def describe(self) -> dict[str, Any]:
        return {"tools": [], "gives_reward": True, "over_http": self.over_http}

    async def run_over_http(self, row: Mapping[str, Any], variables: Mapping[str, str]) -> Any:
        """Call AReaL's `run`; return its result. The variables are restored before the next episode."""
        import httpx

        os.environ.update(variables)
        base_url, api_key = variables["OPENAI_BASE_URL"], variables["OPENAI_API_KEY"]
        data = {"messages": first_messages(row), **row}
        async with httpx.AsyncClient(timeout=None, trust_env=False) as client:
            result = await self.function(data, base_url=base_url, api_key=api_key, http_client=client)
        read_reward(result, self.path)  # raises unless it is a reward
        return result

    async def run(self, row: Mapping[str, Any]) -> dict[str, Any]:
        reward, scores = read_reward(await self.function(row, self.session), self.path)
        return {"reward": reward, "scores": scores}


async def play(row: Row, session: Session, remote: Remote) -> Episode:
    """Play one episode. If the function lets a PolicyLimit pass, the rewards given so far count."""
    if remote.runner.over_http:
        return await _play_over_http(row, session, remote)
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


async def _play_over_http(row: Row, session: Session, remote: Remote) -> Episode:
    """Play one episode of AReaL's `run`, which returns a number, or numbers by the ids of responses."""
    given, failure = None, ""
    async with load_dotted(OPEN_SESSION)(session, remote) as (access, calls):
        try:
            given = await remote.call("run_over_http", row, access.variables(), setup=True)
        except OperationFailed as failed:
            failure = str(failed)
    if isinstance(given, Mapping):
        calls.given |= {name: value for name, value in given.items() if name in calls.calls}
        given = {name: value for name, value in given.items() if name not in calls.calls} or None
    ending = calls.finish(failure)
    reward, scores = read_reward(given, remote.runner.config.path or "run")
    if remote.given or ending is not Ending.finished:
        reward = sum(remote.given, reward or 0.0)
    return Episode(reward, ending, {**remote.scores, **scores}, remote.messages, remote.start)


def takes_address(function: Any, options: Mapping[str, Any]) -> bool:
    """Return whether a function is AReaL's `run`: one argument by position, the policy's address by name."""
    parameters = inspect.signature(function).parameters.values()
    by_place = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    rows = [p for p in by_place if p.name not in (*ADDRESS, *options)]
    return len(rows) == 1 and any(p.name in ADDRESS or p.kind is p.VAR_KEYWORD for p in parameters)
