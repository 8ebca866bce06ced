"""Write files and folders atomically: they appear complete, by a rename, or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished"  # suffix of an incomplete file
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)  # of a file system


@contextmanager
def write_atomic(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; at the end of the block that file is flushed and renamed to `path`.

    If the block raises, nothing is left behind. A killed process leaves `NAME.PID.unfinished`.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace the contents of a text file, atomically."""
    with write_atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


@contextmanager
def folder_atomic(folder: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield a temporary folder to fill; at the end of the block it is renamed to `folder`.

    An older `folder` is replaced. shared: several processes may make it at once, all with the same contents:
    the first one wins.
    """
    temporary = folder.with_name(f".writing-{folder.name}{f'-{os.getpid()}' if shared else ''}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a killed process
    yield temporary
    if shared and folder.exists():
        shutil.rmtree(temporary)
        return
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


@contextmanager
def exclusive(lock: Path) -> Iterator[bool]:
    """Wait until no other process holds the file `lock`, and hold it while the block lasts.

    Yields False if the file system does not support locks: then the block is not exclusive.
    """
    with lock.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            yield False
        else:
            yield True
