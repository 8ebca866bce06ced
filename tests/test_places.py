"""Folders that cannot be written, and temporary folders that are too long for sockets."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rft.cli import main
from rft.config.load import parse_config
from rft.config.schema import Config
from rft.preflight.machine import SOCKET_PATH_BYTES, check_folders, check_sockets

CONFIG = "algorithm: sft\ndata: {kind: arithmetic, limit: 64}\nwarm_start: null\n"


def config(**more: object) -> Config:
    return parse_config({"algorithm": "sft", **more})


def long_folder(root: Path, size: int) -> str:
    """A folder whose path has `size` bytes."""
    text = f"{root}/"
    while len(text) < size:
        text += "d" * min(200, size - len(text))
    Path(text).mkdir(parents=True)
    return text


@pytest.fixture
def read_only(mount_tmpfs: Callable[[str, str], Path]) -> Path:
    """A folder on a disk that is mounted read-only."""
    return mount_tmpfs("read-only", "ro")


@pytest.fixture
def root() -> Iterator[Path]:
    """A folder with a short name: pytest's are long already."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as folder:
        yield Path(folder)


def test_a_temporary_folder_too_long_for_rays_sockets(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", long_folder(root, 40))
    (problem,) = check_sockets(config(), vllm=False)
    assert problem.startswith(f"TMPDIR={root}/") and "40 bytes, at most 39" in problem
    assert "RAY_TMPDIR=/tmp" in problem
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    assert check_sockets(config(), vllm=False) == []
    monkeypatch.setenv("RAY_TMPDIR", long_folder(root, 50))
    (problem,) = check_sockets(config(), vllm=False)
    assert problem.startswith("RAY_TMPDIR=")
    assert check_sockets(config(ray={"address": "auto"}), vllm=False) == []
    monkeypatch.setenv("RAY_TMPDIR", f"{root}/{'ä' * 12}")
    assert len(os.environ["RAY_TMPDIR"]) < 39 - 3
    assert bool(check_sockets(config(), vllm=False)) == (len(os.fsencode(os.environ["RAY_TMPDIR"])) > 39)


def test_the_limits_are_those_of_the_system_and_of_ray(root: Path) -> None:
    """The longest folder that is allowed holds a session's sockets; a byte more does not."""
    from ray._private.utils import validate_socket_filepath

    name = f"/ray/session_2026-11-29_15-40-45_123456_{2**22 - 1}/sockets/plasma_store"
    folder = long_folder(root, SOCKET_PATH_BYTES - len(name))
    assert check_socket_folder(folder) == []
    validate_socket_filepath(folder + name)
    with socket.socket(socket.AF_UNIX) as probe:
        os.makedirs(os.path.dirname(folder + name))
        probe.bind(folder + name)
    with pytest.raises(OSError, match="AF_UNIX"):
        validate_socket_filepath(folder + "x" + name)
    assert check_socket_folder(folder + "x") != []


def check_socket_folder(folder: str) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_TMPDIR", folder)
        return check_sockets(config(), vllm=False)


def test_vllms_sockets(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    monkeypatch.setenv("VLLM_RPC_BASE_PATH", long_folder(root, 71))
    assert check_sockets(config(), vllm=False) == []
    (problem,) = check_sockets(config(), vllm=True)
    assert "71 bytes, at most 70" in problem and "VLLM_RPC_BASE_PATH=/tmp" in problem


def test_read_only_folders_are_found(read_only: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (problem,) = check_folders(config(output_dir=str(read_only)))
    assert problem.startswith(f"output_dir: {read_only}/run cannot be written (Read-only file system): write")
    warm = {"cache": str(read_only / "cache")}
    (problem,) = check_folders(config(output_dir=str(read_only.parent / "runs"), warm_start=warm))
    assert problem.startswith(f"warm_start.cache: {read_only}/cache")
    monkeypatch.setenv("RAY_TMPDIR", str(read_only))
    problems = check_sockets(config(), vllm=False)
    assert len(problems) == 1 and "RAY_TMPDIR" in problems[0]


@pytest.mark.parametrize("command", ["check", "train"])
def test_the_commands_say_so_and_start_nothing(
    read_only: Path, tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(CONFIG)
    assert main([command, str(file), f"output_dir={read_only}/runs"]) == 2
    told = capsys.readouterr().err
    assert f"output_dir: {read_only}/runs/run cannot be written (Read-only file system)" in told
    assert "starting" not in told


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_long_temporary_folder_is_found_before_anything_starts(
    tmp_path: Path,
    root: Path,
    command: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RAY_TMPDIR", long_folder(root, 60))
    file = tmp_path / "c.yaml"
    file.write_text(CONFIG)
    assert main([command, str(file), f"output_dir={tmp_path}/runs"]) == 2
    told = capsys.readouterr().err
    assert "60 bytes, at most 39" in told and "starting" not in told
    assert not (tmp_path / "runs" / "run").exists()
