"""Find the control groups (v1 and v2) that limit this process, such as those of a container."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path


def limit_folders(root: Path, controller: str) -> Iterator[Path]:
    """Yield the folders of the groups that this process belongs to and that can limit `controller` ("cpu",
    "memory"), parents included. root: the folder that holds /proc and the mount points."""
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
        elif kind == "cgroup" and controller in options.split(","):
            group = next((path for names, path in group_of.items() if controller in names.split(",")), None)
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


def read_limit(file: Path) -> str | None:
    """Read a limit; None if the file does not exist (the root group has no limits)."""
    return file.read_text(encoding="utf-8").strip() if file.is_file() else None


def _below(group: str, mounted: str) -> str:
    """Return a group's path below a mount that shows the groups below `mounted`; "" if it is outside of it,
    as in a container whose own group is mounted under a path of the host."""
    if ".." in group.split("/"):
        return ""
    prefix = mounted.rstrip("/") + "/"
    return group[len(prefix) :].strip("/") if group.startswith(prefix) else ""


def _unescape(field: str) -> str:
    r"""Decode a path of mountinfo, in which a space is written as \040."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), field)
