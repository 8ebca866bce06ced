"""The thread that trains: interrupts and signals of its caller become requests to stop."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import rft
from rft.api.thread import in_thread
from rft.utils.signals import STOP_SIGNALS, StopRequests


@pytest.fixture(autouse=True)
def default_handlers() -> Iterator[None]:
    """The handlers of a plain script."""
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for number in STOP_SIGNALS:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def stoppable(seen: list[str], cancelled: threading.Event) -> Callable[[StopRequests], int]:
    """Work that interrupts its caller twice, and that ends only when it is cancelled."""

    def work(stops: StopRequests) -> int:
        stops.handle(request=lambda reason: seen.append(reason) or 0.0, cancel=cancelled.set)
        os.kill(os.getpid(), signal.SIGINT)
        assert stops.asked(within=10)
        time.sleep(0.2)
        os.kill(os.getpid(), signal.SIGINT)
        assert cancelled.wait(10)
        raise RuntimeError("cancelled")

    return work


def test_a_second_interrupt_ends_the_work_at_once() -> None:
    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt, match="it was stopped") as caught:
        in_thread(stoppable(seen, threading.Event()), StopRequests(), "it was stopped")
    assert seen == ["interrupted"] and isinstance(caught.value.__cause__, RuntimeError)
    assert in_thread(lambda stops: 3, StopRequests(), "") == 3  # nothing is held


def test_a_signal_asks_the_work_and_ends_the_program_afterwards() -> None:
    def work(stops: StopRequests) -> str:
        os.kill(os.getpid(), signal.SIGTERM)
        assert stops.asked(within=10)
        return stops.reason

    stops = StopRequests()
    with pytest.raises(SystemExit) as caught:
        in_thread(work, stops, "")
    assert caught.value.code == 75 and stops.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_no_handler_is_installed_in_an_event_loop_or_for_a_program_that_has_its_own() -> None:
    def handlers(stops: StopRequests) -> bool:
        return signal.getsignal(signal.SIGTERM) is signal.SIG_DFL

    async def in_loop() -> bool:
        return in_thread(handlers, StopRequests(), "")

    assert asyncio.run(in_loop()) and not in_thread(handlers, StopRequests(), "")
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    in_thread(lambda stops: None, StopRequests(), "")
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN


def test_signals_are_blocked_in_the_thread_and_in_its_processes_only() -> None:
    blocked = in_thread(
        lambda stops: signal.pthread_sigmask(signal.SIG_BLOCK, ()) >= set(STOP_SIGNALS), StopRequests(), ""
    )
    assert blocked and not signal.pthread_sigmask(signal.SIG_BLOCK, ()) & set(STOP_SIGNALS)


def test_an_error_is_raised_as_it_is_and_one_run_at_a_time_is_allowed() -> None:
    def second(stops: StopRequests) -> None:
        in_thread(lambda stops: None, StopRequests(), "")

    with pytest.raises(rft.ConfigError, match="another run is active in this process"):
        in_thread(second, StopRequests(), "")
    with pytest.raises(ZeroDivisionError):
        in_thread(lambda stops: 1 // 0, StopRequests(), "")


def test_a_request_before_the_run_listens_is_passed_on() -> None:
    stops, seen = StopRequests(), []
    stops.stop("early")
    stops.stop("again")
    stops.handle(request=lambda reason: seen.append(reason) or 0.0)
    assert seen == ["early"] and stops.asked()
    begun = time.monotonic()
    assert not StopRequests().asked(within=0.05) and time.monotonic() - begun >= 0.05
