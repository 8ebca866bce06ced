"""Asynchronous runs, in which no trained token is fresh, prove every push, and a stale replica ends them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rft.metrics.log import read_jsonl
from rft.sync.proof import PROOF_TOKENS
from tests.integration.conftest import ROOT, rft
from tests.specs import needs_vllm

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1000)]


def settings(tmp: Path, *more: str) -> list[str]:
    (tmp / "digits.py").write_text(
        "def score(prompts, completions, **columns):\n"
        "    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]\n"
    )
    return [
        "train",
        "examples/arithmetic.yaml",
        f"output_dir={tmp}",
        "name=async",
        "warm_start=null",
        f"rewards=[{{function: '{tmp}/digits.py:score'}}]",
        "data.limit=64",
        "eval.every=0",
        "train.steps=5",
        "train.batch_size=4",
        "train.num_generations=4",
        "learner.learning_rate=1e-2",
        "learner.warmup_steps=0",
        "rollout.staleness=2",
        "rollout.replicas=2",
        "rollout.sampling={max_prompt_length: 160, max_completion_length: 8}",
        *more,
    ]


def test_every_version_is_proven_on_every_replica(tmp_path: Path) -> None:
    """Also the first and the last; a step without fresh tokens has no value for their gap, and not 0."""
    rft(*settings(tmp_path, "rollout.engine=hf", "rollout.sampling.temperature=0.7"))
    rows = [r for r in read_jsonl(tmp_path / "async/metrics.jsonl") if "train/loss" in r]
    proven = [e for e in read_jsonl(tmp_path / "async/events.jsonl") if e["kind"] == "version/proved"]
    assert [e["version"] for e in proven] == [0, 1, 2, 3, 4, 5]
    assert all(set(e["gaps"]) == {"0", "1"} and e["tokens"] == PROOF_TOKENS - 1 for e in proven)
    assert all(0 < r["sync/proof_gap_mean"] <= r["sync/proof_gap"] < 1e-3 for r in rows)
    assert all(r["sync/logp_gap"] > 0 for r in rows if "sync/logp_gap" in r)


@needs_vllm
def test_without_the_tied_head_repair_an_asynchronous_run_is_stopped(
    tmp_path: Path,
) -> None:
    """One of two engines keeps the old packed copy of its head: the run ends before the next update and names
    that replica alone."""
    env = {"RFT_TEST_UNREPAIRED": str(tmp_path / "taken"), "PYTHONPATH": str(ROOT)}
    extension = "rollout.engine_args={worker_extension_cls: tests.integration.unrepaired.Extension}"
    done = rft(*settings(tmp_path, "rollout.engine=vllm", extension), check=False, timeout=900, env=env)
    assert done.returncode == 1, done.stderr[-3000:]
    (message,) = set(re.findall(r"LogpGapError: (rollout engine .*)", done.stderr))
    assert re.search(r"disagree at policy version 1 .*\(replica [01]: mean gap \S+, allowed 0.001\)", message)
    trained = [r["step"] for r in read_jsonl(tmp_path / "async/metrics.jsonl") if "train/loss" in r]
    assert trained == [1]
