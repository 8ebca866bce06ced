"""A language model as a judge, over any endpoint that speaks OpenAI's chat completions.

A vLLM replica serves the same protocol: `local_judge` starts one of its own.
Requests run concurrently within a call, under one rate limit, with retries and a cache; the verdict is
JSON, constrained by a schema where the server can. A judge that cannot be reached is an `error`, and
one whose verdict cannot be read is an `error` too: neither is a zero.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import sqlite3
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rft.rewards.types import Outcome, Score, Text, graded, text_of
from rft.utils.hashing import json_digest
from rft.utils.urls import has_credentials, without_credentials

TEMPLATE = """You judge an answer to a request.
{principle}
Request:
{prompt}

Answer:
{completion}
{reference}
Judge how good the answer is, from 0 (worthless) to {scale} (perfect). Reply with JSON only:
{{"reason": "<one sentence>", "score": <number from 0 to {scale}>}}"""

REASON = 400  # characters: one that rambles would be cut before its score
RETRIED = {408, 409, 425, 429, 500, 502, 503, 504, 529}


class JudgeError(RuntimeError):
    """The judge could not be reached, or its reply could not be read."""


class RateLimit:
    """At most `per_second` starts a second, evenly spaced; None: no limit."""

    def __init__(self, per_second: float | None) -> None:
        self.gap = 1 / per_second if per_second else 0.0
        self.next = 0.0

    async def wait(self) -> None:
        now = time.monotonic()
        start = max(now, self.next)
        self.next = start + self.gap
        if start > now:
            await asyncio.sleep(start - now)


class Cache:
    """Verdicts by request, in a SQLite file that several processes may share, or in memory."""

    def __init__(self, path: str | Path | None) -> None:
        self.db = sqlite3.connect(str(path) if path else ":memory:", timeout=30.0, isolation_level=None)
        if path:
            self.db.execute("PRAGMA journal_mode=WAL")
        self.db.execute("CREATE TABLE IF NOT EXISTS verdicts (key TEXT PRIMARY KEY, reply TEXT)")

    def get(self, key: str) -> str | None:
        row = self.db.execute("SELECT reply FROM verdicts WHERE key = ?", (key,)).fetchone()
        return row[0] if row else None

    def put(self, key: str, reply: str) -> None:
        self.db.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", (key, reply))


class Judge:
    """Scores from 0 to 1 by a judging model.

    base_url: up to and with `/v1`. api_key_env: the environment variable that holds the key.
    template: with {prompt}, {completion}, {reference}, {principle} and {scale}. principle: what to
        judge by (SALMON's principle-conditioned judging); a column `principle` takes precedence.
    scale: the verdict's highest score; it is divided out. threshold: `correct` from here on.
    concurrency, per_second: limits on requests; retries: with exponential backoff and jitter, or as
        the server's Retry-After says. cache: a file for verdicts. schema: send `response_format`.
    """

    required: Sequence[str] = ()
    optional: Sequence[str] = ("answer", "principle")

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_env: str = "OPENAI_API_KEY",
        template: str = TEMPLATE,
        principle: str = "",
        scale: float = 10.0,
        threshold: float = 0.5,
        temperature: float = 0.0,
        max_tokens: int = 512,
        concurrency: int = 16,
        per_second: float | None = None,
        retries: int = 5,
        backoff_s: float = 0.5,
        request_timeout_s: float = 60.0,
        cache: str | None = None,
        schema: bool = True,
    ) -> None:
        if has_credentials(base_url):
            raise ValueError(
                f"{without_credentials(base_url)} holds a user name or password, which logs would show: put "
                "the key into the environment variable that `api_key_env` names"
            )
        self.url = base_url.rstrip("/") + "/chat/completions"
        self.identity = self.url  # whose verdicts the cached ones are
        self.template, self.principle = template, principle
        self.scale, self.threshold = scale, threshold
        self.body = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        if schema:
            self.body["response_format"] = _response_format(scale)
        self.key = os.environ.get(api_key_env, "")
        self.concurrency, self.limit = concurrency, RateLimit(per_second)
        self.retries, self.backoff_s, self.request_timeout_s = retries, backoff_s, request_timeout_s
        self.cache = Cache(cache)
        self.loop = asyncio.new_event_loop()

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        answer: Sequence[Any] | None = None,
        principle: Sequence[str] | None = None,
    ) -> list[Score]:
        """One Score per completion. The column `answer` is shown to the judge as a reference."""
        n = len(completions)
        requests = [
            self.template.format(
                prompt=text_of(prompts[i]),
                completion=text_of(completions[i]),
                reference=f"\nReference answer:\n{answer[i]}\n" if answer is not None else "",
                principle=(principle[i] if principle is not None else self.principle) or "",
                scale=f"{self.scale:g}",
            )
            for i in range(n)
        ]
        replies = self.loop.run_until_complete(self._ask_all(requests))
        return [self._verdict(reply) for reply in replies]

    def _verdict(self, reply: str | JudgeError) -> Score:
        if isinstance(reply, JudgeError):
            return Score(None, Outcome.error, str(reply))
        try:
            value, reason = read_verdict(reply, self.scale)
        except JudgeError as error:
            return Score(None, Outcome.error, str(error))
        return graded(value / self.scale, f"judge: {value:g} of {self.scale:g}: {reason}", self.threshold)

    async def _ask_all(self, requests: Sequence[str]) -> list[str | JudgeError]:
        import httpx

        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        slots = asyncio.Semaphore(self.concurrency)
        async with httpx.AsyncClient(headers=headers, timeout=self.request_timeout_s) as client:
            return await asyncio.gather(*(self._ask(client, slots, text) for text in requests))

    async def _ask(self, client: Any, slots: asyncio.Semaphore, text: str) -> str | JudgeError:
        body = {**self.body, "messages": [{"role": "user", "content": text}]}
        key = json_digest([self.identity, body])
        if (known := self.cache.get(key)) is not None:
            return known
        async with slots:
            try:
                reply = await self._post(client, body)
            except JudgeError as error:
                return error
        self.cache.put(key, reply)
        return reply

    async def _post(self, client: Any, body: dict[str, Any]) -> str:
        import httpx

        problem = ""
        for attempt in range(self.retries + 1):
            await self.limit.wait()
            pause = self.backoff_s * 2**attempt * (0.5 + random.random())
            try:
                response = await client.post(self.url, json=body)
            except httpx.HTTPError as error:
                problem = f"{type(error).__name__}: {error}"
            else:
                if response.status_code == 200:
                    return _content(response)
                problem = f"status {response.status_code}: {response.text[:300]}"
                if response.status_code not in RETRIED:
                    break
                pause = _retry_after(response.headers.get("retry-after")) or pause
            if attempt < self.retries:
                await asyncio.sleep(pause)
        raise JudgeError(f"the judge at {self.url} did not answer ({attempt + 1} attempts): {problem}")


def _response_format(scale: float) -> dict[str, Any]:
    properties = {
        "reason": {"type": "string", "maxLength": REASON},
        "score": {"type": "number", "minimum": 0, "maximum": scale},
    }
    schema = {
        "type": "object",
        "properties": properties,
        "required": ["reason", "score"],
        "additionalProperties": False,
    }
    return {"type": "json_schema", "json_schema": {"name": "verdict", "strict": True, "schema": schema}}


def _content(response: Any) -> str:
    try:
        return str(response.json()["choices"][0]["message"]["content"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise JudgeError(f"not a chat completion: {response.text[:300]}") from None


def _retry_after(value: str | None) -> float | None:
    return min(float(value), 60.0) if value and re.fullmatch(r"\d+(\.\d+)?", value) else None


def read_verdict(reply: str, scale: float) -> tuple[float, str]:
    """(score, reason) of a verdict. Raises JudgeError where there is none, or it is off the scale."""
    for candidate in (reply, *re.findall(r"\{[^{}]*\}", reply)[::-1]):
        try:
            data = json.loads(candidate, strict=False)  # models put line breaks into strings
        except (ValueError, RecursionError):
            continue
        score = data.get("score") if isinstance(data, dict) else None
        if isinstance(score, int | float) and not isinstance(score, bool):
            if not 0 <= score <= scale:
                raise JudgeError(f"the judge's score {score} is not between 0 and {scale:g}")
            return float(score), str(data.get("reason", ""))
    raise JudgeError(f"the judge's reply holds no verdict: {reply[:300]!r}")
