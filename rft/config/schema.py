"""Root config and its remaining sections: validated once, immutable."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from pydantic import Field, SerializeAsAny, TypeAdapter, field_serializer, field_validator, model_validator

from rft.algorithms import ALGORITHMS, Algorithm
from rft.config.base import ConfigModel
from rft.config.data import DataConfig
from rft.config.environment import EnvironmentConfig
from rft.config.evaluation import EvalConfig
from rft.config.learner import LearnerConfig
from rft.config.metrics import GuardsConfig, TrackingConfig
from rft.config.rewards import RewardsConfig, list_as_functions
from rft.config.rollout import RolloutConfig
from rft.config.sync import SyncConfig
from rft.config.teacher import TeacherConfig
from rft.utils.did_you_mean import did_you_mean_or_list
from rft.utils.dotted import load_dotted
from rft.utils.paths import PathText


class ModelConfig(ConfigModel):
    """The policy."""

    path: PathText = Field(
        "tiny",
        description="Hugging Face model folder, hub name, or GGUF file; `smollm2`: SmolLM2-135M-Instruct "
        "from a Python package; `tiny`: a small random model built on the fly",
    )
    reference: PathText | None = Field(
        None,
        description="the reference model, named as in `path` (none: the initial policy)",
    )
    tokenizer: PathText | None = Field(
        None, description="folder or hub name of the tokenizer, named as in `path` (none: that of the model)"
    )
    options: dict[str, Any] = Field({}, description="sizes of the `tiny` model (see rft.tasks.tiny)")
    trust_remote_code: bool = Field(False, description="run Python code shipped with the model")


class CurriculumConfig(ConfigModel):
    """Curriculum: sample prompts by the policy's pass rate on them."""

    explore: float = Field(0.3, gt=0, le=1, description="fraction of prompts taken in shuffled order instead")
    target: float = Field(0.5, gt=0, lt=1, description="pass rate sampled most often")
    floor: float = Field(
        0.05,
        gt=0,
        le=1,
        description="sampling weight of an always or never solved prompt, relative to the highest weight",
    )
    rate: float = Field(0.5, gt=0, le=1, description="weight of a new pass rate in the moving average")
    rest: int = Field(64, ge=0, description="minimum draws before the curriculum repeats a prompt")
    model: Literal["average", "beta"] = Field(
        "average",
        description="average: of measured pass rates; beta: a posterior of each prompt's pass rate, from "
        "which "
        "unmeasured prompts are drawn too (MoPPS)",
    )
    decay: float = Field(
        0.5,
        ge=0,
        le=1,
        description="beta: weight of earlier measurements at a new one, since the policy changes",
    )
    candidates: int = Field(16, ge=1, description="beta: random prompts of which the best one is drawn")
    allocate: bool = Field(
        False,
        description="sample more completions of prompts whose rewards vary more, num_generations on average",
    )


class TrainConfig(ConfigModel):
    """Training steps and batch sizes."""

    steps: int = Field(100, ge=1, description="number of training steps")
    batch_size: int = Field(32, ge=1, description="prompts (online) or rows (offline) per step")
    num_generations: int = Field(8, ge=1, description="completions per prompt (online)")
    num_iterations: int = Field(1, ge=1, description="passes over each step's batch")
    minibatches: int = Field(1, ge=1, description="optimizer updates per pass; must divide batch_size")
    curriculum: CurriculumConfig | None = Field(
        None, description="prefer prompts of intermediate pass rate (none: shuffled order)"
    )
    max_filtered: int = Field(
        10,
        ge=1,
        description="consecutive batches of groups without a learning signal (filtered, or not scored) "
        "before the run stops; a kept group resets the count",
    )
    stop_grace_s: float = Field(
        600,
        gt=0,
        description="grace period of a stop signal, in seconds, to finish the step and save a checkpoint; "
        "after it the run ends immediately, with its last complete checkpoint",
    )

    @model_validator(mode="after")
    def _divides(self) -> TrainConfig:
        if self.batch_size % self.minibatches:
            raise ValueError(
                f"batch_size {self.batch_size} cannot be split into {self.minibatches} equal minibatches; "
                "choose minibatches that divide it"
            )
        return self


class CheckpointConfig(ConfigModel):
    """Checkpoints, from which an interrupted run resumes."""

    every: int = Field(
        50, ge=0, description="interval between checkpoints, in steps, besides the last (0: only on a stop)"
    )
    keep: int = Field(2, ge=1, description="number of checkpoints kept")
    background: bool = Field(
        True,
        description="write checkpoints while training continues; needs a second copy of the learner state",
    )
    max_failures: int = Field(
        3, ge=0, description="consecutive failed checkpoints (e.g. disk full) tolerated before the run stops"
    )


class RayConfig(ConfigModel):
    """The Ray cluster."""

    address: str | None = Field(None, description="address of an existing cluster (none: start a local one)")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="device of the cluster's nodes (auto: cuda if this machine has a GPU, else cpu)"
    )
    object_store_gib: float = Field(0.5, gt=0, description="object store of a local cluster, in GiB")


class WarmStartConfig(ConfigModel):
    """Supervised fine-tuning stage before the run; its result is cached."""

    steps: int = Field(500, ge=1, description="number of training steps")
    batch_size: int = Field(64, ge=1, description="demonstrations per step")
    data: DataConfig | None = Field(None, description="demonstrations (none: the run's `data`)")
    learner: LearnerConfig = Field(LearnerConfig(learning_rate=1e-3), description="learner of this stage")
    cache: PathText = Field("runs/.cache", description="cache folder of finished warm starts")


class _RaisesConfigError(type(ConfigModel)):  # type: ignore[misc]
    """Metaclass of the root config: its constructor raises ConfigError, as loading a file does."""

    if not TYPE_CHECKING:  # so that the constructor keeps its types

        def __call__(cls, **sections: Any) -> Any:
            return load_dotted("rft.config.load.parse_config")(sections)


class Config(ConfigModel, metaclass=_RaisesConfigError):
    """Config of a run: one field per section. Raises ConfigError with all problems."""

    name: str = Field(
        "run", pattern=r"^[\w.\-]*[\w\-][\w.\-]*$", description="name of the run and of its folder"
    )
    output_dir: PathText = Field("runs", description="parent folder of run folders")
    seed: int = Field(1, ge=0, description="random seed of model initialisation, data order and sampling")
    algorithm: SerializeAsAny[Algorithm] = Field(description="name and settings of the algorithm")
    model: ModelConfig = Field(ModelConfig(), description="policy, reference and tokenizer")
    teacher: TeacherConfig | None = Field(
        None, description="a reference model behind an endpoint (none: `model.reference`, in the learner)"
    )
    warm_start: WarmStartConfig | None = Field(None, description="supervised fine-tuning before the run")
    data: DataConfig = Field(DataConfig(), description="dataset of the run")
    rewards: RewardsConfig = Field(
        RewardsConfig(), description="reward functions; a list is shorthand for `functions`"
    )
    environment: EnvironmentConfig | None = Field(
        None, description="the multi-turn environment of the policy (none: one completion per prompt)"
    )
    train: TrainConfig = Field(TrainConfig(), description="training steps and batch sizes")
    rollout: RolloutConfig = Field(RolloutConfig(), description="rollout engines and sampling")
    learner: LearnerConfig = Field(LearnerConfig(), description="optimizer, parallelism and memory")
    sync: SyncConfig = Field(SyncConfig(), description="weight sync from learner to engines")
    eval: EvalConfig = Field(EvalConfig(), description="held-out evaluation")
    checkpoint: CheckpointConfig = Field(CheckpointConfig(), description="checkpoints")
    tracking: TrackingConfig = Field(TrackingConfig(), description="trackers, logged completions and display")
    guards: GuardsConfig = Field(GuardsConfig(), description="training-health checks")
    ray: RayConfig = Field(RayConfig(), description="the Ray cluster")

    @field_validator("algorithm", mode="before")
    @classmethod
    def _build_algorithm(cls, value: Any) -> Any:
        if isinstance(value, Algorithm):  # check the types and bounds of its settings as well
            value = {"name": algorithm_name(value), **dataclasses.asdict(value)}
        return build_algorithm(value)

    @field_validator("rewards", mode="before")
    @classmethod
    def _list_of_rewards(cls, value: Any) -> Any:
        return list_as_functions(value)

    @field_serializer("algorithm")
    def _name_algorithm(self, value: Algorithm) -> dict[str, Any]:
        return {"name": algorithm_name(value), **dataclasses.asdict(value)}

    @classmethod
    def load(cls, path: str | Path, *overrides: str) -> Self:
        """Read a YAML file and apply overrides `key.sub=value`. Raises ConfigError with all problems."""
        config: Self = load_dotted("rft.config.load.load_config")(path, overrides)
        return config

    def replace(self, changes: Mapping[str, Any]) -> Self:
        """Return a config with other values, by key: `{"train.steps": 60, "learner.threads": 2}`.

        Raises ConfigError with all problems.
        """
        config: Self = load_dotted("rft.config.load.replace")(self, changes)
        return config

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.output_dir) / self.name

    @property
    def environments(self) -> dict[str, EnvironmentConfig]:
        """Return the environments of the run: "" is the section `environment`, a name one of a source of
        `data.mixture`."""
        section = {} if self.environment is None else {"": self.environment}
        sources = self.data.mixture.items()
        return section | {name: s.environment for name, s in sources if s.environment is not None}

    @property
    def single_turn(self) -> list[str]:
        """Return the sources whose rows have one completion each, without an environment; "" for all rows."""
        if self.environment is not None:
            return []
        return [name for name, s in self.data.mixture.items() if s.environment is None] or (
            [] if self.data.mixture else [""]
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON-serialisable data."""
        return self.model_dump(mode="json")


def algorithm_name(algorithm: Algorithm) -> str:
    """Return the registered name of an algorithm. Raises ValueError if it has none."""
    for name, kind in ALGORITHMS.items():
        if type(algorithm) is kind:
            return name
    raise ValueError(f"{type(algorithm).__name__} is not registered: add it to rft.algorithms.ALGORITHMS")


def build_algorithm(value: Any) -> Algorithm:
    """Build an algorithm from its name, or from `{"name": "grpo", "beta": 0.01}`. Raises ValueError."""
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
