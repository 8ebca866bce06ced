"""Actors without Ray: an object of this process behind the calls that a Ray handle takes. The loops do not
see the difference; for tests, benchmarks and notebooks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LocalMethod:
    """A method with Ray's way to call it."""

    method: Callable[..., Any]

    async def remote(self, *args: Any) -> Any:
        """Run the method when it is awaited; what it raises is raised there."""
        return self.method(*args)


class LocalActor:
    """`handle.method.remote(...)` runs `target.method(...)` in this process."""

    def __init__(self, target: Any) -> None:
        self.target = target

    def __getattr__(self, name: str) -> LocalMethod:
        return LocalMethod(getattr(self.target, name))
