"""Calling Ray actors: every call has a deadline that names the culprit, and raises the actor's own error."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from rft.errors import RunStopped
from rft.utils.process import Guardian, kill_tree
from rft.utils.python import safe_workers

R = TypeVar("R")


class Overdue(RuntimeError):
    """A call did not finish in time; the message names it and its deadline."""


class ActorDied(RuntimeError):
    """The process behind an actor is gone."""


class NotHere(RuntimeError):
    """A file or folder that this node needs is not on it."""


def require_here(path: str, what: str) -> None:
    """Raise NotHere, which names this node, unless `path` exists on it. A name that is no absolute path,
    such as a hub's, passes."""
    if path.startswith("/") and not os.path.exists(path):
        import ray

        raise NotHere(
            f"{what}: {path} is not on node {os.uname().nodename} ({ray.util.get_node_ip_address()}). Every "
            "node of the cluster needs it under the same path: put it on a folder that they share, or copy it"
        )


def use_interface_of(host: str) -> None:
    """Let gloo and NCCL talk over the network interface that reaches `host`: by themselves they take the
    one that this machine's name resolves to, which is often the loopback."""
    import psutil

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((host, 9))  # sends nothing; the kernel chooses the route
        own = probe.getsockname()[0]
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == own for a in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
            os.environ.setdefault("NCCL_SOCKET_IFNAME", name)
            return


async def within(seconds: float, what: str, awaitable: Awaitable[R]) -> R:
    """Await with a deadline. Raises Overdue."""
    try:
        async with asyncio.timeout(seconds):  # wait_for loses a cancellation that comes with the answer
            return await awaitable
    except TimeoutError:
        raise Overdue(f"{what} did not finish within {seconds:.0f} s") from None


async def unless_stopped(work: Awaitable[R], stop: asyncio.Event) -> R:
    """Await `work`, or raise RunStopped as soon as a stop is asked for. For what takes minutes and leaves
    nothing to save: a start, an evaluation, an export."""
    doing, asked = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait((doing, asked), return_when=asyncio.FIRST_COMPLETED)
        if stop.is_set() and not doing.done():
            raise RunStopped(None)
        return doing.result()
    finally:
        asked.cancel()
        if not doing.done():
            doing.cancel()
            await asyncio.wait((asyncio.gather(doing, return_exceptions=True),), timeout=5)


async def call(reference: Any, seconds: float, what: str) -> Any:
    """Await an actor's answer. Raises its own error, Overdue, or ActorDied."""
    from ray.exceptions import RayActorError, RayTaskError

    try:
        return await within(seconds, what, reference)
    except RayActorError as error:
        raise ActorDied(f"{what}: {_first_and_last(str(error))}") from error
    except RayTaskError as error:
        raise error.cause from error


async def tell_notes(ask: Callable[[str], Awaitable[list[str]]], tell: Callable[[str], None]) -> None:
    """Tell the user what an actor with `take_notes`, asked by `ask(method)`, has to say."""
    for line in await ask("take_notes"):
        tell(line)


def _first_and_last(text: str) -> str:
    """Ray's own summary, and the error at the end of the traceback that it quotes."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"


@contextmanager
def ray_cluster(address: str | None, object_store_gib: float) -> Iterator[None]:
    """A Ray cluster for the length of the block: an existing one, or one started here.

    One started here leaves no process behind, however the block ends.
    """
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # Ray's 15 starves actors on a shared machine
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    import ray

    if address is not None:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **safe_workers())
        try:
            yield
        finally:
            ray.shutdown()
        return
    ray.init(
        address="local",
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=int(object_store_gib * 2**30),
        **safe_workers(),
    )
    guardian, watched = Guardian(), _family()  # Ray's agents outlive a driver that was killed by a minute
    for process in watched:
        guardian.watch(process.pid)
    try:
        yield
    finally:
        family = _family()  # asked while their parents still live
        _kill_instead_of_terminate()
        ray.shutdown()
        _reap(family)
        for process in watched:
            guardian.forget(process.pid)
        guardian.close()


def on_head_death(act: Callable[[str], None]) -> None:
    """Have the running loop call `act(name)` when a process of the Ray head that was started here ends.

    Ray itself notices after a minute or so, and then aborts the driver. Nothing is watched where the
    cluster is another one's.
    """
    import psutil

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
    """Have Ray's shutdown kill the processes of its head: it sends SIGTERM, which they block, and waits a
    second for each of them."""
    import ray

    node: Any = ray._private.worker._global_node
    for processes in node.all_processes.values() if node is not None else ():
        for info in processes:
            info.process.terminate = info.process.kill


def _reap(family: list[Any]) -> None:
    """Kill what is left of Ray, whose shutdown has ended all that had something to finish."""
    import psutil

    _, alive = psutil.wait_procs(family, timeout=0.2)
    for process in alive:
        kill(process.pid)
    psutil.wait_procs(alive, timeout=5)


def _family() -> list[Any]:
    """The processes of the Ray head that was started here, and of its actors."""
    import psutil

    return [p for p in psutil.Process().children(recursive=True) if _is_of_a_run(p)]


def _is_of_a_run(process: Any) -> bool:
    """True for Ray's own processes and what they started, such as engines: all but reward workers,
    which their runner ends."""
    import psutil

    try:
        lineage = [process, *process.parents()]
        return any("raylet" in p.name() or "gcs_server" in p.name() for p in lineage)
    except psutil.NoSuchProcess:
        return False


def kill_actor(actor: Any, node: str, pid: int) -> None:
    """End an actor and every process that it started, at once: also one that is frozen, which Ray's own
    way of ending an actor would wait for. `node` and `pid` ("" and 0: unknown) say where it runs."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if pid and node == ray.get_runtime_context().get_node_id():
        kill_tree(pid)
    elif pid:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        ray.remote(kill_tree).options(num_cpus=0, scheduling_strategy=there).remote(pid)
    ray.kill(actor)


def kill(pid: int) -> None:
    """SIGKILL; a process that is gone is no error."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
