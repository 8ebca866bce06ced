"""Fixtures that several folders of tests share: a tiny model on disk, random groups, one Ray cluster."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from rft.batch import Completion, Group, Prompt
from rft.utils.quick_imports import collect_rarely

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # without a network, a missing name is looked for for 20 s
torch.set_num_threads(1)
collect_rarely()  # 5% of the processor time of the tests
# A run keeps a SIGHUP that was ignored at its start, and so would every run of a suite started by nohup.
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained tied Qwen3 of 0.1 M parameters with its tokenizer. Sizes that vLLM on CPU accepts."""
    from rft.tasks.tiny import build_tiny

    folder = tmp_path_factory.mktemp("model") / "tiny"
    build_tiny(folder, seed=7, hidden_size=64, layers=2, heads=2, intermediate_size=128)
    return folder


@pytest.fixture
def make_groups() -> Callable[..., list[Group]]:
    """Random groups: `make_groups(groups=3, size=4, seed=0)`; rewards are 0 or 1, never all equal."""

    def make(
        groups: int = 3, size: int = 4, seed: int = 0, vocab: int = 300, longest: int = 12
    ) -> list[Group]:
        dice = random.Random(seed)
        tokens = lambda n: tuple(dice.randrange(6, vocab) for _ in range(n))  # noqa: E731
        out = []
        for index in range(groups):
            completions = []
            for k in range(size):
                n = dice.randint(1, longest)
                completions.append(
                    Completion(
                        tokens=tokens(n),
                        logps=tuple(dice.uniform(-6, -1) for _ in range(n)),
                        versions=((0, 0, n),),
                        reward=float(k % 2),
                    )
                )
            out.append(Group(Prompt(index, tokens(dice.randint(2, 9)), "text"), tuple(completions)))
        return out

    return make


@pytest.fixture
def mount_tmpfs(tmp_path: Path) -> Iterator[Callable[[str, str], Path]]:
    """Mount a tmpfs with the given options on a new folder of the given name; unmounted after the test."""
    disks: list[Path] = []

    def mount(name: str, options: str) -> Path:
        disk = tmp_path / name
        disk.mkdir()
        mounted = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(disk)], capture_output=True, text=True
        )
        if mounted.returncode != 0:
            pytest.skip(f"this user may not mount a tmpfs here: {mounted.stderr.strip()}")
        disks.append(disk)
        return disk

    yield mount
    for disk in disks:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


@pytest.fixture
def tiny_disk(mount_tmpfs: Callable[[str, str], Path]) -> Path:
    """A folder on a separate disk of 1 MiB."""
    return mount_tmpfs("disk", "size=1m")


@pytest.fixture(scope="session")
def ray_here() -> Iterator[None]:
    """One Ray cluster for all tests that talk to actors directly."""
    from rft.utils.ray_cluster import ray_cluster

    with ray_cluster(None, 0.3):
        yield
