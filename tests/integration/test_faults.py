"""The fault table: one live run with real processes, hurt again and again. The tests depend on each other's
order: every one leaves a run behind that makes steps."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rft import checkpoint
from tests.integration.conftest import processes_of
from tests.integration.live import Live, is_gone

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture(scope="module", params=["hf", "vllm"])
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp(f"live-{request.param}")
    disk = folder / "runs"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(disk)]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    run = Live(folder, request.param)
    run.start()
    try:
        run.wait("the first checkpoint", lambda: run.events("checkpoint/saved"), 240)
        yield run
        print(f"\nseconds to detection ({request.param}): {run.measured}")
    finally:
        run.clean_up()
        if mounted:
            subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_engine_process_killed(live: Live) -> None:
    """vLLM: its engine core; hf: the actor itself. Rebuilt, pushed to, asked again."""
    name = "ray::Replica" if live.engine == "hf" else "VLLM::EngineCore"
    lost = live.hurt("engine process killed", live.child(name).kill, "engine/lost", 15)
    assert "rollout replica" in lost["reason"] or "pushing version" in lost["reason"]
    rebuilt = live.wait("a new engine", lambda: live.events("engine/rebuilt"), 120)[-1]
    assert rebuilt["version"] >= 0
    live.makes_steps()


def test_whole_rollout_actor_killed(live: Live) -> None:
    known = len(live.events("engine/rebuilt"))
    live.hurt("rollout actor killed", live.child("ray::Replica").kill, "engine/lost", 15)
    live.wait("a new engine", lambda: live.events("engine/rebuilt")[known:], 120)
    live.makes_steps()


def test_engine_frozen(live: Live) -> None:
    """SIGSTOP: no sign of life. The frozen process is killed, not left behind."""
    name = "ray::Replica" if live.engine == "hf" else "VLLM::EngineCore"
    victim, known = live.child(name), len(live.events("engine/rebuilt"))
    live.hurt("engine frozen", victim.suspend, "engine/lost", 60)
    live.wait("a new engine", lambda: live.events("engine/rebuilt")[known:], 120)
    live.wait("the end of the frozen process", lambda: is_gone(victim), 10)
    live.makes_steps()


def test_reward_worker_hangs(live: Live) -> None:
    told = live.hurt("reward worker hung", (live.folder / "hang").touch, "fault/reward", 30)
    assert told["what"].startswith("so far 1 exceeded their time and were killed")
    live.makes_steps()


def test_reward_worker_killed(live: Live) -> None:
    live.hurt("reward worker killed", live.child("rft.rewards.worker").kill, "fault/reward", 30)
    live.makes_steps()


def test_disk_full(live: Live) -> None:
    """Training goes on without a new checkpoint, and without losing a line of its logs."""
    filler = live.run.parent / "filler"
    if os.statvfs(filler.parent).f_blocks * os.statvfs(filler.parent).f_frsize > 2**30:
        pytest.skip("this user may not mount a small disk here")
    last = live.events("checkpoint/saved")[-1]["step"]
    _fill(filler)
    live.wait(
        "a told failure", lambda: "was not written" in live.stderr() or "not be stored" in live.stderr(), 90
    )
    filler.unlink()
    saved = live.wait(
        "a checkpoint again", lambda: [e for e in live.events("checkpoint/saved") if e["step"] > last], 90
    )
    failed = live.events("fault/checkpoint")
    assert failed and "training continues" in failed[0]["action"] and "MiB free" in failed[0]["what"]
    assert failed[0]["step"] <= saved[-1]["step"]


def test_learner_killed(live: Live) -> None:
    """The run ends with the exit code of a fault; the parent starts it again from the last checkpoint."""
    told = live.hurt("learner killed", live.child("ray::LearnerActor").kill, "fault/learner", 30)
    assert "the learner died" in told["what"]
    live.resumes()


def test_controller_killed(live: Live) -> None:
    live.hurt("controller killed", live.driver().kill, "run/opened", 120)
    live.resumes()


def test_ray_head_killed(live: Live) -> None:
    known = len(live.events("run/opened"))
    told = live.hurt("Ray head killed", live.child("gcs_server").kill, "fault/ray", 30)
    assert told["part"] == "gcs_server"
    live.wait("a restart", lambda: live.events("run/opened")[known:], 120)
    live.resumes()


def test_newest_checkpoint_corrupted(live: Live) -> None:
    """A bit flips in the newest checkpoint and the run dies: it goes on from the one before, and says so."""
    live.wait("two checkpoints", lambda: len(list((live.run / "checkpoints").glob("step-*"))) > 1)
    process = live.driver()
    process.suspend()  # so that no newer one is begun
    live.wait("the one in progress", lambda: not list((live.run / "checkpoints").glob(".writing-*")))
    newest = sorted((live.run / "checkpoints").glob("step-*"))[-1]
    victim = next(newest.rglob("*.safetensors"))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(data)
    live.hurt("checkpoint corrupted", process.kill, "run/opened", 120)
    live.resumes()
    resumed_at = live.events("run/opened")[-1]["resumed_at"]
    assert resumed_at < int(newest.name.removeprefix("step-"))
    assert "checkpoint skipped" in live.stderr() and newest.name in live.stderr()


def test_sigterm_saves_within_the_grace_and_leaves_no_process(live: Live) -> None:
    live.makes_steps()
    code, seconds = live.terminate()
    live.measured["SIGTERM"] = round(seconds, 2)
    assert code == 75 and seconds < 30
    found = checkpoint.latest(live.run / "checkpoints")
    assert found is not None and found.step == live.step()
    assert processes_of(live.marker) == []


def test_nothing_was_lost_or_trained_twice(live: Live) -> None:
    """Over all deaths and resumes."""
    live.accounts_for_every_prompt()


@pytest.mark.parametrize("engine", ["hf", "vllm"])
def test_no_process_of_a_killed_run_outlives_it(tmp_path: Path, engine: str) -> None:
    """Nobody is there to clean up after a SIGKILL: its processes have to go by themselves."""
    run = Live(tmp_path, engine)
    run.start(rollout__replicas=1)
    try:
        run.wait("a step", lambda: run.run.exists() and run.step() > 0, 180)
        assert run.process is not None
        run.process.send_signal(signal.SIGKILL)
        run.process.wait()
        _gone(run)
    finally:
        run.clean_up()


def _fill(file: Path) -> None:
    """Write until the disk is full."""
    descriptor = os.open(file, os.O_WRONLY | os.O_CREAT)
    try:
        for size in (65536, 1):
            while os.write(descriptor, b"x" * size) == size:
                continue
    except OSError as error:
        assert error.errno == errno.ENOSPC
    finally:
        os.close(descriptor)


def _gone(run: Live, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while processes_of(run.marker) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert processes_of(run.marker) == []
