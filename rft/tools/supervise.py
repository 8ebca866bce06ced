"""`rft train --restarts N`: a parent process that restarts the run after a machine fault.

The run is a child process in a separate session, because a dying Ray head also kills its driver. It is
restarted where `--resume auto` would resume: after death by a signal, and after the exit code of a fault. A
user error, a guard's stop and a requested stop are final. Stop signals are forwarded.
"""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path

from rft.utils.process import die_with_parent
from rft.utils.python import SAFE_PYTHON
from rft.utils.signals import STOPPED, describe, print_stop, to_catch

COMMAND = (*SAFE_PYTHON, "-m", "rft.cli", "train")
FINAL = (0, 1, 2, STOPPED)
PAUSE_S = 5.0  # before a restart, times the number of consecutive restarts


def supervise(arguments: Sequence[str], run_dir: Path, restarts: int, resume: str = "auto") -> int:
    """Run `rft train ARGUMENTS` until it ends for good; return its exit code.

    restarts: allowed number of consecutive restarts without a new checkpoint. resume: as `--resume`, for the
    first start; a restart resumes from the checkpoints of this command.
    """
    return _Supervisor(list(arguments), run_dir, restarts, resume).run()


class _Supervisor:
    def __init__(self, arguments: list[str], run_dir: Path, restarts: int, resume: str) -> None:
        self.arguments, self.run_dir, self.restarts, self.resume = arguments, run_dir, restarts, resume
        self.foreign = (run_dir / "config.yaml").exists()  # an existing run that this command did not start
        self.before = self._checkpoints()  # checkpoints that existed at the first start
        self.signals = to_catch()
        self.stopping = False

    def run(self) -> int:
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {*self.signals, signal.SIGCHLD})
        try:
            return self._run()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _run(self) -> int:
        failures, newest = 0, self.before
        while True:
            code = self._wait(self._start())
            if code in FINAL or self.stopping:
                return code if code >= 0 else 128 - code
            reached = self._checkpoints()
            failures, newest = (1 if reached - newest else failures + 1), newest | reached
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
            if failures > self.restarts:
                print_stop(f"{how}; {self.restarts} restarts brought no new checkpoint: giving up")
                return code if code >= 0 else 128 - code
            print_stop(f"the run ended ({how}); restart {failures} of {self.restarts}")
            info = signal.sigtimedwait(self.signals, PAUSE_S * failures)
            if info is not None:
                print_stop(
                    f"stopped before the restart ({describe(info)}); the same command resumes from the last "
                    "checkpoint"
                )
                return STOPPED

    def _start(self) -> subprocess.Popen[bytes]:
        """Start the run with stop signals blocked, so that none is lost before it installs its handlers.

        A separate session: Ctrl-C reaches the run only once, forwarded from here.
        """
        return subprocess.Popen(
            [*COMMAND, *self.arguments, "--resume", self._resume()],
            start_new_session=True,
            preexec_fn=_prepare_child,
        )

    def _resume(self) -> str:
        """Return `--resume` for the next start.

        A path is used until this command has saved a newer checkpoint; `never` until the run folder exists.
        """
        if self.resume == "never":
            return "never" if self.foreign or not (self.run_dir / "config.yaml").exists() else "auto"
        return self.resume if self._checkpoints() <= self.before else "auto"

    def _wait(self, child: subprocess.Popen[bytes]) -> int:
        """Return the child's exit code; forward stop signals while waiting."""
        while (code := child.poll()) is None:
            info = signal.sigwaitinfo({*self.signals, signal.SIGCHLD})
            if info.si_signo != signal.SIGCHLD:
                self.stopping = True
                print_stop(f"{describe(info)}: forwarded to the run (process {child.pid})")
                child.send_signal(info.si_signo)
        return code

    def _checkpoints(self) -> set[str]:
        """Return the names of the run's checkpoints."""
        folder = self.run_dir / "checkpoints"
        return {name for name in os.listdir(folder) if name.startswith("step-")} if folder.is_dir() else set()


def _prepare_child() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
    die_with_parent()
