"""Limit memory with control groups, version 1 or 2, where this process may create them.

The trusted side creates the groups and passes an open folder to the process that is to enter: the sandbox has
no /sys. Version 2 was tested only with fixtures of its files.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass, field

PREFIX = "rft-sandbox-"


@dataclass(frozen=True)
class Hierarchy:
    """Path and cgroup version of this process's memory controller."""

    version: int
    folder: str


def find_hierarchy(proc: str = "/proc", root: str = "") -> Hierarchy | None:
    """Find the memory controller of this process from /proc; None if there is none.

    root: prefix for file-system paths, for tests.
    """
    try:
        with open(f"{proc}/self/cgroup", encoding="utf-8", errors="surrogateescape") as file:
            groups = [line.rstrip("\n").split(":", 2) for line in file]
        with open(f"{proc}/self/mountinfo", encoding="utf-8", errors="surrogateescape") as file:
            mounts = [line.split() for line in file]
    except OSError:
        return None
    for version, controllers in ((1, "memory"), (2, "")):
        path = next((p for _, names, p in groups if controllers in names.split(",")), None)
        if path is None:
            continue
        for fields in mounts:
            kind, _, options = fields[fields.index("-") + 1 :][:3]
            if kind != ("cgroup" if version == 1 else "cgroup2"):
                continue
            if version == 1 and "memory" not in options.split(","):
                continue
            shown, point = fields[3], fields[4]  # which part of the hierarchy is mounted, and where
            inside = os.path.relpath(path, shown) if path.startswith(shown.rstrip("/") + "/") else "."
            folder = os.path.normpath(root + os.path.join(point, inside))
            if version == 2 and "memory" not in _words(folder, "cgroup.controllers"):
                continue
            if os.path.isdir(folder):
                return Hierarchy(version, folder)
    return None


def _words(folder: str, name: str) -> list[str]:
    try:
        with open(f"{folder}/{name}", encoding="utf-8") as file:
            return file.read().split()
    except OSError:
        return []


def write_file(folder: int, name: str, value: str) -> None:
    """Write a file of the group whose folder is open at `folder`. Raises OSError."""
    fd = os.open(name, os.O_WRONLY, dir_fd=folder)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def enter(folder: int) -> None:
    """Move the calling process into the group whose folder is open at `folder`. Raises OSError."""
    write_file(folder, "cgroup.procs", "0")


def kills(folder: int) -> int:
    """Return how many processes of the group the kernel has killed for exceeding the memory limit."""
    for name in ("memory.events", "memory.oom_control"):  # of version 2, of version 1
        with contextlib.suppress(FileNotFoundError):
            fd = os.open(name, os.O_RDONLY, dir_fd=folder)
            try:
                lines = os.read(fd, 1 << 16).decode().splitlines()
            finally:
                os.close(fd)
            return sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
    return 0


@dataclass
class Group:
    """One control group for one process and its descendants. Created by `Groups`."""

    version: int
    name: str
    fd: int
    memory: int = 0  # the last limit that was set

    def limit(self, memory: int) -> None:
        """Set the limit in bytes, swap included. Raises OSError."""
        if memory == self.memory:
            return
        self.memory = 0  # unknown if a later line fails
        if self.version == 1:
            with contextlib.suppress(OSError):  # when both limits are raised, the sum must be raised first
                self._write("memory.memsw.limit_in_bytes", str(memory))
            self._write("memory.limit_in_bytes", str(memory))
            with contextlib.suppress(OSError):  # the kernel does not account for swap
                self._write("memory.memsw.limit_in_bytes", str(memory))
        else:
            self._write("memory.max", str(memory))
            with contextlib.suppress(OSError):
                self._write("memory.swap.max", "0")
        self.memory = memory

    def _write(self, name: str, value: str) -> None:
        write_file(self.fd, name, value)


@dataclass
class Groups:
    """The groups of one sandbox, reused between requests."""

    hierarchy: Hierarchy
    fd: int
    owner: int
    free: list[Group] = field(default_factory=list)
    made: list[Group] = field(default_factory=list)

    @classmethod
    def open(cls, owner: int, hierarchy: Hierarchy | None = None) -> Groups | None:
        """Open the parent group and try a limit; None if this process may not create groups.

        owner: process id; once it has ended, a later sandbox removes the groups.
        """
        hierarchy = hierarchy or find_hierarchy()
        if hierarchy is None:
            return None
        _remove_leftovers(hierarchy.folder)
        try:
            fd = os.open(hierarchy.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            return None
        groups = cls(hierarchy, fd, owner)
        if hierarchy.version == 2:
            with contextlib.suppress(OSError):  # refused if the group has processes, unless it is the root
                write_file(fd, "cgroup.subtree_control", "+memory")
        try:
            group = groups.take()
            group.limit(1 << 30)
        except OSError:
            groups.close()
            return None
        groups.give_back(group)
        return groups

    def take(self) -> Group:
        """Return a group without processes. Raises OSError."""
        if self.free:
            return self.free.pop()
        name = f"{PREFIX}{self.owner}-{os.urandom(4).hex()}"
        os.mkdir(name, 0o755, dir_fd=self.fd)
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=self.fd)
        group = Group(self.hierarchy.version, name, fd)
        self.made.append(group)
        return group

    def give_back(self, group: Group) -> None:
        self.free.append(group)

    def close(self) -> None:
        for group in self.made:
            os.close(group.fd)
            with contextlib.suppress(OSError):  # still busy: the next sandbox removes it
                os.rmdir(group.name, dir_fd=self.fd)
        os.close(self.fd)


def _remove_leftovers(folder: str) -> None:
    """Remove the empty groups of sandboxes that were killed."""
    try:
        names = [name for name in os.listdir(folder) if name.startswith(PREFIX)]
    except OSError:
        return
    for name in names:
        owner = name.removeprefix(PREFIX).partition("-")[0]
        if owner.isdigit() and not os.path.exists(f"/proc/{owner}"):
            with contextlib.suppress(OSError):
                os.rmdir(os.path.join(folder, name))
