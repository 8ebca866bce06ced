"""The dtypes that a config leaves to `auto`, and the config with them filled in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rft.config.schema import Config


def dtypes_of(config: Config) -> dict[str, str]:
    """Return the dtype of each section that computes with a model: {"learner": "auto", ...}."""
    sections: dict[str, Any] = {"learner": config.learner, "rollout": config.rollout}
    if config.warm_start is not None:
        sections["warm_start.learner"] = config.warm_start.learner
    return {name: section.dtype for name, section in sections.items()}


def auto_sections(config: Config) -> list[str]:
    """Return the names of the sections whose dtype is `auto`."""
    return [name for name, dtype in dtypes_of(config).items() if dtype == "auto"]


def fill_in_dtypes(config: Config, dtypes: Mapping[str, str]) -> Config:
    """Return the config with `auto` replaced by the dtype of that section in `dtypes`, where it has one."""
    known = {name: dtypes[name] for name in auto_sections(config) if name in dtypes}
    changes: dict[str, Any] = {
        name: getattr(config, name).model_copy(update={"dtype": known[name]})
        for name in ("learner", "rollout")
        if name in known
    }
    if config.warm_start is not None and "warm_start.learner" in known:
        learner = config.warm_start.learner.model_copy(update={"dtype": known["warm_start.learner"]})
        changes["warm_start"] = config.warm_start.model_copy(update={"learner": learner})
    return config.model_copy(update=changes) if changes else config
