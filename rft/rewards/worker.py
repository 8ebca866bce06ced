"""Worker process: load the reward functions once, then score jobs in chunks.

Messages are length-prefixed pickles over a socket. In: the setup, then jobs. Out: ("loading", i) per
function and the result of the setup, then per job `("scores", offset, [...])` messages, `("logged", {...})`
before the last of them, and `("done",)`.
Before each call the index of its first sample and the time are written to shared memory, so that the
parent knows which sample hangs, and since when, without a message per sample. On the signal `WHERE` the
process writes its stack to a file in memory: Python's handler does so even if a function never releases
the interpreter.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import pickle
import select
import socket
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from mmap import mmap
from time import monotonic
from typing import Any

from rft.rewards.load import CallError, Custom, PerSample, SpecError, Stateful, describe_error, load_spec
from rft.rewards.types import Outcome, Score, TrainerState
from rft.utils.process import PR_SET_CHILD_SUBREAPER, kill_tree, prctl
from rft.utils.signals import restore_defaults
from rft.utils.stack import WHERE

HEADER = struct.Struct("!Q")
PROGRESS = struct.Struct("=qd")  # index within the job (-1: idle), monotonic start of the call
FLUSH_S = 0.25  # results are sent at least this often, so that a kill loses little
PRIVATE_FDS = 512  # high enough to be safe from code that closes or writes to all low descriptors


def send(sock: socket.socket, message: Any) -> None:
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    sock.sendall(HEADER.pack(len(data)) + data)


def receive(sock: socket.socket) -> Any:
    """Read one message. Raises EOFError if the other side has closed."""
    (size,) = HEADER.unpack(_exactly(sock, HEADER.size))
    return pickle.loads(_exactly(sock, size))


def _exactly(sock: socket.socket, size: int) -> bytes:
    buffer = bytearray()
    while len(buffer) < size:
        data = sock.recv(min(size - len(buffer), 1 << 20))
        if not data:
            raise EOFError
        buffer += data
    return bytes(buffer)


Row = tuple[float | None, str, str, float, tuple[float, ...], str, float | None]


def encode(scores: Sequence[Score]) -> list[Row]:
    """Convert scores to plain tuples, which pickle five times faster."""
    return [(s.value, s.outcome.value, s.detail, s.seconds, s.steps, s.answer, s.confidence) for s in scores]


def decode(rows: Sequence[Row]) -> list[Score]:
    """Invert `encode`."""
    return [Score(row[0], Outcome(row[1]), *row[2:]) for row in rows]


class Call:
    """One job: scores are emitted in order through `emit`."""

    def __init__(
        self,
        emit: Callable[[int, list[Score]], None],
        mark: Callable[[int], None],
        log: Callable[[dict[str, list[float]]], None],
    ) -> None:
        self.emit = emit
        self.mark = mark
        self.log = log
        self.pid = os.getpid()
        self.surroundings = Surroundings()

    def run(
        self,
        reward: Any,
        prompts: Any,
        completions: Any,
        columns: dict[str, Any],
        batch: int,
        state: TrainerState | None = None,
    ) -> None:
        """Judge all samples, `batch` per call; per-sample functions report progress by sample.

        `log_metric` values are sent before the last scores, because the request may end with those.
        """
        n = len(completions)
        step = batch if not isinstance(reward, PerSample) else 16
        pending: list[Score] = []
        first, sent = 0, monotonic()
        if isinstance(reward, Custom):
            reward.state = state
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            given = {name: values[part] for name, values in columns.items()}
            pending += self._part(reward, prompts[part], completions[part], given, start)
            if monotonic() - sent > FLUSH_S and part.stop < n:
                self.emit(first, pending)
                first, pending, sent = part.stop, [], monotonic()
        if isinstance(reward, Custom):
            self.log(reward.take_logged())
        self.emit(first, pending)

    def _part(
        self, reward: Any, prompts: Any, completions: Any, columns: dict[str, Any], start: int
    ) -> list[Score]:
        n = len(completions)
        extra: dict[str, Any] = {}
        if isinstance(reward, PerSample):
            extra["progress"] = lambda i: self.mark(start + i)
        else:
            self.mark(start)
        try:
            scores = list(reward.score(prompts, completions, **extra, **columns))
            if len(scores) != n:
                raise CallError(f"{reward.spec} gave {len(scores)} scores for {n} completions")
            return scores
        except BaseException as error:  # SystemExit and similar must not end a worker
            if n == 1 or isinstance(error, CallError):
                return [Score(None, Outcome.error, describe_error(error))] * n
        finally:
            if os.getpid() != self.pid:  # a child forked by the function returned from it
                os._exit(0)
            if isinstance(reward, Custom):
                self.surroundings.restore()
        scores = []  # one sample broke the call: isolate it, and keep the others
        for i in range(n):
            one = {name: values[i : i + 1] for name, values in columns.items()}
            scores += self._part(reward, prompts[i : i + 1], completions[i : i + 1], one, start + i)
        return scores


class Surroundings:
    """Restore working folder, environment and output streams, so that every call starts in the same state."""

    def __init__(self) -> None:
        self.folder: str | None = None
        with contextlib.suppress(FileNotFoundError):  # the folder was deleted: there is none to restore
            self.folder = os.getcwd()
        self.environment = dict(os.environ)

    def restore(self) -> None:
        if self.folder is not None and _folder() != self.folder:
            os.chdir(self.folder)
        if dict(os.environ) != self.environment:
            os.environ.clear()
            os.environ.update(self.environment)
        if sys.stdout.closed or sys.stderr.closed:
            open_streams()


def open_streams() -> None:
    """Open output streams that keep their descriptors when a function closes them."""
    sys.stdout, sys.stderr = (
        open(fd, "w", buffering=1, encoding="utf-8", errors="replace", closefd=False)  # noqa: SIM115
        for fd in (1, 2)
    )


def _folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None


def _watch(sock: socket.socket) -> None:
    """Kill this process and its children when the parent is gone, also during a call."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP | select.POLLHUP)
    poll.poll()
    kill_tree(os.getpid())
    os._exit(1)


def _warm(reward: Any) -> None:
    inner = getattr(reward, "inner", None) or reward.function
    warm = getattr(getattr(inner, "func", inner), "warm_up", None)  # options are bound by a partial
    if callable(warm):
        warm()


def out_of_the_way(fd: int) -> int:
    """Move an open file to a high descriptor that no child program inherits."""
    try:
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, PRIVATE_FDS)
    except OSError:  # the descriptor limit is lower
        moved = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, fd + 1)
    os.close(fd)
    return moved


def main(socket_fd: int, progress_fd: int, where_fd: int) -> None:
    """Load the rewards, report, and score jobs until asked to exit or the parent is gone."""
    open_streams()
    sock = socket.socket(fileno=out_of_the_way(socket_fd))
    where = out_of_the_way(where_fd)
    faulthandler.enable(where, all_threads=False)  # also reports the position of a crash in C
    faulthandler.register(WHERE, where, all_threads=False)
    restore_defaults()  # a reward and its children may send and handle the signals that stop a run
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # orphans of a reward's children stay below this process
    board = mmap(progress_fd, PROGRESS.size)
    os.close(progress_fd)

    def mark(index: int) -> None:
        PROGRESS.pack_into(board, 0, index, monotonic())

    mark(-1)
    try:
        specs = receive(sock)
        rewards: list[Custom | PerSample | Stateful] = []
        try:
            for i, (spec, options, base, payload) in enumerate(specs):
                send(sock, ("loading", i))
                rewards.append(load_spec(spec, options, base, payload))  # type: ignore[arg-type]
                _warm(rewards[-1])
        except BaseException as error:  # including SystemExit
            send(sock, ("failed", str(error) if isinstance(error, SpecError) else describe_error(error)))
            return
        threading.Thread(target=_watch, args=(sock,), daemon=True).start()
        send(
            sock,
            (
                "ready",
                [(r.columns, r.required, r.any_of, r.per_sample, r.reads_environments) for r in rewards],
            ),
        )
        call = Call(
            lambda first, scores: send(sock, ("scores", first, encode(scores))),
            mark,
            lambda logged: send(sock, ("logged", logged)),
        )
        while (job := receive(sock)) is not None:
            index, *rest = job
            call.run(rewards[index], *rest)
            mark(-1)
            send(sock, ("done",))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    finally:
        with contextlib.suppress(ValueError, OSError):  # the reward closed it, or the reader is gone
            sys.stdout.flush()
