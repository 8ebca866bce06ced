"""Kind `mcp`: the tools of an MCP server, started for each session (stdio), or running elsewhere (HTTP)."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from rft.contrib.environments.command import resolved
from rft.environments.loop import as_text, first_messages, tool_loop
from rft.environments.tools import call_tool
from rft.environments.types import Episode, Row, Session, ToolCall
from rft.rewards.load import SpecError

if TYPE_CHECKING:
    from rft.environments.runner import Remote
    from rft.environments.zygote import Spec

OPTIONS = ("url", "tools")


class Host:
    """Operations in the worker. options: `url` of a server that runs; `tools`, the names of those to show."""

    session: Any = None

    def __init__(self, spec: Spec) -> None:
        if find_spec("mcp") is None:
            raise SpecError("kind mcp needs mcp, which is not installed: pip install 'rft[agents]'")
        unknown = next((name for name in spec.options if name not in OPTIONS), None)
        if unknown is not None:
            raise SpecError(f"environment.options.{unknown}: kind mcp knows {', '.join(OPTIONS)}")
        if bool(spec.command) == bool(spec.options.get("url")):
            raise SpecError("kind mcp needs either `command`, a server, or `options: {url: http://...}`")
        self.command = [resolved(word, spec.base_dir) for word in spec.command]
        self.url = spec.options.get("url")
        self.wanted = spec.options.get("tools")
        self.tools = asyncio.run(self._list_tools())
        self._client: Any = None
        self._serving: asyncio.Task[None] | None = None
        self._over = asyncio.Event()

    def _new_client(self) -> Any:
        from mcp import Client, StdioServerParameters

        if self.url:
            return Client(self.url)
        command, *args = self.command
        return Client(StdioServerParameters(command=command, args=args, env=dict(os.environ)))

    async def _list_tools(self) -> list[dict[str, Any]]:
        """Return the schemas of the server's tools. Raises SpecError."""
        watch_without_threads()
        where = self.url or " ".join(self.command)
        listed, cursor = list[Any](), None
        try:
            async with self._new_client() as client:
                while True:
                    page = await client.list_tools(cursor=cursor)
                    listed, cursor = listed + list(page.tools), page.next_cursor
                    if not cursor:
                        break
        except Exception as error:
            raise SpecError(f"the MCP server {where} did not list its tools: {_cause(error)}") from error
        names = [tool.name for tool in listed]
        missing = next((name for name in self.wanted or () if name not in names), None)
        if not names:
            raise SpecError(f"the MCP server {where} has no tools; name a server that offers some")
        if missing is not None:
            raise SpecError(
                f"the MCP server {where} has no tool {missing!r}; its tools are {', '.join(names)}"
            )
        return [
            {
                "type": "function",
                "function": {
                    "name": tool.name,
                    "description": tool.description or "",
                    "parameters": tool.input_schema,
                },
            }
            for tool in listed
            if self.wanted is None or tool.name in self.wanted
        ]

    def describe(self) -> dict[str, Any]:
        return {"tools": self.tools, "gives_reward": False}

    async def open(self) -> None:
        """Connect to a server for this episode."""
        self._over = asyncio.Event()
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        watch_without_threads()

        async def serve() -> None:  # a connection is opened and closed by one task
            try:
                async with self._new_client() as self._client:
                    ready.set_result(None)
                    await self._over.wait()
            except Exception as error:
                if ready.done():
                    raise
                ready.set_exception(RuntimeError(f"the MCP server did not start: {_cause(error)}"))

        self._serving = asyncio.create_task(serve())
        await ready

    async def call(self, name: str, arguments: Mapping[str, Any]) -> dict[str, str]:
        """Call a tool; the result is `{"content": text}`, or `{"error": text}` for the policy to read."""
        if name not in (tool["function"]["name"] for tool in self.tools):
            known = ", ".join(tool["function"]["name"] for tool in self.tools)
            return {"error": f"there is no tool {name!r}; the tools are {known}"}
        try:
            result = await self._client.call_tool(name, dict(arguments))
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        texts = [getattr(part, "text", None) or f"[{part.type}]" for part in result.content]
        text = "\n".join(texts) or as_text(result.structured_content or "")
        return {"error" if result.is_error else "content": text}

    async def end(self) -> None:
        self._over.set()
        if self._serving is not None:
            await asyncio.wait({self._serving}, timeout=5.0)
            self._serving = None


def watch_without_threads() -> None:
    """Have the running loop wait for child processes without a thread for each, as it does from 3.12 on."""
    if sys.version_info < (3, 12):
        watcher = asyncio.PidfdChildWatcher()
        watcher.attach_loop(asyncio.get_running_loop())
        asyncio.set_child_watcher(watcher)


def _cause(error: BaseException) -> BaseException:
    """Return the first error of nested groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def play(row: Row, session: Session, remote: Remote) -> Episode:
    """Play one episode, which the config's rewards score. A server that hangs or dies is a fault."""
    await remote.call("open", setup=True)
    messages = first_messages(row)
    start = len(messages)

    async def call(tool: ToolCall) -> str:
        return await call_tool(remote, tool)

    ending = await tool_loop(session, messages, remote.tools, call)
    return Episode(None, ending, messages=messages, start=start)
