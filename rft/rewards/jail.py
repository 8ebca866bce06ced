"""The sandbox's process: a small server that forks a jailed process per request.

Run as a script in isolated mode. It shuts itself in first (namespaces, or Landlock where those are not
to be had), then forks: a fork costs a few milliseconds where a fresh Python costs thirty. It never
reads what it runs: programs and tests arrive as file descriptors that only the process concerned
reads, so that no program finds another's tests in its memory.

A request is one JSON line with file descriptors attached: `{"kind", "limits"}` and a payload per
process. The kinds are `run` (one process: a command or a Python program) and `test` (two processes:
the program, and the tests that call it over a socket).
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from typing import Any

# Imported before the forks, so that programs find them loaded.
PRELOADED = "bisect collections copy datetime functools hashlib heapq itertools math operator random re"
for _name in [*PRELOADED.split(), "statistics", "string", "typing"]:
    importlib.import_module(_name)

HERE = os.path.dirname(os.path.abspath(__file__))


def _load(name: str) -> Any:
    """A file of rft, by path: its folder must not be on sys.path."""
    path = os.path.normpath(os.path.join(HERE, f"{name}.py"))
    spec = importlib.util.spec_from_file_location(f"rft_{os.path.basename(name)}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


kernel, process, codetest = _load("kernel"), _load("../utils/process"), _load("codetest")

OUTPUT_KEPT = 1 << 16
CHILD_UIDS = 1_000_000_000  # as root, every jailed process gets a user id of its own from here on


class Jail:
    """What protects, found out once."""

    def __init__(self, readable: list[str]) -> None:
        self.readable = [*kernel.readable_prefixes(), *readable]
        self.root = os.getuid() == 0
        self.namespaces, self.why = self._enter()
        self.landlock = kernel.landlock_abi()
        self.own_user = self._try_own_user()
        self.seccomp = self._try_seccomp()

    def _enter(self) -> tuple[bool, str]:
        """Enters the namespaces. Tried in a child first: a failure half-way cannot be undone."""
        pid = os.fork()
        if pid == 0:
            try:
                self._shut_in()
                kernel.unshare(kernel.CLONE_NEWPID | kernel.CLONE_NEWNS)
                inner = os.fork()
                if inner == 0:  # the first process of the new namespace
                    kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV)
                    os._exit(0)
                os._exit(os.waitstatus_to_exitcode(os.waitpid(inner, 0)[1]))
            except OSError as error:
                os._exit(error.errno or 255)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        if code != 0:
            return False, f"namespaces: {os.strerror(code)}"
        self._shut_in()
        return True, ""

    def _shut_in(self) -> None:
        kernel.enter_namespaces()
        empty = [path for path in ("/mnt", "/media", "/srv", "/tmp") if os.path.isdir(path)]
        kernel.build_root(empty[0], self.readable)

    def _try_own_user(self) -> bool:
        """Can a jailed process get a user id of its own, and still read what it needs?"""
        if not self.root or not (self.namespaces or self._others_can_read()):
            return False
        pid = os.fork()
        if pid == 0:
            try:
                kernel.drop_privileges(CHILD_UIDS)
                os._exit(0)
            except OSError:
                os._exit(1)
        return os.waitpid(pid, 0)[1] == 0

    def _try_seccomp(self) -> bool:
        pid = os.fork()
        if pid == 0:
            try:
                kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
                kernel.filter_syscalls(signals=True)
                os._exit(0)
            except (OSError, KeyError):
                os._exit(1)
        return os.waitpid(pid, 0)[1] == 0

    def protections(self) -> dict[str, str]:
        """What is on, by what; an empty string where nothing does it."""
        ns = self.namespaces
        return {
            "network": "network namespace, seccomp" if ns else "seccomp" if self.seccomp else "",
            "files": "mount namespace" if ns else f"Landlock {self.landlock}" if self.landlock else "",
            "signals": "pid namespace" if ns else "seccomp" if self.seccomp else "",
            "system calls": "seccomp" if self.seccomp else "",
            "processes": "RLIMIT_NPROC" if self.own_user or not self.root else "",
            "memory": "RLIMIT_AS, watch of the sum",
            "time": "RLIMIT_CPU, wall clock",
            "output": "RLIMIT_FSIZE, pipe limit",
        }

    def _others_can_read(self) -> bool:
        """Without a mount namespace: can an unprivileged user reach this Python?"""
        path = os.path.realpath(os.__file__)
        while path != "/":
            if not os.stat(path).st_mode & 0o005:
                return False
            path = os.path.dirname(path)
        return True

    def confine(self, limits: dict[str, Any], uid: int, scratch: str) -> None:
        """In the jailed process: every protection, and then no way back."""
        if self.namespaces:
            kernel.mount("proc", "/proc", "proc", kernel.MS_NOSUID | kernel.MS_NODEV)
            size = f"size={limits['scratch']},mode=1777,nr_inodes=4096"
            kernel.mount("tmpfs", scratch, "tmpfs", kernel.MS_NOSUID | kernel.MS_NODEV, size)
        os.chdir(scratch)
        processes = limits["processes"]
        if not self.namespaces and self.own_user:
            os.chown(scratch, uid, uid)
        elif not self.namespaces:  # the limit counts everything that this user runs
            processes += process.threads_of(os.getuid())
        kernel.limit(
            limits["memory"],
            limits["cpu_s"],
            limits["file"],
            processes,
            address_space=limits["address_space"],
        )
        kernel.drop_privileges(uid if self.own_user else None)
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        if not self.namespaces and self.landlock:
            kernel.landlock(self.readable, scratch)
        if self.seccomp:
            kernel.filter_syscalls(signals=self.namespaces)


class Child:
    """One jailed process: the keeper (outside, waits) and the jailed one (inside)."""

    def __init__(self, jail: Jail, limits: dict[str, Any], index: int, body: Any, keep: set[int]) -> None:
        self.scratch = "/tmp" if jail.namespaces else tempfile.mkdtemp(prefix="rft-jail-")
        self.private = not jail.namespaces
        status, theirs = os.pipe()
        uid = CHILD_UIDS + 2 * os.getpid() + index
        self.pid = os.fork()
        if self.pid == 0:
            _keeper(jail, limits, uid, body, keep, theirs, self.scratch)
        os.close(theirs)
        self.status = status
        self.ended: dict[str, Any] | None = None

    def collect(self) -> None:
        """Read how it ended, once it has."""
        data = b""
        while part := os.read(self.status, 4096):
            data += part
        os.close(self.status)
        self.ended = json.loads(data) if data.endswith(b"}") else {"signal": 9, "cpu_s": 0.0}
        os.waitpid(self.pid, 0)

    def kill(self) -> None:
        """End it with everything that it started."""
        if self.ended is None:
            process.kill_tree(self.pid)
            self.collect()

    def clean(self) -> None:
        if self.private:
            shutil.rmtree(self.scratch, ignore_errors=True)


def _keeper(
    jail: Jail,
    limits: dict[str, Any],
    uid: int,
    body: Any,
    keep: set[int],
    report: int,
    scratch: str,
) -> None:
    """Between server and jail: makes the process namespace, waits for its first process, reports."""
    try:
        os.setsid()
        kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
        if jail.namespaces:
            kernel.unshare(kernel.CLONE_NEWPID | kernel.CLONE_NEWNS)
        pid = os.fork()
        if pid == 0:
            _inside(jail, limits, uid, body, keep, scratch)
        _close_all_but({0, 1, 2, report})
        status = os.waitpid(pid, 0)[1]
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        code = os.waitstatus_to_exitcode(status)
        ended: dict[str, Any] = {"signal": -code} if code < 0 else {"code": code}
        ended |= {"cpu_s": usage.ru_utime + usage.ru_stime, "memory": usage.ru_maxrss * 1024}
        os.write(report, json.dumps(ended).encode())
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(1)


def _close_all_but(keep: set[int]) -> None:
    low = 0
    for fd in (*sorted(keep), 65_536):
        if fd > low:  # an empty range at 0 would close everything
            os.closerange(low, fd)
        low = fd + 1


def _inside(jail: Jail, limits: dict[str, Any], uid: int, body: Any, keep: set[int], scratch: str) -> None:
    code = 70
    try:
        _close_all_but(keep | {0, 1, 2})
        os.environ.clear()
        os.environ.update(PATH="/usr/local/bin:/usr/bin:/bin", HOME=scratch, TMPDIR=scratch, LANG="C.UTF-8")
        tempfile.tempdir = None
        jail.confine(limits, uid, scratch)
        code = body()
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    finally:
        with contextlib.suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code & 0xFF if isinstance(code, int) else 1)


# -- serving -----------------------------------------------------------------------------------------


def watch(children: list[Child], pipes: dict[int, str], limits: dict[str, Any]) -> dict[str, Any]:
    """Wait for all children to end; kill them at the first limit they break. Returns the outputs."""
    end = time.monotonic() + limits["wall_s"]
    started = time.monotonic()
    kept: dict[str, bytearray] = {name: bytearray() for name in pipes.values()}
    broken = ""
    poll = select.poll()
    waiting = {child.status: child for child in children}
    for fd in (*pipes, *waiting):
        poll.register(fd, select.POLLIN)
    limit_kept = limits.get("output", OUTPUT_KEPT)
    while waiting:
        left = end - time.monotonic()
        if left <= 0:
            broken = broken or "wall time"
        elif _memory_of(waiting.values(), limits["memory"], time.monotonic() - started):
            broken = broken or "memory"
        if broken:
            for child in waiting.values():
                child.kill()
            break
        for fd, _ in poll.poll(min(left, 0.05) * 1000 + 1):
            if fd in waiting:
                poll.unregister(fd)
                waiting.pop(fd).collect()
                continue
            data = os.read(fd, 1 << 16)
            if not data:
                poll.unregister(fd)
                continue
            kept[pipes[fd]] += data
            if len(kept[pipes[fd]]) > limit_kept:
                broken = "output"
    for fd, name in pipes.items():
        os.set_blocking(fd, False)
        with contextlib.suppress(BlockingIOError):
            while len(kept[name]) <= limit_kept and (data := os.read(fd, 1 << 16)):
                kept[name] += data
        os.close(fd)
    ended = [child.ended for child in children]
    for child in children:
        child.clean()
    result = {"ended": ended, "broken": broken, "wall_s": time.monotonic() - started}
    return {**result, **{k: bytes(v[:limit_kept]).decode("utf-8", "replace") for k, v in kept.items()}}


def _memory_of(children: Any, limit: int, age: float) -> bool:
    """Whether the processes together hold more than `limit` bytes. A look costs a scan of /proc."""
    return age >= 0.1 and sum(process.private_memory(child.pid) for child in children) > limit


def run_one(jail: Jail, limits: dict[str, Any], payload: int) -> dict[str, Any]:
    """A process of its own: a command, or a Python program as `__main__`."""
    (out, out_w), (err, err_w) = os.pipe(), os.pipe()

    def body() -> int:
        job = codetest.read_all(payload)
        os.dup2(out_w, 1)
        os.dup2(err_w, 2)
        os.closerange(3, 4096)
        return codetest.run_program(job)

    child = Child(jail, limits, 0, body, {payload, out_w, err_w})
    for fd in (payload, out_w, err_w):
        os.close(fd)
    return watch([child], {out: "stdout", err: "stderr"}, limits)


def run_test(jail: Jail, limits: dict[str, Any], program: int, tests: int) -> dict[str, Any]:
    """Two processes: the program serves calls, the tests make them and report."""
    ours, theirs = socket.socketpair()
    report, report_w = os.pipe()
    err, err_w = os.pipe()
    null = os.open("/dev/null", os.O_RDWR)

    def serve() -> int:
        job = codetest.read_all(program)
        link = os.dup(theirs.fileno())
        for fd, target in ((null, 0), (null, 1), (err_w, 2)):
            os.dup2(fd, target)
        return codetest.serve(job, link)

    def test() -> int:
        job = codetest.read_all(tests)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        return codetest.test(job, os.dup(ours.fileno()), report_w)

    a = Child(jail, limits, 0, serve, {program, theirs.fileno(), err_w, null})
    b = Child(jail, limits, 1, test, {tests, ours.fileno(), report_w, null})
    ours.close()
    theirs.close()
    for fd in (program, tests, report_w, err_w, null):
        os.close(fd)
    return watch([a, b], {report: "report", err: "stderr"}, limits)


def reap_all() -> None:
    """End and await whatever is left of a request: this process inherits the orphans."""
    with contextlib.suppress(ChildProcessError):
        while True:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                for pid in process.descendants(os.getpid()):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                os.waitpid(-1, 0)


def main() -> None:
    """Serve requests on the socket at fd `argv[1]` until it closes."""
    sock = socket.socket(fileno=int(sys.argv[1]))
    kernel.prctl(kernel.PR_SET_PDEATHSIG, signal.SIGKILL)
    process.prctl(process.PR_SET_CHILD_SUBREAPER, 1)
    jail = Jail(json.loads(sys.argv[2]))
    sock.sendall(json.dumps({"protections": jail.protections(), "why": jail.why}).encode() + b"\n")
    while True:
        data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 4)
        if not data:
            return
        request = json.loads(data)
        try:
            run = run_one if request["kind"] == "run" else run_test
            answer = run(jail, request["limits"], *fds)
        except Exception:
            answer = {"failed": traceback.format_exc()}
        reap_all()
        sock.sendall(json.dumps(answer).encode() + b"\n")


if __name__ == "__main__":
    main()
