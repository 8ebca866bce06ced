"""`rft bench`: run the benchmarks of a checkout, part by part, and write what they measured."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rft.config import ConfigError

FOLDER = Path(__file__).resolve().parents[1] / "benchmarks"


@dataclass(frozen=True)
class Script:
    """A file of benchmarks/ with its arguments.

    brief: further arguments when all parts run, so that they end within 30 minutes on two cores.
    peers: it can run the peers' code, and is told to by `--peers`. needs_peers: it compares with them only.
    """

    name: str
    brief: tuple[str, ...] = ()
    peers: bool = False
    needs_peers: bool = False


PARTS: dict[str, tuple[Script, ...]] = {
    "logprob": (Script("logprob.py", ("--rounds", "2"), peers=True), Script("workspace.py")),
    "prefix": (Script("prefix.py", ("--rounds", "3"), peers=False), Script("combined.py", ("--rounds", "2"))),
    "packing": (Script("packing.py", ("--rounds", "2", "--tokens", "8000")),),
    "step": (
        Script("train_step.py", ("--rounds", "2"), peers=True),
        Script("step_time.py", ("--rounds", "1", "--steps", "12"), needs_peers=True),
    ),
    "reward": (Script("rewards.py", peers=True),),
    "sync": (Script("sync.py"),),
}


def run(parts: Sequence[str], *, peers: bool = False, folder: Path = FOLDER) -> int:
    """Run the scripts of the parts ("all": every one, briefly), then write docs/performance.md anew.

    A script that fails is named and the others still run; returns 1 then, else 0. Raises ConfigError for
    an unknown part, and where there is no checkout with benchmarks/ around this package.
    """
    unknown = [p for p in parts if p != "all" and p not in PARTS]
    if unknown:
        raise ConfigError([f"bench has no part {p!r}; choose of {', '.join(PARTS)}, all" for p in unknown])
    if not (folder / "common.py").is_file():
        raise ConfigError(
            [f"{folder} is not there: benchmarks come with a checkout of rft, not with an installed package. "
             "Clone the repository, `pip install -e .` there, and run rft bench from it"]
        )  # fmt: skip
    brief = "all" in parts or not parts
    scripts = [s for part in (PARTS if brief else parts) for s in PARTS[part]]
    failed, start = [], time.monotonic()
    for script in scripts:
        if script.needs_peers and not peers:
            print(f"[bench] {script.name} left out: it compares with a peer, give --peers", flush=True)
            continue
        command = [sys.executable, str(folder / script.name), *(script.brief if brief else ())]
        command += ["--peers"] if peers and script.peers else []
        print(f"[bench] {' '.join(command[1:])}", flush=True)
        began = time.monotonic()
        code = subprocess.run(command).returncode
        print(f"[bench] {script.name}: exit code {code} after {time.monotonic() - began:.0f} s", flush=True)
        failed += [script.name] if code else []
    subprocess.run([sys.executable, str(folder / "performance.py")], check=True)
    print(f"[bench] {len(scripts)} scripts in {(time.monotonic() - start) / 60:.1f} minutes")
    if failed:
        print(f"[bench] FAILED: {', '.join(failed)}. Remedy: the messages above", file=sys.stderr)
    return 1 if failed else 0
