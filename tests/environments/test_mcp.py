"""Tools of a real MCP server, by stdio and by HTTP."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rft.config.environment import EnvironmentConfig
from rft.environments.runner import EnvironmentRunner
from rft.environments.types import Ending, EnvironmentFault, Episode, ToolCall
from tests.environments.scripted import ScriptedSession

SERVER = '''
import os, sys, time
from mcp.server.mcpserver import MCPServer

server = MCPServer("shop")
bought = []

@server.tool()
def buy(item: str, number: int = 1) -> str:
    """Buy something."""
    bought.extend([item] * number)
    return f"You have {', '.join(bought)}."

@server.tool()
def fail() -> str:
    """Fail."""
    raise ValueError("closed")

@server.tool()
def hang() -> str:
    """Hang."""
    time.sleep(1000)
    return ""

@server.tool()
def die() -> str:
    """Die."""
    os._exit(3)

if len(sys.argv) > 1:
    server.run("streamable-http", host="127.0.0.1", port=int(sys.argv[1]))
else:
    server.run()
'''
ROW = {"prompt": "Go shopping."}


def use(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name, arguments)


def results(episode: Episode) -> list[str]:
    return [m["content"] for m in episode.messages if m["role"] == "tool"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "server.py"
    path.write_text(SERVER)
    return path


def config(file: Path, **more: Any) -> EnvironmentConfig:
    command = [sys.executable, file.name]
    return EnvironmentConfig(**{"kind": "mcp", "command": command, "step_timeout_s": 5, **more})


async def test_tools_of_a_server_by_stdio(file: Path) -> None:
    async with EnvironmentRunner(config(file), file.parent) as runner:
        assert [t["function"]["name"] for t in runner.tools] == ["buy", "fail", "hang", "die"]
        assert runner.tools[0]["function"]["parameters"]["required"] == ["item"]
        assert not runner.gives_reward
        calls = (
            use("buy", item="bread"),
            use("buy", item="apple", number=2),
            use("fail"),
            use("buy"),
            use("sell"),
        )
        for _ in range(2):  # a server for each session
            episode = await runner.run(ROW, ScriptedSession(*calls, "done"))
            first, second, failed, missing, unknown = results(episode)
            assert (first, second) == ("You have bread.", "You have bread, apple, apple.")
            assert "fail" in failed and "buy" in missing and "there is no tool 'sell'" in unknown
            assert episode.ending is Ending.finished and episode.reward is None
        assert runner.counts["crashed"] == runner.counts["killed"] == 0
        hung = await runner.run(ROW, ScriptedSession(use("hang")))
        assert hung.ending is Ending.timeout
        died = await runner.run(ROW, ScriptedSession(use("die"), "sorry"))
        assert died.ending is Ending.finished and "error" in results(died)[0]


async def test_only_some_tools(file: Path) -> None:
    async with EnvironmentRunner(config(file, options={"tools": ["buy"]}), file.parent) as runner:
        assert [t["function"]["name"] for t in runner.tools] == ["buy"]
    with pytest.raises(EnvironmentFault, match="has no tool 'sell'; its tools are buy"):
        await EnvironmentRunner(config(file, options={"tools": ["sell"]}), file.parent).start()
    with pytest.raises(EnvironmentFault, match="did not list its tools"):
        await EnvironmentRunner(config(file, command=["true"]), file.parent).start()


@pytest.fixture
def url(file: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with subprocess.Popen([sys.executable, str(file), str(port)], stderr=subprocess.DEVNULL) as server:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                socket.create_connection(("127.0.0.1", port)).close()
                break
            except OSError:
                time.sleep(0.1)
        yield f"http://127.0.0.1:{port}/mcp"
        server.kill()


async def test_a_server_by_http(url: str) -> None:
    settings = EnvironmentConfig(kind="mcp", options={"url": url}, step_timeout_s=10)
    async with EnvironmentRunner(settings) as runner:
        episode = await runner.run(ROW, ScriptedSession(use("buy", item="bread"), "done"))
        assert results(episode) == ["You have bread."]
