"""Episodes at a server that speaks OpenEnv's wire (its own package does not install beside vLLM).

Its own server runs in an environment that pip makes, or in the Python that RFT_OPENENV_PYTHON names.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from rft.config.environment import EnvironmentConfig
from rft.environments.runner import EnvironmentRunner
from rft.environments.types import Ending, EnvironmentFault, Episode, ToolCall
from tests.environments.scripted import ScriptedSession
from tests.venvs import python_with

REAL = '''
import sys, uvicorn
from openenv.core.env_server.http_server import create_app
from openenv.core.env_server.interfaces import Environment
from openenv.core.env_server.types import Action, Observation, State

class Say(Action):
    """Say something."""
    text: str

class Heard(Observation):
    echo: str = ""

class Echo(Environment):
    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed=None, episode_id=None, word="hi", **more):
        self.n, self.word = 0, word
        return Heard(echo=f"Say {word} twice.")

    def step(self, action, timeout_s=None, **more):
        self.n += 1
        if action.text == "crash":
            raise ValueError("crashed")
        return Heard(echo=f"you said {action.text}", reward=float(action.text == self.word), done=self.n >= 2)

    @property
    def state(self):
        return State(episode_id="x", step_count=self.n)

app = create_app(Echo, Say, Heard, env_name="echo", max_concurrent_envs=16)
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="warning")
'''
WIRE = """
import sys
from aiohttp import web

SCHEMA = {"type": "object", "description": "Say something.", "required": ["text"],
          "properties": {"text": {"type": "string"}, "metadata": {"type": "object"}}}

async def schema(request):
    return web.json_response({"action": SCHEMA, "observation": {}, "state": {}})

async def play(request):
    ws = web.WebSocketResponse()
    await ws.prepare(request)
    n, word = 0, "hi"
    async for message in ws:
        body = message.json()
        if body["type"] == "close":
            break
        kind, data = "observation", body.get("data", {})
        if body["type"] == "reset":
            n, word = 0, data.get("word", "hi")
            echo = {"echo": f"Say {word} twice.", "metadata": {}}
            answer = {"observation": echo, "reward": None, "done": False}
        elif set(data) - {"text"} or data.get("text") == "crash":
            n += "text" in data
            kind, answer = "error", {"message": "crashed", "code": "EXECUTION_ERROR"}
        else:
            n += 1
            echo = {"echo": f"you said {data['text']}", "metadata": {}}
            answer = {"observation": echo, "reward": float(data["text"] == word), "done": n >= 2}
        await ws.send_json({"type": kind, "data": answer})
    return ws

app = web.Application()
app.router.add_get("/schema", schema)
app.router.add_get("/ws", play)
web.run_app(app, host="127.0.0.1", port=int(sys.argv[1]), print=None)
"""
ROW = {"prompt": "Play.", "word": "seven"}
OPENENV = "openenv==0.10.0"
SERVERS = [
    pytest.param(sys.executable, WIRE, id="wire"),
    pytest.param(OPENENV, REAL, id="openenv", marks=[pytest.mark.slow, pytest.mark.timeout(1200)]),
]


def say(text: str) -> ToolCall:
    return ToolCall("step", {"text": text})


def heard(episode: Episode) -> list[str]:
    return [m["content"] for m in episode.messages if m["role"] == "tool"]


def config(folder: Path, python: str, code: str, **more: Any) -> EnvironmentConfig:
    (folder / "server.py").write_text(code)
    command = [python, "server.py", "{port}"]
    return EnvironmentConfig(**{"kind": "openenv", "command": command, "step_timeout_s": 20, **more})


@pytest.mark.parametrize(("python", "code"), SERVERS)
async def test_episodes(tmp_path: Path, python: str, code: str) -> None:
    python = python_with("RFT_OPENENV_PYTHON", OPENENV, "uvicorn") if python == OPENENV else python
    async with EnvironmentRunner(config(tmp_path, python, code), tmp_path) as runner:
        (tool,) = runner.tools
        assert tool["function"]["name"] == "step" and tool["function"]["description"] == "Say something."
        assert list(tool["function"]["parameters"]["properties"]) == ["text"]
        session = ScriptedSession(say("seven"), say("no"), "never asked")
        episode = await runner.run(ROW, session)
        assert episode.messages[0]["content"] == "Play.\n\nSay seven twice."
        assert heard(episode) == ["you said seven", "you said no"]
        assert (episode.reward, episode.ending) == (1.0, Ending.finished)
        assert session.rewards == [(1.0, "reward", 0), (0.0, "reward", 1)]
        wrong = ScriptedSession(ToolCall("step", {"txt": 1}), ToolCall("stp", {}), say("crash"), say("seven"))
        episode = await runner.run(ROW, wrong)
        assert sum("error" in text for text in heard(episode)) == 3 and episode.reward == 1.0
        idle = await runner.run(ROW, ScriptedSession("I do not act."))
        assert (idle.reward, idle.ending) == (0.0, Ending.finished)
        limited = await runner.run(ROW, ScriptedSession(say("seven")))
        assert (limited.reward, limited.ending) == (1.0, Ending.turn_limit)
        assert runner.counts["started"] == 1, "the server is kept with its worker"


async def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "ended with status 3"),
        ({"command": ["python", "x.py"]}, "write {port}"),
        ({"options": {"url": "http://x"}}, "either `command`"),
    ]
    for more, words in cases:
        settings = config(tmp_path, sys.executable, "raise SystemExit(3)", **more)
        with pytest.raises(EnvironmentFault, match=words):
            await EnvironmentRunner(settings, tmp_path).start()
