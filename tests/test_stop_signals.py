"""The thread that hears stop signals, in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from rft import checkpoint
from rft.config.metrics import TrackingConfig
from rft.errors import RunStopped
from rft.metrics import Progress, RunLog
from rft.metrics.log import read_jsonl
from rft.run_dir import RunFolder
from rft.run_training import Ending
from rft.utils import signals
from rft.utils.signals import STOP_SIGNALS, StopSignals
from tests.integration.conftest import ROOT

HEAD = """
import hashlib, os, signal, subprocess, sys, time
from rft.utils import signals
from rft.utils.signals import StopSignals
def say(*text): print(*text, flush=True)
def stuck():
    "No Python code runs in the main thread: a handler of Python's would wait."
    hashlib.pbkdf2_hmac("sha256", b"a", b"b", 10**9)
"""


def program(text: str, *prefix: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*prefix, sys.executable, "-c", HEAD + text],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    while process.stdout.readline() != "ready\n":
        assert process.poll() is None, "it ended before it was ready"
    return process


def ended(process: subprocess.Popen[str], seconds: float = 20) -> tuple[int, str]:
    assert process.stdout is not None
    try:
        process.wait(seconds)
    finally:
        process.kill()
    return process.wait(), process.stdout.read()  # `communicate` loses what was read ahead


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_before_the_run_begins_any_of_them_ends_it_at_once(number: signal.Signals) -> None:
    """Also where the main thread is in the middle of an import or of Ray's start."""
    process = program("with StopSignals():\n    say('ready'); stuck()")
    process.send_signal(number)
    code, told = ended(process)
    assert code == 75
    assert f"stopped before the run began ({number.name} from process {os.getpid()}" in told
    assert "nothing was saved" in told


def test_children_end_with_it() -> None:
    process = program(
        "with StopSignals():\n"
        "    child = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
        "    say('ready'); say(child.pid); stuck()"
    )
    assert process.stdout is not None
    child = int(process.stdout.readline())
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 75
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


RUNNING = """
signals.SAME_REQUEST_S = {same}
with StopSignals() as caught:
    def request(reason):
        say("request", reason.split()[0])
        return {grace}
    def at_once(reason):
        say("at once:", reason)
    caught.handle(request=request, at_once=at_once)
    say("ready")
    {body}
"""


def test_signals_within_some_seconds_are_one_request() -> None:
    process = program(RUNNING.format(same=60, grace=60, body="time.sleep(2); say('tidy', caught.reason)"))
    for number in STOP_SIGNALS:
        process.send_signal(number)
    code, told = ended(process)
    assert code == 0 and told.count("request") == 1 and "tidy SIG" in told and "at once" not in told


def test_a_thread_that_was_started_before_may_receive_it_while_ray_runs() -> None:
    """Ray's own handler of SIGTERM would abort the process three seconds later."""
    process = program(
        """
import threading
from rft.utils.ray_cluster import ray_cluster
early = threading.Thread(target=time.sleep, args=(90,), daemon=True)
early.start()
say("ready")
with StopSignals() as stops:
    stops.handle(request=lambda reason: 60.0)
    with ray_cluster(None, 0.1):
        signal.pthread_kill(early.ident, signal.SIGTERM)
        assert stops.asked(within=20)
        time.sleep(4)
    say("stopped by", stops.reason)
"""
    )
    code, told = ended(process, 100)
    assert code == 0 and told.endswith("stopped by SIGTERM\n"), told


def test_a_later_signal_stops_at_once() -> None:
    process = program(RUNNING.format(same=0.2, grace=60, body="stuck()"))
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGUSR2)
    code, told = ended(process)
    assert code == 75 and "request SIGTERM" in told and "; requested again by SIGUSR2 from process" in told


def test_past_the_grace_it_stops_at_once() -> None:
    process = program(RUNNING.format(same=60, grace=0.5, body="stuck()"))
    process.send_signal(signal.SIGHUP)
    code, told = ended(process)
    assert code == 75 and "at once: SIGHUP" in told and "train.stop_grace_s" in told


COMMAND = """
import asyncio
from rft.errors import RunStopped
from rft.utils.deadlines import stop_event, unless_stopped

async def work(seconds):
    stop = stop_event(stops)
    seconds and say('ready')
    await unless_stopped(asyncio.sleep(seconds), stop)

with StopSignals() as stops:
    try:
        asyncio.run(work({seconds}))
        say('ready')
        say(stops.asked(20))
        time.sleep(0.2)
    except RunStopped:
        say('stopped')
"""


@pytest.mark.parametrize(("seconds", "told"), [(20, "stopped\n"), (0, "True\n")])
def test_a_command_is_stopped_by_an_event(seconds: int, told: str) -> None:
    """After its event loop has ended, a signal does not end the thread that hears them."""
    process = program(COMMAND.format(seconds=seconds))
    process.send_signal(signal.SIGTERM)
    assert ended(process) == (0, told)


def test_a_record_that_hangs_does_not_prevent_the_end() -> None:
    process = program(
        "signals.RECORD_S = 0.5\n"
        "with StopSignals() as caught:\n"
        "    caught.handle(at_once=lambda reason: time.sleep(1000))\n"
        "    say('ready'); stuck()"
    )
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 75


def test_nohup_stays_ignored() -> None:
    process = program(RUNNING.format(same=60, grace=60, body="time.sleep(1); say('lived')"), "nohup")
    process.send_signal(signal.SIGHUP)
    code, told = ended(process)
    assert code == 0 and "lived" in told and "request" not in told


def test_processes_that_are_started_ignore_them_until_they_ask_for_the_default() -> None:
    process = program(
        "with StopSignals() as caught:\n"
        "    caught.handle(request=lambda reason: 60)\n"
        "    deaf = subprocess.Popen(['sleep', '60'])\n"
        "    text = 'import time; from rft.utils.signals import restore_defaults as r; r(); time.sleep(60)'\n"
        "    plain = subprocess.Popen([sys.executable, '-c', text])\n"
        "    time.sleep(1.5)\n"
        "    for child in (deaf, plain): child.send_signal(signal.SIGUSR1)\n"
        "    plain.wait(20)\n"
        "    say('ready'); say(deaf.poll(), plain.returncode); deaf.kill()"
    )
    code, told = ended(process)
    assert code == 0 and f"None {-signal.SIGUSR1}" in told


def test_the_block_leaves_the_mask_as_it_was() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    with StopSignals() as caught:
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) >= set(STOP_SIGNALS)
        caught.handle(request=lambda reason: 60)
        os.kill(os.getpid(), signal.SIGTERM)
        assert any(caught.asked(within=0.1) for _ in range(50))  # another thread may get it
        assert caught.reason == "SIGTERM"
        os.kill(os.getpid(), signal.SIGTERM)  # obeyed already; it does not end this process afterwards
    assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


def test_a_sender_in_another_container_is_no_process_here(tmp_path: Path) -> None:
    class Info:
        si_signo, si_pid = signal.SIGINT, 0

    assert signals.describe(Info()) == "SIGINT"  # type: ignore[arg-type]


def test_a_run_that_is_verified_ends_with_whoever_verifies_it(tmp_path: Path) -> None:
    """SIGTERM to `rft verify-resume` alone: its run does not go on without it."""
    process = program(
        "from rft.tools import verify\n"
        f"verify._train = lambda arguments: ['sh', '-c', 'echo $$ > {tmp_path}/pid; exec sleep 60']\n"
        "say('ready'); verify._run_to_end([])"
    )
    deadline = time.monotonic() + 20
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == -signal.SIGTERM
    child = int((tmp_path / "pid").read_text())
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the run goes on"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("logged", "saved", "stopped", "told"),
    [
        (-1, None, RunStopped(None), "stopped before the first step and nothing was saved: the same command"),
        (2, 2, RunStopped(None), "stopped at step 2 with a checkpoint saved; the same command"),
        (3, 2, RunStopped(3), "stopped at step 3 and the checkpoint of step 2 is complete; the same command"),
        (0, None, RunStopped(None, "warm start"), "before the first step of the warm start and nothing"),
    ],
)
def test_a_stop_says_what_stands(
    tmp_path: Path, logged: int, saved: int | None, stopped: RunStopped, told: str
) -> None:
    """Also in the export, or while a resumed run starts: then it has steps without having made any."""
    folder = RunFolder(tmp_path, None)
    if saved is not None:
        checkpoint.save(folder.checkpoints, saved, lambda into: (into / "a").touch(), keep=1, meta={})
    log = RunLog(tmp_path, 9, TrackingConfig(trackers=[]))
    for step in range(logged + 1):
        log.log(step, {})
    notes: list[str] = []
    with Progress(9, "run", display="off") as progress:
        progress.note = notes.append  # type: ignore[method-assign]
        assert Ending(folder, log, progress, StopSignals(), None).stopped(stopped) == 75
    assert told in notes[0]
    event = read_jsonl(tmp_path / "events.jsonl")[-1]
    assert event["kind"] == "run/stopped" and event["saved"] == saved
    log.close()
