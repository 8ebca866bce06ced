"""The HTTP server: routes, keys, limits and streams. A function that its owner passes answers the calls."""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from rft.endpoint.anthropic import AnthropicMessages
from rft.endpoint.dialect import MODEL, UNTRAINED, Dialect, Sent, encode, invalid
from rft.endpoint.openai import Chat, Completions, Generate
from rft.endpoint.responses import Responses
from rft.endpoint.types import Answer, Ask, Refused, SetReward

DIALECTS: dict[str, Dialect[Any]] = {
    "/v1/chat/completions": Chat(),
    "/v1/completions": Completions(),
    "/v1/messages": AnthropicMessages(),
    "/v1/responses": Responses(),
    "/inference/v1/generate": Generate(),
}
BODY_BYTES = 8 << 20
BODY_S = 30.0  # to receive a request's body
WRITE_S = 60.0  # for a client to read a part of a stream
OPEN_AFTER_S = 5.0  # a stream begins by then: until then an error has its HTTP status
ALIVE_S = 15.0  # between the comments that keep a waiting stream alive
CALLS_PER_SESSION = 64  # in flight; more get 429 with Retry-After
CALLS = 4096
RETRY_AFTER_S = 1
STREAM = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}

Asks = Callable[[str, Ask | SetReward], Awaitable[Answer | None]]
"""Put an Ask to the session of a name. Raises Refused."""


@dataclass(eq=False)
class Open:
    """An open session. context: the most tokens of one call. numbers: of its responses."""

    name: str
    secret: str
    context: int
    numbers: count[int] = field(default_factory=count)
    handlers: set[asyncio.Task[Any]] = field(default_factory=set)


class Server:
    """Serve open sessions. `counts`: calls, refused keys, busy answers and errors of the server so far.

    shared: a session that is always open, whose key has no name in it ("" lets every key in).
    """

    def __init__(self, ask: Asks, shared: Open | None = None) -> None:
        self._ask, self._shared = ask, shared
        self._sessions: dict[str, Open] = {}
        self.counts = {"calls": 0, "refused": 0, "busy": 0, "errors": 0}
        self._running = 0
        self._runner: web.AppRunner | None = None

    async def start(self, host: str, port: int) -> int:
        """Listen; return the port."""
        app = web.Application(client_max_size=BODY_BYTES, middlewares=[self._errors])
        for path in DIALECTS:
            app.router.add_post(path, self._call)
        for prefix in ("", "/v1"):
            app.router.add_post(f"{prefix}/rl/set_reward", self._set_reward)
            app.router.add_post(f"{prefix}/rl/end_session", self._end_session)
            app.router.add_get(f"{prefix}/models", self._models)
        app.router.add_get("/health", self._health)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
        await self._runner.setup()
        site = web.TCPSite(self._runner, host, port, backlog=4096)
        await site.start()
        return int(self._runner.addresses[0][1])

    async def close(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    # -- sessions ------------------------------------------------------------------------------------------

    def open(self, name: str, context: int) -> str:
        """Open a session; return its key."""
        session = self._sessions[name] = Open(name, secrets.token_hex(24), context)
        return f"rft-{name}-{session.secret}"

    def end(self, name: str) -> None:
        """Close a session: its key is no longer valid, and its calls in flight are cancelled."""
        session = self._sessions.pop(name, None)
        for task in () if session is None else session.handlers:
            task.cancel()

    def _session(self, request: web.Request) -> Open:
        """Return the session of a request's key. Raises Refused."""
        scheme, _, key = request.headers.get("Authorization", "").partition(" ")
        if scheme.lower() != "bearer":
            key = request.headers.get("x-api-key", "")
        name, _, secret = key.strip().removeprefix("rft-").rpartition("-")
        session = self._sessions.get(name)
        if self._shared is not None:
            session, secret = self._shared, key.strip() if self._shared.secret else ""
        expected = "no such session" if session is None else session.secret
        same = hmac.compare_digest(_bytes(secret), _bytes(expected))
        if session is None or not same:
            self.counts["refused"] += 1
            raise Refused(401, "invalid_api_key", "the API key belongs to no open session")
        return session

    # -- requests ------------------------------------------------------------------------------------------

    @web.middleware
    async def _errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Answer errors in the dialect of the caller."""
        try:
            return await handler(request)
        except Refused as problem:
            refused = problem
        except web.HTTPException as error:
            refused = Refused(error.status, error.reason.lower().replace(" ", "_"), error.reason)
        except (HttpProcessingError, web.RequestPayloadError):
            refused = invalid("the body cannot be read")
        except ConnectionError:
            raise
        except Exception as error:  # a bug; the session and the others go on
            self.counts["errors"] += 1
            refused = Refused(500, "internal_error", f"rft failed to answer: {type(error).__name__}")
        dialect = DIALECTS.get(request.path, DIALECTS["/v1/chat/completions"])
        headers = {"Retry-After": str(RETRY_AFTER_S)} if refused.status == 429 else {}
        if refused.status == 408:
            headers["Connection"] = "close"
        return web.json_response(dialect.error(refused), status=refused.status, headers=headers)

    async def _body(self, request: web.Request) -> dict[str, Any]:
        """Read a request's JSON object. Raises Refused."""
        try:
            async with asyncio.timeout(BODY_S):
                data = await request.read()
        except TimeoutError:
            raise Refused(408, "timeout", f"the body did not arrive within {BODY_S:g} s") from None
        except web.HTTPRequestEntityTooLarge:
            limit = f"the body exceeds {BODY_BYTES >> 20} MiB"
            raise Refused(413, "request_too_large", limit) from None
        try:
            body = json.loads(data or b"{}")
        except (ValueError, RecursionError):
            raise invalid("the body is not JSON") from None
        if not isinstance(body, dict):
            raise invalid("the body must be a JSON object")
        return body

    @asynccontextmanager
    async def _place(self, session: Open) -> AsyncIterator[None]:
        """Count a call among those in flight. Raises Refused if there are too many."""
        task = asyncio.current_task()
        assert task is not None
        if len(session.handlers) >= CALLS_PER_SESSION or self._running >= CALLS:
            self.counts["busy"] += 1
            raise Refused(429, "busy", f"too many calls in flight; try again in {RETRY_AFTER_S} s")
        self._running += 1
        session.handlers.add(task)
        try:
            yield
        finally:
            self._running -= 1
            session.handlers.discard(task)

    async def _call(self, request: web.Request) -> web.StreamResponse:
        session, dialect = self._session(request), DIALECTS[request.path]
        async with self._place(session):
            body = dialect.read(await self._body(request))
            ask = body.ask()
            trained = ask.trained and request.headers.get(UNTRAINED, "0").lower() in ("0", "false")
            sent = Sent(f"{dialect.prefix}{session.name}-{next(session.numbers)}", int(time.time()), body)
            self.counts["calls"] += 1
            ask = replace(ask, id=sent.id, trained=trained)
            answering = asyncio.ensure_future(self._ask(session.name, ask))
            try:
                if body.stream:
                    return await self._stream(request, dialect, sent, answering)
                answer = await answering
                assert answer is not None
                return web.json_response(dialect.write(sent, answer))
            finally:
                answering.cancel()

    async def _stream(
        self,
        request: web.Request,
        dialect: Dialect[Any],
        sent: Sent[Any],
        answering: asyncio.Future[Answer | None],
    ) -> web.StreamResponse:
        """Answer as a stream of events. It begins with the answer, or after a few seconds."""
        await asyncio.wait({answering}, timeout=OPEN_AFTER_S)
        if answering.done():  # in one piece; Refused is raised, with its HTTP status
            answer = answering.result()
            assert answer is not None
            events = chain(dialect.opening(sent), dialect.answering(sent, answer))
            return web.Response(body=b"".join(map(encode, events)), headers=STREAM)
        response = web.StreamResponse(headers=STREAM)
        await response.prepare(request)
        await _write(response, b"".join(map(encode, dialect.opening(sent))))
        while not answering.done():
            await asyncio.wait({answering}, timeout=ALIVE_S)
            if not answering.done():
                await _write(response, b": waiting\n\n")
        try:
            answer = answering.result()
            assert answer is not None
            events = chain(dialect.answering(sent, answer))
        except Refused as problem:
            events = chain(dialect.failure(problem))
        await _write(response, b"".join(map(encode, events)))
        async with asyncio.timeout(WRITE_S):
            await response.write_eof()
        return response

    async def _models(self, request: web.Request) -> web.Response:
        session = self._session(request)
        card = {"object": "model", "created": 0, "owned_by": "rft", "max_model_len": session.context}
        return web.json_response(
            {"object": "list", "data": [{"id": name, **card} for name in (MODEL, UNTRAINED)]}
        )

    async def _set_reward(self, request: web.Request) -> web.Response:
        """AReaL's form: `{"reward": 1.0, "interaction_id": id of a response, or null}`."""
        session = self._session(request)
        async with self._place(session):
            body = await self._body(request)
            value, name = body.get("reward"), body.get("interaction_id")
            if isinstance(value, bool) or not isinstance(value, int | float) or not _finite(value):
                raise invalid("reward must be a finite number", "reward")
            if name is not None and not isinstance(name, str):
                raise invalid("interaction_id must be the id of a response", "interaction_id")
            await self._ask(session.name, SetReward(float(value), name))
            return web.json_response({"message": "success"})

    async def _end_session(self, request: web.Request) -> web.Response:
        """Invalidate the key: the agent is done with the policy."""
        session = self._session(request)
        await self._body(request)
        if session is not self._shared:
            self.end(session.name)
        return web.json_response({"message": "success"})

    async def _health(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})


async def _write(response: web.StreamResponse, data: bytes) -> None:
    """Send a part of a stream. Raises ConnectionError if the client is gone, or does not read."""
    try:
        async with asyncio.timeout(WRITE_S):
            await response.write(data)
    except TimeoutError:
        raise ConnectionResetError("the client does not read") from None


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")


def _finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False
