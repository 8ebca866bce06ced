"""CPU cores: lists of them as written in a config, and how many this process may keep busy."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path


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


def cpu_quota(root: Path = Path("/")) -> float | None:
    """Read how many CPUs the control groups (v1 and v2) allow this process; None if they set no limit.

    The smallest quota counts, from this process's group up to the top of the mounted hierarchy. `root`: the
    folder that holds /proc and the mount points.
    """
    quotas = [quota for folder in _cpu_groups(root) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _cpu_groups(root: Path) -> Iterator[Path]:
    """Folders of the groups that this process belongs to and that can limit its CPUs, parents included."""
    try:
        memberships = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (root / "proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not Linux, or /proc is not mounted: no limit can be read
        return
    group_of = {controllers: path for _, controllers, path in (m.split(":", 2) for m in memberships)}
    for mount in mounts:
        fields, _, rest = mount.partition(" - ")
        kind, *_, options = rest.split(" ")
        if kind == "cgroup2":
            group = group_of.get("")
        elif kind == "cgroup" and "cpu" in options.split(","):
            group = next((path for names, path in group_of.items() if "cpu" in names.split(",")), None)
        else:
            continue
        if group is None:
            continue
        inside, point = (_unescape(field) for field in fields.split(" ")[3:5])
        top = root / point.lstrip("/")
        folder = top / _below(group, inside)
        yield folder
        if folder != top:
            yield from (parent for parent in folder.parents if parent.is_relative_to(top))


def _below(group: str, mounted: str) -> str:
    """Return a group's path below a mount that shows the groups below `mounted`; "" if it is outside of it,
    as in a container whose own group is mounted under a path of the host."""
    if ".." in group.split("/"):
        return ""
    prefix = mounted.rstrip("/") + "/"
    return group[len(prefix) :].strip("/") if group.startswith(prefix) else ""


def _quota(folder: Path) -> float | None:
    """Return the CPUs that one group allows: `cpu.max` (v2), or quota over period of `cpu.cfs_*` (v1)."""
    if (line := _read(folder / "cpu.max")) is not None:
        quota, period = line.split()
    else:
        v1 = [_read(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period")]
        if v1[0] is None or v1[1] is None:
            return None
        quota, period = v1[0], v1[1]
    return None if quota in ("max", "-1") else int(quota) / int(period)


def _read(path: Path) -> str | None:
    """Read a file; None if it does not exist (the root group has no limits)."""
    return path.read_text(encoding="utf-8").strip() if path.is_file() else None


def _unescape(field: str) -> str:
    r"""Decode a path of mountinfo, in which a space is written as \040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
