"""Check the folders that a run writes into, before anything starts."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from rft.config.schema import Config
from rft.utils.run_lock import not_writable

SOCKET_PATH_BYTES = 107  # of a Unix socket's path on Linux, without its final NUL
# What Ray appends to its temporary folder; a pid has at most seven digits.
_RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
_VLLM_SOCKET = "/00000000-0000-0000-0000-000000000000"


def unwritable_folders(config: Config) -> list[str]:
    """The problems of the folders that a training run writes into."""
    written = {"output_dir": config.run_dir}
    if config.warm_start is not None:
        written["warm_start.cache"] = Path(config.warm_start.cache).expanduser()
    if config.sync.folder is not None:
        written["sync.folder"] = Path(config.sync.folder).expanduser()
    return [
        not_writable(key, folder, error)
        for key, folder in written.items()
        if (error := _write_error(folder.absolute())) is not None
    ]


def socket_problems(config: Config, *, vllm: bool) -> list[str]:
    """The problems of the temporary folders that hold sockets: Ray's, and vLLM's where that runs here."""
    if config.ray.address is not None:
        return []
    problems = _temporary_problems("Ray", "RAY_TMPDIR", _ray_folder(), _RAY_SOCKET)
    if vllm:
        folder = os.environ.get("VLLM_RPC_BASE_PATH") or tempfile.gettempdir()
        problems += _temporary_problems("vLLM", "VLLM_RPC_BASE_PATH", folder, _VLLM_SOCKET)
    return problems


def _ray_folder() -> str:
    """Where Ray puts its session: as `ray.init` decides."""
    return os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"


def _temporary_problems(who: str, variable: str, folder: str, socket: str) -> list[str]:
    source = variable if os.environ.get(variable) else "TMPDIR"
    most = SOCKET_PATH_BYTES - len(socket)
    if (size := len(os.fsencode(folder))) > most:
        return [
            f"{source}={folder} is too long for the sockets that {who} puts there: {size} bytes, at most "
            f"{most} are possible. Set {variable} to a short folder: {variable}=/tmp rft ..."
        ]
    error = _write_error(Path(folder).absolute())
    if error is None:
        return []
    return [
        f"{source}: {folder}, where {who} puts its temporary files, cannot be written ({error.strerror}). "
        f"Set {variable} to a folder with a short path that can: {variable}=/tmp rft ..."
    ]


def _write_error(folder: Path) -> OSError | None:
    """Why a file cannot be written in `folder`, or in the nearest one above it that exists; None: it can."""
    try:
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"rft")
            file.flush()
    except OSError as error:
        return error
    return None
