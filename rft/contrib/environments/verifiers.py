"""Kind `verifiers`: tasksets and environments of verifiers, played in a Python with its packages."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from rft.contrib.environments import verifiers_player
from rft.contrib.environments.command import search_path, without_proxy
from rft.environments.rewards import UnusableReward, read_reward
from rft.environments.types import Ending, Episode, OperationFailed, Row, Session
from rft.rewards.load import SpecError
from rft.utils.process import kill_tree

if TYPE_CHECKING:
    from rft.environments.runner import EnvironmentRunner, Remote
    from rft.environments.zygote import Spec

RUN = "import runpy, sys; sys.argv.pop(0); runpy.run_path(sys.argv[0], run_name='__main__')"
"""Runs a file without its folder on the import path: there `mcp.py` would hide the package mcp."""
OF_RFT = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "OPENAI_BASE_URL", "OPENAI_API_KEY")
"""Variables that are not passed on: they are about rft's Python, or another endpoint."""


class Host:
    """Operations in the worker. options: of v1 verifiers' section `env`, and `renderer`; of v0 the arguments
    of `load_environment`."""

    session: Any = None

    def __init__(self, spec: Spec) -> None:
        if find_spec("aiohttp") is None:
            raise SpecError("kind verifiers needs aiohttp, which is not installed: pip install 'rft[agents]'")
        assert spec.python is not None and spec.path is not None  # checked with the config
        python = spec.base_dir / spec.python if os.sep in spec.python else Path(spec.python)
        self.python = str(python)
        self.base_dir = spec.base_dir
        given = spec.base_dir / spec.path
        file = given.exists()  # a file or a folder with the code, or the name of an installed package
        self.settings = {
            "id": given.stem if file else spec.path,
            "folder": str(given.parent if file else spec.base_dir),
            "options": dict(spec.options),
        }
        refuse_services(spec.path, spec.options)
        self.process: Player | None = None
        self._start(0).end()  # each worker starts one: forks cannot share it

    def describe(self) -> dict[str, Any]:
        return {"tools": [], "gives_reward": True, "over_http": True}

    def kept(self) -> set[int]:
        return set() if self.process is None else {self.process.pid}

    def run(self, row: Mapping[str, Any], asked: Mapping[str, Any], max_turns: int) -> dict[str, Any]:
        """Play an episode; return the player's answer."""
        if self.process is None or not self.process.running:
            self.process = self._start(max_turns)
        answer = self.process.ask({**asked, "row": dict(row)})
        if "problem" in answer:
            raise UnusableReward(answer["problem"])
        return answer

    def _start(self, max_turns: int) -> Player:
        """Start the player, and wait until it has loaded. Raises SpecError."""
        try:
            player = Player(self.python, {**self.settings, "max_turns": max_turns}, self.base_dir)
        except OSError as error:
            raise SpecError(
                f"environment.python: {self.python} cannot be started ({error.strerror}); make an "
                "environment for verifiers: python3 -m venv FOLDER && FOLDER/bin/pip install "
                f"'{verifiers_player.V1}', and write python: FOLDER/bin/python"
            ) from None
        try:
            loaded = player.receive()
        except EOFError:
            raise SpecError(
                f"environment.python: {self.python} could not load verifiers: it {player.how()}"
            ) from None
        if "problem" in loaded:
            player.end()
            raise SpecError(loaded["problem"])
        return player


class Player:
    """A process in verifiers' Python, which plays one episode at a time."""

    def __init__(self, python: str, settings: Mapping[str, Any], folder: Path) -> None:
        ours, theirs = socket.socketpair()
        kept = {name: value for name, value in os.environ.items() if name not in OF_RFT}
        try:
            self._process = subprocess.Popen(
                [
                    python,
                    "-c",
                    RUN,
                    verifiers_player.__file__,
                    str(theirs.fileno()),
                    json.dumps(settings, default=str),
                ],
                cwd=folder,
                env={**kept, "PATH": search_path(), **without_proxy()},
                stdin=subprocess.DEVNULL,
                stdout=2,
                pass_fds=(theirs.fileno(),),
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        self._stream = ours.makefile("rw", encoding="utf-8", newline="\n")
        ours.close()  # the stream keeps it open

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def receive(self) -> dict[str, Any]:
        """Return the next message. Raises EOFError if the process has ended."""
        line = self._stream.readline()
        if not line.endswith("\n"):
            raise EOFError
        answer: dict[str, Any] = json.loads(line)
        return answer

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Return the answer to a message. Raises RuntimeError if the process ends."""
        try:
            self._stream.write(json.dumps(message, ensure_ascii=False, default=str) + "\n")
            self._stream.flush()
            return self.receive()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            raise RuntimeError(f"the process of verifiers {self.how()}") from None

    def how(self) -> str:
        """Return how the process ended."""
        try:
            status = self._process.wait(timeout=2.0)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"

    def end(self) -> None:
        kill_tree(self.pid)
        self._process.wait()
        self._stream.close()


def refuse_services(path: str, options: Mapping[str, Any]) -> None:
    """Raise SpecError for a taskset of verifiers that needs a service which the options do not name."""
    name = path.rsplit("/", 1)[-1].replace("-", "_").lower()
    taskset = options.get("taskset") or {}
    seats = [seat for seat in options.values() if isinstance(seat, Mapping)]
    elsewhere = any((seat.get("runtime") or {}).get("type", "subprocess") != "subprocess" for seat in seats)
    needs = {
        "harbor": (elsewhere, "containers; name their runtime: {agent: {runtime: {type: docker}}}"),
        "nemo_gym": (
            bool((taskset.get("task") or {}).get("resources_url")),
            "a resource server of NeMo-Gym; start it, and name it: {taskset: {task: {resources_url: URL}}}",
        ),
        "openenv": (
            bool(taskset.get("base_url")),
            "an OpenEnv server; start it, and name it: {taskset: {base_url: URL}}; or write kind: openenv",
        ),
    }
    given, what = needs.get(name, (True, ""))
    if not given:
        raise SpecError(f"environment.options: the taskset {path} of verifiers needs {what}")
    if name == "textarena":
        print(
            "rft: the taskset textarena needs word lists, which nltk loads from the network", file=sys.stderr
        )


_tokenizers: WeakKeyDictionary[EnvironmentRunner, TemporaryDirectory[str]] = WeakKeyDictionary()


def saved_tokenizer(runner: EnvironmentRunner, tokenizer: Any) -> str:
    """Return a folder with the run's tokenizer, for the renderers of verifiers."""
    if runner not in _tokenizers:
        folder = _tokenizers[runner] = TemporaryDirectory(prefix="rft-tokenizer-")
        tokenizer.save_pretrained(folder.name)
    return _tokenizers[runner].name


async def play(row: Row, session: Session, remote: Remote) -> Episode:
    """Play one episode. One that fails after a budget was used up is scored by the rewards so far."""
    from rft.endpoint.calls import open_session
    from rft.rollout import session as sessions

    assert isinstance(session, sessions.Session)
    tokenizer = saved_tokenizer(remote.runner, session.tokenizer)
    asked = {"tokenizer": tokenizer, "model": session.tokenizer.name_or_path, "seed": session.seed}
    async with open_session(session, remote) as (access, calls):
        asked |= {"url": access.url, "key": access.key}
        answer = await remote.call("run", row, asked, session.budget.turns, setup=True)
    ending = calls.finish(answer["failure"])
    if answer["failure"]:
        return Episode(sum(remote.given, 0.0), ending, remote.scores)
    try:
        reward, _ = read_reward(answer["reward"], "verifiers")
        _, scores = read_reward(answer["scores"] or None, "verifiers")
    except ValueError as error:
        raise OperationFailed(str(error)) from None
    if answer["turn_limit"]:
        ending = Ending.turn_limit
    return Episode(reward, ending, scores, answer["messages"], answer["start"])
