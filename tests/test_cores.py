"""The CPU quota of a container counts as its number of cores: trees of control groups, v1 and v2."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from rft.utils.cores import cpu_quota, threads_for, usable_cores
from rft.utils.memory import machine_memory
from tests.specs import engine_spec, learner_spec

V2_MOUNT = "31 23 0:27 {root} {point} ro,nosuid - cgroup2 cgroup2 rw,nsdelegate"
V1_MOUNT = "33 32 0:29 {root} {point} ro,nosuid master:11 - cgroup cgroup rw,cpu,cpuacct"
OTHER = "24 22 0:24 / /proc rw - proc proc rw\n35 32 0:31 / /sys/fs/cgroup/memory rw - cgroup none rw,memory"


def tree(root: Path, membership: str, mounts: list[str], files: dict[str, str]) -> Path:
    """A machine below `root`: /proc/self of a process, and the groups' files."""
    proc = {"proc/self/cgroup": membership, "proc/self/mountinfo": "\n".join([OTHER, *mounts])}
    for name, text in {**proc, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def v2(
    root: Path, group: str, files: dict[str, str], mounted: str = "/", point: str = "/sys/fs/cgroup"
) -> Path:
    mount = V2_MOUNT.format(root=mounted, point=point.replace(" ", r"\040"))
    return tree(root, f"0::{group}", [mount], {f"{point.lstrip('/')}/{k}": v for k, v in files.items()})


def v1(root: Path, group: str, quotas: dict[str, int], mounted: str = "/") -> Path:
    """`quotas`: microseconds of 100,000 by the group's folder below the mount."""
    files = {}
    for name, quota in quotas.items():
        folder = f"sys/fs/cgroup/cpu,cpuacct/{name}".rstrip("/")
        files |= {f"{folder}/cpu.cfs_quota_us": str(quota), f"{folder}/cpu.cfs_period_us": "100000"}
    membership = f"9:memory:{group}\n4:cpu,cpuacct:{group}\n1:name=systemd:{group}\n0::/elsewhere"
    return tree(root, membership, [V1_MOUNT.format(root=mounted, point="/sys/fs/cgroup/cpu,cpuacct")], files)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "200000 100000"}, 2.0),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "25000 50000"}, 0.5),
        ({}, None),  # the topmost group of a machine has no such file
    ],
)
def test_v2_in_a_container(tmp_path: Path, files: dict[str, str], quota: float | None) -> None:
    assert cpu_quota(v2(tmp_path, "/", files)) == quota


def test_v2_nested_groups_have_the_smallest_quota(tmp_path: Path) -> None:
    files = {
        "kube/cpu.max": "800000 100000",
        "kube/pod/cpu.max": "300000 100000",
        "kube/pod/main/cpu.max": "max 100000",
        "kube/other/cpu.max": "100000 100000",  # not this process's
    }
    assert cpu_quota(v2(tmp_path, "/kube/pod/main", files)) == 3.0


def test_v1(tmp_path: Path) -> None:
    assert cpu_quota(v1(tmp_path / "plain", "/", {"": 250_000})) == 2.5
    assert cpu_quota(v1(tmp_path / "none", "/", {"": -1})) is None
    nested = {"": -1, "slurm": 600_000, "slurm/job": 400_000, "slurm/job/step": -1}
    assert cpu_quota(v1(tmp_path / "nested", "/slurm/job/step", nested)) == 4.0


@pytest.mark.parametrize("make", ["v1", "v2"])
def test_the_group_is_mounted_as_the_top(tmp_path: Path, make: str) -> None:
    """Without a cgroup namespace, a container reads the host's path and sees its own group as the top."""
    if make == "v1":
        root = v1(tmp_path, "/docker/abc/inner", {"": 200_000, "inner": -1}, mounted="/docker/abc")
    else:
        files = {"cpu.max": "200000 100000", "inner/cpu.max": "max 100000"}
        root = v2(tmp_path, "/docker/abc/inner", files, mounted="/docker/abc")
    assert cpu_quota(root) == 2.0


def test_a_group_outside_of_the_mount_leaves_the_top(tmp_path: Path) -> None:
    assert cpu_quota(v2(tmp_path / "a", "/../../sibling", {"cpu.max": "100000 100000"})) == 1.0
    outside = v2(tmp_path / "b", "/docker/abcdef", {"cpu.max": "100000 100000"}, mounted="/docker/abc")
    assert cpu_quota(outside) == 1.0


def test_both_versions_and_odd_names(tmp_path: Path) -> None:
    """A hybrid machine limits through v1 while v2 is mounted beside it; names hold colons and spaces."""
    root = v1(tmp_path / "hybrid", "/job", {"job": 300_000})
    with (root / "proc/self/mountinfo").open("a") as mounts:
        mounts.write(V2_MOUNT.format(root="/", point="/sys/fs/cgroup/unified") + "\n")
    assert cpu_quota(root) == 3.0
    odd = v2(tmp_path / "odd", "/pod:a b", {"pod:a b/cpu.max": "100000 100000"}, point="/sys/fs/c groups")
    assert cpu_quota(odd) == 1.0


def test_a_system_without_control_groups(tmp_path: Path) -> None:
    assert cpu_quota(tmp_path) is None
    assert cpu_quota(tree(tmp_path, "0::/", [], {})) is None


@pytest.mark.parametrize(
    ("quota", "cores", "count"),
    [(None, None, 8), (2.5, None, 2), (0.5, None, 1), (64.0, None, 8), (2.0, "0-3", 2), (None, "0-3", 4)],
)
def test_threads_are_bounded_by_the_quota(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, cores: str | None, count: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    monkeypatch.setattr("rft.utils.cores.cpu_quota", lambda: quota)
    assert usable_cores(cores) == threads_for(None, cores) == count
    assert threads_for(5, cores) == 5  # as asked


ELSEWHERE = """
import asyncio, os, pickle, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import torch
from rft.learner.learner import Learner
from rft.rollout.hf import HFEngine
with open(sys.argv[1], "rb") as file:
    learner, engine = pickle.load(file)
torch.set_num_threads(7)
Learner(learner)
print(torch.get_num_threads())
torch.set_num_threads(7)
asyncio.run(HFEngine(engine).start())
print(torch.get_num_threads())
"""


def test_threads_are_counted_on_the_machine_that_runs_the_actor(tiny_folder: Path, tmp_path: Path) -> None:
    """The driver of a cluster may have more cores than the actors' machines, here one."""
    specs = learner_spec(tiny_folder, threads=None), engine_spec(tiny_folder, threads=None)
    (tmp_path / "specs").write_bytes(pickle.dumps(specs))
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path / "specs")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["1", "1"], done.stderr[-3000:]


def test_memory_limits_of_control_groups(tmp_path: Path) -> None:
    """The smallest limit above the process counts, v1 and v2; the machine's RAM bounds all of them."""
    whole = machine_memory(tmp_path / "nothing")
    assert whole == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    assert machine_memory(v2(tmp_path / "one", "/", {"memory.max": str(1 << 30)})) == 1 << 30
    assert machine_memory(v2(tmp_path / "none", "/", {"memory.max": "max"})) == whole
    nested = {"job/memory.max": str(2 << 30), "job/step/memory.max": "max", "other/memory.max": "4096"}
    assert machine_memory(v2(tmp_path / "nested", "/job/step", nested)) == 2 << 30
    unlimited = {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(2**63 - 4096)}
    assert machine_memory(tree(tmp_path / "v1", "9:memory:/", [], unlimited)) == whole
    small = {"sys/fs/cgroup/memory/memory.limit_in_bytes": str(3 << 30)}
    assert machine_memory(tree(tmp_path / "small", "9:memory:/", [], small)) == 3 << 30
