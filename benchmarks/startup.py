"""Seconds until a command has its answer: help, the list of keys, `rft check`, beside an import of torch.

    python benchmarks/startup.py [--rounds 5]

`rft check` of examples/arithmetic.yaml reads the config, encodes 8,704 prompts and makes the plan; its first
run, which makes the embedded model, is not counted. The peer is TRL's command line (`trl --help`), where its
environment is there (RFT_PEER_TRL). Commands run in turns, in new processes; wall and processor time are
medians of the rounds. Written to benchmarks/results/startup-cpu.json, one entry for each kind of processor.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from common import RESULTS, machine, peer_versions, write_entry
from peers.make_env import ENVIRONMENTS, peer_python

RESULT = RESULTS / "startup-cpu.json"
AIM = 3.0  # seconds of `rft check`, on a machine with nothing else to do
CHECK = "rft check"


def commands() -> dict[str, list[str]]:
    rft = [sys.executable, "-m", "rft.cli"]
    config = str(Path(__file__).resolve().parents[1] / "examples" / "arithmetic.yaml")
    found = {
        "rft --help": [*rft, "--help"],
        "rft config learner": [*rft, "config", "learner"],
        CHECK: [*rft, "check", config],
        "python -c 'import torch'": [sys.executable, "-c", "import torch"],
    }
    if "RFT_PEER_TRL" in os.environ or (ENVIRONMENTS / "trl" / "made-from").is_file():
        found["trl --help"] = [str(peer_python("trl").with_name("trl")), "--help"]
    return found


def timed(command: list[str], folder: str) -> tuple[float, float]:
    """Run a command in a folder; return its wall and its processor seconds."""
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    here, asked = machine(), commands()
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in asked}
    with tempfile.TemporaryDirectory(prefix="startup-") as folder:
        for counted in [False, *[True] * arguments.rounds]:
            for name, command in asked.items():
                took = timed(command, folder)
                if counted:
                    times[name].append(took)
    rows = {}
    for name, took in times.items():
        wall, processor = (statistics.median(column) for column in zip(*took, strict=True))
        rows[name] = {"wall": round(wall, 2), "processor": round(processor, 2)}
        print(f"{name}: {wall:.2f} s, of the processor {processor:.2f} s")
    result = {
        "machine": here,
        "rounds": arguments.rounds,
        "peer": peer_versions("trl", "trl") if "trl --help" in rows else {},
        "commands": rows,
        "aim": AIM,
        "passed": rows[CHECK]["wall"] <= AIM,
    }
    write_entry(arguments.out, result)


if __name__ == "__main__":
    main()
