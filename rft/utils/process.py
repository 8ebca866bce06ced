"""Ending processes with everything that they started. Standard library only, Linux."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1
PR_SET_CHILD_SUBREAPER = 36


def prctl(option: int, value: int) -> None:
    """Call prctl(2). Raises OSError where the kernel refuses."""
    if ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), f"prctl({option}) failed")


def die_with_parent() -> None:
    """Have this process killed when its parent ends, for `preexec_fn`."""
    prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _processes() -> dict[int, tuple[int, int]]:
    """pid -> (parent, session) of every process."""
    table = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with contextlib.suppress(OSError), open(f"/proc/{entry}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
                table[int(entry)] = (int(fields[1]), int(fields[3]))
    return table


def descendants(pid: int) -> set[int]:
    """The living processes below `pid`, and those of the session that it leads; without itself."""
    table = _processes()
    found: set[int] = set()
    grown = True
    while grown:
        new = {
            p for p, (parent, session) in table.items() if parent in found or parent == pid or session == pid
        }
        grown = not new <= found
        found |= new
    return found - {pid}


def memory_below(pid: int) -> int:
    """Bytes in memory of the processes below `pid`, without files; what two of them share counts twice."""
    total = 0
    for p in descendants(pid):
        with contextlib.suppress(OSError, ValueError), open(f"/proc/{p}/status", encoding="utf-8") as file:
            for line in file:
                if line.startswith(("RssAnon:", "RssShmem:")):
                    total += int(line.split()[1]) << 10
    return total


def kill_tree(pid: int) -> None:
    """SIGKILL `pid` and all its descendants. They are stopped first, so that none can fork away."""
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


def _signal(pid: int, number: int) -> None:
    if pid != os.getpid():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, number)


def guard() -> None:
    """The guardian's main: told pids on stdin (`+pid`, `-pid`), it kills their trees when its parent goes.

    It runs no reward code, so nothing can hang it. A parent that was SIGKILLed leaves no worker behind.
    """
    import select

    parent, pids, rest = os.getppid(), set[int](), b""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    while os.getppid() == parent:  # a fork of the parent may hold the pipe open: look at both
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
    """A process that kills what it watches, with all descendants, when this process is gone: also when a
    SIGKILL left nobody to clean up. A guardian that was itself killed is no error."""

    # Isolated: this folder's files are called like modules of the standard library.
    COMMAND = (sys.executable, "-I", "-S", os.path.abspath(__file__))

    def __init__(self) -> None:
        self._process = subprocess.Popen(self.COMMAND, stdin=subprocess.PIPE, start_new_session=True)

    def watch(self, pid: int) -> None:
        self._tell(f"+{pid}\n")

    def forget(self, pid: int) -> None:
        self._tell(f"-{pid}\n")

    def _tell(self, line: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            os.write(self._process.stdin.fileno(), line.encode())

    def close(self) -> None:
        """End it, and what it still watches."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


if __name__ == "__main__":
    guard()
