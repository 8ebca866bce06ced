"""`rft train --restarts N`: a parent that starts the run again where a fault of the machine ended it.

The run is a child process of its own, since a dead Ray head takes its driver along. What starts again is
what `--resume auto` would resume: ends by a signal, and the exit code of a fault. A mistake of the user, a
guard's stop and a requested stop are final.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from rft.utils.process import PR_SET_PDEATHSIG, prctl

FINAL = (0, 1, 2, 75)
PAUSE_S = 5.0  # before a restart, times the restarts in a row


def supervise(arguments: Sequence[str], run_dir: Path, restarts: int) -> int:
    """Run `rft train ARGUMENTS` until it ends for good; returns its exit code.

    restarts: how many in a row without a new checkpoint are allowed.
    """
    failures, newest = 0, _newest(run_dir)
    stopping: list[int] = []
    child: subprocess.Popen[bytes] | None = None

    def forward(number: int, _: FrameType | None) -> None:
        stopping.append(number)
        if child is not None and child.poll() is None:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    while True:
        # A session of its own: Ctrl-C reaches the child once, through `forward`.
        child = subprocess.Popen(
            [sys.executable, "-m", "rft.cli", "train", *arguments],
            start_new_session=True,
            preexec_fn=lambda: prctl(PR_SET_PDEATHSIG, signal.SIGKILL),
        )
        code = child.wait()
        if code in FINAL or stopping:
            return code if code >= 0 else 128 - code
        reached = _newest(run_dir)
        failures, newest = (1 if reached != newest else failures + 1), reached
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if failures > restarts:
            print(f"rft: {how}; {restarts} restarts brought no new checkpoint: giving up", file=sys.stderr)
            return code if code >= 0 else 128 - code
        print(f"rft: the run ended ({how}); restart {failures} of {restarts}", file=sys.stderr, flush=True)
        _wait(PAUSE_S * failures, stopping)
        if stopping:
            return code if code >= 0 else 128 - code


def _newest(run_dir: Path) -> tuple[str, ...]:
    """The names of the run's checkpoints: they change with every new one."""
    folder = run_dir / "checkpoints"
    return tuple(sorted(os.listdir(folder))) if folder.is_dir() else ()


def _wait(seconds: float, stopping: Sequence[int]) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end and not stopping:
        time.sleep(0.1)
