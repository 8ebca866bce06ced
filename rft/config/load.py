"""Load a YAML config, merge it over its `base`, apply `key.sub=value` overrides and validate.

All problems are reported at once, each with its key and, for an unknown key, the closest known one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

from pydantic import ValidationError

from rft.config.base import UNLISTED, ConfigModel
from rft.config.environment import EnvironmentConfig
from rft.config.rewards import list_as_functions
from rft.config.schema import Config
from rft.errors import ConfigError
from rft.utils import yaml_files
from rft.utils.did_you_mean import did_you_mean_or_list
from rft.utils.paths import expand


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and validate a config. Raises ConfigError listing all problems."""
    return parse_config(apply_overrides(read_config(Path(path)), overrides))


def read_config(path: Path) -> dict[str, Any]:
    """Read a YAML file and merge it over its `base`, without validating it. Raises ConfigError."""
    return _read(path, ())


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """Read a YAML file and merge it over its `base`, a path relative to the file's folder.

    above: files that lead here through `base`, to detect cycles.
    """
    if path.resolve() in above:
        raise ConfigError(
            [f"config {path}: its `base` leads back to this file; remove one `base` of the cycle"]
        )
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
    return _merged_over(_read(below, (*above, path.resolve())), raw)


def _merged_over(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `above` over `below`, sections key by key; other values, and `algorithm`, are replaced."""
    merged = dict(below)
    for key, value in above.items():
        under = merged.get(key)
        if isinstance(under, dict) and isinstance(value, dict) and key != "algorithm":
            value = _merged_over(under, value)
        merged[key] = value
    return merged


def merge(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set a key of a plain config, in place; a section is merged key by key with the existing one."""
    if key == "rewards":
        raw[key], value = list_as_functions(raw.get(key)), list_as_functions(value)
    raw[key] = _merged_over(raw, {key: value})[key]


def parse_config(raw: Mapping[str, Any]) -> Config:
    """Validate plain data. Raises ConfigError listing all problems."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError([_explain(e) for e in error.errors()]) from None


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return a config with other values, by dotted key. Raises ConfigError listing all problems."""
    raw, problems = config.to_dict(), []
    for key, value in changes.items():
        try:
            apply_change(raw, key, value)
        except ValueError as error:
            problems.append(f"{key}: {error}")
    if problems:
        raise ConfigError(problems)
    return with_objects(parse_config(raw), config)


def with_objects(config: Config, known: Config) -> Config:
    """Return `config` with the objects of `known` that it names by their hash."""
    payloads = {c.passed.sha256: c.payload for c in known.rewards.functions if c.passed is not None}
    functions = [
        c.with_payload(payloads[c.passed.sha256])
        if c.passed is not None and c.payload is None and c.passed.sha256 in payloads
        else c
        for c in config.rewards.functions
    ]
    changed: dict[str, Any] = {"rewards": config.rewards.model_copy(update={"functions": functions})}
    if config.environment is not None and known.environment is not None:
        changed["environment"] = environment_with_objects(config.environment, known.environment)
    return config.model_copy(update=changed)


def environment_with_objects(config: EnvironmentConfig, known: EnvironmentConfig) -> EnvironmentConfig:
    """Return `config` with the objects of `known` that it names by their hash."""
    payloads = {
        name: known.payloads[name]
        for name, passed in config.passed.items()
        if name in known.payloads and known.passed[name].sha256 == passed.sha256
    }
    return config.with_payloads({**payloads, **config.payloads})


def apply_overrides(raw: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply overrides `a.b=value` to a copy of `raw`; values are YAML, numeric keys are list indices.

    Raises ConfigError listing all malformed or inapplicable overrides.
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
    """Apply one override to `raw` in place. Raises ValueError."""
    key, equals, text = override.partition("=")
    keys = key.split(".")
    if not equals or not all(part and part == part.strip() for part in keys):
        raise ValueError("write key.sub=value, without empty parts or spaces in the key")
    apply_change(raw, key, yaml_files.parse(text))


def apply_change(raw: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key, in place; numbers are list indices. Raises ValueError."""
    keys = key.split(".")
    if keys[0] == "rewards" and len(keys) > 1:
        raw["rewards"] = list_as_functions(raw.get("rewards")) or {}
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
        if (isinstance(child, str) or callable(child)) and keys[:i] == ["rewards", "functions"]:
            child = {"function": child}
        if not isinstance(child, dict | list):
            raise ValueError(
                f"{where} is not a section (it is {child!r:.40}), so it has no key {keys[i + 1]}"
            )
        node[int(part) if isinstance(node, list) else part] = child
        node = child
    _entry(node, keys[-1], keys[:-1])  # raises for an index out of range
    node[int(keys[-1]) if isinstance(node, list) else keys[-1]] = value


def _entry(node: dict[str, Any] | list[Any], part: str, above: Sequence[str]) -> Any:
    """Return entry `part` of a section (None if missing) or of a list. Raises ValueError for a bad index."""
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
    """Format a pydantic error as `key: problem, remedy`."""
    location = [str(part) for part in error["loc"]]
    where = ".".join(location) or "config"
    if error["type"] == "extra_forbidden":
        section = _model_at(location[:-1])
        hint = did_you_mean_or_list(location[-1], section.model_fields) if section else ""
        return f"{where}: unknown key{hint}"
    if error["type"] == "missing":
        return f"{where}: required, but not given"
    message = error["msg"].removeprefix("Value error, ")
    given = error.get("input")
    shown = f" (got {given!r})" if isinstance(given, str | int | float | bool) else ""
    return f"{where}: {message[0].lower() + message[1:]}{shown}"


def _model_at(location: Sequence[str]) -> type[ConfigModel] | None:
    """Return the section class at a path of keys; None if there is none."""
    section: type[ConfigModel] | None = Config
    for part in location:
        if section is None:
            return None
        if part in section.model_fields:
            section = model_of(section.model_fields[part].annotation)
    return section


def model_of(annotation: Any) -> type[ConfigModel] | None:
    """Return the section class in a field's annotation; None if there is none."""
    for kind in (annotation, *(a for arg in get_args(annotation) for a in (arg, *get_args(arg)))):
        if isinstance(kind, type) and issubclass(kind, ConfigModel):
            return kind
    return None


def describe_fields(section: type[ConfigModel] = Config, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Yield (key, default, description) of all fields, recursively, in order of definition."""
    for name, info in section.model_fields.items():
        child = model_of(info.annotation)
        required = info.is_required()
        default = None if required else info.get_default(call_default_factory=True)
        listed = info.json_schema_extra != UNLISTED
        if child is not None and not isinstance(default, list | tuple) and listed:
            yield f"{prefix}{name}", "none" if default is None else "", info.description or ""
            yield from describe_fields(child, f"{prefix}{name}.")
        else:
            shown = "required" if required else yaml_files.dump(default, flow=True)
            yield (
                f"{prefix}{name}",
                shown.removesuffix("\n").removesuffix("...").strip(),
                info.description or "",
            )


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = ""
) -> list[tuple[str, Any, Any]]:
    """Return (key, old value, new value) for every key that differs between two plain configs."""
    changed = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            changed += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            changed.append((f"{prefix}{key}", a, b))
    return changed
