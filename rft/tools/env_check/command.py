"""`rft env check SPEC`: from its arguments to the report."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from pathlib import Path
from typing import Any

from rft.config.load import apply_overrides, parse_config, read_config
from rft.config.schema import Config
from rft.environments.tools import BUILT_IN
from rft.errors import ConfigError
from rft.tools.env_check.check import POLICIES, Options, check, load_parts
from rft.tools.env_check.policies import read_replies
from rft.tools.env_check.report import PROBES
from rft.utils.terminal import say


def main(args: argparse.Namespace) -> int:
    """Check an environment. Return 0 if nothing would go wrong, else 1. Raises ConfigError."""
    options = options_of(args)
    report = asyncio.run(check(load_parts(config_of(args)), options))
    say(json.dumps(report.plain(), indent=2) if args.json else report.text(), sys.stdout)
    return 0 if report.good else 1


def config_of(args: argparse.Namespace) -> Config:
    """Return the config that SPEC and the options describe. Raises ConfigError."""
    if args.spec.endswith((".yaml", ".yml")):
        raw = read_config(Path(args.spec))
    else:
        raw = {"algorithm": "grpo", "environment": _section(args.spec, args.kind)}
    given = {"model.path": args.model, "data.path": args.data, "environment.kind": args.kind}
    changes = [f"{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    changes += [f"rewards={json.dumps([{'function': name} for name in args.reward])}"] if args.reward else []
    return parse_config(apply_overrides(raw, [*changes, *args.overrides]))


def _section(spec: str, kind: str | None) -> dict[str, Any]:
    """Return the config section of a short form: `file.py:name`, names of tools, or `reasoning_gym`."""
    names = spec.split(",")
    if kind == "tools" or (kind is None and all(name in BUILT_IN for name in names)):
        return {"kind": "tools", "tools": names}
    if spec == "reasoning_gym":
        return {"kind": spec}
    if kind is None:
        raise ConfigError(
            [
                f"{spec}: name its kind by --kind: class (`reset`, public methods as tools, `get_reward`), "
                "text (`reset` or `init`, and `step(text)`), function (`async def f(row, session)`) or "
                "tools. Or give a config, FILE.yaml"
            ]
        )
    return {"kind": kind, "path": spec}


def options_of(args: argparse.Namespace) -> Options:
    """Return the options of the check. Raises ConfigError."""
    problems = []
    for name, allowed in (("policies", POLICIES), ("accept", tuple(PROBES))):
        unknown = [value for value in getattr(args, name) if value not in allowed]
        if unknown:
            problems.append(f"--{name} {unknown[0]}: choose from {', '.join(allowed)}")
    for name in ("rows", "sessions"):
        if getattr(args, name) < 1:
            problems.append(f"--{name} {getattr(args, name)}: write a number from 1 on")
    stated, replies = None, {}
    if args.reward_range is not None:
        low, high = args.reward_range
        stated = (low, high)
        if not low <= high:
            problems.append(f"--reward-range {low:g} {high:g}: the first number must not be the larger one")
    if args.replies is not None:
        try:
            replies = read_replies(Path(args.replies))
        except (OSError, ValueError) as error:
            problems.append(f"--replies: {error}")
    if problems:
        raise ConfigError(problems)
    return Options(args.rows, args.sessions, args.policies, replies, stated, args.accept)
