"""Plain data about a learner: its specification, and the facts that it reports."""

from __future__ import annotations

from dataclasses import dataclass

from rft.algorithms.base import Algorithm
from rft.config.data import DataConfig
from rft.config.learner import LearnerConfig
from rft.config.rollout import SamplingConfig
from rft.config.schema import ModelConfig, TrainConfig


@dataclass(frozen=True)
class LearnerSpec:
    """Everything that a learner needs, as sections of the config; plain data that can be sent to an actor.

    model: with `path`, `tokenizer` and `reference` as resolved for the learner's process.
    teacher: batches have the reference's log-probs, or its most likely tokens: no reference is loaded.
    max_gap_mean, max_gap: log-prob gap allowed between engine and learner, in nats (None: any).
    expects_fresh: synchronous training, so that every batch was sampled by the current policy version.
    stop_token_ids: end a completion; written to the exported generation config.
    data: how a reward model's texts are rendered, which its config records.
    """

    algorithm: Algorithm
    model: ModelConfig
    config: LearnerConfig
    train: TrainConfig
    sampling: SamplingConfig
    device: str
    seed: int
    teacher: bool = False
    max_gap_mean: float | None = None
    max_gap: float | None = None
    expects_fresh: bool = False
    stop_token_ids: tuple[int, ...] = ()
    data: DataConfig | None = None

    @property
    def temperature(self) -> float:
        """The temperature of the log-probs: the sampling temperature; offline 1."""
        return self.sampling.temperature if self.algorithm.online else 1.0

    @property
    def tokenizer(self) -> str:
        return self.model.tokenizer or self.model.path


@dataclass(frozen=True)
class LearnerInfo:
    """Facts about a loaded learner, for the log."""

    parameters: int
    trained: int
    device: str
    ranks: int
    compute_dtype: str
    threads: int
    processor: str
    version: int
