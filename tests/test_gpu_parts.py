"""The GPU benchmarks end to end in their small setting, on the CPU: they run, and they resume."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu" / "run_all.sh"


def run_all(*arguments: str | Path, seconds: float = 250) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *map(str, arguments)],
        env=os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=seconds,
    )


def result(folder: Path, part: str) -> dict:
    return json.loads((folder / f"gpu-{part}.json").read_text())


def test_parts_run_small_and_what_is_done_is_not_done_again(tmp_path: Path) -> None:
    (tmp_path / "gpu-environment.json").write_text("{}")
    done = run_all("--small", "--out", tmp_path, "environment", "heads")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "environment: done before" in done.stdout and result(tmp_path, "environment") == {}
    heads = result(tmp_path, "heads")
    assert heads["small"] is True and all(row["passed"] for row in heads["correctness"])
    assert {row["task"] for row in heads["speed"]} == {"forward", "train", "frozen"}
    assert all(row["failed"] == {} and set(row["contenders"]) == {"rft", "plain"} for row in heads["speed"])
    assert not list(tmp_path.glob(".gpu-*"))


def test_an_unknown_part_is_refused() -> None:
    done = run_all("--small", "haeds")
    assert done.returncode == 2 and "no part haeds; there are environment ceilings heads" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_only_the_small_setting_runs(tmp_path: Path) -> None:
    done = run_all("--out", tmp_path, "ceilings")
    assert done.returncode == 1 and "give --small" in done.stderr and "FAILED: ceilings" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(1000)
def test_all_parts_run_small(tmp_path: Path) -> None:
    done = run_all("--small", "--out", tmp_path, seconds=900)
    assert done.returncode == 0, done.stdout + done.stderr
    forest = result(tmp_path, "forest")
    assert all(row["passed"] for row in forest["correctness"]) and len(forest["results"]) == 4
    online = result(tmp_path, "online")
    assert online["left_out"] if "left_out" in online else len(online["curve"]) >= 2
    assert "left_out" in result(tmp_path, "colocated") or result(tmp_path, "colocated")["medians"]
    assert [row["transport"] for row in result(tmp_path, "transports")["results"]] == ["nccl", "sparse"]
    assert {row["name"] for row in result(tmp_path, "learner")["results"]} == {"LoRA", "QLoRA", "full"}
    assert {row["algorithm"] for row in result(tmp_path, "steps")["results"]} == {"sft", "dpo", "grpo"}


@pytest.mark.gpu
@pytest.mark.timeout(1200)
def test_the_short_parts_run_in_full_on_a_gpu(tmp_path: Path) -> None:
    done = run_all("--out", tmp_path, "environment", "ceilings", "heads", seconds=1100)
    assert done.returncode == 0, done.stdout + done.stderr
    assert result(tmp_path, "ceilings")["matmul_tflops"] > 1
    assert all(row["passed"] for row in result(tmp_path, "heads")["correctness"])
