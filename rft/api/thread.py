"""Run a training loop on a separate thread, so that a notebook, a thread and a script can call it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rft.errors import ConfigError
from rft.utils.signals import STOP_SIGNALS, STOPPED, StopRequests
from rft.utils.terminal import say

T = TypeVar("T")
_BUSY = threading.Lock()
POLL_S = 0.5  # a signal that arrives just before a wait does not end it, and is handled after it


def in_thread(work: Callable[[StopRequests], T], stops: StopRequests, stopped: str) -> T:
    """Return `work(stops)`, run on a new thread; the caller may be in an event loop or in another thread.

    A KeyboardInterrupt of the caller asks `work` to stop (the run saves a checkpoint), a second one ends it
    at once; then it is raised. In the main thread of a program without an event loop, SIGTERM and the other
    stop signals that have no handler do the same, and end the program with exit code 75. stopped: the message
    of the KeyboardInterrupt.

    Raises the errors of `work`, and ConfigError while another run is active in this process: a process has
    one Ray cluster.
    """
    if not _BUSY.acquire(blocking=False):
        raise ConfigError(
            ["another run is active in this process: wait until it ends, or use another process"]
        )
    os.environ["PYTHONUTF8"] = "1"  # engines, learner and reward workers use UTF-8 whatever the locale is
    results: list[T] = []
    errors: list[BaseException] = []
    begin, done, abandoned = threading.Event(), threading.Event(), threading.Event()

    def body() -> None:
        # Processes of the run inherit the mask: an interrupt from a terminal reaches them, too.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        begin.wait()
        try:
            if not abandoned.is_set():
                results.append(work(stops))
        except BaseException as error:
            errors.append(error)
        finally:
            done.set()

    thread = threading.Thread(target=body, name="rft-run", daemon=True)
    try:
        with _other_signals(stops) as received:
            thread.start()
            interrupt = _wait(begin, done, stops)
    except BaseException:  # interrupted while the thread was started: the work has not begun
        abandoned.set()
        begin.set()
        raise
    finally:
        _BUSY.release()
    if interrupt is not None:
        raise KeyboardInterrupt(stopped) from (errors[0] if errors else None)
    if received and stops.reason:
        raise SystemExit(STOPPED)
    if errors:
        raise errors[0]
    return results[0]


def _wait(begin: threading.Event, done: threading.Event, stops: StopRequests) -> KeyboardInterrupt | None:
    """Let the work begin, and wait for its end; returns the caller's first interrupt, if any."""
    first: KeyboardInterrupt | None = None
    received = passed_on = 0
    while not done.is_set():
        try:  # also around the requests: the next interrupt may arrive while one is passed on
            begin.set()
            while passed_on < received:
                if passed_on == 0:
                    stops.stop("interrupted")
                else:
                    say("rft: interrupted again: the run is ended at once")
                    stops.stop_at_once()
                passed_on += 1
            done.wait(POLL_S)
        except KeyboardInterrupt as interrupt:
            first = first or interrupt
            received += 1
    return first


@contextmanager
def _other_signals(stops: StopRequests) -> Iterator[list[int]]:
    """Turn stop signals that would end the program into requests during the block; yields those received."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread() or _in_loop():
        yield received
        return

    def ask(number: int, frame: Any) -> None:
        received.append(number)
        stops.stop(signal.Signals(number).name)

    ending = [n for n in STOP_SIGNALS if n != signal.SIGINT and signal.getsignal(n) is signal.SIG_DFL]
    for number in ending:
        signal.signal(number, ask)
    try:
        yield received
    finally:
        for number in ending:
            signal.signal(number, signal.SIG_DFL)


def _in_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True
