"""Preflight of the warm start: its demonstrations, and the folder that its result is kept in."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rft.config.data import DataConfig
from rft.config.schema import Config, WarmStartConfig
from rft.data import DataError, load_groups
from rft.learner.stops import unstopped_turns
from rft.preflight.offline import overlong_problem
from rft.tasks import REVISION
from rft.utils.hashing import fingerprint

GENERATED = 64  # rows of a generated task that are checked: its code makes all of them alike


def warm_start_folder(config: Config, model: str) -> Path:
    """Where the warm start of this config is (or will be) kept."""
    assert config.warm_start is not None
    stage = config.warm_start
    key = {
        "stage": stage.model_dump(mode="json", exclude={"cache"}),
        "data": warm_start_data(config, stage).model_dump(mode="json"),
        "model": config.model.model_dump(mode="json"),
        "seed": config.seed,
        "code": REVISION,
        "loaded": model,
    }
    return Path(stage.cache) / f"warm-start-{fingerprint(key)}"


def warm_start_data(config: Config, stage: WarmStartConfig) -> DataConfig:
    """The demonstrations of the stage: its own, or else the run's data."""
    return stage.data or config.data


def is_finished(folder: Path) -> bool:
    """Whether a warm start's folder holds its result."""
    return (folder / "config.json").exists()


def warm_start_problems(
    config: Config, model: str, tokenizer: Any, stops: Sequence[int] | None, positions: int
) -> list[str]:
    """What is wrong with the demonstrations of a warm start that is still to be done; none where it is
    finished, since its data are not read again.

    stops: token ids that end a completion; None where they are not known yet. positions: tokens that the
    model reads at most.
    """
    stage = config.warm_start
    if stage is None or is_finished(warm_start_folder(config, model)):
        return []
    data = warm_start_data(config, stage)
    if data.resolved_kind not in ("file", "hub"):
        data = data.model_copy(update={"limit": min(data.limit or GENERATED, GENERATED)})
    key = "warm_start.data"
    try:
        groups = load_groups(data, tokenizer, "sft").groups
    except DataError as error:
        other = "" if stage.data else "\n(these are the run's own data; name others under warm_start.data)"
        return [f"{key}: {error}{other}"]
    unstopped = [] if stops is None else unstopped_turns(groups, stops, tokenizer, key)
    return unstopped + overlong_problem(key, groups, positions)
