"""Weights from GPU to GPU, whole and sparse, to a real vLLM: by NCCL on two GPUs, and on CPU with gloo in
NCCL's place under vLLM's own protocol and loaders. tests/sync/nccl_on_cpu.py says what is stood in for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.integration.conftest import Stage, raise_stage
from tests.integration.test_sync import sample, step, train_and_push

pytestmark = pytest.mark.timeout(600)

ON_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: the learner's and an engine's"),
]
SYNC = {"full_every": 3, "measure_changes": "overall"}


@pytest.fixture(
    params=[
        *(pytest.param((name, "gpu"), marks=ON_GPUS, id=name) for name in ("nccl", "sparse")),
        *(
            pytest.param((name, "cpu"), marks=pytest.mark.slow, id=f"{name} on CPU")
            for name in ("nccl", "sparse_nccl")
        ),
    ]
)
def stage(ray_here: None, tiny_folder: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    transport, device = request.param
    if device == "gpu":
        stage = raise_stage(tiny_folder, "vllm", more={"sync": {**SYNC, "transport": transport}})
    else:
        stage = raise_stage(tiny_folder, "vllm", more={"sync": SYNC}, nccl_on_cpu=transport)
    yield stage
    stage.run(stage.pool.close())
    stage.learner.kill()


def test_engine_and_learner_agree_after_every_push(stage: Stage) -> None:
    """A tied model with fused projections. Also after the engine was killed and built anew: the group forms
    again, and the next push is full."""
    assert stage.plan.transport in ("nccl", "sparse_nccl")
    bound = 0.05 if stage.plan.device == "cuda" else 1e-4
    for _ in range(4):
        _, report = train_and_push(stage, bound=bound)
        assert report.bytes > 0 and report.metrics["sync/changed_share"] > 0
    stage.run(stage.pool.rebuild(0))
    stage.run(stage.channel.connect())
    stage.run(stage.channel.push(report.version))
    assert step(stage, [sample(stage, length=9)])["sync/logp_gap_mean"] < bound
