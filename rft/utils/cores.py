"""Lists of CPU cores as they are written in a config."""

from __future__ import annotations


def parse_cores(text: str) -> set[int]:
    """Parse "0-2,5" into {0, 1, 2, 5}. Raises ValueError for anything else."""
    cores: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        try:
            cores |= set(range(int(first), int(last or first) + 1))
        except ValueError:
            raise ValueError(f'cores {text!r}: write a list such as "0" or "0-3,8"') from None
    return cores
