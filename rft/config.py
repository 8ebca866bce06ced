"""The one config tree: typed, frozen, validated once, never mutated.

`load_config(path, overrides)` reads YAML (laid over the file that its `base` names), applies
`key.sub=value` overrides and validates; every problem is reported at once, each with the key it is
about and, for an unknown key, the nearest right one. The sections stand beside the code that they
configure.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import (
    Field,
    SerializeAsAny,
    TypeAdapter,
    ValidationError,
    field_serializer,
    field_validator,
    model_validator,
)

from rft.algorithms import ALGORITHMS, Algorithm
from rft.data.config import DataConfig
from rft.data.curriculum import CurriculumConfig
from rft.learner.config import LearnerConfig
from rft.metrics.config import GuardsConfig, TrackingConfig
from rft.rewards.config import RewardsConfig
from rft.rollout.config import RolloutConfig
from rft.section import Section
from rft.spelling import nearest_or_all
from rft.sync.config import SyncConfig
from rft.utils import yaml_files
from rft.utils.paths import PathText, expand


class ConfigError(ValueError):
    """The config is wrong; `problems` lists everything at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class ModelConfig(Section):
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


class TrainConfig(Section):
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


class EvalConfig(Section):
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


class CheckpointConfig(Section):
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


class RayConfig(Section):
    """The Ray cluster."""

    address: str | None = Field(None, description="an existing cluster's address (none: start one here)")
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="what the cluster's nodes compute on (auto: what this machine has)"
    )
    object_store_gib: float = Field(0.5, gt=0, description="shared memory of a cluster started here")


class WarmStartConfig(Section):
    """A supervised stage before the run, by the same learner; its result is cached."""

    steps: int = Field(500, ge=1, description="training steps")
    batch_size: int = Field(64, ge=1, description="demonstrations per step")
    data: DataConfig | None = Field(None, description="demonstrations (none: the run's own data)")
    learner: LearnerConfig = Field(LearnerConfig(learning_rate=1e-3), description="optimizer of this stage")
    cache: PathText = Field("runs/.cache", description="folder where finished warm starts are kept")


class Config(Section):
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
        return _list_as_functions(value)

    @field_serializer("algorithm")
    def _name_algorithm(self, value: Algorithm) -> dict[str, Any]:
        return {"name": algorithm_name(value), **dataclasses.asdict(value)}

    @property
    def run_dir(self) -> Path:
        return Path(self.output_dir) / self.name

    def to_dict(self) -> dict[str, Any]:
        """The whole tree as plain JSON-able data."""
        return self.model_dump(mode="json")


def _list_as_functions(rewards: Any) -> Any:
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
        raise ValueError(f"unknown algorithm {value['name']!r}{nearest_or_all(value['name'], ALGORITHMS)}")
    known = [f.name for f in dataclasses.fields(kind)]
    for key in settings:
        if key not in known:
            raise ValueError(f"{value['name']} has no setting {key!r}{nearest_or_all(key, known)}")
    return TypeAdapter(kind).validate_python(settings)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and validate a config. Raises ConfigError with every problem found."""
    return parse_config(apply_overrides(_read(Path(path), ()), overrides))


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """A YAML file laid over its `base`, if it names one (a path relative to its own folder)."""
    if path.resolve() in above:
        raise ConfigError([f"config {path}: its `base` leads back to itself"])
    try:
        raw = yaml_files.read(path)
        raw = {} if raw is None else raw
    except OSError as error:
        raise ConfigError([f"config {path}: {error.strerror or error}"]) from None
    except yaml_files.YamlError as error:
        raise ConfigError([f"config {path} is not valid YAML: {error}"]) from None
    if not isinstance(raw, dict):
        raise ConfigError([f"config {path} must be a mapping of keys to values"])
    base = raw.pop("base", None)
    if base is None:
        return raw
    if not isinstance(base, str):
        raise ConfigError([f"config {path}: base must be the path of one YAML file, got {base!r}"])
    try:
        below = path.parent / expand(base)
    except ValueError as error:
        raise ConfigError([f"config {path}: base: {error}"]) from None
    return _laid_over(_read(below, (*above, path.resolve())), raw)


def _laid_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Sections merge key by key; all else replaces, an `algorithm` whole: its settings are its own."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(under, dict) and isinstance(value, dict) and key != "algorithm":
            value = _laid_over(under, value)
        merged[key] = value
    return merged


def parse_config(raw: Mapping[str, Any]) -> Config:
    """Validate plain data. Raises ConfigError with every problem found."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError([_explain(e) for e in error.errors()]) from None


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """`a.b=value` into a copy of `raw`; values are YAML, a number is an index into a list.

    Raises ConfigError with every override that is malformed or leads nowhere.
    """
    result: dict[str, Any] = deepcopy(dict(raw))
    problems = []
    for override in overrides:
        try:
            _apply(result, override)
        except ValueError as error:
            problems.append(f"override {override!r}: {error}")
    if problems:
        raise ConfigError(problems)
    return result


def _apply(raw: dict[str, Any], override: str) -> None:
    """Put one override into `raw`. Raises ValueError saying what is wrong with it."""
    key, equals, text = override.partition("=")
    keys = key.split(".")
    if not equals or not all(part and part == part.strip() for part in keys):
        raise ValueError("write key.sub=value, without empty parts or spaces in the key")
    value = yaml_files.parse(text)
    if keys[0] == "rewards" and len(keys) > 1:
        raw["rewards"] = _list_as_functions(raw.get("rewards")) or {}
        keys[1:1] = ["functions"] if keys[1].isdecimal() else []
    node: Any = raw
    for i, part in enumerate(keys[:-1]):
        child, where = _entry(node, part, keys[:i]), ".".join(keys[: i + 1])
        if child is None:
            if keys[i + 1].isdecimal():
                raise ValueError(f"{where} is not set, so it has no entry {keys[i + 1]}; give the whole list")
            child = {}
        if isinstance(child, str) and keys[: i + 1] == ["algorithm"]:
            child = {"name": child}
        if not isinstance(child, dict | list):
            raise ValueError(f"{where} is not a section (it is {child!r:.40})")
        node[int(part) if isinstance(node, list) else part] = child
        node = child
    _entry(node, keys[-1], keys[:-1])  # refuses an index that is out of range
    node[int(keys[-1]) if isinstance(node, list) else keys[-1]] = value


def _entry(node: dict[str, Any] | list[Any], part: str, above: Sequence[str]) -> Any:
    """What a section or list holds under `part`; None where a section lacks it. Raises ValueError for
    an index that the list does not have."""
    if isinstance(node, dict):
        return node.get(part)
    where = ".".join(above)
    if not part.isdecimal():
        raise ValueError(f"{where} is a list: write the number of an entry after it, as in {where}.0")
    if int(part) >= len(node):
        have = f"its entries are 0 to {len(node) - 1}" if node else "it is empty"
        raise ValueError(f"{where} has no entry {part}: {have}")
    return node[int(part)]


def _explain(error: Any) -> str:
    """One pydantic error as `key: what is wrong, what to write instead`."""
    location = [str(part) for part in error["loc"]]
    where = ".".join(location) or "config"
    if error["type"] == "extra_forbidden":
        section = _section_at(location[:-1])
        hint = nearest_or_all(location[-1], section.model_fields) if section else ""
        return f"{where}: unknown key{hint}"
    if error["type"] == "missing":
        return f"{where}: required, but not given"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{where}: {message[0].lower() + message[1:]}{shown}"


def _section_at(location: Sequence[str]) -> type[Section] | None:
    """The section class at a path of keys."""
    section: type[Section] | None = Config
    for part in location:
        if section is None:
            return None
        if part in section.model_fields:
            section = _section_of(section.model_fields[part].annotation)
    return section


def _section_of(annotation: Any) -> type[Section] | None:
    for kind in (annotation, *(a for arg in get_args(annotation) for a in (arg, *get_args(arg)))):
        if isinstance(kind, type) and issubclass(kind, Section):
            return kind
    return None


def describe_fields(section: type[Section] = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """(key, default, description) of every field in the tree, in order."""
    for name, info in section.model_fields.items():
        child = _section_of(info.annotation)
        required = info.is_required()
        default = None if required else info.get_default(call_default_factory=True)
        if child is not None and not isinstance(default, list | tuple):
            yield f"{prefix}{name}", "none" if default is None else "", info.description or ""
            yield from describe_fields(child, f"{prefix}{name}.")
        else:
            shown = "required" if required else yaml_files.dump(default, flow=True)
            yield (
                f"{prefix}{name}",
                shown.removesuffix("\n").removesuffix("...").strip(),
                info.description or "",
            )


def fingerprint(config: Mapping[str, Any]) -> str:
    """A short hash of plain config data."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """(key, old value, new value) wherever two plain configs differ."""
    found = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append((f"{prefix}{key}", a, b))
    return found


Resume = Literal["auto", "never"]
