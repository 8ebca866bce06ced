"""End processes together with all their descendants. Standard library only, Linux."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Iterable, Mapping

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def prctl(option: int, value: int) -> None:
    """Call prctl(2). Raises OSError if the kernel refuses."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def die_with_parent() -> None:
    """Have the kernel kill this process when its parent ends; for `preexec_fn`."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _processes() -> dict[int, tuple[int, int]]:
    """Return pid -> (parent, session) of every process."""
    table = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
                table[int(entry)] = (int(fields[1]), int(fields[3]))
    return table


def descendants(pid: int, table: Mapping[int, tuple[int, int]] | None = None) -> set[int]:
    """Return the living descendants of `pid` and the members of its session, without `pid` itself."""
    table = _processes() if table is None else table
    below: set[int] = set()
    grown = True
    while grown:
        new = {
            p for p, (parent, session) in table.items() if parent in below or parent == pid or session == pid
        }
        grown = not new <= below
        below |= new
    return below - {pid}


def children(pid: int) -> set[int]:
    """Return the living child processes of `pid`."""
    return {p for p, (parent, _) in _processes().items() if parent == pid}


def memory_below(pid: int) -> int:
    """Return the resident bytes of `pid`'s descendants without file pages (shared pages: per process)."""
    return sum(map(memory_of, descendants(pid)))


def memory_of_trees(pids: Iterable[int], shared_with: int) -> dict[int, int]:
    """Return the resident bytes of each process with its descendants, counted as `memory_below` does.

    shared_with: the process that they were forked from; its pages count only for other programs.
    """
    table, program, shared = _processes(), _command_line(shared_with), memory_of(shared_with)

    def unshared(pid: int) -> int:
        return max(0, memory_of(pid) - (shared if _command_line(pid) == program else 0))

    return {pid: sum(map(unshared, {pid} | descendants(pid, table))) for pid in pids}


def _command_line(pid: int) -> bytes:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return file.read()
    except OSError:
        return b""


def memory_of(pid: int) -> int:
    """Return the resident bytes of a process without file pages; 0 if it has ended."""
    total = 0
    with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/status", encoding="utf-8") as file:
        for line in file:
            if line.startswith(("RssAnon:", "RssShmem:")):
                total += int(line.split()[1]) << 10
    return total


def is_running(pid: int) -> bool:
    """True until the process has ended; an unreaped (zombie) process counts as ended."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] not in (b"Z", b"X")
    except OSError:
        return False


def kill_tree(pid: int) -> set[int]:
    """SIGKILL `pid` and all its descendants. They are stopped first, so that none can fork away.

    Returns all their pids: a killed process still runs for a moment, longer the more memory it holds.
    """
    stopped: set[int] = set()
    wave = {pid}
    for _ in range(100):
        for p in wave:
            _signal(p, signal.SIGSTOP)
        stopped |= wave
        wave = descendants(pid) - stopped
        if not wave:
            break
    for p in (*(stopped - {pid}), pid):
        _signal(p, signal.SIGKILL)
    return stopped


def _signal(pid: int, number: int) -> None:
    if pid != os.getpid():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def guard() -> None:
    """Main of the guardian: read pids from stdin (`+pid`, `-pid`) and kill their trees when the parent exits.

    It does not run reward code, so it cannot hang, and workers do not survive a parent killed with SIGKILL.
    """
    import select

    parent, pids, rest = os.getppid(), set[int](), b""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    while os.getppid() == parent:  # a fork of the parent may hold the pipe open: check both
        if not poll.poll(500):
            continue
        data = os.read(0, 4096)
        if not data:
            break
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            (pids.add if line[:1] == b"+" else pids.discard)(int(line[1:]))
    for pid in pids:
        kill_tree(pid)


class Guardian:
    """A child process that kills the watched processes, with all descendants, when this process exits, even
    after a SIGKILL. If the guardian itself was killed, its methods do nothing."""

    # Isolated: files in this folder have the names of standard library modules.
    COMMAND = (sys.executable, "-I", "-S", os.path.abspath(__file__))

    def __init__(self) -> None:
        self._process = subprocess.Popen(self.COMMAND, stdin=subprocess.PIPE, start_new_session=True)

    def watch(self, pid: int) -> None:
        self._send(f"+{pid}\n")

    def forget(self, pid: int) -> None:
        self._send(f"-{pid}\n")

    def _send(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            os.write(self._process.stdin.fileno(), line.encode())

    def close(self) -> None:
        """End the guardian and the processes that it still watches."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


if __name__ == "__main__":
    guard()
