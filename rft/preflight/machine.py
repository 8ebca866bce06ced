"""Collect facts about the machine and check the folders that a run writes to."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import tempfile
from pathlib import Path

import torch

from rft.algorithms.extras import copies
from rft.config.facts import PACKAGES, Facts
from rft.config.schema import Config
from rft.utils.cores import usable_cores
from rft.utils.hashing import short_digest
from rft.utils.paths import not_writable

SHARED_MEMORY = Path("/dev/shm")
SOCKET_PATH_BYTES = 107  # maximum path length of a Unix socket on Linux, without the final NUL
# Path that Ray appends to its temporary folder; a pid has at most seven digits.
_RAY_SOCKET = "/ray/session_2026-01-01_00-00-00_000000_0000000/sockets/plasma_store"
_VLLM_SOCKET = "/00000000-0000-0000-0000-000000000000"


def machine_facts(config: Config, *, samples: bool) -> Facts:
    """Return the machine's facts: devices, cores, installed packages."""
    installed = frozenset(name for name in PACKAGES if importlib.util.find_spec(name) is not None)
    gpus, device = count_gpus(), config.ray.device
    if not gpus:  # peft imports DeepSpeed where it is installed, which would print that it looked for one
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    on_gpu = gpus > 0 if device == "auto" else device == "cuda"
    if on_gpu and not gpus and config.ray.address is None:
        on_gpu = False  # reported by `engine_checks`
    engine = config.rollout.engine
    if engine == "auto":
        engine = "vllm" if "vllm" in installed else "hf"
    return Facts(
        device="cuda" if on_gpu else "cpu",
        engine=engine if samples else "hf",
        samples=samples,
        installed=installed,
        gpus=gpus,
        cores=frozenset(os.sched_getaffinity(0)),
        usable_cores=usable_cores(),
    )


def count_gpus() -> int:
    """Count the GPUs that torch can use. Without a driver there is none, and torch need not be loaded."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        if not Path("/dev/kfd").exists():  # AMD's
            return 0
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def sync_folder(config: Config, transport: str) -> Path | None:
    """Return the folder of the run's weight files, unchanged by a resume; None: no weight files."""
    folder = config.sync.folder
    if transport != "file" and not folder:
        return None
    base = SHARED_MEMORY if folder is None else Path(folder).expanduser().resolve()
    return base / f"rft-{config.name}-{short_digest(str(config.run_dir.resolve()))}"


def check_sync_folder(config: Config, weight_bytes: int | None) -> list[str]:
    """Check that two versions of the weights fit the folder of transports `file` and `sparse`."""
    sync, algorithm = config.sync, config.algorithm
    writes = sync.transport == "file" or (sync.transport == "sparse" and sync.folder is not None)
    refused = copies(algorithm) == 2 or (sync.folder is None and config.ray.address is not None)
    if not algorithm.online or not writes or refused:
        return []
    base = SHARED_MEMORY if sync.folder is None else Path(sync.folder).expanduser()
    if not base.is_dir() or not os.access(base, os.W_OK):
        return [f"sync.folder: {base} is not a folder that this user can write to; name another one"]
    need = 2 * (weight_bytes or 0)  # the version in use and the one being written
    free = shutil.disk_usage(base).free
    if need <= free:
        return []
    return [
        f"sync.folder: two versions of the weights need {need / 2**30:.2f} GiB, but {base} has "
        f"{free / 2**30:.2f} free: free space there, or name another folder"
    ]


def check_folders(config: Config) -> list[str]:
    """Check that all folders that a training run writes to are writable."""
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


def check_sockets(config: Config, *, vllm: bool) -> list[str]:
    """Check the folders for sockets of Ray and, if it runs here, vLLM."""
    if config.ray.address is not None:
        return []
    ray_folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # as in `ray.init`
    problems = _check_socket_folder("Ray", "RAY_TMPDIR", ray_folder, _RAY_SOCKET)
    if vllm:
        folder = os.environ.get("VLLM_RPC_BASE_PATH") or tempfile.gettempdir()
        problems += _check_socket_folder("vLLM", "VLLM_RPC_BASE_PATH", folder, _VLLM_SOCKET)
    return problems


def _check_socket_folder(who: str, variable: str, folder: str, socket: str) -> list[str]:
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
    """Return the error of writing a file in `folder` or its closest existing parent; None: writable."""
    try:
        while not folder.exists():
            folder = folder.parent
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"rft")
            file.flush()
    except OSError as error:
        return error
    return None
