"""What every GPU part shares: its two settings, its timing, and where its result goes.

Every part runs in full on one CUDA device, and with `--small` end to end on a CPU at toy sizes, which
proves the code and measures nothing. A part's result is written last, by a rename: where the file is, the
part is done.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

sys.path.insert(1, str(Path(__file__).resolve().parents[1]))  # the benchmarks beside this folder

from common import RESULTS, clock, peak_of, write_result
from shapes import Shape
from transformers import Qwen3ForCausalLM

BENCHMARKS = Path(__file__).resolve().parents[1]
PACKAGES = ("triton", "peft", "bitsandbytes", "liger-kernel", "cut-cross-entropy", "trl", "vllm", "ray")


@dataclass(frozen=True)
class Settings:
    """A part by name, small or in full, and the folder of its result."""

    part: str
    small: bool
    out: Path

    @property
    def device(self) -> str:
        return "cpu" if self.small else "cuda"

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if self.small else torch.bfloat16

    def finish(self, result: Mapping[str, Any]) -> None:
        """Write the part's result with the machine, its clocks and the versions."""
        name = f"gpu-{self.part}.json"
        unfinished = self.out / f".{name}.{os.getpid()}"
        write_result(unfinished, {"small": self.small, "clocks": clocks(), **result}, *PACKAGES)
        unfinished.replace(self.out / name)

    def earlier(self, part: str) -> dict[str, Any] | None:
        """Return the result of another part, if it exists."""
        import json

        file = self.out / f"gpu-{part}.json"
        return json.loads(file.read_text()) if file.exists() else None


def settings(part: str, description: str | None) -> Settings:
    """Read the settings from the command line. Exits with 2 without a CUDA device or `--small`."""
    parser = argparse.ArgumentParser(description=(description or "").split("\n\n")[0])
    parser.add_argument("--small", action="store_true", help="toy sizes on the CPU: proves the code only")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    args = parser.parse_args()
    if not args.small and not torch.cuda.is_available():
        parser.error("no CUDA device: give --small to run toy sizes on the CPU")
    torch.manual_seed(time.time_ns() % 2**31)  # fresh data every time: correctness must not hang on a seed
    return Settings(part, args.small, args.out)


def random_model(shape: Shape, s: Settings) -> Qwen3ForCausalLM:
    """On the part's device and in its dtype; other weights at every call."""
    with torch.device(s.device):
        return Qwen3ForCausalLM(shape.config()).to(s.dtype)


def clocks() -> dict[str, str]:
    """What nvidia-smi says of clocks, power and temperature; empty without it."""
    fields = "name,driver_version,clocks.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return {}
    return dict(zip(fields.split(","), done.stdout.strip().splitlines()[0].split(", "), strict=False))


def missing_engine() -> str | None:
    """Which packages of a run with vLLM are not installed here, in words; None where all are."""
    missing = [name for name in ("ray", "vllm") if find_spec(name) is None]
    return f"{' and '.join(missing)} are not installed here" if missing else None


def timed(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Median seconds, spread (largest over smallest, less 1) and peak 10^6 bytes of runs taken in turns. The
    first turn compiles and tunes; it is not counted."""
    peaks = {}
    for name, run in runs.items():
        run()
        peaks[name] = peak_of(run)
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = clock()
            run()
            times[name].append(clock() - start)
    return {
        name: {"seconds": statistics.median(t), "spread": max(t) / min(t) - 1, "peak_mb": peaks[name]}
        for name, t in times.items()
    }


def guarded(
    runs: Mapping[str, Callable[[], object]],
) -> tuple[dict[str, Callable[[], object]], dict[str, str]]:
    """The runs that work here, and why the others do not: a peer that fails is a line in the table."""
    good, bad = {}, {}
    for name, run in runs.items():
        try:
            run()
        except (ImportError, RuntimeError, NotImplementedError, ValueError, TypeError) as error:
            bad[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            good[name] = run
    return good, bad


def script(name: str, *arguments: str | Path, log: Path) -> None:
    """Run another benchmark in a separate process. Raises CalledProcessError when it fails."""
    command: Sequence[str] = [sys.executable, str(BENCHMARKS / name), *map(str, arguments)]
    with log.open("w") as out:
        subprocess.run(command, check=True, stdout=out, stderr=subprocess.STDOUT)
