"""The judge, against a small server on loopback: verdicts, retries, rate limit, cache, failures."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from rft.rewards import Outcome, load_reward
from rft.rewards.judge import JudgeError, read_verdict

Reply = tuple[int, Any, dict[str, str]]


class Server:
    """Speaks chat completions; `answer` decides, from the request's number and body."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.keys: list[str | None] = []
        self.answer: Callable[[int, dict[str, Any]], Reply] = lambda n, body: verdict(8)
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                outer.requests.append(body)
                outer.times.append(time.monotonic())
                outer.keys.append(self.headers.get("Authorization"))
                status, content, headers = outer.answer(len(outer.requests), body)
                data = json.dumps(content).encode()
                self.send_response(status)
                for name, value in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, format: str, *args: Any) -> None:
                return

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}/v1"


def verdict(score: float, reason: str = "fine") -> Reply:
    return said(json.dumps({"reason": reason, "score": score}))


def said(text: str) -> Reply:
    return 200, {"choices": [{"message": {"content": text}}]}, {}


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    thread = threading.Thread(target=made.http.serve_forever, daemon=True)
    thread.start()
    yield made
    made.http.shutdown()
    made.http.server_close()


def judge(server: Server, **options: Any) -> Any:
    return load_reward("judge", base_url=server.url, model="m", backoff_s=0.01, **options)


def test_a_verdict_is_a_score_between_0_and_1(server: Server) -> None:
    server.answer = lambda n, body: verdict(8 if "excellent" in body["messages"][0]["content"] else 2)
    scores = judge(server).score(["ask", "ask"], ["excellent", "poor"])
    assert [s.value for s in scores] == [0.8, 0.2]
    assert [s.outcome for s in scores] == [Outcome.correct, Outcome.wrong]
    assert server.requests[0]["response_format"]["type"] == "json_schema"


def test_prompt_principle_reference_and_key_reach_the_judge(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_KEY", "k1")
    reward = judge(server, principle="Be concise.", api_key_env="MY_KEY")
    reward.score(["the question"], ["the answer"], answer=["the gold"])
    text = server.requests[0]["messages"][0]["content"]
    assert all(part in text for part in ("the question", "the answer", "the gold", "Be concise."))
    assert server.keys == ["Bearer k1"]
    reward.score(["q"], ["a"], principle=["Be kind."])
    assert "Be kind." in server.requests[1]["messages"][0]["content"]


def test_busy_servers_are_asked_again(server: Server) -> None:
    def busy(n: int, body: dict[str, Any]) -> Reply:
        return (429, {}, {"Retry-After": "0.2"}) if n == 1 else (503, {}, {}) if n == 2 else verdict(10)

    server.answer = busy
    assert judge(server).score(["q"], ["a"])[0].value == 1.0
    assert len(server.requests) == 3
    assert server.times[1] - server.times[0] >= 0.2


def test_a_judge_that_fails_is_an_error_and_not_a_zero(server: Server) -> None:
    server.answer = lambda n, body: (500, {"error": "broken"}, {})
    score = judge(server, retries=2).score(["q"], ["a"])[0]
    assert (score.value, score.outcome) == (None, Outcome.error)
    assert "3 attempts" in score.detail
    server.answer = lambda n, body: (401, {"error": "no key"}, {})
    before = len(server.requests)
    assert "401" in judge(server).score(["q"], ["b"])[0].detail
    assert len(server.requests) == before + 1  # nothing to gain by asking again
    server.answer = lambda n, body: said("I would say 7")
    assert judge(server).score(["q"], ["c"])[0].outcome is Outcome.error


def test_an_unreachable_judge_is_an_error() -> None:
    reward: Any = load_reward("judge", base_url="http://127.0.0.1:9/v1", model="m", retries=1, backoff_s=0.01)
    score = reward.score(["q"], ["a"])[0]
    assert (score.value, score.outcome) == (None, Outcome.error)


def test_the_cache_answers_the_second_time(server: Server, tmp_path: Path) -> None:
    path = str(tmp_path / "verdicts.sqlite")
    assert judge(server, cache=path).score(["q"], ["a"])[0].value == 0.8
    assert judge(server, cache=path).score(["q", "q"], ["a", "b"])[0].value == 0.8
    assert len(server.requests) == 2


def test_the_rate_limit_holds_and_requests_are_concurrent(server: Server) -> None:
    begun = time.monotonic()
    judge(server, per_second=20.0).score(["q"] * 5, list("abcde"))
    assert max(server.times) - begun >= 4 / 20

    def late(n: int, body: dict[str, Any]) -> Reply:
        time.sleep(0.3)
        return verdict(5)

    server.answer = late
    start = time.monotonic()
    judge(server).score(["q"] * 6, list("fghijk"))
    assert time.monotonic() - start < 1.5


def test_verdicts_are_read_strictly() -> None:
    assert read_verdict('{"reason": "r", "score": 3}', 10) == (3.0, "r")
    assert read_verdict('Well: {"score": 1} and then {"score": 4.5}', 10) == (4.5, "")
    for reply in ('{"score": 11}', '{"score": "7"}', '{"score": true}', "7", ""):
        with pytest.raises(JudgeError):
            read_verdict(reply, 10)
