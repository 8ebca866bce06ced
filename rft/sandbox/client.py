"""Trusted side of the sandbox: start the zygote, send it programs, read the results, keep nothing."""

from __future__ import annotations

import base64
import contextlib
import fcntl
import json
import os
import random
import select
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from . import linux
from .cgroup import Group, Groups

PROTECTIONS = ("network", "files", "signals", "system calls", "processes", "memory", "time", "output")
Backend = Literal["auto", "bubblewrap", "native", "landlock"]
HERE = os.path.dirname(os.path.abspath(__file__))
_F_ADD_SEALS, _ALL_SEALS = 1033, 1 | 2 | 4 | 8  # F_SEAL_SEAL, SHRINK, GROW, WRITE
_GRACE_S = 30.0  # added to the wall time for a busy machine


class SandboxError(RuntimeError):
    """The sandbox does not work, or lacks a required protection. Never caused by the program."""


class TestsError(ValueError):
    """The tests cannot be run, whatever the program is: an error in the dataset."""

    __test__ = False  # keeps pytest from collecting this class


@dataclass(frozen=True)
class Limits:
    """Resource limits of a program and its descendants.

    wall_s, cpu_s: seconds. memory: bytes in memory. processes: processes and threads. file: bytes of one
    file; scratch: of all files. output: bytes of stdout and of stderr. address_space: whether `memory` also
    limits the address space of each process; off for runtimes that reserve more than they use (node, java).
    """

    wall_s: float = 10.0
    cpu_s: int = 5
    memory: int = 512 << 20
    processes: int = 16
    file: int = 16 << 20
    scratch: int = 64 << 20
    output: int = 1 << 16
    address_space: bool = True


@dataclass(frozen=True)
class Result:
    """How a program ended: its exit `code`, or the `signal` that killed it.

    exceeded: the limit that it exceeded, else empty. error: in a session, the traceback of this call.
    """

    code: int | None
    signal: int | None
    exceeded: str
    stdout: str
    stderr: str
    cpu_s: float
    wall_s: float
    error: str = ""


@dataclass(frozen=True)
class TestResult:
    """Result of running tests. problem: why they ended early; exceeded: the limit that was exceeded."""

    __test__ = False

    passed: int
    total: int
    failures: tuple[str, ...]
    problem: str
    exceeded: str
    stderr: str
    wall_s: float


class Sandbox:
    """A zygote and the requests to it, which may come from several threads.

    A forked process that uses the sandbox starts a separate zygote.

    readable: further folders that programs may read. require: protections without which nothing runs.
    backend: `bubblewrap`, `native` namespaces, `landlock`, or `auto`: the first of them that works here.
    Raises SandboxError if a required protection or the named backend is unavailable on this machine.
    """

    def __init__(
        self,
        readable: Sequence[str] = (),
        require: Collection[str] = PROTECTIONS,
        backend: Backend = "auto",
    ) -> None:
        unknown = set(require) - set(PROTECTIONS)
        if unknown:
            raise SandboxError(
                f"unknown protection {min(unknown)!r} in `require`; known: {', '.join(PROTECTIONS)}"
            )
        self._readable = [os.path.abspath(os.path.expanduser(path)) for path in readable]
        self._require = require
        self._wanted: Backend = backend
        self._process: subprocess.Popen[bytes] | None = None
        self._first_user = random.SystemRandom().randrange(1_000_000_000, 2_000_000_000)
        self._users = 0
        self._lock = threading.Lock()
        self._pid = os.getpid()
        self._groups = Groups.open(self._pid)
        self.protections: dict[str, str] = {}
        self.backend = ""
        self.notes: list[str] = []
        self._start()

    # -- the zygote ----------------------------------------------------------------------------------

    def _start(self) -> None:
        """Start the zygote with the first backend that works."""
        self.notes = []
        if self._wanted == "auto":
            choices = ["bubblewrap"] if shutil.which("bwrap") else []
            choices += ["native", "landlock"]
        else:
            choices = [self._wanted]
        for backend in choices:
            hello = self._try(backend)
            if hello is None:
                continue
            if backend != "landlock" and not hello["namespaces"] and self._wanted == "auto":
                self._note(f"{backend}: {hello['why']}")
                self._end_process()
                continue
            self._check(backend, hello)
            return
        raise SandboxError(f"no sandbox starts on this machine: {'; '.join(self.notes)}")

    def _note(self, note: str) -> None:
        if note not in self.notes:
            self.notes.append(note)

    def _try(self, backend: str) -> dict[str, Any] | None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        owner = os.pidfd_open(os.getpid())
        options = json.dumps(
            {"backend": backend, "readable": self._readable, "counted": self._groups is not None}
        )
        command = [sys.executable, "-I", HERE, str(theirs.fileno()), str(owner), options]
        if backend == "bubblewrap":
            bwrap = shutil.which("bwrap")
            if bwrap is None:
                self._note("bubblewrap (bwrap) is not installed")
                return None
            command = [bwrap, *_bubblewrap(self._readable), *command]
        try:
            self._process = subprocess.Popen(
                command,
                env={"LANG": "C.UTF-8", "PATH": "/usr/local/bin:/usr/bin:/bin"},
                pass_fds=[theirs.fileno(), owner],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd="/",
                start_new_session=True,  # Ctrl-C must reach the owner only, which decides what to do
            )
        except OSError as error:
            self._note(f"{backend}: {error}")
            return None
        finally:
            theirs.close()
            os.close(owner)
        self._socket = ours
        ready, _, _ = select.select([ours], [], [], 60.0)
        data = ours.recv(1 << 20) if ready else b""
        if not data:
            self._process.kill()
            assert self._process.stderr is not None
            stderr = self._process.stderr.read().decode("utf-8", "replace").strip()[-400:]
            self._note(f"{backend} does not start: {stderr or 'no answer within 60 s'}")
            self._end_process()
            return None
        return json.loads(data)

    def _check(self, backend: str, hello: Mapping[str, Any]) -> None:
        self.backend = backend
        self.protections = dict(hello["protections"])
        if self._groups is not None:
            self.protections["memory"] = (
                f"control group (version {self._groups.hierarchy.version}), RLIMIT_AS"
            )
        if hello["why"]:
            self._note(hello["why"])
        if hello["hidden"]:
            self.close()
            raise SandboxError(
                f"programs in the sandbox would not find the packages in {', '.join(hello['hidden'])}: "
                "name the folder in `readable`"
            )
        missing = [name for name in self._require if not self.protections[name]]
        if self._wanted not in ("auto", "landlock") and not hello["namespaces"]:
            missing = missing or ["files"]
        if missing:
            self.close()
            why = f" ({'; '.join(self.notes)})" if self.notes else ""
            raise SandboxError(
                f"this machine cannot protect: {', '.join(missing)}{why}. Allow user namespaces (for a "
                f"container: a seccomp profile that permits unshare), or list only the protections you need: "
                f"require: {sorted(set(self._require) - set(missing))}"
            )

    def _after_fork(self) -> None:
        """Leave zygote and groups to the parent process after a fork."""
        self._lock = threading.Lock()
        self._pid = os.getpid()
        if self._process is not None:
            self._socket.close()
            self._process.returncode = 0  # a child of another process, which must not be waited for here
            self._process = None
        self._groups = Groups.open(self._pid)
        self._first_user = random.SystemRandom().randrange(1_000_000_000, 2_000_000_000)

    def _end_process(self) -> None:
        if self._process is not None:
            self._socket.close()
            self._process.kill()
            self._process.wait()
            if self._process.stderr is not None:
                self._process.stderr.close()
            self._process = None

    @property
    def pid(self) -> int | None:
        """Return the process id of the zygote; None if it is not running."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """Stop the zygote, and with it everything that runs in the sandbox."""
        if self._pid != os.getpid():
            self._after_fork()
        self._end_process()
        if self._groups is not None:
            self._groups.close()
            self._groups = None

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def describe(self) -> str:
        """Describe in one line which protections are on, their mechanisms, and which are missing."""
        on = "; ".join(f"{k}: {v or 'OFF'}" for k, v in self.protections.items())
        return f"sandbox ({self.backend}): {on}" + (f" [{'; '.join(self.notes)}]" if self.notes else "")

    # -- requests ------------------------------------------------------------------------------------

    def _spawn(self, role: str, limits: Limits, fds: Mapping[str, int]) -> _Running:
        """Start one process. It receives copies of the given descriptors, which stay open here."""
        if self._pid != os.getpid():
            self._after_fork()
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._end_process()
                self._start()
            zygote = self._socket
            self._users = (self._users + 1) % 1_000_000
            user, group = self._first_user + self._users, None
            if self._groups is not None:
                group = self._groups.take()
                group.limit(limits.memory)
        running = _Running(self, group, limits)
        theirs = {**fds, "status": running.status_w, "control": running.control_r}
        sent = theirs if group is None else {**theirs, "cgroup": group.fd}
        header = {
            "role": role,
            "user": user,
            "fds": list(sent),
            "limits": {
                "wall_s": limits.wall_s,
                "cpu_s": limits.cpu_s,
                "memory": limits.memory,
                "processes": limits.processes,
                "file": limits.file,
                "scratch": limits.scratch,
                "address_space": limits.address_space,
            },
        }
        message, copies = [json.dumps(header).encode()], list(sent.values())
        try:
            try:
                socket.send_fds(zygote, message, copies)
            except OSError as error:
                if not isinstance(error, ConnectionError) and zygote.fileno() >= 0:
                    raise
                # The zygote ended, and `poll` does not show it yet; nothing was sent.
                with self._lock:
                    if self._socket is zygote:
                        self._end_process()
                        self._start()
                socket.send_fds(self._socket, message, copies)
        except BaseException as error:
            running.abandon()
            if isinstance(error, OSError):
                raise SandboxError(f"the sandbox process has ended: {error}") from error
            raise
        running.sent()
        return running

    def _done_with(self, group: Group | None) -> None:
        if group is not None and self._groups is not None:
            self._groups.give_back(group)

    def run(
        self,
        program: str | None = None,
        files: Mapping[str, bytes] | None = None,
        stdin: str = "",
        limits: Limits = Limits(),
        *,
        argv: Sequence[str] | None = None,
    ) -> Result:
        """Run a Python program as `__main__`, or a command, in an empty scratch folder with `files`."""
        payload: dict[str, Any] = {"files": _encoded(files or {})}
        payload |= {"argv": list(argv)} if argv is not None else {"program": program}
        with _Descriptors() as descriptors:
            out, out_w = descriptors.pipe()
            err, err_w = descriptors.pipe()
            fds = {
                "payload": descriptors.add(_memory_file(json.dumps(payload).encode())),
                "stdin": descriptors.add(_memory_file(stdin.encode("utf-8", "surrogatepass"))),
                "stdout": out_w,
                "stderr": err_w,
            }
            with self._spawn("main", limits, fds) as running:
                descriptors.close(*fds.values())
                outputs = _collect([running], {out: "stdout", err: "stderr"}, limits.output)
        return running.result(outputs)

    def test(
        self,
        program: str,
        tests: Sequence[str],
        *,
        names: Sequence[str] = (),
        limits: Limits = Limits(),
    ) -> TestResult:
        """Run Python tests against a program's names, in two processes.

        tests: sources; `testing.py` defines which statements are tests. names: builtin names that mean the
        program's function in the tests, for example `sum`. Raises TestsError for tests that cannot be run.
        """
        with _Descriptors() as descriptors:
            link, link_w = map(descriptors.add, map(socket.socket.detach, socket.socketpair()))
            report, report_w = descriptors.pipe()
            err, err_w = descriptors.pipe()
            source = descriptors.add(_memory_file(json.dumps({"program": program}).encode()))
            checks = descriptors.add(
                _memory_file(json.dumps({"tests": list(tests), "names": list(names)}).encode())
            )
            with (
                self._spawn("serve", limits, {"payload": source, "link": link, "stderr": err_w}) as a,
                self._spawn("test", limits, {"payload": checks, "link": link_w, "report": report_w}) as b,
            ):
                descriptors.close(source, link, err_w, checks, link_w, report_w)
                outputs = _collect([b, a], {report: "report", err: "stderr"}, max(limits.output, 1 << 16))
        ran, tested = a.result(outputs), b.result(outputs)
        exceeded = ran.exceeded or tested.exceeded
        if exceeded == "stopped":  # the program was stopped because its tests had finished
            exceeded = tested.exceeded
        test_report: dict[str, Any] = {
            "passed": 0,
            "total": 0,
            "failures": [],
            "problem": "no result",
            "invalid": "",
        }
        with contextlib.suppress(ValueError):  # missing, or cut off by a limit
            test_report = json.loads(outputs["report"])
        if test_report["invalid"]:
            raise TestsError(test_report["invalid"])
        if exceeded:
            test_report["problem"] = f"it exceeded its limit: {exceeded}"
        return TestResult(
            passed=test_report["passed"],
            total=test_report["total"],
            failures=tuple(test_report["failures"]),
            problem=test_report["problem"],
            exceeded=exceeded,
            stderr=ran.stderr,
            wall_s=max(ran.wall_s, tested.wall_s),
        )

    def session(self, files: Mapping[str, bytes] | None = None, limits: Limits = Limits()) -> Session:
        """Open a Python session that keeps its state between calls, for example as a model's tool.

        limits: `wall_s` limits one call, the others the whole session.
        """
        return Session(self, files or {}, limits)


class _Descriptors:
    """File descriptors that are closed at the end of a block, also after an exception."""

    def __init__(self) -> None:
        self.fds: set[int] = set()

    def add(self, fd: int) -> int:
        self.fds.add(fd)
        return fd

    def pipe(self) -> tuple[int, int]:
        first, second = os.pipe()
        return self.add(first), self.add(second)

    def close(self, *fds: int) -> None:
        for fd in fds:
            if fd in self.fds:
                self.fds.discard(fd)
                os.close(fd)

    def __enter__(self) -> _Descriptors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close(*self.fds)


class _Running:
    """State of one sandboxed process on the trusted side."""

    def __init__(self, sandbox: Sandbox, group: Group | None, limits: Limits) -> None:
        self.sandbox, self.group, self.limits = sandbox, group, limits
        self.ending = b""
        self.exceeded = ""
        self._own = _Descriptors()
        try:
            self.status, self.status_w = self._own.pipe()
            self.control_r, self.control = self._own.pipe()
        except OSError as error:
            self.abandon()
            raise SandboxError(f"cannot open a pipe to the sandbox: {error}") from error

    def __enter__(self) -> _Running:
        return self

    def __exit__(self, *_: object) -> None:
        """Stop the process if it is still running because the caller was interrupted."""
        if self.group is not None or self._own.fds:
            self.stop()
            while self.read_status():
                pass
            self.finish()

    def sent(self) -> None:
        self._own.close(self.status_w, self.control_r)

    def abandon(self) -> None:
        """Release the resources of a process that was not started."""
        self._own.close(*self._own.fds)
        self.sandbox._done_with(self.group)
        self.group = None

    def stop(self, exceeded: str = "") -> None:
        """Request the end of the process and its descendants."""
        self.exceeded = self.exceeded or exceeded
        self._own.close(self.control)

    def read_status(self) -> bool:
        """Read a part of the exit status; return False once the process and its descendants are gone."""
        part = os.read(self.status, 4096)
        self.ending += part
        return bool(part)

    def finish(self) -> None:
        self.abandon()

    def result(self, outputs: Mapping[str, str], error: str = "") -> Result:
        """Return the result after the end. Raises SandboxError if the sandbox failed."""
        try:
            ended: dict[str, Any] = json.loads(
                self.ending or '{"failed": "the process could not be started, or the sandbox was killed"}'
            )
        except ValueError:
            ended = {"failed": self.ending.decode("utf-8", "replace")}
        if "failed" in ended:
            raise SandboxError(f"the sandbox failed:\n{ended['failed']}")
        return Result(
            code=ended.get("code"),
            signal=ended.get("signal"),
            exceeded=self.exceeded or ended["exceeded"],
            stdout=outputs.get("stdout", ""),
            stderr=outputs.get("stderr", ""),
            cpu_s=ended["cpu_s"],
            wall_s=ended["wall_s"],
            error=error,
        )


def _collect(processes: Sequence[_Running], pipes: Mapping[int, str], most: int) -> dict[str, str]:
    """Wait for the end of all processes and read their pipes, at most `most` bytes of each.

    When the first process has ended, the others are stopped.
    """
    kept: dict[str, bytearray] = {name: bytearray() for name in pipes.values()}
    poll = select.poll()
    waiting = {process.status: process for process in processes}
    for fd in (*pipes, *waiting):
        poll.register(fd, select.POLLIN | select.POLLHUP)
    end = time.monotonic() + max(process.limits.wall_s for process in processes) + _GRACE_S
    while waiting:
        left = end - time.monotonic()
        if left <= 0:  # init enforces the wall time: this happens only if the machine stalls
            for process in waiting.values():
                process.stop("wall time")
            end = time.monotonic() + _GRACE_S
        for fd, _ in poll.poll(max(0.0, left) * 1000 + 1):
            if fd in waiting:
                if not waiting[fd].read_status():
                    poll.unregister(fd)
                    ended = waiting.pop(fd)
                    ended.finish()
                    if ended is processes[0]:
                        for process in waiting.values():
                            process.stop()
                continue
            data = os.read(fd, 1 << 16)
            if not data:
                poll.unregister(fd)
                continue
            _keep(kept[pipes[fd]], data, most, processes)
    for fd, name in pipes.items():
        os.set_blocking(fd, False)
        with contextlib.suppress(BlockingIOError):
            while data := os.read(fd, 1 << 16):
                _keep(kept[name], data, most, processes)
    return {name: bytes(data[:most]).decode("utf-8", "replace") for name, data in kept.items()}


def _keep(kept: bytearray, data: bytes, most: int, processes: Sequence[_Running]) -> None:
    kept += data
    if len(kept) > most:
        del kept[most + 1 :]
        for process in processes:
            process.stop("output")


class Session:
    """A Python process that executes sources one by one. Use as a context manager, or `close` it."""

    def __init__(self, sandbox: Sandbox, files: Mapping[str, bytes], limits: Limits) -> None:
        self._limits = limits
        self._ended = ""
        self._running: _Running | None = None
        whole = Limits(**{**vars(limits), "wall_s": 1e9})
        self._own = descriptors = _Descriptors()
        try:
            link, theirs = map(descriptors.add, map(socket.socket.detach, socket.socketpair()))
            out, out_w = descriptors.pipe()
            err, err_w = descriptors.pipe()
            self._pipes = {out: "stdout", err: "stderr"}
            payload = descriptors.add(_memory_file(json.dumps({"files": _encoded(files)}).encode()))
            fds = {"payload": payload, "link": theirs, "stdout": out_w, "stderr": err_w}
            self._running = sandbox._spawn("session", whole, fds)
            descriptors.close(*fds.values())
            self._link = socket.socket(fileno=link)
            descriptors.fds.discard(link)
        except BaseException:
            if self._running is not None:
                self._running.abandon()
            descriptors.close(*descriptors.fds)
            raise

    def run(self, code: str) -> Result:
        """Execute a source in the session's namespace; a last expression is printed, as in an interpreter.

        `error` of the result is the traceback of an exception, `exceeded` the limit that ended the session.
        Raises SandboxError once the session has ended.
        """
        running = self._running
        if running is None:
            raise SandboxError(f"the session has ended: {self._ended}")
        started = time.monotonic()
        message = json.dumps({"code": code}).encode() + b"\n"
        try:
            answer, outputs = self._exchange(running, message, started + self._limits.wall_s)
        except BaseException:  # interrupted: the next call would read this call's answer
            self.close()
            raise
        wall_s = time.monotonic() - started
        if answer is not None:
            return Result(0, None, "", outputs["stdout"], outputs["stderr"], 0.0, wall_s, answer)
        result = running.result(outputs)
        self._ended = (
            result.exceeded or f"it ended with {result.code if result.signal is None else result.signal}"
        )
        self._release()
        return result

    def _exchange(self, running: _Running, message: bytes, end: float) -> tuple[str | None, dict[str, str]]:
        """Send a source and read its answer: the error text, or None if the process ended."""
        kept = {name: bytearray() for name in self._pipes.values()}
        reply = bytearray()
        self._link.setblocking(False)
        poll = select.poll()
        for fd in (*self._pipes, running.status):
            poll.register(fd, select.POLLIN | select.POLLHUP)
        poll.register(self._link, select.POLLIN | select.POLLOUT)
        alive = True
        while alive and not reply.endswith(b"\n"):
            left = end - time.monotonic()
            if left <= 0:
                running.stop("wall time")
                end = time.monotonic() + _GRACE_S
            for fd, what in poll.poll(max(0.0, left) * 1000 + 1):
                if fd == running.status:
                    alive = running.read_status()
                elif fd == self._link.fileno():
                    message = self._talk(poll, what, message, reply)
                else:
                    _keep_or_end(poll, fd, kept[self._pipes[fd]], self._limits.output, running)
        for fd, name in self._pipes.items():
            os.set_blocking(fd, False)
            with contextlib.suppress(BlockingIOError):
                while data := os.read(fd, 1 << 16):
                    _keep(kept[name], data, self._limits.output, [running])
            os.set_blocking(fd, True)
        texts = {n: bytes(d[: self._limits.output]).decode("utf-8", "replace") for n, d in kept.items()}
        if not alive:
            running.finish()
            return None, texts
        try:
            return str(json.loads(reply)["error"]), texts
        except (ValueError, KeyError, TypeError, RecursionError):  # the program wrote to the link
            running.stop("protocol")
            while running.read_status():
                pass
            running.finish()
            return None, texts

    def _talk(self, poll: select.poll, what: int, message: bytes, reply: bytearray) -> bytes:
        """Send a part of the message, or read; return the unsent rest."""
        if what & select.POLLOUT and message:
            with contextlib.suppress(BlockingIOError, BrokenPipeError, ConnectionResetError):
                message = message[self._link.send(message) :]
        if not message:
            poll.modify(self._link, select.POLLIN)
        if what & select.POLLIN:
            with contextlib.suppress(BlockingIOError, ConnectionResetError):
                data = self._link.recv(1 << 16)
                if len(reply) < 1 << 20:  # a valid answer is a traceback, cut to 4,000 characters
                    reply += data
                if not data:
                    poll.unregister(self._link)
        elif what & (select.POLLHUP | select.POLLERR):
            poll.unregister(self._link)
        return message

    def _release(self) -> None:
        self._running = None
        self._link.close()
        self._own.close(*self._own.fds)

    def close(self) -> None:
        """Stop the session and all its processes."""
        running = self._running
        if running is None:
            return
        self._ended = "it was closed"
        running.stop()
        while running.read_status():
            pass
        running.finish()
        self._release()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _keep_or_end(poll: select.poll, fd: int, kept: bytearray, most: int, running: _Running) -> None:
    data = os.read(fd, 1 << 16)
    if not data:
        poll.unregister(fd)
        return
    _keep(kept, data, most, [running])


def _encoded(files: Mapping[str, bytes]) -> dict[str, str]:
    return {name: base64.b64encode(content).decode() for name, content in files.items()}


def _memory_file(data: bytes) -> int:
    """Create a sealed file in memory, positioned at its start: its receiver can read it, but not grow it."""
    fd = os.memfd_create("rft-sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(os.dup(fd), "wb") as file:
        file.write(data)
    fcntl.fcntl(fd, _F_ADD_SEALS, _ALL_SEALS)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _bubblewrap(readable: Sequence[str]) -> list[str]:
    """Return the bwrap options of the zygote: its root file system and outer namespaces.

    The zygote keeps capabilities to create the namespaces of each request; a program gets none of them.
    """
    command = [
        "--unshare-net",
        "--unshare-ipc",
        "--unshare-uts",
        "--unshare-pid",
        "--cap-add",
        "ALL",
    ]
    if os.getuid() != 0:
        command += ["--unshare-user"]
    paths = [*linux.SYSTEM_PATHS, *linux.python_paths(), HERE, *readable]
    parents = {str(parent) for path in (*paths, *linux.DEVICES) for parent in Path(path).parents}
    for folder in sorted(parents - {"/"} - {path for path in paths if os.path.islink(path)}):
        command += ["--perms", "0755", "--dir", folder]  # by default only root can enter these parents
    for path in paths:
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.exists(path):
            command += ["--ro-bind", path, path]
    for device in linux.DEVICES:
        command += ["--dev-bind", device, device]
    command += ["--proc", "/proc", "--dir", linux.SCRATCH]
    if "/tmp" not in parents:
        command += ["--symlink", linux.SCRATCH, "/tmp"]
    return [*command, "--chdir", "/", "--remount-ro", "/", "--"]
