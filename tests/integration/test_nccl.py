"""Weights from GPU to GPU by NCCL, whole and sparse: two GPUs, real vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.integration.conftest import Stage, raise_stage
from tests.integration.test_sync import sample, step, train_and_push

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.timeout(600),
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: the learner's and an engine's"),
]


@pytest.fixture(params=["nccl", "sparse"])
def stage(ray_here: None, tiny_folder: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    sync = {"transport": request.param, "full_every": 3, "measure_changes": "overall"}
    stage = raise_stage(tiny_folder, "vllm", more={"sync": sync})
    yield stage
    stage.run(stage.pool.close())
    stage.learner.kill()


def test_engine_and_learner_agree_after_every_push(stage: Stage) -> None:
    """Also after the engine was killed and built anew: the group forms again, and the next push is full."""
    assert stage.plan.transport in ("nccl", "sparse_nccl")
    for _ in range(4):
        _, report = train_and_push(stage, bound=0.05)
        assert report.bytes > 0 and report.metrics["sync/changed_share"] > 0
    stage.run(stage.pool.rebuild(0))
    stage.run(stage.channel.connect())
    stage.run(stage.channel.push(report.version))
    assert step(stage, [sample(stage, length=9)])["sync/logp_gap_mean"] < 0.05
