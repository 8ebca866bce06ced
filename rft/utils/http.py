"""POST JSON to a server with retries: backoff with jitter, or the server's Retry-After."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any

import httpx
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, stop_after_attempt

RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}
LONGEST_PAUSE_S = 60.0


class HTTPFailure(RuntimeError):
    """A request failed in all its attempts, or in a way that another attempt would repeat."""


class _Unanswered(HTTPFailure):
    """An attempt that may succeed when repeated, after `pause_s` if the server gave a delay."""

    def __init__(self, problem: str, pause_s: float | None = None) -> None:
        super().__init__(problem)
        self.pause_s = pause_s


@dataclass(frozen=True)
class Poster:
    """retries: attempts after the first one. backoff_s: of the first pause, which doubles. limit: entered
    before each attempt, for a rate limit."""

    retries: int = 5
    backoff_s: float = 0.5
    limit: AbstractAsyncContextManager[Any] = field(default_factory=contextlib.nullcontext)

    async def post(self, client: httpx.AsyncClient, url: str, body: Mapping[str, Any]) -> httpx.Response:
        """Return the response with status 200. Raises HTTPFailure, with the number of attempts."""
        attempts = AsyncRetrying(
            retry=retry_if_exception_type(_Unanswered),
            stop=stop_after_attempt(self.retries + 1),
            wait=self._pause,
            reraise=True,
        )
        tried = 0
        try:
            async for attempt in attempts:
                with attempt:
                    tried += 1
                    return await self._once(client, url, body)
        except HTTPFailure as error:
            raise HTTPFailure(f"{url} did not answer ({tried} attempts): {error}") from None
        raise AssertionError("tenacity ends with a result or an error")

    async def _once(self, client: httpx.AsyncClient, url: str, body: Mapping[str, Any]) -> httpx.Response:
        async with self.limit:
            pass
        try:
            response = await client.post(url, json=body)
        except httpx.HTTPError as error:
            raise _Unanswered(f"{type(error).__name__}: {error}") from None
        if response.status_code == 200:
            return response
        problem = f"status {response.status_code}: {response.text[:300]}"
        if response.status_code not in RETRIED:
            raise HTTPFailure(problem)
        raise _Unanswered(problem, _retry_after(response.headers.get("retry-after")))

    def _pause(self, state: RetryCallState) -> float:
        """Return the seconds before the next attempt."""
        error = state.outcome.exception() if state.outcome is not None else None
        if isinstance(error, _Unanswered) and error.pause_s:
            return error.pause_s
        return self.backoff_s * 2 ** (state.attempt_number - 1) * (0.5 + random.random())


def _retry_after(value: str | None) -> float | None:
    return min(float(value), LONGEST_PAUSE_S) if value and re.fullmatch(r"\d+(\.\d+)?", value) else None
