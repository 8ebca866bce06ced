"""`rft bench`: run the benchmarks of a checkout, part by part, and write their results.

Each script is a separate process that writes its results file as it runs. Finished scripts are recorded next
to the results: after an interruption or a failure, the same call continues with the missing scripts.
"""

from __future__ import annotations

import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft.errors import ConfigError
from rft.utils.cores import usable_cores
from rft.utils.files import write_text_atomic
from rft.utils.process import kill_tree

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
STOPPED = 124  # exit code of a script stopped at twice its minutes, as of timeout(1)


@dataclass(frozen=True)
class Script:
    """A file of benchmarks/ with its arguments.

    minutes: expected time when all parts run on two cores; the script is stopped at twice that.
    brief: extra arguments in a run of all parts. peers: the script can also run the peers' code (`--peers`),
    except in a brief run of rft only. needs_peers: the script only compares with peers. alone: the script
    runs only if its part is named.
    """

    name: str
    arguments: tuple[str, ...] = ()
    minutes: float = 0.0
    brief: tuple[str, ...] = ()
    peers: bool = False
    needs_peers: bool = False
    alone: bool = False

    def command(self, brief: bool, peers: bool) -> list[str]:
        """Return the file and its arguments."""
        more = self.brief if brief else ()
        peers_flag = ["--peers"] if peers and self.peers and "--only-ours" not in more else []
        return [self.name, *self.arguments, *more, *peers_flag]


def _logprob(
    case: str, dtype: str, minutes: float, *brief: str, peers: bool = True, alone: bool = False
) -> Script:
    arguments = ("--cases", case, "--dtypes", dtype)
    return Script("logprob.py", arguments, minutes, brief, peers, alone=alone)


OURS_TWICE = ("--only-ours", "--rounds", "2")
PARTS: dict[str, tuple[Script, ...]] = {
    "logprob": (
        _logprob("main", "float32", 2.75, *OURS_TWICE),
        _logprob("main", "bfloat16", 3.0, "--rounds", "2"),
        _logprob("small", "float32", 1.0, "--rounds", "2"),
        _logprob("small", "bfloat16", 0.5),
        _logprob("large-vocabulary", "float32", 1.5, *OURS_TWICE, "--rows", "128", peers=False),
        _logprob("large-vocabulary", "bfloat16", 2.25, peers=False, alone=True),
        _logprob("two-threads", "float32", 0.75, *OURS_TWICE, "--rows", "1024", peers=False),
        _logprob("two-threads", "bfloat16", 0.75, *OURS_TWICE, "--rows", "1024", peers=False),
        Script("workspace.py", minutes=0.75),
    ),
    "prefix": (
        Script("prefix.py", minutes=3.5, brief=("--rounds", "2")),
        Script("session_cost.py", minutes=1.5, brief=("--rounds", "2", "--layers", "4")),
        Script("combined.py", minutes=2.0, brief=("--rounds", "2")),
    ),
    "packing": (Script("packing.py", minutes=3.25, brief=("--rounds", "2", "--tokens", "2000")),),
    "step": (
        Script(
            "train_step.py",
            minutes=5.5,
            brief=("--rounds", "2", "--threads", "2", "--scale", "0.4"),
            peers=True,
        ),
        Script("step_time.py", needs_peers=True, alone=True),
    ),
    "reward": (Script("rewards.py", minutes=1.0, peers=True),),
    "sync": (Script("sync.py", minutes=2.0, brief=("--steps", "6", "--transports", "gloo", "sparse")),),
}


def run(parts: Sequence[str], *, peers: bool = False, fresh: bool = False, folder: Path = FOLDER) -> int:
    """Run the scripts of the parts ("all": every part, briefly), then regenerate docs/performance.md.

    Scripts that the same call finished before an interruption are skipped, unless `fresh`. After a failed
    script, which is named, the others still run; returns 1 then, else 0. Raises ConfigError for an
    unknown part, and if this package is not in a checkout with benchmarks/.
    """
    unknown = [p for p in parts if p != "all" and p not in PARTS]
    if unknown:
        raise ConfigError([f"bench has no part {p!r}; choose from {', '.join(PARTS)}, all" for p in unknown])
    if not (folder / "common.py").is_file():
        raise ConfigError(
            [f"{folder} does not exist: benchmarks come with a checkout of rft, not with an installed "
             "package. Clone the repository, `pip install -e .` there, and run rft bench from it"]
        )  # fmt: skip
    brief = "all" in parts or not parts
    chosen = tuple(PARTS) if brief else tuple(dict.fromkeys(parts))
    journal = Journal(
        folder / "results", {"parts": ["all"] if brief else list(chosen), "peers": peers}, fresh
    )
    failed = []
    for script in (s for part in chosen for s in PARTS[part]):
        if brief and script.alone:
            continue
        if script.needs_peers and not peers:
            print(f"[bench] {script.name} left out: it compares with a peer, give --peers", flush=True)
            continue
        command = script.command(brief, peers)
        if not journal.run(command, folder, script.minutes if brief else None):
            failed.append(" ".join(command))
    journal.close(complete=not failed, brief=brief)
    subprocess.run([sys.executable, str(folder / "performance.py")], check=True)
    if failed:
        print(
            f"[bench] FAILED: {'; '.join(failed)}. See the messages above; the same command repeats only "
            "these",
            file=sys.stderr,
        )
    return 1 if failed else 0


class Journal:
    """Record the successful scripts of a call and their seconds in `unfinished.json`, until all are done."""

    def __init__(self, results: Path, call: dict[str, Any], fresh: bool) -> None:
        """Load the journal of the same call.

        call: the requested parts and options; other journals, or any with `fresh`, are ignored.
        """
        self.results, self.file, self.call = results, results / "unfinished.json", call
        results.mkdir(exist_ok=True)
        self.seconds: dict[str, float] = {}
        if not fresh and self.file.is_file():
            journal = json.loads(self.file.read_text(encoding="utf-8"))
            self.seconds = journal["seconds"] if journal["call"] == call else {}

    def run(self, command: Sequence[str], folder: Path, minutes: float | None) -> bool:
        """Run a script that the journal lacks, for at most twice its minutes; return whether it succeeded."""
        name = " ".join(command)
        if name in self.seconds:
            print(
                f"[bench] {name}: done before, in {self.seconds[name]:.0f} s (--fresh: measure again)",
                flush=True,
            )
            return True
        print(f"[bench] {name}", flush=True)
        began = time.monotonic()
        code = _run([sys.executable, str(folder / command[0]), *command[1:]], minutes)
        taken = time.monotonic() - began
        allowed = "" if minutes is None else f" of {60 * minutes:.0f}"
        why = ", stopped: twice its time" if code == STOPPED else ""
        print(f"[bench] {name}: exit code {code} after {taken:.0f}{allowed} s{why}", flush=True)
        if code:
            return False
        self.seconds[name] = round(taken, 1)
        self._write(self.file, {"call": self.call, "seconds": self.seconds})
        return True

    def close(self, *, complete: bool, brief: bool) -> None:
        """Print the total time. A complete call deletes its journal; for all parts it is kept as a result."""
        total = sum(self.seconds.values())
        print(f"[bench] {len(self.seconds)} scripts in {total / 60:.1f} minutes", flush=True)
        if not complete:
            return
        self.file.unlink(missing_ok=True)
        if brief:
            machine = {"system": platform.platform(), "cores": usable_cores()}
            summary = {
                **self.call,
                "minutes": round(total / 60, 1),
                "machine": machine,
                "seconds": self.seconds,
            }
            self._write(self.results / "bench-all.json", summary)

    @staticmethod
    def _write(file: Path, content: dict[str, Any]) -> None:
        write_text_atomic(file, json.dumps(content, indent=1) + "\n")


def _run(command: Sequence[str], minutes: float | None) -> int:
    """Run a command and return its exit code; kill it with its children on a timeout or interrupt."""
    process = subprocess.Popen(command)
    try:
        return process.wait(timeout=None if minutes is None else 2 * 60 * minutes)
    except subprocess.TimeoutExpired:
        return STOPPED
    finally:
        if process.poll() is None:
            kill_tree(process.pid)
            process.wait()
