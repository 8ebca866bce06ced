"""Whole runs from the command line, with the real Ray actors and the real vLLM engine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from rft.cli import main
from rft.metrics.names import is_documented
from tests.integration.conftest import ENV, ROOT, processes_of, rft

SUMS = ["data.options.min_operands=2", "data.options.max_operands=2", "data.options.largest=9"]
SMALL = [
    "train.steps=4",
    "train.batch_size=4",
    "train.num_generations=4",
    "eval.problems=8",
    "eval.samples=2",
    "eval.every=2",
    "rollout.sampling.max_completion_length=16",
    "checkpoint.every=2",
]


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def command(tmp: Path, *args: str) -> list[str]:
    cache = f"warm_start.cache={tmp}/cache"
    return ["train", "examples/arithmetic.yaml", f"output_dir={tmp}", cache, *SUMS, *args]


@pytest.mark.timeout(900)
def test_a_short_run_learns(tmp_path: Path) -> None:
    """The demo with a short warm start and 40 steps: held-out accuracy rises."""
    args = [
        "warm_start.steps=700",
        "train.steps=40",
        "eval.every=40",
        "eval.problems=128",
        "data.options.min_operands=3",
        "data.options.max_operands=3",
        "name=learn",
    ]
    rft(*command(tmp_path, *args), timeout=850)
    run = tmp_path / "learn"
    metrics = rows(run)
    assert [r["step"] for r in metrics] == list(range(41))
    first, last = metrics[0], metrics[-1]
    assert last["eval/accuracy"] >= first["eval/accuracy"] + 0.08, (first, last)
    assert max(r["sync/logp_gap"] for r in metrics[1:]) < 1e-3
    undocumented = {name for r in metrics for name in r if not is_documented(name)}
    assert not undocumented
    assert yaml.safe_load((run / "config.yaml").read_text())["name"] == "learn"
    assert {r["split"] for r in rows(run, "samples.jsonl")} == {"train", "eval"}
    assert list((run / "tensorboard").iterdir())

    # The final model is an ordinary folder; `rft export` copies it, `rft eval` reads it.
    out = tmp_path / "exported"
    assert main(["export", str(run), str(out)]) == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    assert AutoTokenizer.from_pretrained(out).eos_token_id is not None
    shown = rft("eval", *command(tmp_path, *args)[1:], "rollout.engine=hf", "--model", str(out))
    accuracy = json.loads(shown.stdout)["eval/accuracy"]
    assert accuracy == pytest.approx(last["eval/accuracy"], abs=0.06)

    # The same command again finds the run complete and changes nothing.
    again = rft(*command(tmp_path, *args))
    assert "is complete" in again.stderr and len(rows(run)) == 41


@pytest.mark.timeout(600)
def test_sigterm_saves_exits_75_leaves_nothing_behind_and_resumes(tmp_path: Path) -> None:
    marker = f"RFT_TEST_MARK={tmp_path.name}"
    env = {**ENV, "RFT_TEST_MARK": tmp_path.name}
    args = command(tmp_path, *SMALL, "warm_start=null", "train.steps=500", "name=stop", "eval.every=0")
    process = subprocess.Popen(
        [sys.executable, "-m", "rft.cli", *args], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
    )
    run = tmp_path / "stop"
    deadline = time.monotonic() + 240
    while not (run / "metrics.jsonl").exists() or len(rows(run)) < 4:
        assert time.monotonic() < deadline and process.poll() is None, process.stderr
        time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, told = process.communicate(timeout=120)
    assert process.returncode == 75, told
    assert "stopped at step" in told
    reached = rows(run)[-1]["step"]
    saved = sorted((run / "checkpoints").glob("step-*"))
    assert saved[-1].name == f"step-{reached:08d}"
    assert processes_of(marker) == []

    more = command(
        tmp_path, *SMALL, "warm_start=null", f"train.steps={reached + 2}", "name=stop", "eval.every=0"
    )
    done = rft(*more)
    assert f"resumed at step {reached}" in done.stderr
    assert [r["step"] for r in rows(run)] == list(range(reached + 3))
    assert rows(run)[-1]["sync/version"] == reached + 2


@pytest.mark.timeout(600)
def test_a_run_killed_outright_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """`rft verify-resume`, synchronous with the plain engine: sample order, completions, metrics, weights,
    optimizer, random states and the run's own state are those of a run that was never killed."""
    (tmp_path / "digits.py").write_text(
        "def score(prompts, completions, **columns):\n"
        "    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]\n"
    )
    reward = f"rewards=[{{function: '{tmp_path}/digits.py:score'}}]"
    curriculum = "train.curriculum={rest: 2}"  # the state that is hardest to bring back
    common = [*SMALL, "warm_start=null", "rollout.engine=hf", "learner.threads=1", reward, curriculum]
    config, *overrides = command(tmp_path, *common)[1:]
    out = f"--out={tmp_path}/verify"
    args = ["verify-resume", config, *overrides, "--steps", "6", "--kill-at", "3", out]
    done = rft(*args, check=False, mark=tmp_path.name)
    assert done.returncode == 0 and "verdict: kept" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("  equal  ") == 9 and "differs" not in done.stdout.lower()
    assert processes_of(f"RFT_TEST_MARK={tmp_path.name}") == [], "the killed run left processes behind"


@pytest.mark.timeout(300)
def test_a_reward_that_raises_stops_the_run_with_its_traceback(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def score(prompts, completions, **columns):\n    return 1 / 0\n")
    done = rft(
        *command(tmp_path, *SMALL, "warm_start=null", "rollout.engine=hf", "eval.every=0"),
        f"rewards=[{{function: '{tmp_path}/broken.py:score'}}]",
        check=False,
    )
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr and "broken.py" in done.stderr
    metrics = tmp_path / "arithmetic" / "metrics.jsonl"
    assert all("reward/mean" not in r for r in map(json.loads, metrics.read_text().splitlines()))
