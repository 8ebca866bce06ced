"""Thousands of rubbish requests: each gets an error in the caller's dialect, and nothing else happens."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rft.endpoint.server import DIALECTS, Server
from rft.endpoint.types import Answer, Ask, Refused, SetReward
from rft.rollout.session import Budget
from tests.cases.families import GEMMA, PHI, QWEN3, TOOLS
from tests.endpoint.served import ADD, END, served, trained

ATOMS: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.sampled_from(["", "user", "\ud800"])
)
JSON = st.recursive(
    ATOMS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
)
ROLES = st.sampled_from(["system", "user", "assistant", "tool", "developer", "function"]) | JSON
MESSAGE = st.fixed_dictionaries(
    {"role": ROLES},
    optional={
        "content": st.text() | JSON | st.lists(st.fixed_dictionaries({"type": st.text(), "text": JSON})),
        "tool_calls": JSON
        | st.lists(
            st.fixed_dictionaries({"function": st.fixed_dictionaries({"name": JSON, "arguments": JSON})})
        ),
        "type": st.sampled_from(["message", "function_call", "function_call_output", "reasoning"]),
        "arguments": JSON,
        "name": JSON,
    },
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "model": JSON | st.just("rft-untrained"),
        "messages": st.lists(MESSAGE, max_size=3) | JSON,
        "input": st.lists(MESSAGE, max_size=3) | JSON,
        "prompt": JSON | st.lists(st.integers()),
        "token_ids": JSON | st.lists(st.integers()),
        "sampling_params": JSON,
        "max_tokens": st.integers() | JSON,
        "n": st.integers(0, 2),
        "stop": JSON,
        "tools": JSON
        | st.lists(
            st.fixed_dictionaries(
                {
                    "function": st.fixed_dictionaries({"name": st.text(), "parameters": JSON}),
                    "name": st.text(),
                    "input_schema": JSON,
                    "type": st.just("function"),
                }
            ),
            max_size=2,
        ),
        "tool_choice": JSON,
        "system": JSON,
        "stream": JSON,
        "reward": JSON,
        "interaction_id": JSON,
    },
)
PATHS = (*DIALECTS, "/v1/rl/set_reward", "/v1/nothing", "/")

FUNCTION = st.fixed_dictionaries({"name": st.text(), "arguments": JSON | st.just("{}")})
NEARLY_RIGHT = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "tool"]),
        "content": st.text() | st.none() | JSON,
    },
    optional={
        "tool_calls": st.lists(st.fixed_dictionaries({"id": JSON, "function": FUNCTION}), max_size=2),
        "name": st.text(),
        "tool_call_id": st.text(),
        "reasoning_content": st.text(),
    },
)
SCHEMA = st.fixed_dictionaries(
    {"name": st.text(min_size=1), "parameters": st.dictionaries(st.text(), JSON, max_size=3)}
)
CHAT = st.fixed_dictionaries(
    {"messages": st.lists(NEARLY_RIGHT, min_size=1, max_size=4)},
    optional={
        "max_tokens": st.integers(1, 10),
        "stop": st.text() | st.lists(st.text()),
        "tools": st.lists(
            st.fixed_dictionaries({"type": st.just("function"), "function": SCHEMA}), max_size=2
        ),
        "logprobs": st.booleans(),
        "return_token_ids": st.booleans(),
        "stream": st.booleans(),
        "stop_token_ids": st.lists(st.integers()),
    },
)
LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "max_tokens": st.integers(1, 9),
        "stop": st.text(),
        "stop_token_ids": st.lists(st.integers()),
    },
)
TOKENS = st.fixed_dictionaries(
    {"token_ids": st.lists(st.integers(0, 300) | st.integers(), min_size=1)},
    optional={"sampling_params": LIMITS},
)
TEXTS = st.fixed_dictionaries(
    {"prompt": st.text() | st.lists(st.integers(0, 300), min_size=1)},
    optional={"max_tokens": st.integers(1, 9), "logprobs": st.integers(0, 1), "stop": st.text()},
)
CALLS = st.one_of(
    st.tuples(st.sampled_from(PATHS), FIELDS | JSON),
    st.tuples(st.just("/v1/chat/completions"), CHAT),
    st.tuples(st.just("/v1/messages"), CHAT.map(lambda body: {**body, "max_tokens": 5})),
    st.tuples(st.just("/v1/responses"), CHAT.map(lambda body: {**body, "input": body["messages"]})),
    st.tuples(st.just("/v1/completions"), TEXTS),
    st.tuples(st.just("/inference/v1/generate"), TOKENS),
)


class Client:
    """A server in a loop of its own, with a session whose policy refuses what the tokenizer would."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.asked: list[tuple[str, Ask | SetReward]] = []
        self.server = Server(self.ask)
        self.url = f"http://127.0.0.1:{self.loop.run_until_complete(self.server.start('127.0.0.1', 0))}"
        self.key, self.other = self.server.open("s", 100), self.server.open("t", 100)
        self.http = self.loop.run_until_complete(self.connect())

    async def connect(self) -> aiohttp.ClientSession:
        return aiohttp.ClientSession()

    async def ask(self, name: str, ask: Ask | SetReward) -> Answer | None:
        self.asked.append((name, ask))
        if isinstance(ask, Ask) and len(ask.messages) > 2:
            raise Refused(400, "context_length_exceeded", "too long")
        return (
            None
            if isinstance(ask, SetReward)
            else Answer("four", sampled=(1,), logps=(-1.0,), texts=("four",))
        )

    def post(self, path: str, data: bytes, **headers: str) -> tuple[int, bytes]:
        async def post() -> tuple[int, bytes]:
            async with self.http.post(self.url + path, data=data, headers=headers) as answer:
                return answer.status, await answer.read()

        return self.loop.run_until_complete(post())

    def close(self) -> None:
        self.loop.run_until_complete(self.http.close())
        self.loop.run_until_complete(self.server.close())
        self.loop.close()


def check(client: Client, path: str, status: int, body: bytes) -> None:
    assert status in (200, 400, 401, 404, 405, 413), (status, body)
    assert client.server.counts["errors"] == 0, body
    if status != 200:
        error = json.loads(body)["error"]
        assert error["message"] and error["type"]
        assert path != "/v1/messages" or json.loads(body)["type"] == "error"


@pytest.mark.parametrize("requests", [1000, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(900)
def test_rubbish_is_refused_in_the_callers_dialect(requests: int) -> None:
    client = Client()
    known = {"Authorization": f"Bearer {client.key}"}

    @settings(max_examples=requests, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(PATHS), FIELDS | JSON | st.binary(), st.booleans())
    def rubbish(path: str, body: Any, authorised: bool) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        status, answer = client.post(path, data, **(known if authorised else {}))
        check(client, path, status, answer)
        assert authorised or status in (401, 404)

    ask = {"messages": [{"role": "user", "content": "hi"}]}
    try:
        assert client.post("/v1/chat/completions", json.dumps(ask).encode(), **known)[0] == 200
        rubbish()
        assert {name for name, _ in client.asked} == {"s"}, "nothing reached the other session"
        assert client.server.counts["refused"] > requests / 10
        session = client.server._sessions["s"]
        assert not session.handlers and client.server._running == 0
        other = {"Authorization": f"Bearer {client.other}"}
        assert client.post("/v1/chat/completions", json.dumps(ask).encode(), **other)[0] == 200
    finally:
        client.close()


@pytest.mark.parametrize("requests", [40, pytest.param(2500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("template", [TOOLS, GEMMA, QWEN3, PHI], ids=["tools", "gemma", "qwen3", "phi"])
@pytest.mark.timeout(900)
def test_rubbish_in_a_session(template: str, requests: int) -> None:
    """Calls that are nearly right reach the tokenizer and the template: none fails otherwise than refused,
    and what was sampled between them is laid out for training, each token once."""

    async def body() -> None:
        loop = asyncio.get_running_loop()
        limits = Budget(10**6, 50, 4000)
        async with (
            served(f"{ADD}{END}", f"four{END}", "five", template=template, budget=limits) as server,
            aiohttp.ClientSession() as http,
        ):
            calls, key = server.open("s")
            other, _ = server.open("t")

            async def post(path: str, data: bytes) -> tuple[int, bytes]:
                headers = {"Authorization": f"Bearer {key}"}
                async with http.post(server.url + path, data=data, headers=headers) as answer:
                    return answer.status, await answer.read()

            @settings(
                max_examples=requests,
                deadline=None,
                database=None,
                suppress_health_check=list(HealthCheck),
            )
            @given(CALLS)
            def rubbish(call: tuple[str, Any]) -> None:
                path, given = call
                asked = post(path, json.dumps(given).encode())
                status, answer = asyncio.run_coroutine_threadsafe(asked, loop).result(60)
                assert status in (200, 400, 401, 404, 405), (status, answer)
                assert b"server_error" not in answer and b"internal_error" not in answer, answer

            right = {"messages": [{"role": "user", "content": "hi"}]}  # by chance no other call may be
            assert (await post("/v1/chat/completions", json.dumps(right).encode()))[0] == 200
            await asyncio.to_thread(rubbish)
            made = calls.session.calls
            assert server.server.counts["errors"] == 0 and not other.session.calls
            assert made and trained(calls).num_sampled == sum(len(c.sampled) for c in made if c.trained)

    asyncio.run(body())


def test_traps() -> None:
    client = Client()
    known = {"Authorization": f"Bearer {client.key}"}
    deep = b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    wide = (
        b'{"tools": [{"function": {"name": "f", "parameters": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}}],"
    )
    wide += b'"messages": [{"role": "user", "content": "x"}]}'
    large = b'{"messages": [{"role": "user", "content": "' + b"x" * (9 << 20) + b'"}]}'
    number = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": ' + b"9" * 5000 + b"}"
    try:
        for data, statuses in (
            (deep, (400,)),
            (wide, (200, 400)),
            (large, (413,)),
            (number, (400,)),
            (b"[]", (400,)),
        ):
            status, answer = client.post("/v1/chat/completions", data, **known)
            check(client, "/v1/chat/completions", status, answer)
            assert status in statuses, answer
        for headers in (
            {"Authorization": "Bearer rft-s-é".encode().decode("latin-1")},
            {"Authorization": "Bearer rft-s-"},
            {"Authorization": "Bearer"},
            {"Authorization": f"Basic {client.key}"},
            {"Authorization": f"Bearer {client.key}x"},
            {"Authorization": f"Bearer {client.key.replace('rft-s', 'rft-t')}"},
            {"x-api-key": ""},
        ):
            assert client.post("/v1/chat/completions", b"{}", **headers)[0] == 401
        ask = json.dumps({"messages": [{"role": "user", "content": "hi"}]}).encode()
        assert client.post("/v1/chat/completions", ask, **{"x-api-key": client.key})[0] == 200
        gzip = client.post("/v1/chat/completions", b"no gzip", **known, **{"Content-Encoding": "gzip"})
        assert gzip[0] == 400 and client.server.counts["errors"] == 0
    finally:
        client.close()
