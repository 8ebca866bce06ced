"""Calls to Ray actors with a named deadline; they raise the actor's original error."""

from __future__ import annotations

import os
from typing import Any

from rft.utils.deadlines import within
from rft.utils.process import kill_tree


class ActorDied(RuntimeError):
    """The actor's process is gone."""


class NotHere(RuntimeError):
    """A file or folder that this node needs does not exist on it."""


def require_here(path: str, what: str) -> None:
    """Raise NotHere, naming this node, unless `path` exists on it. A name that is not an absolute path
    (a hub name) passes."""
    if path.startswith("/") and not os.path.exists(path):
        import ray

        raise NotHere(
            f"{what}: {path} does not exist on node {os.uname().nodename} "
            f"({ray.util.get_node_ip_address()}). Every node of the cluster needs it under the same path: "
            "put it into a shared folder, or copy it there"
        )


async def call(reference: Any, seconds: float, what: str) -> Any:
    """Await an actor's answer. Raises the actor's error, Overdue, or ActorDied."""
    from ray.exceptions import RayActorError, RayTaskError

    try:
        return await within(seconds, what, reference)
    except RayActorError as error:
        raise ActorDied(f"{what}: {_first_and_last(str(error))}") from error
    except RayTaskError as error:
        raise error.cause from error


def _first_and_last(text: str) -> str:
    """Return Ray's summary, and the error at the end of the traceback that it quotes."""
    lines = [line.strip() for line in text.strip().splitlines()]
    return lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"


def kill_actor(actor: Any, node: str, pid: int) -> None:
    """Kill an actor and every process that it started, even a frozen one, for which `ray.kill` would wait.

    node, pid: where it runs; "" and 0 if unknown.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if pid and node == ray.get_runtime_context().get_node_id():
        kill_tree(pid)
    elif pid:
        there = NodeAffinitySchedulingStrategy(node, soft=False)
        ray.remote(kill_tree).options(num_cpus=0, scheduling_strategy=there).remote(pid)
    ray.kill(actor)
