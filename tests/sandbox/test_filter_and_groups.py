"""The seccomp filter by either compiler, and control groups of either version, on fixtures of their files."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rft.sandbox import cgroup, seccomp, zygote

PROBE = """
import ctypes, errno, os, sys
from rft.sandbox import seccomp
from unittest import mock
if sys.argv[1] == "table":
    seccomp._libseccomp = lambda: None
f = seccomp.build_filter(signals=sys.argv[2] == "signals")
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)
seccomp.install(f)
def call(number, *args):
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *(ctypes.c_ulong(a) for a in args))
    return "ok" if result >= 0 else errno.errorcode[ctypes.get_errno()]
column = {"x86_64": 0, "aarch64": 1}[os.uname().machine]
pair = (ctypes.c_int * 8)()
n = {r.call: r.numbers[column] for r in [*seccomp.RULES, *seccomp.SIGNAL_RULES]}
at = ctypes.addressof(pair)
print(f.compiler,
      call(n["socketpair"], 1, 1 | 0o2000000, 0, at), call(n["socketpair"], 1, 2, 0, at),
      call(n["setsockopt"], pair[0], 1, 7, at, 4), call(n["setsockopt"], pair[0], 1, 9, at, 4),
      call(n["semget"], 5, 1, 0o600), call(n["clone3"], 0, 0), call(n["fcntl"], pair[0], 1031, 4096),
      call(n["fcntl"], pair[0], 1, 0), call(n["unshare"], 0), call(n["kill"], os.getpid(), 0),
      call(n["clone"], 0x10000000 | 17, 0, 0, 0, 0), call(n["memfd_create"], at, 0),
      call(n["prlimit64"], 0, 7, 0, at), call(n["prlimit64"], os.getppid(), 7, 0, at),
      call(n["prlimit64"], 1 << 31, 7, 0, at))
"""


@pytest.mark.parametrize("compiler", ["libseccomp", "table"])
@pytest.mark.parametrize("signals", ["signals", "no signals"])
def test_both_compilers_make_the_same_filter(compiler: str, signals: str) -> None:
    if compiler == "libseccomp" and seccomp._libseccomp() is None:
        pytest.skip("libseccomp.so.2 is not installed")
    command = [sys.executable, "-c", PROBE.replace("from unittest import mock\n", ""), compiler, signals]
    done = subprocess.run(command, capture_output=True, text=True)
    name = "libseccomp" if compiler == "libseccomp" else "built-in table"
    want = ["ok", "EPERM", "EPERM", "ok", "EPERM", "ENOSYS", "EPERM", "ok", "EPERM"]
    want += ["ok" if signals == "signals" else "EPERM", "EPERM", "EPERM", "ok", "EPERM", "EPERM"]
    assert done.stdout.split() == [*name.split(), *want], done.stderr


def test_the_table_agrees_with_libseccomp_on_every_number() -> None:
    library = seccomp._libseccomp()
    if library is None:
        pytest.skip("libseccomp.so.2 is not installed")
    column, _ = seccomp._ARCHITECTURES[os.uname().machine]
    for rule in [*seccomp.RULES, *seccomp.SIGNAL_RULES]:
        known = library.seccomp_syscall_resolve_name(rule.call.encode())
        if known != -1:
            assert known == rule.numbers[column], rule.call
        assert rule.reason


def test_the_table_agrees_with_libseccomp_on_the_other_architecture() -> None:
    library = seccomp._libseccomp()
    if library is None:
        pytest.skip("libseccomp.so.2 is not installed")
    library.seccomp_syscall_resolve_name_arch.argtypes = [ctypes.c_uint32, ctypes.c_char_p]
    for column, architecture in ((0, 0xC000003E), (1, 0xC00000B7)):
        for rule in [*seccomp.RULES, *seccomp.SIGNAL_RULES]:
            known = library.seccomp_syscall_resolve_name_arch(architecture, rule.call.encode())
            if known >= 0:
                assert known == rule.numbers[column], (rule.call, hex(architecture))


def _fixture(tmp_path: Path, groups: str, mounts: str) -> str:
    proc = tmp_path / "proc" / "self"
    proc.mkdir(parents=True)
    (proc / "cgroup").write_text(groups)
    (proc / "mountinfo").write_text(mounts)
    return str(tmp_path / "proc")


def test_version_1_is_found(tmp_path: Path) -> None:
    folder = tmp_path / "sys/fs/cgroup/memory/job/7"
    folder.mkdir(parents=True)
    proc = _fixture(
        tmp_path,
        "4:memory:/job/7\n1:cpu:/\n0::/\n",
        "32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n"
        "33 31 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
    )
    assert cgroup.find_hierarchy(proc, str(tmp_path)) == cgroup.Hierarchy(1, str(folder))


def test_version_1_in_a_container_that_sees_its_own_part(tmp_path: Path) -> None:
    folder = tmp_path / "sys/fs/cgroup/memory"
    folder.mkdir(parents=True)
    proc = _fixture(
        tmp_path,
        "4:memory:/docker/abc\n",
        "33 31 0:30 /docker/abc /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n",
    )
    assert cgroup.find_hierarchy(proc, str(tmp_path)) == cgroup.Hierarchy(1, str(folder))


def _version_2(tmp_path: Path, controllers: str = "cpu memory pids\n") -> tuple[str, Path]:
    folder = tmp_path / "sys/fs/cgroup/user.slice"
    folder.mkdir(parents=True)
    (folder / "cgroup.controllers").write_text(controllers)
    proc = _fixture(tmp_path, "0::/user.slice\n", "33 31 0:30 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
    return proc, folder


def test_version_2_is_found_where_it_has_the_memory_controller(tmp_path: Path) -> None:
    proc, folder = _version_2(tmp_path)
    assert cgroup.find_hierarchy(proc, str(tmp_path)) == cgroup.Hierarchy(2, str(folder))
    (folder / "cgroup.controllers").write_text("cpu\n")
    assert cgroup.find_hierarchy(proc, str(tmp_path)) is None


def test_a_group_of_version_2_on_its_files(tmp_path: Path) -> None:
    for name in ("memory.max", "memory.swap.max", "cgroup.procs"):
        (tmp_path / name).write_text("")
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 1\noom_kill 1\n")
    fd = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        group = cgroup.Group(2, "g", fd)
        group.limit(1 << 27)
        assert (tmp_path / "memory.max").read_text() == str(1 << 27)
        assert (tmp_path / "memory.swap.max").read_text() == "0"
        cgroup.enter(fd)
        assert (tmp_path / "cgroup.procs").read_text() == "0"
        assert cgroup.kills(fd) == 1
        events.write_text("low 0\noom 2\noom_kill 3\n")
        assert cgroup.kills(fd) == 3
    finally:
        os.close(fd)


def test_groups_without_the_controller_files_are_given_up(tmp_path: Path) -> None:
    """As where version 2 is mounted but its memory controller is not delegated."""
    (tmp_path / "cgroup.subtree_control").write_text("")
    assert cgroup.Groups.open(os.getpid(), cgroup.Hierarchy(2, str(tmp_path))) is None


def test_leftover_groups_of_dead_owners_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen(["true"])
    dead.wait()
    (tmp_path / f"{cgroup.PREFIX}{dead.pid}-aa").mkdir()
    (tmp_path / f"{cgroup.PREFIX}{os.getpid()}-bb").mkdir()
    cgroup._remove_leftovers(str(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == [f"{cgroup.PREFIX}{os.getpid()}-bb"]


def test_a_process_whose_name_is_not_utf_8_is_counted() -> None:
    code = (
        "import ctypes, sys\n"
        "ctypes.CDLL(None).prctl(15, b'\\xff\\xfe', 0, 0, 0)\n"  # PR_SET_NAME
        "held = bytearray(b'x' * (64 << 20))\n"
        "print('ready', flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        memory, _ = zygote.usage_of([process.pid], counted=True)
        process.communicate(b"")
    assert memory > 64 << 20
