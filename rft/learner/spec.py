"""Plain data about a learner: its specification, and the facts that it reports."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rft.algorithms.base import Algorithm
from rft.config.learner import LearnerConfig


@dataclass(frozen=True)
class LearnerSpec:
    """Everything that a learner needs; plain data, so that it travels to an actor."""

    model: str
    tokenizer: str
    algorithm: Algorithm
    config: LearnerConfig
    device: str
    threads: int
    seed: int
    total_steps: int
    num_iterations: int
    minibatches: int
    max_completion_length: int
    temperature: float
    max_gap_mean: float | None
    max_gap: float | None
    expects_fresh: bool = False  # synchronous: every batch was sampled by the current version
    trust_remote_code: bool = False
    reference: str | None = None  # the model that the reference is; None: `model`
    reference_cached: bool = False  # batches bring `ref_logps`: the reference is not kept in memory
    stop_token_ids: tuple[int, ...] = ()  # what ends a completion, for the exported generation config
    texts: Mapping[str, Any] | None = None  # a reward model's config says so how its texts were rendered


@dataclass(frozen=True)
class LearnerInfo:
    """Facts about a loaded learner, for the log."""

    parameters: int
    trained: int
    device: str
    ranks: int
    compute_dtype: str
    threads: int
    version: int
