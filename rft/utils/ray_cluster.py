"""Start and end a Ray cluster on this machine, and detect the death of its head."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import psutil

from rft.utils.process import PR_SET_CHILD_SUBREAPER, Guardian, prctl
from rft.utils.python import safe_workers
from rft.utils.quick_imports import load_torch
from rft.utils.signals import STOP_SIGNALS


@contextmanager
def ray_cluster(address: str | None, object_store_gib: float) -> Iterator[None]:
    """Provide a Ray cluster for the length of the block: the one that this process is connected to, the one
    at an address, or one started here.

    A cluster started here leaves no process behind, however the block ends.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's default, 15, starves actors on a shared machine
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    load_torch()  # before Ray's threads
    import ray

    if ray.is_initialized():  # by the program that calls rft, which also shuts it down
        yield
        return
    if address is not None:
        with _signal_handlers_kept():
            ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **safe_workers())
        try:
            yield
        finally:
            ray.shutdown()
        return
    with _signal_handlers_kept():
        ray.init(
            address="local",
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            object_store_memory=int(object_store_gib * 2**30),
            **safe_workers(),
        )
    guardian, watched = Guardian(), _family()  # Ray's agents survive a killed driver for about a minute
    for process in watched:
        guardian.watch(process.pid)
    try:
        yield
    finally:
        known = _below()  # while their parents are still alive
        family = [p for p in known if _is_of_a_run(p)]
        prctl(PR_SET_CHILD_SUBREAPER, 1)  # workers orphaned later become our children
        _kill_instead_of_terminate()
        ray.shutdown()
        _reap([*family, *(p for p in _below() if p not in known)])
        prctl(PR_SET_CHILD_SUBREAPER, 0)
        for process in watched:
            guardian.forget(process.pid)
        guardian.close()


@contextmanager
def _signal_handlers_kept() -> Iterator[None]:
    """Install this program's handlers of the stop signals again at the end of the block. `ray.init` sets two
    for SIGTERM: one exits, and one aborts the process three seconds later, if a thread receives the signal
    that does not block it."""
    in_main = threading.current_thread() is threading.main_thread()
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS} if in_main else {}
    yield
    for number, handler in handlers.items():
        if handler is not None:  # None: set by other code than Python's
            signal.signal(number, handler)


def on_head_death(act: Callable[[str], None]) -> None:
    """Have the running loop call `act(name)` when a process of the Ray head that was started here ends.

    Ray itself notices after about a minute, and then aborts the driver. A cluster that was not started here
    is not monitored.
    """
    loop = asyncio.get_running_loop()

    def ended(descriptor: int, name: str) -> None:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        act(name)

    for process in psutil.Process().children():
        if process.name() in ("gcs_server", "raylet"):
            descriptor = os.pidfd_open(process.pid)
            loop.add_reader(descriptor, ended, descriptor, process.name())


def _kill_instead_of_terminate() -> None:
    """Make Ray's shutdown kill its head processes: it sends SIGTERM, which they block, and waits a second for
    each of them."""
    import ray

    node: Any = ray._private.worker._global_node
    for processes in node.all_processes.values() if node is not None else ():
        for info in processes:
            info.process.terminate = info.process.kill


def _reap(family: list[Any]) -> None:
    """Kill the processes that Ray's shutdown left behind."""
    _, alive = psutil.wait_procs(family, timeout=0.2)
    for process in alive:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(alive, timeout=5)


def _below() -> list[Any]:
    """Return all descendants of this process."""
    return list(psutil.Process().children(recursive=True))


def _family() -> list[Any]:
    """Return the processes of the Ray head that was started here, and of its actors."""
    return [p for p in _below() if _is_of_a_run(p)]


def _is_of_a_run(process: Any) -> bool:
    """True for Ray's processes and their children, such as engines: all but reward workers, which their
    runner ends."""
    try:
        lineage = [process, *process.parents()]
        return any("raylet" in p.name() or "gcs_server" in p.name() for p in lineage)
    except psutil.NoSuchProcess:
        return False
