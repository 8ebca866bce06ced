"""Every section of the config: typed, frozen, validated once, never mutated."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, SerializeAsAny, TypeAdapter, field_serializer, field_validator, model_validator

from rft.algorithms import ALGORITHMS, Algorithm
from rft.config.base import ConfigModel
from rft.config.data import DataConfig
from rft.config.learner import LearnerConfig
from rft.config.metrics import GuardsConfig, TrackingConfig
from rft.config.rewards import RewardsConfig
from rft.config.rollout import RolloutConfig
from rft.config.sync import SyncConfig
from rft.utils.did_you_mean import did_you_mean_or_list
from rft.utils.paths import PathText


class ModelConfig(ConfigModel):
    """The policy."""

    path: PathText = Field(
        "tiny", description="Hugging Face folder or hub name; `tiny`: a small model made on the spot"
    )
    reference: PathText | None = Field(
        None,
        description="folder or hub name of the reference model (none: the model that the run starts from)",
    )
    tokenizer: PathText | None = Field(
        None, description="folder or hub name of the tokenizer (none: the model's)"
    )
    options: dict[str, Any] = Field({}, description="sizes of the `tiny` model (see rft.tasks.tiny)")
    trust_remote_code: bool = Field(False, description="run Python code that comes with the model")


class CurriculumConfig(ConfigModel):
    """Sample prompts by how often the policy solves them."""

    explore: float = Field(
        0.3, gt=0, le=1, description="share of the prompts that come in the plain shuffled order instead"
    )
    target: float = Field(0.5, gt=0, lt=1, description="pass rate that is sampled most")
    floor: float = Field(
        0.05, gt=0, le=1, description="chance of a prompt that is always or never solved, over the best one's"
    )
    rate: float = Field(0.5, gt=0, le=1, description="weight of a new measurement over the earlier ones")
    rest: int = Field(64, ge=0, description="draws before a prompt may come again out of turn")


class TrainConfig(ConfigModel):
    """How much is trained on."""

    steps: int = Field(100, ge=1, description="training steps")
    batch_size: int = Field(32, ge=1, description="prompts (online) or rows (offline) per step")
    num_generations: int = Field(8, ge=1, description="completions per prompt (online)")
    num_iterations: int = Field(1, ge=1, description="passes over each step's batch")
    minibatches: int = Field(1, ge=1, description="optimizer updates per pass; must divide batch_size")
    curriculum: CurriculumConfig | None = Field(
        None, description="prefer prompts that the policy solves now and then (none: plain shuffled order)"
    )
    max_filtered: int = Field(
        10,
        ge=1,
        description="batches of groups in a row that may be dropped without a learning signal (filtered, or "
        "not judged) before the run stops; a kept group starts the count anew",
    )
    stop_grace_s: float = Field(
        600,
        gt=0,
        description="seconds that a requested stop (a signal) may take to finish the step and save; past "
        "them the run ends at once, and its last complete checkpoint stands",
    )

    @model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        if self.batch_size % self.minibatches:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split into {self.minibatches} equal minibatches; "
                "choose minibatches that divide it"
            )
        return self


class EvalConfig(ConfigModel):
    """Held-out evaluation: completions scored by the run's own rewards; offline, the loss on examples."""

    every: int = Field(
        20, ge=0, description="steps between evaluations, besides the first and last (0: none)"
    )
    problems: int = Field(512, ge=1, description="held-out problems, or rows of an offline run")
    samples: int = Field(
        4, ge=1, description="samples per problem; accuracy is their mean, pass@k their best"
    )
    temperature: float = Field(1.0, gt=0, description="temperature of the samples")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus of the samples")
    greedy: bool = Field(True, description="measure greedy accuracy too")
    generate: bool = Field(
        False, description="offline: sample completions of held-out prompts too, scored by the run's rewards"
    )


class CheckpointConfig(ConfigModel):
    """Saving, so that a killed run goes on where it was."""

    every: int = Field(
        50, ge=0, description="steps between checkpoints, besides the last (0: only on a stop)"
    )
    keep: int = Field(2, ge=1, description="checkpoints kept")
    background: bool = Field(
        True, description="write while training goes on; costs a second copy of the learner's state"
    )
    max_failures: int = Field(
        3, ge=0, description="checkpoints in a row that may fail (a full disk) before the run stops"
    )


class RayConfig(ConfigModel):
    """The Ray cluster."""

    address: str | None = Field(None, description="an existing cluster's address (none: start one here)")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="what the cluster's nodes compute on (auto: what this machine has)"
    )
    object_store_gib: float = Field(0.5, gt=0, description="shared memory of a cluster started here")


class WarmStartConfig(ConfigModel):
    """A supervised stage before the run, by the same learner; its result is cached."""

    steps: int = Field(500, ge=1, description="training steps")
    batch_size: int = Field(64, ge=1, description="demonstrations per step")
    data: DataConfig | None = Field(None, description="demonstrations (none: the run's own data)")
    learner: LearnerConfig = Field(LearnerConfig(learning_rate=1e-3), description="optimizer of this stage")
    cache: PathText = Field("runs/.cache", description="folder where finished warm starts are kept")


class Config(ConfigModel):
    """A run."""

    name: str = Field(
        "run", pattern=r"^[\w.\-]*[\w\-][\w.\-]*$", description="name of the run, and of its folder"
    )
    output_dir: PathText = Field("runs", description="where run folders are")
    seed: int = Field(1, ge=0, description="seed of the model, the data order and the sampling")
    algorithm: SerializeAsAny[Algorithm] = Field(description="name and settings of the algorithm")
    model: ModelConfig = Field(ModelConfig(), description="the policy")
    warm_start: WarmStartConfig | None = Field(None, description="supervised stage before the run")
    data: DataConfig = Field(DataConfig(), description="prompts or examples")
    rewards: RewardsConfig = Field(RewardsConfig(), description="reward functions; a list is short for it")
    train: TrainConfig = Field(TrainConfig(), description="how much is trained on")
    rollout: RolloutConfig = Field(RolloutConfig(), description="the engines that sample")
    learner: LearnerConfig = Field(LearnerConfig(), description="the optimizer and its memory")
    sync: SyncConfig = Field(SyncConfig(), description="weights from learner to engines")
    eval: EvalConfig = Field(EvalConfig(), description="held-out evaluation")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="checkpoints")
    tracking: TrackingConfig = Field(TrackingConfig(), description="metrics, samples, trackers")
    guards: GuardsConfig = Field(GuardsConfig(), description="warnings about a run that goes wrong")
    ray: RayConfig = Field(RayConfig(), description="the Ray cluster")

    @field_validator("algorithm", mode="before")
    @classmethod
    def _build_algorithm(cls, value: Any) -> Any:
        return value if isinstance(value, Algorithm) else build_algorithm(value)

    @field_validator("rewards", mode="before")
    @classmethod
    def _list_of_rewards(cls, value: Any) -> Any:
        return list_as_functions(value)

    @field_serializer("algorithm")
    def _name_algorithm(self, value: Algorithm) -> dict[str, Any]:
        return {"name": algorithm_name(value), **dataclasses.asdict(value)}

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    def to_dict(self) -> dict[str, Any]:
        """The whole tree as plain JSON-able data."""
        return self.model_dump(mode="json")


def list_as_functions(rewards: Any) -> Any:
    """The section `rewards` where a plain list of functions is given for it."""
    return {"functions": rewards} if isinstance(rewards, list) else rewards


def algorithm_name(algorithm: Algorithm) -> str:
    """The registered name of an algorithm."""
    return next(name for name, kind in ALGORITHMS.items() if type(algorithm) is kind)


def build_algorithm(value: Any) -> Algorithm:
    """`"grpo"` or `{"name": "grpo", "beta": 0.01}` -> the algorithm. Raises ValueError."""
    if isinstance(value, str):
        value = {"name": value}
    if not isinstance(value, Mapping) or "name" not in value:
        raise ValueError('write a name, or {name: grpo, ...}; "name" is missing')
    settings = {k: v for k, v in value.items() if k != "name"}
    kind = ALGORITHMS.get(value["name"])
    if kind is None:
        raise ValueError(
            f"unknown algorithm {value['name']!r}{did_you_mean_or_list(value['name'], ALGORITHMS)}"
        )
    known = [f.name for f in dataclasses.fields(kind)]
    for key in settings:
        if key not in known:
            raise ValueError(f"{value['name']} has no setting {key!r}{did_you_mean_or_list(key, known)}")
    return TypeAdapter(kind).validate_python(settings)
