"""Turn the arguments of the Python API into a config, and rows in memory into files that it names."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypedDict

from rft.algorithms import Algorithm
from rft.config.base import ConfigModel
from rft.config.data import DataConfig
from rft.config.environment import EnvironmentConfig
from rft.config.learner import LearnerConfig
from rft.config.load import (
    apply_change,
    environment_with_objects,
    merge,
    parse_config,
    read_config,
    with_objects,
)
from rft.config.metrics import GuardsConfig, TrackingConfig
from rft.config.rewards import RewardConfig, RewardsConfig
from rft.config.rollout import RolloutConfig
from rft.config.schema import (
    CheckpointConfig,
    Config,
    EvalConfig,
    ModelConfig,
    RayConfig,
    TrainConfig,
    WarmStartConfig,
)
from rft.config.sync import SyncConfig
from rft.config.teacher import TeacherConfig
from rft.errors import ConfigError
from rft.run_dir import DATA_FOLDER
from rft.utils.did_you_mean import did_you_mean_or_list
from rft.utils.paths import expand

Section: TypeAlias = Mapping[str, Any]
Rows: TypeAlias = Sequence[Mapping[str, Any]]
"""Rows in memory: a list of dicts, or a `datasets.Dataset`."""
ConfigArgument: TypeAlias = Config | Section | str | os.PathLike[str]
ModelArgument: TypeAlias = str | os.PathLike[str] | ModelConfig | Section
DataArgument: TypeAlias = Rows | str | os.PathLike[str] | DataConfig | Section
RewardArgument: TypeAlias = str | Callable[..., Any] | RewardConfig | Section
RewardsArgument: TypeAlias = RewardArgument | Sequence[RewardArgument] | RewardsConfig
AlgorithmArgument: TypeAlias = Algorithm | str | Section
EnvironmentArgument: TypeAlias = Callable[..., Any] | EnvironmentConfig | Section
ToolArgument: TypeAlias = str | Callable[..., Any]


class Sections(TypedDict, total=False):
    """Further arguments: the sections of the config, and shorthands for single keys."""

    name: str
    output_dir: str
    seed: int
    warm_start: WarmStartConfig | Section
    train: TrainConfig | Section
    rollout: RolloutConfig | Section
    learner: LearnerConfig | Section
    sync: SyncConfig | Section
    eval: EvalConfig | Section
    checkpoint: CheckpointConfig | Section
    tracking: TrackingConfig | Section
    guards: GuardsConfig | Section
    ray: RayConfig | Section
    teacher: TeacherConfig | Section
    steps: int
    batch_size: int
    num_generations: int
    learning_rate: float
    temperature: float
    max_prompt_length: int
    max_completion_length: int


SHORTHANDS = {
    "steps": "train.steps",
    "batch_size": "train.batch_size",
    "num_generations": "train.num_generations",
    "learning_rate": "learner.learning_rate",
    "temperature": "rollout.sampling.temperature",
    "max_prompt_length": "rollout.sampling.max_prompt_length",
    "max_completion_length": "rollout.sampling.max_completion_length",
}
"""Shorthand arguments, and the config key that each one sets."""

# Keys of `data` that say where rows come from.
_SOURCE = ("kind", "path", "eval_path", "split", "eval_split", "subset", "revision", "task", "options",
           "holdout", "streaming", "mixture", "mixing", "mixing_temperature")  # fmt: skip


@dataclass(frozen=True)
class Arguments:
    """The named arguments that `train`, `evaluate` and `check` share; None: as the config says."""

    model: ModelArgument | None = None
    data: DataArgument | None = None
    eval_data: DataArgument | None = None
    rewards: RewardsArgument | None = None
    algorithm: AlgorithmArgument | None = None
    environment: EnvironmentArgument | None = None
    tools: Sequence[ToolArgument] = ()
    sections: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Resolved:
    """A config, and the files that it names and that have to be written first."""

    config: Config
    files: dict[Path, bytes]


def resolve(config: ConfigArgument | None, arguments: Arguments) -> Resolved:
    """Lay the arguments over a config. Raises ConfigError with all problems."""
    raw = _plain(config)
    _lay_over(raw, arguments.sections)
    if arguments.model is not None:
        named = isinstance(arguments.model, str | os.PathLike)
        merge(raw, "model", {"path": os.fspath(arguments.model)} if named else as_plain(arguments.model))  # type: ignore[arg-type]
    _lay_environment(raw, arguments)
    if arguments.algorithm is not None:
        raw["algorithm"] = arguments.algorithm
    if arguments.rewards is not None:
        merge(raw, "rewards", _rewards(arguments.rewards))
    files: dict[Path, bytes] = {}
    run_dir = Path(expand(str(raw.get("output_dir", "runs")))) / str(raw.get("name", "run"))
    for key, rows in _lay_data(raw, arguments.data, arguments.eval_data).items():
        kind = "eval" if key == "eval_path" else "train"
        content = json_lines(rows, "eval_data" if kind == "eval" else "data")
        path = run_dir / DATA_FOLDER / f"{kind}-{hashlib.sha256(content).hexdigest()[:16]}.jsonl"
        files[path] = content
        raw["data"][key] = str(path)
    made = parse_config(raw)
    if isinstance(config, Config):
        made = with_objects(made, config)
    if isinstance(arguments.environment, EnvironmentConfig) and made.environment is not None:
        environment = environment_with_objects(made.environment, arguments.environment)
        made = made.model_copy(update={"environment": environment})
    return Resolved(made, files)


def _lay_environment(raw: dict[str, Any], arguments: Arguments) -> None:
    """Lay the environment and the tools over the section `environment`, in place. Raises ConfigError."""
    given, tools = arguments.environment, arguments.tools
    if isinstance(given, str | os.PathLike):
        raise ConfigError([f"environment: pass the class or function, or {{'kind': ..., 'path': {given!r}}}"])
    if callable(given) and not isinstance(given, ConfigModel):
        given = {"path": given}
    if tools:
        if isinstance(tools, str) or callable(tools):
            raise ConfigError(["tools: pass a list of functions, or of names of built-in tools"])
        given = {**(as_plain(given) or {}), "tools": list(tools)}
    if given is not None:
        merge(raw, "environment", as_plain(given))


def _plain(config: ConfigArgument | None) -> dict[str, Any]:
    if config is None:
        return {}
    if isinstance(config, Config):
        return config.to_dict()
    if isinstance(config, str | os.PathLike):
        return read_config(Path(config))
    if isinstance(config, Mapping):
        return {key: as_plain(value) for key, value in config.items()}
    raise ConfigError([f"config: expected a Config, a dict or the path of a YAML file, got {_kind(config)}"])


def as_plain(value: Any) -> Any:
    """Return a value of the config as plain data, copied; of a typed section, the keys that were given.

    A `RewardConfig` is kept unchanged, with the function that was passed.
    """
    if isinstance(value, RewardConfig):
        return value
    if isinstance(value, RewardsConfig):
        return {**value.model_dump(exclude_unset=True), "functions": list(value.functions)}
    if isinstance(value, ConfigModel):
        return value.model_dump(exclude_unset=True)
    if isinstance(value, Mapping):
        return {key: as_plain(part) for key, part in value.items()}
    return [*map(as_plain, value)] if isinstance(value, list | tuple) else value


def _lay_over(raw: dict[str, Any], sections: Mapping[str, Any]) -> None:
    """Lay sections, shorthands and dotted keys over a plain config, in place. Raises ConfigError."""
    known = [*Config.model_fields, *SHORTHANDS]
    problems = []
    given = {SHORTHANDS.get(name, name): name for name in sections}
    for name, value in sections.items():
        key = SHORTHANDS.get(name, name)
        section, _, rest = key.partition(".")
        if section not in Config.model_fields:
            problems.append(f"{name}: unknown argument{did_you_mean_or_list(name, known)}")
        elif given[key] != name or (rest and _holds(as_plain(sections.get(section)), rest)):
            problems.append(f"{name}: {key} is given twice; write it once")
        elif not rest:
            merge(raw, key, as_plain(value))
    for name, value in sections.items():
        key = SHORTHANDS.get(name, name)
        if "." in key and not problems:
            try:
                apply_change(raw, key, value)
            except ValueError as error:
                problems.append(f"{key}: {error}")
    if problems:
        raise ConfigError(problems)


def _holds(section: Any, key: str) -> bool:
    """Whether a section has a value at a dotted key."""
    for part in key.split("."):
        if not isinstance(section, Mapping) or part not in section:
            return False
        section = section[part]
    return True


def _rewards(rewards: RewardsArgument) -> Any:
    if isinstance(rewards, RewardsConfig):
        return as_plain(rewards)
    if isinstance(rewards, Mapping):
        return {"functions": [rewards]} if "function" in rewards else dict(rewards)
    return {"functions": list(rewards) if isinstance(rewards, list | tuple) else [rewards]}


# -- data ----------------------------------------------------------------------------------------------


def _lay_data(raw: dict[str, Any], data: Any, eval_data: Any) -> dict[str, Any]:
    """Lay both data arguments over the section `data`, in place; returns rows in memory by their key."""
    rows: dict[str, Any] = {}
    if data is not None:
        splits = _splits(data)
        if splits is not None:
            data = splits["train"]
            eval_data = splits.get("test") if eval_data is None else eval_data
        source, more = _source(data, "data")
        section = dict(raw.get("data") or {})
        if source is not None:  # rows from elsewhere: how they are read (columns, template, ...) stays
            section = {key: value for key, value in section.items() if key not in _SOURCE}
        raw["data"] = section
        merge(raw, "data", more)
        _put(raw["data"], rows, "path", source)
    if eval_data is not None:
        source, more = _source(eval_data, "eval_data")
        if more:
            raise ConfigError(["eval_data: pass rows or a path; options for reading them belong under data"])
        raw["data"] = dict(raw.get("data") or {})
        _put(raw["data"], rows, "eval_path", source)
    return rows


def _put(section: dict[str, Any], rows: dict[str, Any], key: str, source: Any) -> None:
    if isinstance(source, str):
        section[key] = source
    elif source is not None:
        rows[key] = source


def _splits(data: Any) -> Mapping[str, Any] | None:
    """Return the training and test split of a `DatasetDict`; None for anything else."""
    datasets = sys.modules.get("datasets")
    if datasets is None or not isinstance(data, datasets.DatasetDict):
        return None
    test = next((name for name in ("test", "validation") if name in data), None)
    if "train" not in data:
        have = ", ".join(map(str, data))
        raise ConfigError([f"data: the DatasetDict has no split 'train' ({have}): pass one of its datasets"])
    return {"train": data["train"], **({} if test is None else {"test": data[test]})}


def _source(data: Any, argument: str) -> tuple[Any, Section]:
    """Return where rows come from (rows, a path, or None: as the section says), and further keys."""
    if isinstance(data, str | os.PathLike):
        return os.fspath(data), {}
    if isinstance(data, ConfigModel):
        return None, as_plain(data)
    if isinstance(data, Mapping):
        more = dict(data)
        rows = more.pop("rows", None)
        return (None if rows is None else _checked(rows, f"{argument}['rows']")), more
    return _checked(data, argument), {}


def _checked(rows: Any, argument: str) -> Any:
    """Return rows in memory. Raises ConfigError for anything else."""
    datasets = sys.modules.get("datasets")
    if datasets is not None and isinstance(rows, datasets.Dataset):
        return rows
    if isinstance(rows, list | tuple):
        return rows
    remedy = "pass a list of dicts, a datasets.Dataset, a DatasetDict, or a path"
    if datasets is not None and isinstance(rows, datasets.IterableDataset):
        remedy = (
            "it has no end that a resumed run could return to: pass list(data.take(10_000)), or a path with "
            'data={"path": ..., "streaming": True}'
        )
    elif hasattr(rows, "to_dict"):
        remedy = 'pass its rows: data.to_dict("records")'
    raise ConfigError([f"{argument}: {_kind(rows)} cannot be saved with the run; {remedy}"])


def json_lines(rows: Any, argument: str) -> bytes:
    """Return rows as JSON lines, in UTF-8. Raises ConfigError for values that JSON cannot hold."""
    lines = []
    for number, row in enumerate(_each(rows), 1):
        if not isinstance(row, Mapping):
            raise ConfigError([f"{argument}, row {number}: must be a dict of columns, not {_kind(row)}"])
        try:
            lines.append(json.dumps(row, ensure_ascii=False, default=_number))
        except (TypeError, ValueError) as error:
            column = next((name for name, value in row.items() if not _is_json(value)), "")
            raise ConfigError(
                [
                    f"{argument}, row {number}, column {column!r}: {error}; rows are saved as JSON lines: "
                    "convert the column to text or numbers, or leave it out"
                ]
            ) from None
    if not lines:
        raise ConfigError([f"{argument}: no rows were given; pass at least one"])
    return ("\n".join(lines) + "\n").encode("utf-8", "surrogatepass")


def _each(rows: Any) -> Iterator[Any]:
    """Yield the rows of a list, or of a Dataset as plain Python values."""
    if isinstance(rows, list | tuple):
        yield from rows
        return
    for batch in rows.with_format(None).iter(1000):
        columns: dict[str, Iterable[Any]] = dict(batch)
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def _number(value: Any) -> Any:
    """Convert a NumPy or torch value for JSON."""
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{_kind(value)} cannot be written as JSON")


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, default=_number)
    except (TypeError, ValueError):
        return False
    return True


def _kind(value: Any) -> str:
    name = type(value).__name__
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"
