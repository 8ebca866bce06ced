"""Helpers of the benchmarks: clocks, interleaved rounds with a baseline, peak memory, machine, results."""

from __future__ import annotations

import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distributions, version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from rft.kernels.logprob_linear import product_dtype
from rft.utils.cores import usable_cores

RESULTS = Path(__file__).resolve().parent / "results"
PRELOADED = ["torch", "transformers", "rft.kernels.logprob", "rft.kernels.attention"]


# -- the machine -----------------------------------------------------------------------------------


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), platform.machine())


def versions(*packages: str) -> dict[str, str | None]:
    """Installed versions; None for packages that are not installed."""
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def machine(*packages: str) -> dict[str, Any]:
    """Describe the machine and the versions, for every results file."""
    described: dict[str, Any] = {
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "bfloat16_arithmetic": product_dtype(torch.empty(0, dtype=torch.bfloat16)) == torch.bfloat16,
        "threads": torch.get_num_threads(),
        "load": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "versions": versions("torch", "transformers", *packages),
    }
    if torch.cuda.is_available():
        described["gpu"] = torch.cuda.get_device_name()
        described["cuda"] = torch.version.cuda
    return described


def kind_of(described: Mapping[str, Any]) -> tuple[str, str, bool]:
    """Return what CPU figures depend on most: name, instructions and native bfloat16 of the processor. One
    name may stand for several kinds."""
    return described["cpu"], described["capability"], described["bfloat16_arithmetic"]


def write_result(file: Path, result: Mapping[str, Any], *packages: str) -> None:
    """Write a result with the machine and the versions that it comes from."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine(*packages), **result}, indent=1) + "\n")
    print(f"written to {file}")


def entry_of(file: Path, described: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a results file for this kind of processor; {} if it has none."""
    entries = json.loads(file.read_text())["machines"] if file.exists() else []
    return next((e for e in entries if kind_of(e["machine"]) == kind_of(described)), {})


def write_entry(file: Path, result: Mapping[str, Any]) -> None:
    """Write a result that names its `machine`, in place of that of the same kind of processor."""
    entries = json.loads(file.read_text())["machines"] if file.exists() else []
    entries = [e for e in entries if kind_of(e["machine"]) != kind_of(result["machine"])] + [result]
    entries.sort(key=lambda entry: kind_of(entry["machine"]))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machines": entries}, indent=1) + "\n")
    print(f"written to {file}")


def merge_rows(
    file: Path, key: Sequence[str], rows: Sequence[dict[str, Any]], *, timed: bool = True
) -> list[dict[str, Any]]:
    """Rows of an earlier result whose `key` fields are not measured anew, then the new ones: a benchmark may
    be run case by case. timed: they depend on the processor, so rows of another kind of it are dropped."""
    earlier = json.loads(file.read_text()) if file.exists() else {"results": []}
    keeps = not timed or ("machine" in earlier and kind_of(earlier["machine"]) == kind_of(machine()))
    old = earlier["results"] if keeps else []
    new = {tuple(row[k] for k in key) for row in rows}
    return [row for row in old if tuple(row.get(k) for k in key) not in new] + list(rows)


# -- time ------------------------------------------------------------------------------------------


def clock() -> float:
    """Seconds: processor time on one thread, which other programs lengthen less, else wall time; on a GPU
    after all its work is done."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def seconds(run: Callable[[], object]) -> float:
    start = clock()
    run()
    return clock() - start


class MatrixProduct:
    """The baseline: the present rate of a plain float32 matrix product."""

    def __init__(self, size: int = 1024) -> None:
        self.a = torch.randn(size, size)
        self.out = torch.empty(size, size)
        self.rate()

    def rate(self) -> float:
        """10^9 operations per second, the best of three."""
        taken = min(seconds(lambda: torch.mm(self.a, self.a, out=self.out)) for _ in range(3))
        return 2 * self.a.shape[0] ** 3 / taken / 1e9


@dataclass(frozen=True)
class Rounds:
    """Seconds of every run in every round, and the baseline's rates before and after each round."""

    all: dict[str, list[float]]
    gflops: list[float]

    @property
    def medians(self) -> dict[str, float]:
        return {name: statistics.median(times) for name, times in self.all.items()}

    def gain(self, slow: str, fast: str) -> float:
        """How many times faster: the median over rounds, so that a slow spell hits both sides of a ratio."""
        return statistics.median(a / b for a, b in zip(self.all[slow], self.all[fast], strict=True))

    def summary(self) -> dict[str, Any]:
        return {
            "seconds": {k: round(v, 5) for k, v in self.medians.items()},
            "spread": {k: round(max(v) / min(v) - 1, 3) for k, v in self.all.items()},
            "baseline_gflops": [round(statistics.median(self.gflops), 1), round(min(self.gflops), 1)],
        }


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> Rounds:
    """Time the runs in turns, after one turn that is not counted, with the baseline between turns."""
    baseline = MatrixProduct()
    for run in runs.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    gflops = [baseline.rate()]
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(seconds(run))
        gflops.append(baseline.rate())
    return Rounds(times, gflops)


# -- memory ----------------------------------------------------------------------------------------


def memory(key: str = "VmRSS") -> int:
    """Bytes that this process holds (VmRSS) or has held at most (VmHWM). Linux only."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """From now on, VmHWM counts anew."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_of(run: Callable[[], object]) -> float:
    """Peak memory of a run beyond what is held before it, in 10^6 bytes."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - held) / 1e6
    forget_peak()
    held = memory()
    run()
    return (memory("VmHWM") - held) / 1e6


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return the result of a module's function, run in a separate process with torch imported and nothing
    allocated; freed memory goes back to the system at once there, or the next allocation hides in it."""
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(
        target=_send_result, args=(sender, torch.get_num_threads(), function, arguments), daemon=True
    )
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        process.join()
        what = f"{function.__name__}{arguments}"
        raise RuntimeError(
            f"{what} ended in its process with exit code {process.exitcode}: see above"
        ) from None


def _send_result(
    sender: Connection, threads: int, function: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    torch.set_num_threads(threads)
    sender.send(function(*arguments))


def gradient_error(model: torch.nn.Module, reference: torch.nn.Module) -> float:
    """The largest difference of a parameter's gradient from the reference model's, relative to its norm."""
    pairs = zip(model.parameters(), reference.parameters(), strict=True)
    return max(
        float((a.grad - b.grad).norm() / b.grad.norm())
        for a, b in pairs
        if a.grad is not None and b.grad is not None and b.grad.norm() > 0
    )


def peer_versions(peer: str, *packages: str) -> dict[str, str]:
    """Versions in the environment of a peer. Raises KeyError for a package that is not installed."""
    from peers.make_env import peer_packages

    installed = distributions(path=[str(peer_packages(peer))])
    found = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in installed}
    return {package: found[package] for package in packages}


def use_peer(name: str) -> None:
    """Let this process import the packages of the peer `name`, after those of its environment."""
    from peers.make_env import peer_packages

    folder = str(peer_packages(name))
    if folder not in sys.path:
        sys.path.append(folder)
