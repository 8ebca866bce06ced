"""Running untrusted programs: the client of the jail server (`rft/rewards/jail.py`)."""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PROTECTIONS = (
    "network",
    "files",
    "signals",
    "system calls",
    "processes",
    "memory",
    "time",
    "output",
)


class SandboxError(RuntimeError):
    """The sandbox itself does not work, or lacks a required protection. Never the program's fault."""


@dataclass(frozen=True)
class Limits:
    """What a program may use: bytes, seconds, counts."""

    wall_s: float = 10.0
    cpu_s: int = 5
    memory: int = 512 << 20
    processes: int = 16
    file: int = 16 << 20
    scratch: int = 64 << 20
    output: int = 1 << 16
    address_space: bool = True  # off for runtimes that reserve far more than they use (node, java)


@dataclass(frozen=True)
class Run:
    """How a process ended. `broken` names the limit that it exceeded, `code` its exit status."""

    code: int | None
    signal: int | None
    broken: str
    stdout: str
    stderr: str
    cpu_s: float
    wall_s: float


@dataclass(frozen=True)
class Tested:
    """How tests went. `problem`: what ended them early; `broken`: the limit that was exceeded."""

    passed: int
    total: int
    failures: tuple[str, ...]
    problem: str
    broken: str
    stderr: str
    wall_s: float


class Sandbox:
    """A jail server and the requests to it; one request at a time.

    readable: further folders that programs may read. require: protections without which nothing runs.
    Raises SandboxError where a required protection is not to be had on this machine.
    """

    def __init__(self, readable: Sequence[str] = (), require: Collection[str] = PROTECTIONS) -> None:
        unknown = set(require) - set(PROTECTIONS)
        if unknown:
            raise SandboxError(f"no protection {min(unknown)!r}; there are: {', '.join(PROTECTIONS)}")
        self._readable = list(readable)
        self._require = require
        self._process: subprocess.Popen[bytes] | None = None
        self.protections: dict[str, str] = {}
        self._start()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        jail = Path(__file__).with_name("jail.py")
        command = [sys.executable, "-I", str(jail), str(theirs.fileno()), json.dumps(self._readable)]
        self._process = subprocess.Popen(
            command, env={"LANG": "C.UTF-8"}, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL
        )
        theirs.close()
        self._socket = ours
        hello = self._read(30.0)
        self.protections = hello["protections"]
        missing = [name for name in self._require if not self.protections[name]]
        if missing:
            self.close()
            why = f" ({hello['why']})" if hello["why"] else ""
            raise SandboxError(
                f"this machine cannot protect: {', '.join(missing)}{why}. Allow user namespaces (for a "
                f"container: a seccomp profile that permits unshare), or name what you do without: "
                f"require: {sorted(set(self._require) - set(missing))}"
            )

    def close(self) -> None:
        """End the server; its jailed processes end with it."""
        if self._process is not None:
            self._socket.close()
            self._process.kill()
            self._process.wait()
            self._process = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe(self) -> str:
        """Which protections are on, by what, in one line."""
        return "sandbox: " + "; ".join(f"{k}: {v or 'OFF'}" for k, v in self.protections.items())

    def _read(self, timeout_s: float) -> dict[str, Any]:
        data = b""
        while not data.endswith(b"\n"):
            ready, _, _ = select.select([self._socket], [], [], timeout_s)
            part = self._socket.recv(1 << 20) if ready else b""
            if not part:
                self.close()
                state = "ended" if ready else f"did not answer within {timeout_s:g} s"
                raise SandboxError(f"the sandbox's server {state}")
            data += part
        return json.loads(data)

    def _request(self, kind: str, limits: Limits, *payloads: Mapping[str, Any]) -> dict[str, Any]:
        if self._process is None or self._process.poll() is not None:
            self._start()
        fds = [_memory_file(payload) for payload in payloads]
        try:
            header = json.dumps({"kind": kind, "limits": asdict(limits)}).encode()
            socket.send_fds(self._socket, [header], fds)
        finally:
            for fd in fds:
                os.close(fd)
        answer = self._read(limits.wall_s + 30.0)
        if "failed" in answer:
            raise SandboxError(f"the sandbox's server failed:\n{answer['failed']}")
        return answer

    def run(
        self,
        program: str | None = None,
        *,
        argv: Sequence[str] | None = None,
        files: Mapping[str, bytes] | None = None,
        stdin: str = "",
        limits: Limits = Limits(),
    ) -> Run:
        """Run a Python program as `__main__`, or a command, in an empty scratch folder with `files`."""
        import base64

        payload: dict[str, Any] = {"stdin": stdin}
        payload["files"] = {k: base64.b64encode(v).decode() for k, v in (files or {}).items()}
        payload |= {"argv": list(argv)} if argv is not None else {"program": program}
        answer = self._request("run", limits, payload)
        ended = answer["ended"][0]
        broken = answer["broken"] or _cpu_broken(ended, limits)
        return Run(
            code=ended.get("code"),
            signal=ended.get("signal"),
            broken=broken,
            stdout=answer["stdout"],
            stderr=answer["stderr"],
            cpu_s=ended.get("cpu_s", 0.0),
            wall_s=answer["wall_s"],
        )

    def test(
        self,
        program: str,
        tests: Sequence[str],
        *,
        names: Sequence[str] = (),
        limits: Limits = Limits(),
    ) -> Tested:
        """Run Python tests (sources with asserts) against a program's names, in two processes.

        names: builtin names that mean the program's function in the tests, for example `sum`.
        """
        answer = self._request(
            "test", limits, {"program": program}, {"tests": list(tests), "names": list(names)}
        )
        program_ended = answer["ended"][0] or {}
        broken = answer["broken"] or _cpu_broken(program_ended, limits)
        report: dict[str, Any] = {"passed": 0, "total": 0, "failures": [], "problem": "no result"}
        if answer["report"]:
            report = json.loads(answer["report"])
        if broken:
            report["problem"] = f"it exceeded its limit: {broken}"
        return Tested(
            passed=report["passed"],
            total=report["total"],
            failures=tuple(report["failures"]),
            problem=report["problem"],
            broken=broken,
            stderr=answer["stderr"],
            wall_s=answer["wall_s"],
        )


def _cpu_broken(ended: Mapping[str, Any], limits: Limits) -> str:
    killed = ended.get("signal") in (9, 24)
    return "CPU time" if killed and ended.get("cpu_s", 0.0) >= limits.cpu_s - 0.5 else ""


def _memory_file(payload: Mapping[str, Any]) -> int:
    """A file in memory that only its receiver reads."""
    fd = os.memfd_create("rft-sandbox")
    os.write(fd, b"")
    with open(os.dup(fd), "wb") as file:
        file.write(json.dumps(payload).encode())
    os.lseek(fd, 0, os.SEEK_SET)
    return fd
