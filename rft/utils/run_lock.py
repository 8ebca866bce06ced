"""Lock a run's folder, so that only one process at a time trains it.

The lock is a POSIX record lock on RUN/run.lock: it ends with the process, however that dies, and child
processes do not inherit it. The file names its owner. If the file system does not support locks, the owner
renews the file every few seconds instead, and a second start checks whether the named owner is alive.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rft.errors import ConfigError
from rft.utils.files import NO_LOCKS
from rft.utils.paths import not_writable

LOCK_FILE = "run.lock"
RENEW_S = 5.0
GONE_S = 4 * RENEW_S  # without a renewal for this long, the owner is considered dead
_TAKEN = (errno.EACCES, errno.EAGAIN)


class RunLock:
    """A lock on a run's folder, from construction until `release` or the end of this process.

    Makes the folder. `note` is a message for the user, empty if there is none. Raises ConfigError if another
    process trains this run, or if the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / LOCK_FILE
        self.note = ""
        self._ended = threading.Event()
        self._made = [p for p in (folder, *folder.parents) if not p.exists()]  # removed again if unused
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._descriptor = self._open()
        except OSError as error:
            raise ConfigError([not_writable("output_dir", folder, error)]) from error

    def _open(self) -> int:
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                locks = self._lock(descriptor)
                if os.stat(self.path).st_ino == os.fstat(descriptor).st_ino:  # else its owner just removed it
                    if not locks:
                        self._wait_for_owner()
                    self._write(descriptor)
                    if not locks:
                        self._check_alone()
                        threading.Thread(target=self._renew, name="rft-run-lock", daemon=True).start()
                    return descriptor
            except FileNotFoundError:
                pass
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _lock(self, descriptor: int) -> bool:
        """Take the lock; False if the file system does not support it. Raises ConfigError if it is taken."""
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _TAKEN:
                raise ConfigError([self._busy(read_owner(self.path))]) from error
            if error.errno not in NO_LOCKS:
                raise
            self.note = (
                f"{self.path.parent} is on a file system without locks ({error.strerror}): {LOCK_FILE} is "
                f"renewed every {RENEW_S:g} s instead, for a second start of this run to see"
            )
            return False
        return True

    def _wait_for_owner(self) -> None:
        """Without locks: raise ConfigError if the owner that the file names is alive. A process of this
        machine is looked up; for another machine, wait for the next renewal."""
        owner = read_owner(self.path)
        if not owner:
            return
        if owner.get("place") == _machine():
            if _start_of(owner["pid"]) == owner.get("started"):
                raise ConfigError([self._busy(owner)])
            return
        seen, deadline = self.path.stat().st_mtime_ns, time.monotonic() + GONE_S
        while time.monotonic() < deadline:
            time.sleep(RENEW_S / 5)
            if self.path.stat().st_mtime_ns != seen:
                raise ConfigError([self._busy(owner)])

    def _check_alone(self) -> None:
        """Without locks: of two simultaneous starts, the last writer continues."""
        time.sleep(1.0)
        owner = read_owner(self.path)
        if (owner.get("pid"), owner.get("place")) != (os.getpid(), _machine()):
            raise ConfigError([self._busy(owner)])

    def _busy(self, owner: Mapping[str, Any]) -> str:
        who = (
            f"by process {owner['pid']} on {owner['host']} since {owner['since']}"
            if owner
            else "by another process that is just starting"
        )
        return (
            f"output folder {self.path.parent}: this run is already being trained, {who}. Wait until it "
            "ends, stop it, or give this run another name"
        )

    def _write(self, descriptor: int) -> None:
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "started": _start_of(os.getpid()),
            "place": _machine(),
        }
        data = json.dumps(owner).encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, data, 0)
        os.fsync(descriptor)

    def _renew(self) -> None:
        while not self._ended.wait(RENEW_S):
            with contextlib.suppress(OSError):  # a hung or full disk: the next renewal may succeed
                os.utime(self.path)

    def release(self) -> None:
        """Release the folder; remove it if nothing was written into it."""
        if self._ended.is_set():
            return
        self._ended.set()
        with contextlib.suppress(OSError):
            self.path.unlink()
        os.close(self._descriptor)
        with contextlib.suppress(OSError):  # not empty: the run has begun
            for folder in self._made:
                folder.rmdir()


def read_owner(path: Path) -> dict[str, Any]:
    """Return the owner that a lock file names; {} if it names none (yet). Must not be called by the owner:
    closing the file would release its lock."""
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return owner if isinstance(owner, dict) and {"pid", "host", "since"} <= owner.keys() else {}


def _machine() -> str:
    """Identify this boot of this machine, and this container: within both, a pid identifies one process."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"


def _start_of(pid: int) -> int | None:
    """Return a process's start time in ticks since boot; None if it does not exist."""
    try:
        fields = (
            Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        )
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])
