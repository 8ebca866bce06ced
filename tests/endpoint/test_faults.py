"""Clients that leave, flood or come too late: no leak, and no other session is touched."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest

from rft.endpoint.server import CALLS_PER_SESSION
from tests.endpoint.served import Served, served, trained

ASK: Any = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}


def client(key: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(headers={"Authorization": f"Bearer {key}"}, timeout=20)


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


def idle(server: Served) -> bool:
    return server.server._running == 0 and not any(s.handlers for s in server.server._sessions.values())


@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_call(stream: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its turn is spent, but nothing of it is recorded; the session and the others go on."""
    monkeypatch.setattr("rft.endpoint.server.OPEN_AFTER_S", 0.05)
    async with served(gate=asyncio.Event()) as server:
        calls, key = server.open("a")
        others, other_key = server.open("b")
        url = f"{server.url}/v1/chat/completions"
        async with client(key) as http, client(other_key) as other:
            staying = asyncio.ensure_future(other.post(url, json=ASK))
            leaving = asyncio.ensure_future(http.post(url, json={**ASK, "stream": stream}))
            await until(lambda: len(server.policy.requests) == 2)
            await asyncio.sleep(0.2)  # the stream has begun
            leaving.cancel()
            await until(lambda: server.policy.cancelled == 1)
            assert server.policy.gate is not None
            server.policy.gate.set()
            assert (await staying).status_code == 200
            assert (await http.post(url, json=ASK)).status_code == 200
        await until(lambda: idle(server))
        assert len(calls.session.calls) == len(others.session.calls) == 1
        assert trained(calls).num_sampled == trained(others).num_sampled > 0


async def test_a_client_that_leaves_in_mid_stream() -> None:
    """The answer was sampled, and the agent acts on the part that it read: the call is trained on."""
    async with served("four " * 100) as server:
        calls, key = server.open()
        async with client(key) as http:
            async with http.stream(
                "POST", f"{server.url}/v1/messages", json={**ASK, "max_tokens": 99, "stream": True}
            ) as answer:
                async for _ in answer.aiter_bytes(16):
                    break
            await until(lambda: idle(server))
            assert (await http.post(f"{server.url}/v1/chat/completions", json=ASK)).status_code == 200
        assert len(calls.session.calls) == 2 and server.server.counts["errors"] == 0
        assert trained(calls).num_sampled == sum(len(c.sampled) for c in calls.session.calls)


async def test_two_agents_with_one_key() -> None:
    """Their calls are branches of one session; each sampled token is trained once."""
    async with served("one", "two", "three", "four") as server:
        calls, key = server.open()
        async with client(key) as a, client(key) as b:
            for text in ("x", "y"):
                asks = [
                    http.post(
                        f"{server.url}/v1/chat/completions",
                        json={"messages": [{"role": "user", "content": f"{name} {text}"}]},
                    )
                    for name, http in (("a", a), ("b", b))
                ]
                assert {r.status_code for r in await asyncio.gather(*asks)} == {200}
        assert trained(calls).num_sampled == sum(len(c.sampled) for c in calls.session.calls) > 0
        assert len(calls.session.calls) == 4


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_a_body_that_does_not_arrive(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused after its deadline."""
    monkeypatch.setattr("rft.endpoint.server.BODY_S", 0.1)
    async with served() as server:
        calls, key = server.open()
        url = httpx.URL(server.url)
        reader, writer = await asyncio.open_connection(url.host, url.port)
        head = (
            f"POST {path} HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {key}\r\nContent-Length: 9\r\n\r\n{{"
        )
        writer.write(head.encode())
        async with asyncio.timeout(10):
            status, *fields = (await reader.readuntil(b"\r\n\r\n")).decode().lower().split("\r\n")
            headers = dict(line.split(": ") for line in fields if line)
            answer = json.loads(await reader.readexactly(int(headers["content-length"])))
        writer.close()
        assert status.startswith("http/1.1 408 ") and headers["connection"] == "close"
        assert "did not arrive within 0.1 s" in answer["error"]["message"]
        assert answer.get("type") == ("error" if path == "/v1/messages" else None)
        await until(lambda: idle(server))
        assert not calls.session.calls


async def test_too_many_calls_are_told_to_come_again() -> None:
    async with served(gate=asyncio.Event()) as server:
        _, key = server.open("a")
        _, other_key = server.open("b")
        url = f"{server.url}/v1/chat/completions"
        limits = httpx.Limits(max_connections=200)
        headers = {"Authorization": f"Bearer {key}"}
        async with (
            httpx.AsyncClient(headers=headers, limits=limits, timeout=20) as http,
            client(other_key) as other,
        ):
            asks = [asyncio.ensure_future(http.post(url, json=ASK)) for _ in range(CALLS_PER_SESSION + 5)]
            staying = asyncio.ensure_future(other.post(url, json=ASK))
            await until(lambda: server.server.counts["busy"] == 5)
            assert server.policy.gate is not None
            server.policy.gate.set()
            answers = await asyncio.gather(*asks)
            assert (await staying).status_code == 200  # another session's calls have room
        busy = [r for r in answers if r.status_code == 429]
        assert len(busy) == 5 and {r.headers["Retry-After"] for r in busy} == {"1"}
        assert {r.json()["error"]["type"] for r in busy} == {"rate_limit_error"}
        await until(lambda: idle(server))


async def test_calls_after_the_end_and_calls_in_flight_at_the_end() -> None:
    async with served(gate=asyncio.Event()) as server:
        calls, key = server.open("a")
        others, other_key = server.open("b")
        url = f"{server.url}/v1/chat/completions"
        async with client(key) as http, client(other_key) as other:
            late = asyncio.ensure_future(http.post(url, json=ASK))
            staying = asyncio.ensure_future(other.post(url, json=ASK))
            await until(lambda: len(server.policy.requests) == 2)
            server.server.end("a")
            with pytest.raises(httpx.TransportError):
                await late
            await until(lambda: server.policy.cancelled == 1)
            refused = await http.post(url, json=ASK)
            assert refused.status_code == 401 and refused.json()["error"]["type"] == "authentication_error"
            assert server.policy.gate is not None
            server.policy.gate.set()
            assert (await staying).status_code == 200
        assert not calls.session.calls and len(others.session.calls) == 1
        assert list(server.server._sessions) == ["b"] and idle(server)


async def test_an_engine_that_fails_is_an_error_of_the_server() -> None:
    async with served() as server:
        calls, key = server.open()
        server.policy.failure = RuntimeError("the engine is gone")
        async with client(key) as http:
            task = asyncio.ensure_future(http.post(f"{server.url}/v1/chat/completions", json=ASK))
            answer = await task
        assert answer.status_code == 500 and not calls.session.calls
