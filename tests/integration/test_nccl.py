"""Weights from GPU to GPU, whole and sparse, to a real vLLM: by NCCL on two GPUs, and on CPU with gloo in
NCCL's place under vLLM's own protocol and loaders. tests/sync/nccl_on_cpu.py says what is stood in for."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from rft.errors import EngineError
from tests.integration.conftest import Stage, raise_stage
from tests.integration.test_sync import sample, step, train_and_push

pytestmark = pytest.mark.timeout(600)

ON_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs: the learner's and an engine's"),
]
SYNC = {"full_every": 3, "measure_changes": "overall"}


@pytest.fixture(
    scope="module",
    params=[
        *(pytest.param((name, "gpu"), marks=ON_GPUS, id=name) for name in ("nccl", "sparse")),
        *(
            pytest.param((name, "cpu"), marks=pytest.mark.slow, id=f"{name} on CPU")
            for name in ("nccl", "sparse_nccl")
        ),
    ],
)
def stage(ray_here: None, tiny_folder: Path, request: pytest.FixtureRequest) -> Iterator[Stage]:
    transport, device = request.param
    if device == "gpu":
        stage = raise_stage(tiny_folder, "vllm", more={"sync": {**SYNC, "transport": transport}})
    else:
        stage = raise_stage(
            tiny_folder, "vllm", more={"sync": {**SYNC, "timeout_s": 20}}, nccl_on_cpu=transport
        )
    yield stage
    stage.run(stage.pool.close())
    stage.learner.kill()


def bound(stage: Stage) -> float:
    """In nats, of what learner and engine may differ by on average."""
    return 0.05 if stage.plan.device == "cuda" else 1e-4


def test_engine_and_learner_agree_after_every_push(stage: Stage) -> None:
    """A tied model with fused projections; sparse: whole pushes and parts in turn."""
    assert stage.plan.transport in ("nccl", "sparse_nccl")
    for _ in range(4):
        _, report = train_and_push(stage, bound=bound(stage))
        assert report.bytes > 0 and report.metrics["sync/changed_share"] > 0


def test_an_engine_killed_in_a_push_is_built_anew(stage: Stage) -> None:
    """NCCL knows of nothing: the deadline ends the push, and with it the learner's wait. The group forms
    again, and the next push is full."""
    version = stage.run(stage.learner.describe()).version

    async def killed() -> None:
        update = await stage.learner.announce(version)
        await stage.pool.begin_update("keep")
        for child in psutil.Process(stage.pool.members[0].pid).children(recursive=True):
            child.kill()
        sent, received = stage.learner.send_weights(), stage.pool.receive(update)
        await stage.channel._both("the push", sent, received, stage.channel.timeout_s)

    began = time.monotonic()
    with pytest.raises(EngineError, match=r"did not finish within \d+ s|rollout replica 0 died"):
        stage.run(killed())
    assert stage.run(stage.learner.describe()).version == version
    assert time.monotonic() - began < stage.channel.timeout_s + 10
    stage.run(stage.pool.rebuild(0))
    stage.run(stage.channel.connect())
    stage.run(stage.channel.push(version))
    assert step(stage, [sample(stage, length=9)])["sync/logp_gap_mean"] < bound(stage)
