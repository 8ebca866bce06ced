"""Check reward functions, their options, and the data columns that they read."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from rft.config.mixture import COLUMN
from rft.config.rewards import DIRECTION, PASSED, RewardConfig, RewardsConfig
from rft.config.schema import Config
from rft.data import PromptSet
from rft.data.errors import BadRows
from rft.preflight.data import EvalSet
from rft.rewards.combine import direction_of
from rft.rewards.load import (
    BUILTINS,
    ENVIRONMENTS,
    SAMPLED,
    SpecError,
    builtin,
    checked_options,
    signature_columns,
)
from rft.rewards.pool import Loaded, WorkerPool, spec_of
from rft.rewards.runner import rewards_of
from rft.rewards.types import RewardError
from rft.sandbox import PROTECTIONS, Backend, Sandbox, SandboxError
from rft.utils.did_you_mean import did_you_mean
from rft.utils.urls import has_credentials

PROGRAMS = ("code", "translated_code")
"""Rewards that run programs, in a sandbox of a worker process."""

Rows = Mapping[int, Collection[str]]
"""Column names of each row, by row number counted from 1."""


def check_rewards(
    config: RewardsConfig,
    sets: Mapping[str, PromptSet],
    environments: Mapping[str, str] | None = None,
    by_source: Mapping[str, Sequence[str]] | None = None,
) -> list[str]:
    """Check the reward functions, and the columns that they need in each dataset, including their values.

    environments: kinds of the environments, by source of a mixture; "" is that of all other rows.
    by_source: names of the rewards that score rows of a source of a mixture; of other rows, all.
    """
    problems: list[str] = []
    kinds = environments or {}
    for sources, functions in _by_rewards(config, sets, by_source or {}):
        rows = {
            name: {p.id + 1: p.columns for p in prompts.prompts if p.columns.get(COLUMN) in sources}
            for name, prompts in sets.items()
        }
        rows = {name: of_set for name, of_set in rows.items() if of_set}
        for kind in sorted({kinds.get(source or "", kinds.get("")) for source in sources or {None}}, key=str):
            problems += check_reward(functions, Path.cwd(), rows=rows, environment=kind)
        for name, of_set in rows.items():
            problems += check_values(functions, sets[name].source, of_set.items())
            if config.direction == "row":
                problems += _check_directions(sets[name].source, of_set, len(config.functions))
    return list(dict.fromkeys(problems))


def _check_directions(source: str, rows: Mapping[int, Mapping[str, Any]], count: int) -> list[str]:
    wrong = BadRows(source)
    for number, columns in rows.items():
        try:
            direction_of(columns.get(DIRECTION), count)
        except ValueError as error:
            wrong.add(str(error), number)
    return [f"{source}: {line}" for line in wrong.lines()]


def _by_rewards(
    config: RewardsConfig, sets: Mapping[str, PromptSet], by_source: Mapping[str, Sequence[str]]
) -> list[tuple[set[str | None], RewardsConfig]]:
    """Return the sources of the rows (None: no mixture), split by the rewards that score them."""
    names: set[str | None] = {p.columns.get(COLUMN) for prompts in sets.values() for p in prompts.prompts}
    chosen = {name: by_source[name] for name in names if name is not None and name in by_source}
    parts: list[tuple[set[str | None], RewardsConfig]] = [(names - set(chosen), config)]
    parts += [({name}, rewards_of(config, labels)) for name, labels in sorted(chosen.items())]
    return [part for part in parts if part[0] or not names]


def check_run_rewards(config: Config, train: PromptSet | None, sets: Sequence[EvalSet]) -> list[str]:
    """Check the rewards of a run on its training and held-out prompts, and those of named held-out sets."""
    problems = []
    kinds = {source: environment.kind for source, environment in config.environments.items()}
    if config.rewards.functions:
        shared = {
            f"the set {s.name}" if s.name else "the held-out data": s.prompts for s in sets if not s.rewards
        }
        shared |= {"the training data": train} if train else {}
        problems += check_rewards(config.rewards, shared, kinds, config.data.rewards_by_source)
    for s in sets:
        if s.rewards is not None:
            of_set = check_rewards(s.rewards, {f"the set {s.name}": s.prompts})
            problems += [f"{s.key}.rewards: {problem}" for problem in of_set]
    return problems


def check_align(config: Config, sets: Sequence[EvalSet], *, trains: bool) -> list[str]:
    """Check the rewards of `rollout.align` on held-out prompts, and that nothing is trained or played."""
    align = config.rollout.align
    if align is None:
        return []
    if trains:
        return [
            "rollout.align: a run trains on completions of its policy alone; remove it, and use it in "
            "`rft eval` and `rft serve`"
        ]
    if config.environments:
        return ["rollout.align: sessions in an environment are not aligned; remove one of the two"]
    prompts = {f"the set {s.name}" if s.name else "the held-out data": s.prompts for s in sets}
    return [f"rollout.align.rewards: {problem}" for problem in check_rewards(align.rewards, prompts)]


def check_reward(
    config: RewardsConfig,
    base_dir: Path | str = ".",
    columns: Collection[str] | None = None,
    rows: Mapping[str, Rows] | None = None,
    environment: str | None = None,
) -> list[str]:
    """Check that each function can be loaded and that its columns exist.

    columns: column names of a single dataset. rows: column names by row, for each dataset by name.
    environment: kind of the environment, if there is one.
    Custom functions are loaded in worker processes, as in a run.
    """
    problems = [] if config.functions else ["rewards.functions is empty: name at least one reward"]
    datasets = dict(rows or {}) if columns is None else {"the dataset": {1: columns}}
    needs = _needs(config, Path(base_dir))
    for i, (c, need) in enumerate(zip(config.functions, needs, strict=True)):
        where = f"rewards.functions[{i}] ({c.label})"
        if isinstance(need, str):
            problems.append(f"{where}: {need}")
            continue
        if ENVIRONMENTS in need.required:
            if environment != "class":
                has = "no environment" if environment is None else f"kind {environment}"
                problems.append(f"{where}: {NO_INSTANCES.format(has)}")
                continue
            need = replace(need, required=tuple(n for n in need.required if n != ENVIRONMENTS))
        for name, dataset in datasets.items():
            problems += [f"{where}: {problem}" for problem in _column_problems(c, need, name, dataset)]
    return problems


NO_INSTANCES = (
    "reads `environments`, the instances of an environment class, and this config has {0}; write "
    "environment: {{kind: class, path: file.py:Class}}; or read `completions`, with "
    "environment.transcript: true"
)


def check_values(
    config: RewardsConfig, source: str, rows: Iterable[tuple[int, Mapping[str, Any]]]
) -> list[str]:
    """Check the column values that built-ins read, e.g. for null gold answers.

    rows: (number, columns), counted from 1. Returns one problem per reward and column, with its rows.
    """
    checks = []
    for i, c in enumerate(config.functions):
        target = builtin(c.function) if c.function in BUILTINS else None
        for name, check in getattr(target, "column_checks", {}).items():
            label = f"rewards.functions[{i}] ({c.label})"
            checks.append((label, c.columns.get(name, name), check, BadRows(source)))
    if checks:
        for number, columns in rows:
            for _, column, check, bad in checks:
                if column in columns and (problem := check(columns[column])) is not None:
                    bad.add(f"column {column!r}: {problem}", number)
    remedy = "write an answer (a text, a number, or a list of acceptable ones), or leave the rows out"
    return [f"{label}: {bad.error(remedy)}" for label, _, _, bad in checks if bad]


def _column_problems(c: RewardConfig, need: Loaded, dataset: str, rows: Rows) -> list[str]:
    columns = {name for row in rows.values() for name in row}
    have = f"{dataset} has {', '.join(sorted(columns)) or 'none'}"
    known = {*columns, *c.columns, *SAMPLED}
    problems = []
    lacks = [(repr(name), name) for name in need.required if name not in known]
    if need.any_of and not set(need.any_of) & known:
        lacks.append((" or ".join(map(repr, need.any_of)), need.any_of[0]))
    for shown, name in lacks:
        problems.append(
            f"needs the column {shown}{did_you_mean(name, columns)}; {have}. If the column has another name, "
            f"write columns: {{{name}: NAME_IN_YOUR_DATA}}; or give the parameter a default"
        )
    for parameter, column in c.columns.items():
        if column not in columns:
            problems.append(
                f"its `columns: {{{parameter}: {column}}}` names {column!r}{did_you_mean(column, columns)}; "
                f"{have}"
            )
    for column in (c.columns.get(name, name) for name in need.required):
        without = [number for number, row in rows.items() if column not in row]
        if column in columns and without:
            shown = ", ".join(map(str, without[:8])) + (", ..." if len(without) > 8 else "")
            problems.append(
                f"needs the column {column!r}, which {len(without)} of {len(rows)} rows of {dataset} lack "
                f"({shown}): give them one, or leave them out"
            )
    return problems


def _needs(config: RewardsConfig, base_dir: Path) -> list[Loaded | str]:
    """Load all rewards; return the columns that each needs, or its load error."""
    result: dict[int, Loaded | str] = {}
    custom = []
    for i, c in enumerate(config.functions):
        if ":" not in c.function:
            result[i] = _builtin_needs(c)
        elif c.passed is not None and c.payload is None:
            result[i] = NOT_PASSED.format(c.function.removeprefix(PASSED))
        else:
            custom.append(i)
    if custom:  # in another thread, since an event loop may already run in this one
        with ThreadPoolExecutor(1) as thread:
            thread.submit(lambda: asyncio.run(_load_all(config, custom, base_dir, result))).result()
    return [result[i] for i in range(len(config.functions))]


NOT_PASSED = (
    "it was passed from Python as an object, and this process does not have it: continue from Python, with "
    'rft.Run("RUN_FOLDER").resume(rewards=[{0}]); or start a run whose config names the function as '
    "file.py:function"
)


def _builtin_needs(c: RewardConfig) -> Loaded | str:
    try:
        target = builtin(c.function)
        checked_options(c.function, target, c.options, strict=True)
        required, optional = signature_columns(target)
        protection(c)
    except (SpecError, SandboxError) as error:
        return str(error)
    if has_credentials(str(c.options.get("base_url", ""))):
        return CREDENTIALS
    return Loaded(required + optional, required, tuple(getattr(target, "any_of", ())), True)


async def _load_all(
    config: RewardsConfig, custom: Sequence[int], base_dir: Path, result: dict[int, Loaded | str]
) -> None:
    """Load the custom functions, each in a worker that exits afterwards."""

    async def one(i: int) -> None:
        c = config.functions[i]
        pool = WorkerPool([spec_of(c, base_dir)], 1, start_timeout_s=config.start_timeout_s)
        try:
            await pool.start()
            result[i] = pool.loaded[0]
        except RewardError as error:
            result[i] = str(error)
        finally:
            await pool.close()

    for i in custom:  # sequentially, to limit the number of processes
        await one(i)


CREDENTIALS = (
    "base_url contains a user name or password, which logs and config.yaml would show: leave it out of the "
    "URL, and put the key into the environment variable that `api_key_env` names"
)


def protection(c: RewardConfig) -> str:
    """Describe the sandbox of the programs that a reward runs; "" if it does not run programs.

    Raises SandboxError if a required protection is not available on this machine.
    """
    if c.function not in PROGRAMS:
        return ""
    readable, require = c.options.get("readable", ()), c.options.get("require", PROTECTIONS)
    return _sandbox_of(tuple(readable), tuple(require), c.options.get("sandbox", "auto"))


@lru_cache
def _sandbox_of(readable: tuple[str, ...], require: tuple[str, ...], backend: Backend) -> str:
    """Describe a sandbox's protections on this machine; cached, since the check and the plan both need it."""
    with Sandbox(readable, require, backend) as sandbox:
        return sandbox.describe()
