"""The lock of a run's folder, between real processes."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from rft.errors import ConfigError
from rft.utils import run_lock as runlock
from rft.utils.run_lock import LOCK_FILE, RunLock

HOLDER = """
import errno, fcntl, os, sys, time
from pathlib import Path
from rft.utils.run_lock import RunLock
if "no-locks" in sys.argv:
    def refuse(*args): raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    fcntl.lockf = refuse
lock = RunLock(Path(sys.argv[1]))
if "fork" in sys.argv and os.fork() == 0:
    print("child", os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
print("held", flush=True)
time.sleep(60)
"""


@contextmanager
def holder(folder: Path, *more: str) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the lock."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder), *more], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        while "held" not in process.stdout.readline():
            assert process.poll() is None
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    monkeypatch.setattr(runlock, "RENEW_S", 0.1)
    monkeypatch.setattr(runlock, "GONE_S", 1.0)


def test_a_second_process_is_told_who_trains_the_run(tmp_path: Path) -> None:
    with holder(tmp_path / "run") as other:
        with pytest.raises(ConfigError) as refused:
            RunLock(tmp_path / "run")
        pattern = (
            rf"already being trained, by process {other.pid} on \S+ since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d"
        )
        assert re.search(pattern, str(refused.value)) and str(tmp_path / "run") in str(refused.value)


def test_death_frees_it_whatever_the_children_do(tmp_path: Path) -> None:
    """A forked child lives on with all descriptors, and holds nothing."""
    with holder(tmp_path / "run", "fork") as other:
        children = Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split()
        try:
            other.send_signal(signal.SIGKILL)
            other.wait()
            lock = RunLock(tmp_path / "run")
            assert lock.note == ""
            lock.release()
        finally:
            for child in children:
                os.kill(int(child), signal.SIGKILL)
    assert len(children) == 1


def test_a_program_that_is_started_does_not_hold_it(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "run")
    shown = subprocess.run(["ls", "-l", "/proc/self/fd"], capture_output=True, text=True, close_fds=False)
    assert LOCK_FILE not in shown.stdout
    lock.release()


def test_it_leaves_no_folder_where_nothing_was_written(tmp_path: Path) -> None:
    lock = RunLock(tmp_path / "runs" / "run")
    assert (tmp_path / "runs" / "run" / LOCK_FILE).exists()
    lock.release()
    assert list(tmp_path.iterdir()) == []
    lock = RunLock(tmp_path / "runs" / "run")
    (tmp_path / "runs" / "run" / "config.yaml").touch()
    lock.release()
    assert [p.name for p in (tmp_path / "runs" / "run").iterdir()] == ["config.yaml"]


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_living_owner_is_seen(tmp_path: Path) -> None:
    with holder(tmp_path / "run", "no-locks") as other:
        with pytest.raises(ConfigError, match=f"by process {other.pid} on "):
            RunLock(tmp_path / "run")
        other.kill()
        other.wait()
        lock = RunLock(tmp_path / "run")  # the file is there, its owner is not
    assert "on a file system without locks (No locks available)" in lock.note
    assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()
    lock.release()


@pytest.mark.usefixtures("no_locks")
@pytest.mark.parametrize("alive", [True, False])
def test_without_locks_an_owner_elsewhere_lives_while_it_renews(tmp_path: Path, alive: bool) -> None:
    file = tmp_path / LOCK_FILE
    owner = {
        "pid": os.getpid(),
        "host": "elsewhere",
        "since": "yesterday",
        "started": 1,
        "place": "elsewhere",
    }
    file.write_text(json.dumps(owner))
    ended = threading.Event()

    def renew() -> None:
        while not ended.wait(0.1):
            os.utime(file)

    thread = threading.Thread(target=renew)
    if alive:
        thread.start()
        try:
            with pytest.raises(ConfigError, match=r"by process \d+ on elsewhere since yesterday"):
                RunLock(tmp_path)
        finally:
            ended.set()
            thread.join()
    else:
        lock = RunLock(tmp_path)
        seen = file.stat().st_mtime_ns
        deadline = time.monotonic() + 20
        while file.stat().st_mtime_ns == seen and time.monotonic() < deadline:
            time.sleep(0.05)
        assert file.stat().st_mtime_ns > seen, "the owner does not renew it"
        lock.release()


@pytest.mark.usefixtures("no_locks")
def test_without_locks_one_of_two_starts_at_a_time_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one writes its name while this one waits."""
    real = time.sleep

    def sleep(seconds: float) -> None:
        owner = json.loads((tmp_path / LOCK_FILE).read_text())
        (tmp_path / LOCK_FILE).write_text(json.dumps({**owner, "pid": owner["pid"] + 1}))
        real(0)

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(ConfigError, match="already being trained"):
        RunLock(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(
        ConfigError, match=r"output_dir: .*/file/run cannot be written \(Not a directory\): write"
    ):
        RunLock(tmp_path / "file" / "run")
