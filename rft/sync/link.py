"""The address of a weight channel's process group."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Link:
    """Where the sender of weights listens, and which rank this engine has in the group.

    `host` is empty where weights travel without a process group.
    """

    host: str
    port: int
    rank_offset: int
    world_size: int
    timeout_s: float
