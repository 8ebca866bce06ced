"""Fork sandboxed processes from one process: a fork takes a millisecond, a new Python thirty.

The zygote confines itself first, then forks once per request and keeps nothing of the request. It never sees
a program, a test or an output: those are in memory files that only the process concerned reads, and results
go through pipes to the trusted side. The memory that a program inherits thus contains no earlier request.

    trusted side (client.py)
      └ zygote           namespaces of files, network, IPC
          └ init         pid 1 of one request: limits, watch, end of all processes of the program
              └ program  the only process that runs untrusted code

A request is one JSON line `{"role", "limits", "user", "fds"}` with file descriptors attached, named by `fds`.
Standard library only.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import importlib
import json
import mmap
import os
import select
import signal
import socket
import stat
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from . import cgroup, linux, program, seccomp, testing

# Imported before the forks, so that programs need not load them.
PRELOADED = "bisect collections copy datetime functools hashlib heapq itertools math operator random re"
for _name in [*PRELOADED.split(), "statistics", "string", "typing"]:
    importlib.import_module(_name)

CHECK_INTERVAL_S = 0.05
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
MOST_FILES = 4096  # in the scratch folder
REQUEST_NAMESPACES = linux.CLONE_NEWPID | linux.CLONE_NEWNS | linux.CLONE_NEWIPC
ROLES: dict[str, Callable[[dict[str, int]], int]] = {
    "main": lambda fds: program.run_main(program.read_payload(fds["payload"])),
    "serve": lambda fds: program.serve(program.read_payload(fds["payload"]), fds["link"]),
    "test": lambda fds: testing.run_tests(program.read_payload(fds["payload"]), fds["link"], fds["report"]),
    "session": lambda fds: program.interact(program.read_payload(fds["payload"]), fds["link"]),
}


@dataclass
class Protections:
    """The protections available on this machine."""

    namespaces: bool
    landlock: int  # the kernel's Landlock version; 0: none
    filter: seccomp.Filter | None
    own_user: bool  # every request runs under a separate user id
    readable: list[str]
    backend: str
    why: str  # reason why namespaces or seccomp are missing

    def describe(self) -> dict[str, str]:
        """Return each protection and its mechanism; empty if there is none."""
        ns = self.namespaces
        calls = f"seccomp ({self.filter.compiler})" if self.filter else ""
        landlock = f"Landlock {self.landlock}" if self.landlock else ""
        return {
            "network": "network namespace, seccomp" if ns and calls else "seccomp" if calls else "",
            "files": f"mount namespace ({self.backend})" if ns else landlock,
            "signals": "pid namespace" if ns else "seccomp" if calls else "",
            "system calls": calls,
            "processes": "RLIMIT_NPROC" if self.own_user or os.getuid() != 0 else "",
            "memory": "RLIMIT_AS, sum of the processes",
            "time": "RLIMIT_CPU, wall clock",
            "output": "RLIMIT_FSIZE, pipe limit",
        }


def shut_in(backend: str, readable: list[str], counted: bool) -> Protections:
    """Enter the outer namespaces if requested and possible, and probe the other protections.

    backend: `bubblewrap` (this process was started inside it), `native`, or `landlock`.
    counted: whether control groups limit memory.
    """
    readable = [*linux.python_paths(), *readable]
    namespaces, why = True, ""
    if backend == "native":
        why = _in_child(lambda: _enter(readable), "namespaces")
        if not why:
            linux.enter_namespaces()
            linux.build_root(readable)
    elif backend == "bubblewrap":
        why = _in_child(_inner_namespaces, "namespaces inside of bubblewrap")
    namespaces = backend != "landlock" and not why
    filter_: seccomp.Filter | None = None
    try:
        filter_ = seccomp.build_filter(
            signals=namespaces, shared_memory=counted or not _in_child(_count_shared_memory, "")
        )
        refused = _in_child(lambda: _try_filter(filter_), "seccomp")
        if refused:
            filter_, why = None, why or refused
    except OSError as error:
        why = why or f"seccomp: {error.strerror}"
    own_user = os.getuid() == 0 and (namespaces or _others_can_read())
    own_user = own_user and not _in_child(lambda: linux.drop_privileges(1_000_000_000), "another user")
    linux.bound_capabilities()
    return Protections(namespaces, linux.landlock_abi(), filter_, own_user, readable, backend, why)


def _enter(readable: list[str]) -> None:
    linux.enter_namespaces()
    linux.build_root(readable)
    _inner_namespaces()


def _inner_namespaces() -> None:
    """Enter a request's namespaces once, to check that it works."""
    pid = linux.fork_into(REQUEST_NAMESPACES)
    if pid == 0:
        try:
            _mounts({"scratch": 1 << 20})
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or 255)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if code:
        raise OSError(code, os.strerror(code))


def _count_shared_memory() -> None:
    """Check that this process can count the pages of a shared map, mapped or not."""
    with mmap.mmap(-1, mmap.PAGESIZE) as shared:
        shared[0] = 1
        held: dict[str, int] = {}
        _add_shared_maps("self", held)
        if not all(held.values()) or not held:
            raise OSError(errno.EPERM, "the pages of shared maps cannot be counted")


def _try_filter(filter_: seccomp.Filter | None) -> None:
    assert filter_ is not None
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    seccomp.install(filter_)


def _in_child(attempt: Callable[[], None], name: str) -> str:
    """Try in a child, because a partial failure cannot be undone. Return the error; empty on success."""
    pid = os.fork()
    if pid == 0:
        try:
            attempt()
            os._exit(0)
        except OSError as error:
            os._exit(error.errno or 255)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(255)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    return "" if code == 0 else f"{name}: {os.strerror(code)}"


def _hidden(protections: Protections, path: str) -> bool:
    """Whether a program cannot list a folder that this process could list before it confined itself."""

    def look() -> None:
        if protections.own_user:
            linux.drop_privileges(1_000_000_000)
        os.listdir(path)

    return bool(_in_child(look, path))


def _others_can_read() -> bool:
    """Whether an unprivileged user can reach this Python without a mount namespace."""
    path = os.path.realpath(os.__file__)
    while path != "/":
        if not os.stat(path).st_mode & 0o005:
            return False
        path = os.path.dirname(path)
    return True


def _mounts(limits: dict[str, Any]) -> None:
    """Mount /proc, with a request's processes only, and an empty scratch folder in its mount namespace."""
    flags = linux.MS_NOSUID | linux.MS_NODEV
    linux.mount("proc", "/proc", "proc", flags)
    size = f"size={limits['scratch']},mode=1777,nr_inodes={MOST_FILES}"
    linux.mount("tmpfs", linux.SCRATCH, "tmpfs", flags, size)


# -- one request -------------------------------------------------------------------------------------


@dataclass
class Request:
    """A program to run: role, limits, user id and file descriptors.

    fds: `status` (exit status, as JSON), `control` (closed by the trusted side to end it), and by role
    `payload`, `link`, `report`, `stdin`, `stdout`, `stderr`, `cgroup`.
    """

    role: str
    limits: dict[str, Any]
    user: int
    fds: dict[str, int]


def _report(request: Request, outcome: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):  # the trusted side has gone
        os.write(request.fds["status"], json.dumps(outcome).encode())


def init(protections: Protections, request: Request, owner: int) -> NoReturn:
    """Run as the trusted pid 1 of a request: start and watch the program, and end all processes on exit."""
    scratch = linux.SCRATCH
    try:
        os.setsid()
        linux.prctl(linux.PR_SET_DUMPABLE, 0)  # denies /proc/1/mem to a program of the same user
        if protections.namespaces:
            linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
            _mounts(request.limits)
        else:
            linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
            scratch = tempfile.mkdtemp(prefix="rft-sandbox-")
        killed = _kills(request)
        started = time.monotonic()
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)  # a process group, so that it can be killed as one
            _inside(protections, request, scratch)
        child = os.pidfd_open(pid)
        for name, fd in request.fds.items():
            if name not in ("status", "control", "cgroup"):
                os.close(fd)
        children = Children(pid)
        exceeded = _watch(protections, request, child, owner, started, children, killed, scratch)
        if exceeded:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if not protections.namespaces:
            while children.remain():  # one that was being forked may have been missed
                _kill_descendants()
                while children.reap():
                    pass
            remove_tree(scratch)
        code = children.wait_for_program()
        cpu_s = children.cpu_s
        if not exceeded and _kills(request) > killed:
            exceeded = "memory"
        if (
            not exceeded
            and code in (-signal.SIGKILL, -signal.SIGXCPU)
            and cpu_s >= request.limits["cpu_s"] - 0.5
        ):
            exceeded = "CPU time"
        ended = {"signal": -code} if code < 0 else {"code": code}
        wall_s = time.monotonic() - started
        _report(request, {**ended, "exceeded": exceeded, "cpu_s": cpu_s, "wall_s": wall_s})
    except BaseException:
        _report(request, {"failed": traceback.format_exc()})
    os._exit(0)


def _kills(request: Request) -> int:
    return cgroup.kills(request.fds["cgroup"]) if "cgroup" in request.fds else 0


class Children:
    """The processes that pid 1 must reap: the program, and orphans, which would count as processes."""

    def __init__(self, program: int) -> None:
        self.program = program
        self.code: int | None = None
        self.cpu_s = 0.0

    def reap(self, options: int = os.WNOHANG) -> bool:
        """Reap one ended process; return False if there is none."""
        try:
            pid, status, usage = os.wait4(-1, options)
        except ChildProcessError:
            return False
        self.cpu_s += usage.ru_utime + usage.ru_stime
        if pid == self.program:
            self.code = os.waitstatus_to_exitcode(status)
        return pid != 0

    def remain(self) -> bool:
        """Whether there is a process to end or to reap."""
        try:
            os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        except ChildProcessError:
            return False
        return True

    def wait_for_program(self) -> int:
        while self.code is None:
            self.reap(0)
        return self.code


def _watch(
    protections: Protections,
    request: Request,
    child: int,
    owner: int,
    started: float,
    children: Children,
    killed: int,
    scratch: str,
) -> str:
    """Wait for the program's end; return the limit that it exceeded before, if any."""
    limits = request.limits
    poll = select.poll()
    for fd in (child, owner, request.fds["control"]):
        poll.register(fd, select.POLLIN | select.POLLHUP)
    end, look = started + limits["wall_s"], started + CHECK_INTERVAL_S
    while True:
        now = time.monotonic()
        if now >= end:
            return "wall time"
        if now >= look:
            while children.reap():
                pass
            memory, cpu_s = usage_of(_processes(protections), counted="cgroup" not in request.fds)
            if memory > limits["memory"] or _kills(request) > killed:
                return "memory"
            if cpu_s + children.cpu_s > limits["cpu_s"]:
                return "CPU time"
            if not protections.namespaces:
                pids = _processes(protections)
                if len(pids) > limits["processes"]:  # no other limit applies to root without a separate uid
                    return "processes"
                if _on_disk(pids, scratch) > limits["scratch"]:
                    return "scratch"
            look = time.monotonic() + CHECK_INTERVAL_S
        ready = {fd for fd, _ in poll.poll(max(0.0, min(look, end) - time.monotonic()) * 1000 + 1)}
        if child in ready:
            return ""
        if ready:
            return "stopped"


def _processes(protections: Protections) -> list[int]:
    """Return the processes of the request, without pid 1."""
    if not protections.namespaces:
        return descendants(os.getpid())
    return [int(name) for name in os.listdir("/proc") if name.isdigit() and name != "1"]


def usage_of(pids: list[int], *, counted: bool) -> tuple[int, float]:
    """Return the bytes that processes hold, and the CPU seconds that they have used.

    Memory is counted if no control group does it: private pages, shared maps including pages that
    no process maps any more, and for each socket and pipe the buffer that it may fill.
    """
    memory, ticks = 0, 0
    shared: dict[str, int] = {}
    buffers: set[str] = set()
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(f"/proc/{pid}/stat", "rb") as file:
                ticks += sum(map(int, file.read().rpartition(b")")[2].split()[11:15]))
            if not counted:
                continue
            memory += _private_memory(pid, shared, buffers)
    memory += sum(SOCKET_BUFFER if name.startswith("socket:") else PIPE_BUFFER for name in buffers)
    return memory + sum(shared.values()), ticks / os.sysconf("SC_CLK_TCK")


def _private_memory(pid: int, shared: dict[str, int], buffers: set[str]) -> int:
    """Return the private bytes of a process; add its shared maps, and the sockets and pipes of all threads.

    Read per thread: the first thread may have ended while others hold the memory, and each thread may have a
    separate descriptor table.
    """
    private = -1
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            # A name that is not UTF-8 must not hide memory: programs choose their name and those of files.
            path = f"/proc/{pid}/task/{thread}/status"
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                status = dict(line.split(":", 1) for line in file if ":" in line)
            if "RssAnon" not in status:  # it has ended
                continue
            try:
                descriptors = os.listdir(f"/proc/{pid}/task/{thread}/fd")
                if private < 0:
                    _add_shared_maps(thread, shared)
            except PermissionError:
                if status.get("Seccomp", "").strip() == "2":  # it hides, e.g. by executing an unreadable file
                    return HIDDEN
                descriptors = []  # starting up
            private = _kilobytes(status["RssAnon"])
            for fd in descriptors:
                with contextlib.suppress(FileNotFoundError):
                    name = os.readlink(f"/proc/{pid}/task/{thread}/fd/{fd}")
                    if name.startswith(("socket:", "pipe:")):
                        buffers.add(name)
    return max(private, 0)


def _kilobytes(text: str) -> int:
    return int(text.split()[0]) << 10


def _add_shared_maps(pid: str, shared: dict[str, int]) -> None:
    """Add the bytes of shared maps without a file, by inode.

    All pages if this process may see them, otherwise the mapped size.
    """
    with open(f"/proc/{pid}/maps", encoding="utf-8", errors="surrogateescape") as maps:
        for line in maps:
            if "/dev/zero" not in line:
                continue
            span, mode, _, _, inode, *_ = line.split()
            if mode[3] != "s":
                continue
            first, last = (int(end, 16) for end in span.split("-"))
            try:
                pages = os.stat(f"/proc/{pid}/map_files/{first:x}-{last:x}").st_blocks * 512
            except PermissionError:
                pages = 0 if pid == "self" else last - first
            except FileNotFoundError:
                continue
            shared[inode] = max(shared.get(inode, 0), pages)


def _on_disk(pids: list[int], scratch: str) -> int:
    """Return the bytes in a scratch folder on a disk, including removed files that are still open.

    More files than `MOST_FILES` count as too many bytes.
    """
    total, files, folders = 0, 0, [scratch]
    while folders:
        with contextlib.suppress(OSError), os.scandir(folders.pop()) as entries:
            for entry in entries:
                files += 1
                if files > MOST_FILES:
                    return HIDDEN
                with contextlib.suppress(OSError):
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
    removed: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for fd in os.listdir(f"/proc/{pid}/fd"):
                info = os.stat(f"/proc/{pid}/fd/{fd}")
                if stat.S_ISREG(info.st_mode) and info.st_nlink == 0:
                    removed[info.st_ino] = info.st_blocks * 512
    return total + sum(removed.values())


def remove_tree(folder: str) -> None:
    """Remove a folder filled by a program: of any depth, and with any permissions."""
    while True:
        with os.scandir(folder) as entries:
            first = list(entries)
        if not first:
            break
        for entry in first:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, 0o700)
            with os.scandir(entry.path) as entries:
                for below in list(entries):
                    if below.is_dir(follow_symlinks=False):  # moved up, so that no path grows long
                        os.chmod(below.path, 0o700)
                        os.rename(below.path, f"{folder}/{os.urandom(8).hex()}")
                    else:
                        os.unlink(below.path)
            os.rmdir(entry.path)
    os.rmdir(folder)


def _socket_buffer() -> int:
    """Return the kernel memory of a full send buffer in bytes: twice its size, for the overhead."""
    try:
        with open("/proc/sys/net/core/wmem_default", encoding="utf-8") as file:
            return 2 * int(file.read())
    except (OSError, ValueError):  # hidden in some containers
        return 2 * 212_992


SOCKET_BUFFER = _socket_buffer()
PIPE_BUFFER = 1 << 16
HIDDEN = 1 << 62  # more than any limit: memory that a program keeps from being counted


def descendants(pid: int) -> list[int]:
    """Return the running processes below `pid`."""
    parents = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:
                parents[int(entry)] = int(file.read().rpartition(b")")[2].split()[1])
    below = {pid}
    while True:
        more = {p for p, parent in parents.items() if parent in below} - below
        if not more:
            return sorted(below - {pid})
        below |= more


def _kill_descendants() -> None:
    """Kill all processes started by the program, without a namespace. Orphans are adopted here.

    Kills by process group, which no fork escapes: a fork bomb is faster than killing processes one by one.
    """
    own_group = os.getpgid(0)
    while wave := [pid for pid in descendants(os.getpid()) if not _has_ended(pid)]:
        for pid in wave:
            with contextlib.suppress(OSError):
                group = os.getpgid(pid)
                if group == own_group:
                    os.kill(pid, signal.SIGKILL)
                else:
                    os.killpg(group, signal.SIGKILL)
        time.sleep(0.001)


def _has_ended(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in b"ZX"
    except OSError:
        return True


# -- the program's process ---------------------------------------------------------------------------


def _inside(protections: Protections, request: Request, scratch: str) -> NoReturn:
    code = 70
    try:
        _own_descriptors(request)
        if not protections.namespaces:
            os.environ.update(HOME=scratch, TMPDIR=scratch)
            tempfile.tempdir = None
        _confine(protections, request, scratch)
        for number in ENDING:
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        code = ROLES[request.role](request.fds)
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


def _own_descriptors(request: Request) -> None:
    """Enter the control group, set up the standard streams and close descriptors of other processes."""
    fds = request.fds
    if "cgroup" in fds:
        cgroup.enter(fds["cgroup"])
    null = os.open("/dev/null", os.O_RDWR)
    for target, name in enumerate(("stdin", "stdout", "stderr")):
        os.dup2(fds.pop(name, null), target)
    kept = sorted(fds[name] for name in ("payload", "link", "report") if name in fds)
    low = 3
    for fd in (*kept, 65_536):
        if fd > low:
            os.closerange(low, fd)
        low = fd + 1


def _confine(protections: Protections, request: Request, scratch: str) -> None:
    """Apply every protection, irrevocably."""
    limits = request.limits
    os.chdir(scratch)
    processes = limits["processes"]
    if not protections.namespaces and protections.own_user:
        os.chown(scratch, request.user, request.user)
    elif not protections.own_user and not protections.namespaces:
        processes += _threads_of(os.getuid())  # the limit counts all processes of this user
    linux.limit(
        limits["memory"], limits["cpu_s"], limits["file"], processes, address_space=limits["address_space"]
    )
    linux.drop_privileges(request.user if protections.own_user else None)
    linux.prctl(linux.PR_SET_DUMPABLE, 1)  # otherwise an unprivileged init could not count its memory
    if not protections.namespaces and protections.landlock:
        linux.landlock(protections.readable, scratch)
    if protections.filter is not None:
        seccomp.install(protections.filter)


def _threads_of(uid: int) -> int:
    total = 0
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError):
                if os.stat(f"/proc/{entry}").st_uid == uid:
                    total += len(os.listdir(f"/proc/{entry}/task"))
    return total


# -- serving -----------------------------------------------------------------------------------------


def main() -> None:
    """Serve requests on the socket at `argv[1]` until it closes or the owner, at `argv[2]`, ends."""
    sock, owner = socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])
    options = json.loads(sys.argv[3])
    for number in ENDING:  # sent to a whole process group; this process ends when its owner does
        signal.signal(number, signal.SIG_IGN)
    before = [path for path in sys.path if path.endswith("-packages") and os.path.isdir(path)]
    protections = shut_in(options["backend"], options["readable"], options["counted"])
    # Programs inherit the environment: changing it in each of them would copy more pages.
    os.environ.clear()
    os.environ.update(PATH="/usr/local/bin:/usr/bin:/bin", LANG="C.UTF-8")
    if protections.namespaces:
        os.environ.update(HOME=linux.SCRATCH, TMPDIR=linux.SCRATCH)
    hidden = [path for path in before if _hidden(protections, path)]
    hello = {"protections": protections.describe(), "why": protections.why, "hidden": hidden}
    sock.sendall(json.dumps({**hello, "namespaces": protections.namespaces}).encode() + b"\n")
    gc.freeze()  # a collection in a child would touch, and so copy, every page
    poll = select.poll()
    for fd in (sock.fileno(), owner):
        poll.register(fd, select.POLLIN | select.POLLHUP)
    statuses: dict[int, int] = {}  # pidfd of an init -> its request's `status`, which must outlive it
    while True:
        ready = {fd for fd, _ in poll.poll()}
        for pidfd in ready & statuses.keys():
            os.waitid(os.P_PIDFD, pidfd, os.WEXITED)  # all processes of the request are gone by now
            poll.unregister(pidfd)
            os.close(pidfd)
            os.close(statuses.pop(pidfd))
        if owner in ready:
            return
        if sock.fileno() not in ready:
            continue
        data, fds, _, _ = socket.recv_fds(sock, 1 << 16, 16)
        if not data:
            return
        message = json.loads(data)
        names = dict(zip(message["fds"], fds, strict=True))
        request = Request(message["role"], message["limits"], message["user"], names)
        pid = linux.fork_into(REQUEST_NAMESPACES if protections.namespaces else 0)
        if pid == 0:
            for fd in (sock.fileno(), *statuses, *statuses.values()):
                os.close(fd)
            init(protections, request, owner)
        pidfd = os.pidfd_open(pid)
        poll.register(pidfd, select.POLLIN)
        statuses[pidfd] = names.pop("status")
        for fd in names.values():
            os.close(fd)
