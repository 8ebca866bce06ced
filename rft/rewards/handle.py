"""The parent's handle of a worker process: launch, messages, time limits, a sure end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import pickle
import re
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

from rft.rewards.worker import HEADER, PROGRESS, WHERE
from rft.utils.keeper import TOO_MUCH_MEMORY, WORKER
from rft.utils.process import is_running, kill_tree
from rft.utils.python import SAFE_PYTHON, search_path

START = (
    "import mmap, json, sys; sys.path[:] = json.loads(sys.argv[1]); fds = [int(a) for a in sys.argv[4:]]; "
    "from rft.utils.keeper import fork_worker; "
    "fork_worker(mmap.mmap(fds[1], 0), int(sys.argv[2]), int(sys.argv[3]) or None); "
    "from rft.rewards.worker import main; main(*fds)"
)
END_S = 10.0
"""A killed process ends within this, unless it hangs in the kernel (on a disk, a device)."""
FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)


class Died(Exception):
    """The worker's process ended; `reason` says how."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Hung(Exception):
    """A call exceeded its time; `index` is its first sample within the job."""

    def __init__(self, index: int) -> None:
        super().__init__(f"call of sample {index} exceeded its time")
        self.index = index


class Worker:
    """One process. All methods run in the event loop that started it."""

    def __init__(
        self, process: subprocess.Popen[bytes], board: mmap.mmap, where_fd: int, memory: int | None
    ) -> None:
        self.process = process  # the worker's keeper; it ends as the worker does
        self.memory = memory
        self.board = board
        self._where_fd = where_fd
        self.judged = 0
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter | None = None
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[None] = loop.create_future()
        self._pidfd = os.pidfd_open(process.pid)
        loop.add_reader(self._pidfd, self._on_exit)

    @classmethod
    def launch(cls, memory: int | None = None) -> tuple[Worker, socket.socket]:
        """Start the process; the socket is this side's end. memory: bytes that it may hold."""
        ours, theirs = socket.socketpair()
        board_fd, where_fd = os.memfd_create("rft-reward-progress"), os.memfd_create("rft-reward-where")
        os.ftruncate(board_fd, PROGRESS.size + WORKER.size)
        board = mmap.mmap(board_fd, PROGRESS.size + WORKER.size)
        fds = (theirs.fileno(), board_fd, where_fd)
        try:
            process = subprocess.Popen(
                [
                    *SAFE_PYTHON,
                    "-c",
                    START,
                    json.dumps(search_path()),
                    *map(str, (PROGRESS.size, memory or 0, *fds)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=2,  # what a reward prints must not end up among a command's own output
                pass_fds=fds,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            )
        finally:
            theirs.close()
            os.close(board_fd)
        return cls(process, board, where_fd, memory), ours

    @property
    def pid(self) -> int:
        """The process that runs the rewards, once it has started; until then its keeper."""
        return int(WORKER.unpack_from(self.board, PROGRESS.size)[0]) or self.process.pid

    async def attach(self, sock: socket.socket) -> None:
        """Take the socket over."""
        self.reader, self.writer = await asyncio.open_connection(sock=sock, limit=1 << 24)

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        if not self.exited.done():
            self.exited.set_result(None)

    def send(self, message: Any) -> None:
        """Write one message; it leaves when the loop gets to it."""
        assert self.writer is not None
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self.writer.write(HEADER.pack(len(data)) + data)

    async def _read(self) -> Any:
        (size,) = HEADER.unpack(await self.reader.readexactly(HEADER.size))
        data = await self.reader.readexactly(size)
        try:
            return pickle.loads(data)
        except Exception as error:  # whatever bytes a reward wrote to a descriptor that is not its own
            raise Died("its connection carried something else than messages") from error

    async def receive(self, timeout_s: float, *, per_call: bool) -> Any:
        """The next message. Raises Died; raises Hung once a call (or the wait) exceeds `timeout_s`."""
        read = asyncio.ensure_future(self._read())
        begun = time.monotonic()
        try:
            while True:
                index, since = PROGRESS.unpack_from(self.board) if per_call else (0, begun)
                since = max(since, begun) if index < 0 else since
                left = since + timeout_s - time.monotonic()
                if left <= 0:
                    await asyncio.sleep(0.002)  # the two numbers are not written at one instant: look again
                    if not read.done() and (not per_call or PROGRESS.unpack_from(self.board)[0] == index):
                        raise Hung(max(index, 0))
                    continue
                await asyncio.wait({read, self.exited}, timeout=left + 0.005, return_when="FIRST_COMPLETED")
                if read.done():
                    return read.result()
                if self.exited.done():  # what it wrote before it died still counts
                    return await asyncio.wait_for(read, 1.0)
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            await asyncio.wait({self.exited}, timeout=1.0)  # the connection may close before the process ends
            raise Died(self.reason()) from None
        finally:
            read.cancel()
            with contextlib.suppress(asyncio.CancelledError, asyncio.IncompleteReadError, ConnectionError):
                await read

    async def where(self) -> str:
        """What the process is doing, innermost first, as `; it was at FILE, line N, in f`; "" where it does
        not say."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, WHERE)
        for _ in range(20):
            begun = self._told() != ""
            await asyncio.sleep(0.02)  # it is written line by line
            if begun:
                break
        return self._told()

    def _told(self) -> str:
        """The frames of the reward's own code that the process has written down."""
        text = os.pread(self._where_fd, 1 << 16, 0).decode("utf-8", "replace")
        frames = [f for f in FRAME.findall(text) if not f[0].startswith((_REWARDS, "<frozen", "<string>"))]
        return (
            "; it was at "
            + ", called from ".join(f"{file}, line {line}, in {name}" for file, line, name in frames[:6])
            if frames
            else ""
        )

    def reason(self) -> str:
        """How the process ended, in words."""
        end = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if end is None:  # not reaped here: the process id must stay its own until its tree is gone
            return "its connection closed"
        if end.si_code == os.CLD_EXITED and end.si_status == TOO_MUCH_MEMORY and self.memory is not None:
            allowed = f"rewards.worker_memory_gib = {self.memory / 2**30:g}"
            return f"it held more memory, with all that it has started, than {allowed} allows"
        if end.si_code == os.CLD_EXITED:
            return f"it exited with status {end.si_status}"
        return f"it was killed by {signal.Signals(end.si_status).name}{self._told()}"

    async def close(self, *, grace_s: float = 0.0) -> None:
        """End the process and its children; with a grace, ask first."""
        if grace_s and self.writer is not None and not self.exited.done():
            with contextlib.suppress(ConnectionError):
                self.send(None)
                await asyncio.wait({self.exited}, timeout=grace_s)
        if self.process.returncode is None:  # not reaped yet, so the process id is still its own
            killed = kill_tree(self.process.pid)
            await asyncio.shield(self.exited)
            await _until_ended(killed)
        self.process.wait()
        if self.writer is not None:
            self.writer.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
            os.close(self._where_fd)
        self.board.close()


async def _until_ended(killed: set[int]) -> None:
    """Wait for the death of killed processes; one that the kernel keeps past END_S is left to it."""
    deadline = time.monotonic() + END_S
    while any(map(is_running, killed)) and time.monotonic() < deadline:
        await asyncio.sleep(0.005)


_REWARDS = str(Path(__file__).parent)
