"""Kind `command`: a program, started once for each session, that calls the policy by HTTP."""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rft.contrib.environments.forked import Forked, preload
from rft.environments.rewards import read_reward
from rft.environments.types import Episode, OperationFailed, Row, Session
from rft.rewards.load import SpecError

if TYPE_CHECKING:
    from rft.environments.runner import Remote
    from rft.environments.zygote import Spec

KEPT = 1 << 16  # bytes of the end of a program's output
DRAIN_S = 0.5  # to read what an ended program has written, while its children keep the pipe open
OPTIONS = ("reward", "preload")


class Host:
    """Operations in the worker. options: `reward: false` if the program's last line is not a reward;
    `preload`, modules of a Python program that are imported once for all sessions."""

    session: Any = None

    def __init__(self, spec: Spec) -> None:
        unknown = next((name for name in spec.options if name not in OPTIONS), None)
        if unknown is not None:
            raise SpecError(f"environment.options.{unknown}: kind command knows {', '.join(OPTIONS)}")
        self.gives_reward = bool(spec.options.get("reward", True))
        self.command = [resolved(word, spec.base_dir) for word in spec.command]
        if shutil.which(self.command[0], path=search_path()) is None:
            raise SpecError(
                f"environment.command: {self.command[0]} is neither a program nor an executable file; write "
                "for example `python agent.py` or `bash agent.sh`"
            )
        modules = spec.options.get("preload") or ()
        self.preloaded = [modules] if isinstance(modules, str) else list(modules)
        if self.preloaded:
            preload(self.preloaded, self.command, search_path())

    def describe(self) -> dict[str, Any]:
        return {"tools": [], "gives_reward": self.gives_reward, "over_http": True}

    def run(self, row: Mapping[str, Any], variables: Mapping[str, str], folder: str) -> dict[str, Any]:
        """Run the program to its end; return its exit status and the ends of its output."""
        row_file = Path(folder, "row.json")
        row_file.write_text(json.dumps(row, ensure_ascii=False, default=str), encoding="utf-8")
        with self._start(
            folder, {**os.environ, "PATH": search_path(), **variables, "RFT_ROW": str(row_file)}
        ) as process:
            try:
                output, errors = read_until_end(process)
            finally:
                with suppress(ProcessLookupError):  # none of its children is left
                    os.killpg(process.pid, signal.SIGKILL)
        return {"status": process.returncode, "output": output, "errors": errors}

    def _start(self, folder: str, variables: Mapping[str, str]) -> subprocess.Popen[bytes] | Forked:
        if self.preloaded:
            return Forked(self.command[1:], folder, variables)
        return subprocess.Popen(
            self.command,
            cwd=folder,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            process_group=0,
        )


def search_path() -> str:
    """Return where programs are looked for: first beside rft's Python, also if its environment is not
    activated."""
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def resolved(word: str, base_dir: Path) -> str:
    """Return the absolute path of a word that names a file: the program runs in another folder."""
    path = base_dir / word
    return str(path) if path.is_file() else word


def read_until_end(process: subprocess.Popen[bytes] | Forked) -> tuple[str, str]:
    """Read a program's output until it ends; return the ends of both streams."""
    assert process.stdout is not None and process.stderr is not None
    streams = {process.stdout.fileno(): bytearray(), process.stderr.fileno(): bytearray()}
    ended = os.pidfd_open(process.pid)
    poll = select.poll()
    for fd in (*streams, ended):
        poll.register(fd, select.POLLIN)
    waiting, until = set(streams), float("inf")
    while waiting and time.monotonic() < until:
        for fd, _ in poll.poll(None if until == float("inf") else 50):
            if fd == ended:
                poll.unregister(fd)
                until = time.monotonic() + DRAIN_S
                continue
            data = os.read(fd, 1 << 16)
            if not data:
                poll.unregister(fd)
                waiting.discard(fd)
            streams[fd] += data
            del streams[fd][:-KEPT]
    process.wait()
    os.close(ended)
    output, errors = (bytes(kept).decode("utf-8", "replace") for kept in streams.values())
    return output, errors


async def play(row: Row, session: Session, remote: Remote) -> Episode:
    """Play one episode. A program that fails after a budget was used up is scored by the rewards so far."""
    from rft.endpoint.calls import open_session

    folder = tempfile.mkdtemp(prefix="rft-session-")
    try:
        async with open_session(session, remote) as (access, calls):
            variables = {**access.variables(), **without_proxy()}
            ended = await remote.call("run", row, variables, folder, setup=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    failure = ""
    if ended["status"] != 0:
        output = (ended["errors"] or ended["output"]).strip()[-2000:]
        failure = f"the command {_how(ended['status'])}: {output}"
    ending, scores = calls.finish(failure), dict(remote.scores)
    reward = sum(remote.given) if remote.given or failure else None
    if reward is None and remote.gives_reward:
        reward, scores = last_line(ended["output"])
    return Episode(reward, ending, scores, remote.messages, remote.start)


def last_line(output: str) -> tuple[float | None, dict[str, float]]:
    """Return the reward in the last line of an output: a number, or JSON. Raises OperationFailed."""
    line = output.strip().rpartition("\n")[2].strip()
    try:
        return read_reward(json.loads(line), "the command's last line")
    except (ValueError, RecursionError):
        raise OperationFailed(
            f"the last line of the command's output is not a reward: {line!r:.200}; print a number or a JSON "
            "object of named numbers, or call /rl/set_reward; or write environment.options: {reward: false}"
        ) from None


def without_proxy() -> dict[str, str]:
    """Return variables that keep clients from sending calls to this machine through a proxy."""
    hosts = ",".join(filter(None, [os.environ.get("NO_PROXY") or os.environ.get("no_proxy"), "127.0.0.1"]))
    return {"NO_PROXY": hosts, "no_proxy": hosts}


def _how(status: int) -> str:
    return f"exited with status {status}" if status > 0 else f"was killed by signal {-status}"
