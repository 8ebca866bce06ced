"""The folder of `--out`: claimed by one command with one set of settings, and gone on with by the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rft.config.load import differences
from rft.errors import ConfigError
from rft.utils import yaml_files
from rft.utils.files import write_text_atomic
from rft.utils.run_lock import RunLock


@contextmanager
def claimed(
    out: Path, command: str, written: str, files: tuple[str, ...], settings: Mapping[str, Any], holds: str
) -> Iterator[None]:
    """Hold a folder for the length of a block.

    written: name of the file with the settings. files: the other names that the command writes. holds: the
    content of a folder with other settings, for the error. Raises ConfigError for such settings, and for
    foreign files.
    """
    known = {written, *files, "run.lock"}
    other = sorted(p.name for p in out.iterdir() if p.name not in known) if out.is_dir() else []
    if other or (out.exists() and not out.is_dir()):
        what = f"has {other[0]}, which {command} did not write" if other else "is a file"
        raise ConfigError([f"--out: {out} {what}; choose another folder"])
    lock = RunLock(out)
    try:
        file = out / written
        if not file.exists():
            write_text_atomic(file, yaml_files.dump(dict(settings)))
        elif changed := differences(yaml_files.read(file), settings):
            raise ConfigError(
                [
                    f"--out: {out} has {holds}; choose another folder, or set these back:",
                    *(f"{key}: was {a!r}, now {b!r}" for key, a, b in changed),
                ]
            )
        yield
    finally:
        lock.release()
