"""CPU cores: lists of them as written in a config, and how many this process may keep busy."""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path

from rft.utils.control_groups import limit_folders, read_limit


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


def usable_cores(cores: str | None = None) -> int:
    """Count the cores that this process, or one bound to `cores`, may keep busy: at least 1.

    A container's CPU quota counts. It is rounded down, because threads beyond it are suspended in the middle
    of a product, and the others then wait for them.
    """
    count = len(parse_cores(cores)) if cores else len(os.sched_getaffinity(0))
    quota = cpu_quota()
    return count if quota is None else max(1, min(count, int(quota)))


def threads_for(threads: int | None, cores: str | None, processes: int = 1) -> int:
    """Return the CPU threads of this process: `threads` if given, else its share of the cores that it and the
    other `processes` on its machine may keep busy. Call it in the process itself: the driver's machine may
    have more cores."""
    return max(1, usable_cores(cores) // processes) if threads is None else threads


def processor() -> str:
    """Return the name of this machine's processor; where the system does not report it, its architecture."""
    try:
        match = re.search(
            r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE
        )
    except OSError:
        match = None
    return match[1] if match else platform.machine()


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Read how many CPUs the control groups (v1 and v2) allow this process; None if they set no limit.

    The smallest quota counts, from this process's group up to the top of the mounted hierarchy. `root`: the
    folder that holds /proc and the mount points.
    """
    quotas = [quota for folder in limit_folders(root, "cpu") if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _quota(folder: Path) -> float | None:
    """Return the CPUs that one group allows: `cpu.max` (v2), or quota over period of `cpu.cfs_*` (v1)."""
    if (line := read_limit(folder / "cpu.max")) is not None:
        quota, period = line.split()
    else:
        v1 = [read_limit(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        if v1[0] is None or v1[1] is None:
            return None
        quota, period = v1[0], v1[1]
    return None if quota in ("max", "-1") else int(quota) / int(period)
