"""Files and folders that appear complete, by a rename, or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

UNFINISHED = ".unfinished"  # suffix of a file that is being written


@contextmanager
def write_atomic(path: Path) -> Iterator[Path]:
    """Yield the path to write to; at the end of the block that file is flushed and becomes `path`.

    Nothing is left behind where the block raises. A process that is killed leaves `NAME.PID.unfinished`.
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
    """Yield the path of a folder to make; at the end of the block it becomes `folder`.

    An older `folder` is replaced. shared: several processes may make it at once, all with the same contents:
    the first one wins.
    """
    temporary = folder.with_name(f".writing-{folder.name}{f'-{os.getpid()}' if shared else ''}")
    shutil.rmtree(temporary, ignore_errors=True)  # left by a process that was killed
    yield temporary
    if shared and folder.exists():
        shutil.rmtree(temporary)
        return
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)
