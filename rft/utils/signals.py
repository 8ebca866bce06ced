"""Requests to stop a run: signals, received by one thread and blocked in every process that a run starts, and
requests by the calling program. Standard library only.

    with StopSignals() as signals:
        signals.handle(request=ask_the_loop, at_once=write_the_reason)

A signal sent to a process group, or by a job scheduler to every process of a job step, also reaches Ray's
processes and the engines. They inherit the blocked mask, so that they live until the checkpoint is saved.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn, Self

from rft.utils.process import kill_tree

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
STOPPED = 75  # the exit code of a requested stop
SAME_REQUEST_S = 5.0
"""Signals within this time are one request: a job step signals each process, and the parent forwards it."""
RECORD_S = 5.0  # to write the reason of an immediate exit: a hung file system must not prevent the exit


def to_catch() -> set[signal.Signals]:
    """Return the stop signals to catch: not SIGHUP if it is ignored (`nohup`)."""
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return {number for number in STOP_SIGNALS if not (ignored and number is signal.SIGHUP)}


def restore_defaults() -> None:
    """Restore the default stop signals in this process, for user programs, which may send and expect them.
    Call it in the main thread, or between fork and exec."""
    for number in to_catch():
        signal.signal(number, signal.SIG_DFL)  # SIGINT too: Python's default handler would print a traceback
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)


def describe(info: signal.struct_siginfo) -> str:
    """Describe a received signal: its name, and its sender."""
    name, pid = signal.Signals(info.si_signo).name, info.si_pid
    if pid in (0, os.getpid()):  # the kernel (a terminal), another container, or this process
        return name
    with contextlib.suppress(OSError), open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as file:
        return f"{name} from process {pid} ({file.read().strip()})"
    return f"{name} from process {pid}"


def print_stop(text: str) -> None:
    """Print on stderr why the process ends."""
    print(f"rft: {text}", file=sys.stderr, flush=True)


class StopRequests:
    """Requests to stop from this program: from a callback of the run, or because its caller was interrupted.

    The first `stop(reason)` calls `request(reason)`, at once or as soon as `handle` sets it: the run finishes
    its step and saves a checkpoint. `stop_at_once()` calls `cancel()`: nothing is finished.
    """

    again = "another interrupt stops at once"  # how to stop at once, for a message

    def __init__(self) -> None:
        self.exit_code = STOPPED
        self.reason = ""  # of the first request; empty before it
        self._asked = threading.Event()
        self._request: Callable[[str], float] | None = None
        self._cancel: Callable[[], object] | None = None
        self._at_once: Callable[[str], None] = _nothing_was_saved
        self._switching = threading.Lock()

    def handle(
        self,
        *,
        request: Callable[[str], float] | None = None,
        at_once: Callable[[str], None] | None = None,
        cancel: Callable[[], object] | None = None,
    ) -> None:
        """Set the callbacks of a request. They are called on the thread that makes it."""
        with self._switching:
            self._request = request or self._request
            self._at_once = at_once or self._at_once
            self._cancel = cancel or self._cancel
        if request is not None and self.reason:
            request(self.reason)

    def asked(self, within: float = 0.0) -> bool:
        """Whether a stop was requested; waits up to `within` seconds, since the processes of a job step get
        one signal each, in any order."""
        deadline = time.monotonic() + within
        while not self._asked.wait(min(0.1, max(within, 0.0))):  # `_pass_on` runs between two waits
            if time.monotonic() >= deadline:
                return False
        return True

    def stop(self, reason: str) -> None:
        """Request an orderly end; a repetition does nothing."""
        with self._switching:
            if self.reason:
                return
            self.reason, request = reason, self._request
            self._asked.set()
        if request is not None:
            request(reason)

    def stop_at_once(self) -> None:
        """End the run without finishing its step."""
        with self._switching:
            cancel = self._cancel
        if cancel is not None:
            cancel()


class StopSignals(StopRequests):
    """Catch the stop signals of this process during the block, on a dedicated thread that is never blocked.

    The first signal calls `request(reason)`, which returns the seconds that an orderly exit may take; after
    that time the process exits immediately, and so it does on a signal later than SAME_REQUEST_S. Until
    `handle` is called, the first signal causes an immediate exit too: there is nothing to finish yet. An
    immediate exit calls `at_once(reason)`, kills all child processes, and exits with `exit_code`.

    until_exit: leave the signals blocked at the end, for a process that is about to exit, so that a late
        signal does not change its exit code.
    """

    again = f"a signal more than {SAME_REQUEST_S:g} s from now stops at once"

    def __init__(self, *, until_exit: bool = False) -> None:
        super().__init__()
        self.until_exit = until_exit
        self._closing = False
        self._first = 0.0

    def __enter__(self) -> Self:
        self._signals = to_catch()
        self._mask = signal.pthread_sigmask(signal.SIG_BLOCK, self._signals)
        self._handlers: dict[signal.Signals, Any] = {}
        self._thread = threading.Thread(target=self._listen, name="rft-stop-signals", daemon=True)
        self._thread.start()
        if threading.current_thread() is threading.main_thread():
            for number in self._signals:  # for threads started before the mask was set, if any
                self._handlers[number] = signal.signal(number, self._pass_on)
        return self

    def _pass_on(self, number: int, frame: object) -> None:
        assert self._thread.ident is not None
        signal.pthread_kill(self._thread.ident, number)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        if not self.until_exit:
            while signal.sigtimedwait(self._signals, 0) is not None:
                pass  # a repetition of the request already being handled
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            signal.pthread_sigmask(signal.SIG_SETMASK, self._mask)

    def release(self) -> None:
        """Stop listening. The signals stay blocked, for a caller that waits for them."""
        if not self._closing:
            self._closing = True
            assert self._thread.ident is not None
            signal.pthread_kill(self._thread.ident, signal.SIGTERM)
            self._thread.join()

    def handle(
        self,
        *,
        request: Callable[[str], float] | None = None,
        at_once: Callable[[str], None] | None = None,
        cancel: Callable[[], object] | None = None,
    ) -> None:
        """Set the callbacks of a signal, called on the listening thread. `cancel` is not used: the process
        exits instead."""
        with self._switching:
            self._request = request or self._request
            self._at_once = at_once or self._at_once

    def _listen(self) -> None:
        deadline: float | None = None
        while True:
            left = None if deadline is None else max(deadline - time.monotonic(), 0.0)
            info = (
                signal.sigwaitinfo(self._signals)
                if left is None
                else signal.sigtimedwait(self._signals, left)
            )
            if self._closing:
                return
            now = time.monotonic()
            with self._switching:
                if info is None:
                    self._end("the time for finishing the step and saving (train.stop_grace_s) is over")
                if not self.reason:
                    self.reason, self._first = describe(info), now
                    self._asked.set()
                    seconds = self._request(self.reason) if self._request is not None else 0.0
                    if seconds <= 0:
                        self._end("")
                    deadline = now + seconds
                elif now - self._first > SAME_REQUEST_S:
                    self._end(f"requested again by {describe(info)}")

    def _end(self, why: str) -> NoReturn:
        reason = f"{self.reason}; {why}" if why else self.reason
        record = threading.Thread(target=self._at_once, args=(reason,), daemon=True)
        record.start()
        record.join(RECORD_S)
        kill_tree(os.getpid())
        with contextlib.suppress(Exception):
            sys.stdout.flush()
        os._exit(self.exit_code)


def _nothing_was_saved(reason: str) -> None:
    print_stop(f"stopped before the run began ({reason}): nothing was saved")
