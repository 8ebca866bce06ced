"""Kind `openenv`: an OpenEnv server, spoken to by its WebSocket; its action is the policy's one tool."""

from __future__ import annotations

import json
import socket
import subprocess
import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import urlopen

from rft.contrib.environments.command import resolved
from rft.environments.loop import as_text, error_text, first_messages
from rft.environments.types import ContextFull, Ending, Episode, Message, Row, Session, TurnLimit
from rft.rewards.load import SpecError

if TYPE_CHECKING:
    from rft.environments.runner import Remote
    from rft.environments.zygote import Spec

OPTIONS = ("url", "tool", "reset")
TOOL = "step"
START_S = 60.0  # for a server to answer
MESSAGE_BYTES = 8 << 20


class Host:
    """Operations in the worker. options: `url` of a server that runs; `tool`, the name that the policy sees;
    `reset`, arguments of every reset."""

    session: Any = None

    def __init__(self, spec: Spec) -> None:
        if find_spec("aiohttp") is None:
            raise SpecError("kind openenv needs aiohttp, which is not installed: pip install 'rft[agents]'")
        unknown = next((name for name in spec.options if name not in OPTIONS), None)
        if unknown is not None:
            raise SpecError(f"environment.options.{unknown}: kind openenv knows {', '.join(OPTIONS)}")
        if bool(spec.command) == bool(spec.options.get("url")):
            raise SpecError("kind openenv needs either `command`, a server, or `options: {url: http://...}`")
        if spec.command and not any("{port}" in word for word in spec.command):
            raise SpecError("environment.command: write {port} where the server's port belongs")
        self.command = [resolved(word, spec.base_dir) for word in spec.command]
        self.given = str(spec.options.get("url") or "").rstrip("/")
        self.tool = str(spec.options.get("tool", TOOL))
        self.reset_with = dict(spec.options.get("reset") or {})
        self.server: subprocess.Popen[bytes] | None = None
        self.url = ""
        try:
            self._start()
            self.schema = self._read_schema()
        except (OSError, ValueError) as error:
            where = self.given or " ".join(self.command)
            raise SpecError(f"the OpenEnv server {where} does not answer: {error}") from error
        finally:
            self._stop()  # each worker starts its server: forks cannot share one
        self._http: Any = None
        self._socket: Any = None

    def describe(self) -> dict[str, Any]:
        return {"tools": [self.schema], "gives_reward": True}

    def kept(self) -> set[int]:
        return set() if self.server is None else {self.server.pid}

    # -- the server ----------------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the server unless it runs elsewhere, or already. Raises OSError."""
        if self.given:
            self.url = self.given
            return
        if self.server is not None and self.server.poll() is None:
            return
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        words = [word.replace("{port}", str(port)) for word in self.command]
        self.server = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=2)
        self.url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + START_S
        while True:
            try:
                with urlopen(f"{self.url}/schema", timeout=5):
                    return
            except URLError:
                if self.server.poll() is not None:
                    raise OSError(f"it ended with status {self.server.returncode}") from None
                if time.monotonic() > deadline:
                    raise OSError(f"it did not start within {START_S:g} s") from None
                time.sleep(0.05)

    def _stop(self) -> None:
        if self.server is not None:
            self.server.kill()
            self.server.wait()
            self.server = None

    def _read_schema(self) -> dict[str, Any]:
        """Return the action as the schema of a tool."""
        with urlopen(f"{self.url}/schema", timeout=30) as answer:
            action = json.load(answer)["action"]
        properties = {k: v for k, v in action.get("properties", {}).items() if k != "metadata"}
        parameters = {**action, "type": "object", "properties": properties}
        described = {"name": self.tool, "description": action.get("description") or "Act in the environment."}
        return {"type": "function", "function": {**described, "parameters": parameters}}

    # -- one episode ---------------------------------------------------------------------------------------

    async def reset(self, row: Mapping[str, Any], seed: int | None) -> dict[str, Any]:
        """Connect, and begin an episode. Columns of the row that a server does not know are ignored by it."""
        import aiohttp

        self._start()
        self._http = aiohttp.ClientSession(trust_env=False)
        self._socket = await self._http.ws_connect(f"{self.url}/ws", max_msg_size=MESSAGE_BYTES)
        seeded = {} if seed is None else {"seed": seed % 2**31}
        columns = {k: v for k, v in row.items() if k != "prompt"}
        return await self._ask("reset", {**columns, **seeded, **self.reset_with})

    async def step(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Act; return `text`, `reward` and `done`, or `error` for the policy to read."""
        return await self._ask("step", dict(arguments))

    async def _ask(self, kind: str, data: dict[str, Any]) -> dict[str, Any]:
        await self._socket.send_json({"type": kind, "data": data})
        answer = await self._socket.receive_json()
        data = answer["data"]
        if answer["type"] == "error":
            if kind == "reset":
                raise RuntimeError(f"the OpenEnv server did not reset: {data.get('message')}")
            return {"error": str(data.get("message"))}
        seen = {k: v for k, v in data["observation"].items() if k != "metadata"}
        text = as_text(next(iter(seen.values())) if len(seen) == 1 else seen)
        return {"text": text, "reward": data.get("reward"), "done": bool(data.get("done"))}

    async def end(self) -> None:
        if self._socket is not None and not self._socket.closed:
            await self._socket.send_json({"type": "close"})
            await self._socket.close()
        if self._http is not None:
            await self._http.close()
        self._http = self._socket = None


async def play(row: Row, session: Session, remote: Remote) -> Episode:
    """Play one episode, until the server says that it is done, or the policy answers without an action. The
    reward is the sum of the steps'."""
    seen = await remote.call("reset", row, session.seed, setup=True)
    messages = first_messages(row, seen["text"], separator="\n\n")
    start, ending = len(messages), Ending.finished
    done = seen["done"]
    while not done:
        try:
            reply = await session.chat(messages, tools=remote.tools)
        except ContextFull:
            ending = Ending.context_full
            break
        except TurnLimit:
            ending = Ending.turn_limit
            break
        messages.append(reply.message())
        if reply.error:
            messages.append({"role": "tool", "name": "error", "content": error_text(reply.error)})
        elif not reply.tool_calls:
            break
        for call in reply.tool_calls:
            remote.tool_calls += 1
            name = remote.tools[0]["function"]["name"]
            if done:
                result: dict[str, Any] = {"error": "the episode is over"}
            elif call.name != name:
                result = {"error": f"there is no tool {call.name!r}; the tool is {name}"}
            else:
                result = await remote.call("step", call.arguments)
            remote.tool_errors += "error" in result
            text = error_text(result["error"]) if "error" in result else result["text"]
            answer: Message = {"role": "tool", "name": call.name, "content": text}
            messages.append(answer | ({"tool_call_id": call.id} if call.id else {}))
            if result.get("reward") is not None:
                remote.reward(float(result["reward"]), call=reply.call)
            done = done or bool(result.get("done"))
    return Episode(sum(remote.given, 0.0), ending, messages=messages, start=start)
