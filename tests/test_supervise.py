"""`--restarts`: what is started again, from where, and how signals go through. The run is a stand-in."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rft.tools import supervise
from tests.integration.conftest import ROOT

# Appends its arguments, then does what the line of `plan` with its number says: a checkpoint's name or "",
# and an exit code (negative: a signal).
RUN = """
import json, os, signal, sys
from pathlib import Path
home, run = Path(sys.argv[1]), Path(sys.argv[2])
starts = home / "starts"
with starts.open("a") as file: file.write(json.dumps(sys.argv[3:]) + "\\n")
number = len(starts.read_text().splitlines()) - 1
name, code = json.loads((home / "plan").read_text())[number]
if name != "nothing":
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").touch()
if name not in ("", "nothing"): (run / "checkpoints" / name).mkdir()
if code < 0: os.kill(os.getpid(), -code)
sys.exit(code)
"""


class Stand:
    """A stand-in run in `home`/run."""

    def __init__(self, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.home, self.run = home, home / "run"
        (home / "run.py").write_text(RUN)
        command = (sys.executable, str(home / "run.py"), str(home), str(self.run))
        monkeypatch.setattr(supervise, "COMMAND", command)
        monkeypatch.setattr(supervise, "PAUSE_S", 0.0)

    def supervise(self, plan: list[tuple[str, int]], resume: str, restarts: int = 1) -> int:
        (self.home / "plan").write_text(json.dumps(plan))
        return supervise.supervise(["c.yaml"], self.run, restarts, resume)

    def resumes(self) -> list[str]:
        """The value of --resume, start by start."""
        return [json.loads(line)[-1] for line in (self.home / "starts").read_text().splitlines()]

    def earlier(self, *names: str) -> None:
        (self.run / "checkpoints").mkdir(parents=True)
        (self.run / "config.yaml").touch()
        for name in names:
            (self.run / "checkpoints" / name).mkdir()


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    return Stand(tmp_path, monkeypatch)


def test_a_path_holds_until_there_is_something_newer(stand: Stand) -> None:
    """Also where the run's folder has other checkpoints, which `auto` would take."""
    stand.earlier("step-00000020", "step-00000040")
    plan = [("", 76), ("step-00000030", 76), ("", 76), ("step-00000050", 0)]
    assert stand.supervise(plan, "run/checkpoints/step-00000020", restarts=2) == 0
    assert stand.resumes() == ["run/checkpoints/step-00000020"] * 2 + ["auto"] * 2


def test_a_path_without_progress_ends(stand: Stand) -> None:
    stand.earlier("step-00000020")
    assert stand.supervise([("", 76)] * 9, "elsewhere/step-00000020", restarts=2) == 76
    assert stand.resumes() == ["elsewhere/step-00000020"] * 3


def test_never_restarts_the_run_that_it_began(stand: Stand) -> None:
    assert stand.supervise([("nothing", 76), ("", -9), ("", 0)], "never", restarts=3) == 0
    assert stand.resumes() == ["never", "never", "auto"]


def test_never_does_not_go_on_with_an_earlier_run(stand: Stand) -> None:
    """Killed before it could refuse, it is started with `never` again, and refuses."""
    stand.earlier("step-00000020")
    assert stand.supervise([("", -9), ("", 2)], "never") == 2
    assert stand.resumes() == ["never", "never"]


def test_auto_counts_failures_from_the_last_checkpoint(stand: Stand) -> None:
    plan = [("", 76), ("not-a-checkpoint", 76), ("step-00000002", 76), ("", 76), ("", -6)]
    assert stand.supervise(plan, "auto", restarts=2) == 128 + 6
    assert stand.resumes() == ["auto"] * 5


SUPERVISOR = """
import signal, sys
from pathlib import Path
from rft.tools import supervise
supervise.COMMAND = (sys.executable, sys.argv[1] + "/run.py")
sys.exit(supervise.supervise([], Path(sys.argv[1]) / "run", int(sys.argv[2])))
"""
WAITS = """
import signal, sys, time
from pathlib import Path
from rft.utils.signals import STOP_SIGNALS
home = Path(__file__).parent
blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
assert blocked == set(STOP_SIGNALS) - ({signal.SIGHUP} if "nohup" in str(home) else set()), blocked
(home / "ready").touch()
got = signal.sigtimedwait(STOP_SIGNALS, 20)
(home / "got").write_text(got.si_signo.__str__() if got else "nothing")
sys.exit(75 if got else 3)
"""


def supervisor(home: Path, run: str, restarts: int = 1, *prefix: str) -> subprocess.Popen[str]:
    (home / "run.py").write_text(run)
    command = [*prefix, sys.executable, "-c", SUPERVISOR, str(home), str(restarts)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for(file: Path) -> None:
    deadline = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < deadline, file
        time.sleep(0.02)


@pytest.mark.parametrize("name", ["TERM", "INT", "HUP", "USR1", "USR2"])
@pytest.mark.parametrize("group", [False, True])
def test_each_signal_reaches_the_run(tmp_path: Path, name: str, group: bool) -> None:
    number = signal.Signals[f"SIG{name}"]
    process = supervisor(tmp_path, WAITS)
    wait_for(tmp_path / "ready")
    (os.killpg if group else os.kill)(process.pid, number)
    told = process.communicate(timeout=30)[1]
    assert process.returncode == 75, told
    assert (tmp_path / "got").read_text() == str(int(number))
    assert f"SIG{name} from process {os.getpid()}" in told and "forwarded to the run" in told


def test_nohup_reaches_the_run(tmp_path: Path) -> None:
    home = tmp_path / "nohup"
    home.mkdir()
    process = supervisor(home, WAITS, 1, "nohup")
    wait_for(home / "ready")
    process.send_signal(signal.SIGHUP)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 75


def test_a_signal_between_two_starts_ends_with_the_code_of_a_stop(tmp_path: Path) -> None:
    process = supervisor(tmp_path, "import sys; sys.exit(76)")
    assert process.stderr is not None
    while "restart 1 of 1" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGUSR1)
    told = process.communicate(timeout=4)[1]  # the pause is longer
    assert process.returncode == 75 and "SIGUSR1" in told and "stopped before the restart" in told
