"""The preflight of rewards: every mistake in the config, found before anything is started."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Collection
from pathlib import Path

from rft.rewards.config import MaxFraction, RewardConfig, RewardsConfig, Schedule
from rft.rewards.load import BUILTINS, SpecError, builtin, checked_options, signature_columns
from rft.spelling import nearest

PROBE = (
    "import sys, json; sys.path[:] = json.loads(sys.argv[1]); from rft.rewards.check import probe; probe()"
)


def probe() -> None:
    """Main of the checking process: loads one custom reward and prints its problem and columns as JSON."""
    from rft.rewards.load import load_reward

    spec, base_dir, options = json.loads(sys.stdin.read())
    answer: dict[str, object] = {}
    try:
        reward = load_reward(spec, base_dir=base_dir, **options)
        answer = {"columns": reward.columns, "required": reward.required}  # type: ignore[attr-defined]
    except SpecError as error:
        answer = {"problem": str(error)}
    print("\n" + json.dumps(answer))


def check_reward(
    config: RewardsConfig, base_dir: Path | str = ".", columns: Collection[str] | None = None
) -> list[str]:
    """Problems in words, empty where all is well.

    columns: the dataset's columns, where known; a reward that needs another one is a problem. Custom
    functions are imported in a process of their own.
    """
    problems = [] if config.functions else ["rewards.functions is empty: name at least one reward"]
    for i, c in enumerate(config.functions):
        where = f"rewards.functions[{i}] ({c.label})"
        try:
            required = _required(c, Path(base_dir))
        except SpecError as error:
            problems.append(f"{where}: {error}")
            continue
        if columns is not None:
            problems += [f"{where}: {problem}" for problem in _column_problems(c, required, columns)]
    return problems


def _column_problems(c: RewardConfig, required: Collection[str], columns: Collection[str]) -> list[str]:
    have = f"the dataset has {', '.join(sorted(columns)) or 'none'}"
    known = {*columns, *c.columns, "num_tokens", "truncated", "completion_ids"}
    problems = [
        f"needs the column {name!r}{nearest(name, columns)}; {have}" for name in required if name not in known
    ]
    for column in c.columns.values():
        if column not in columns:
            problems.append(f"its `columns` name {column!r}{nearest(column, columns)}; {have}")
    return problems


def _required(c: RewardConfig, base_dir: Path) -> tuple[str, ...]:
    """The columns that a reward must have. Raises SpecError."""
    if c.function in BUILTINS or ":" not in c.function:
        target = builtin(c.function)
        checked_options(c.function, target, c.options, strict=True)
        return signature_columns(target)[0]
    command = [sys.executable, "-c", PROBE, json.dumps(sys.path)]
    request = json.dumps([c.function, str(base_dir), c.options], default=str)
    try:
        done = subprocess.run(command, input=request, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        raise SpecError(f"{c.function} did not import within 300 s") from None
    if done.returncode != 0:
        raise SpecError(
            f"{c.function} does not import (exit status {done.returncode}):\n{done.stderr.strip()}"
        )
    answer = json.loads(done.stdout.strip().splitlines()[-1])
    if "problem" in answer:
        raise SpecError(answer["problem"])
    return tuple(answer["required"])


def describe(config: RewardsConfig) -> str:
    """A few lines: what is rewarded, how it is combined, what happens on failure."""
    lines = []
    for c in config.functions:
        weight = c.weight
        if isinstance(weight, Schedule):
            shown = f"{weight.start:g} -> {weight.end:g} ({weight.shape})"
        else:
            shown = f"{weight:g}"
        role = f"gate at {c.threshold:g}" if c.gate else f"weight {shown}"
        name = "" if c.label == c.function else f"{c.label} = "
        options = "".join(f", {k}={v!r}" for k, v in c.options.items())
        lines.append(f"{name}{c.function} ({role}, timeout {c.call_timeout_s:g} s{options})")
    on = [config.on_error, config.on_timeout]
    error, timeout = (f"at most {p.max_fraction:.2%}" if isinstance(p, MaxFraction) else p for p in on)
    lines.append(f"combine: {config.combine}; on error: {error}; on timeout: {timeout}")
    return "\n".join(lines)
