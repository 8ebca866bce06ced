"""The learner and the plain engine of most tests: one process on CPU, a single thread."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rft.algorithms import ALGORITHMS, Algorithm
from rft.config.learner import LearnerConfig
from rft.learner.learner import LearnerSpec
from rft.rollout.engine import EngineSpec

needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")


def learner_spec(model: Path | str, algorithm: Algorithm | None = None, **config: Any) -> LearnerSpec:
    """A learner of the model in a folder; `config` are fields of LearnerConfig. Anything else is changed by
    `dataclasses.replace`. No algorithm: GRPO."""
    return LearnerSpec(
        model=str(model),
        tokenizer=str(model),
        algorithm=algorithm or ALGORITHMS["grpo"](),
        config=LearnerConfig(**config),
        device="cpu",
        threads=1,
        seed=1,
        total_steps=10,
        num_iterations=1,
        minibatches=1,
        max_completion_length=12,
        temperature=1.0,
        max_gap_mean=None,
        max_gap=None,
    )


def engine_spec(model: Path, reference: Path | None = None) -> EngineSpec:
    """An engine of plain transformers."""
    return EngineSpec(
        kind="hf",
        model=str(model),
        dtype="float32",
        device="cpu",
        max_model_len=128,
        max_num_seqs=8,
        tensor_parallel=1,
        seed=1,
        kv_cache_gib=0.1,
        gpu_memory_utilization=0.5,
        threads=1,
        cores=None,
        eager=True,
        needs_text=False,
        transport="gloo",
        control_timeout_s=10,
        stop_token_ids=(1,),
        reference=None if reference is None else str(reference),
    )
