"""The policy as a LoRA adapter in vLLM: new tensors and a new identity at every push, base untouched."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.conftest import Stage, raise_stage
from tests.integration.test_sync import assert_proven, sample, train_and_push


@pytest.fixture(scope="module")
def adapter_stage(ray_here: None, tiny_folder: Path) -> Iterator[Stage]:
    more = {
        "learner": {"learning_rate": 1e-2, "threads": 1, "adapter": {"r": 8}},
        "sync": {"transport": "adapter", "measure_changes": "off"},
    }
    stage = raise_stage(tiny_folder, "vllm", more=more, update="wait")
    yield stage
    stage.run(stage.pool.close())


@pytest.mark.slow
def test_vllm_samples_from_the_adapter_that_was_sent(adapter_stage: Stage) -> None:
    """Prompts of 5 and 140 tokens, the same ones at every version: a stale prefix would show."""
    weights = 0
    for _ in range(3):
        _, report = train_and_push(adapter_stage)
        weights = report.bytes
        assert_proven(adapter_stage, report.version)
        generated = sample(adapter_stage, length=6).completions[0]
        assert generated.versions == ((report.version, 0, len(generated.tokens)),)
    assert 0 < weights < 4 * adapter_stage.plan.shape.parameters  # the factors alone, not the model
