"""What runs in a worker process: it loads the reward functions once and judges chunk after chunk.

Messages are length-prefixed pickles over a socket. In: the set-up, then jobs. Out: the set-up's
result, then per job one or more `("scores", offset, [...])` and `("done",)`. Before each call the
index of its first sample and the time are written to shared memory, so that the parent knows which
sample hangs, and since when, without a message per sample.
"""

from __future__ import annotations

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

from rft.rewards.load import CallError, Custom, PerSample, Stateful, load_reward
from rft.rewards.types import Outcome, Score
from rft.utils.process import PR_SET_CHILD_SUBREAPER, kill_tree, prctl

HEADER = struct.Struct("!Q")
PROGRESS = struct.Struct("=qd")  # index within the job (-1: idle), monotonic start of the call
FLUSH_S = 0.25  # results are sent at least this often, so that a kill loses little


def send(sock: socket.socket, message: Any) -> None:
    """Write one message."""
    data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    sock.sendall(HEADER.pack(len(data)) + data)


def receive(sock: socket.socket) -> Any:
    """Read one message; EOFError where the other side is gone."""
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


Row = tuple[float | None, str, str, float, tuple[float, ...]]


def encode(scores: Sequence[Score]) -> list[Row]:
    """Scores as plain tuples: they pickle five times faster."""
    return [(s.value, s.outcome.value, s.detail, s.seconds, s.steps) for s in scores]


def decode(rows: Sequence[Row]) -> list[Score]:
    """Back from `encode`."""
    return [Score(value, Outcome(outcome), detail, s, steps) for value, outcome, detail, s, steps in rows]


class Call:
    """One job: scores come out in order, through `emit`."""

    def __init__(self, emit: Callable[[int, list[Score]], None], mark: Callable[[int], None]) -> None:
        self.emit = emit
        self.mark = mark

    def run(self, reward: Any, prompts: Any, completions: Any, columns: dict[str, Any], batch: int) -> None:
        """Judge all samples, `batch` per call; per-sample functions report progress by sample."""
        n = len(completions)
        step = batch if not isinstance(reward, PerSample) else 16
        pending: list[Score] = []
        first, sent = 0, monotonic()
        for start in range(0, n, step):
            part = slice(start, min(start + step, n))
            given = {name: values[part] for name, values in columns.items()}
            pending += self._part(reward, prompts[part], completions[part], given, start)
            if monotonic() - sent > FLUSH_S:
                self.emit(first, pending)
                first, pending, sent = part.stop, [], monotonic()
        if pending:
            self.emit(first, pending)

    def _part(
        self, reward: Any, prompts: Any, completions: Any, columns: dict[str, Any], start: int
    ) -> list[Score]:
        extra: dict[str, Any] = {}
        if isinstance(reward, PerSample):
            extra["progress"] = lambda i: self.mark(start + i)
        else:
            self.mark(start)
        try:
            return list(reward.score(prompts, completions, **extra, **columns))
        except Exception as error:
            if len(completions) == 1 or isinstance(error, CallError):
                return [Score(None, Outcome.error, _describe(error))] * len(completions)
        scores: list[Score] = []  # one sample broke the call: find it, and keep the others
        for i in range(len(completions)):
            one = {name: values[i : i + 1] for name, values in columns.items()}
            scores += self._part(reward, prompts[i : i + 1], completions[i : i + 1], one, start + i)
        return scores


def _describe(error: BaseException) -> str:
    import traceback

    return "".join(traceback.format_exception(error)).rstrip()


def _watch(sock: socket.socket) -> None:
    """Ends this process and its children when the parent is gone, also in the middle of a call."""
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP | select.POLLHUP)
    poll.poll()
    kill_tree(os.getpid())
    os._exit(1)


def _load(specs: Sequence[tuple[str, dict[str, Any], str]]) -> list[Custom | PerSample | Stateful]:
    return [load_reward(spec, base_dir=base, **options) for spec, options, base in specs]  # type: ignore[misc]


def _warm(reward: Any) -> None:
    inner = getattr(reward, "inner", None) or reward.function
    warm = getattr(getattr(inner, "func", inner), "warm_up", None)  # options are bound by a partial
    if callable(warm):
        warm()


def main(socket_fd: int, progress_fd: int) -> None:
    """Load, report, and judge until told to stop or the parent is gone."""
    sock = socket.socket(fileno=socket_fd)
    prctl(PR_SET_CHILD_SUBREAPER, 1)  # what a reward starts stays below this process
    board = mmap(progress_fd, PROGRESS.size)

    def mark(index: int) -> None:
        PROGRESS.pack_into(board, 0, index, monotonic())

    mark(-1)
    try:
        specs = receive(sock)
        try:
            rewards = _load(specs)
            for reward in rewards:
                _warm(reward)
        except Exception as error:
            send(sock, ("failed", _describe(error)))
            return
        threading.Thread(target=_watch, args=(sock,), daemon=True).start()
        send(sock, ("ready", [(r.columns, r.required, r.per_sample) for r in rewards]))
        call = Call(lambda first, scores: send(sock, ("scores", first, encode(scores))), mark)
        while (job := receive(sock)) is not None:
            index, prompts, completions, columns, batch = job
            call.run(rewards[index], prompts, completions, columns, batch)
            mark(-1)
            send(sock, ("done",))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone
    finally:
        sys.stdout.flush()
