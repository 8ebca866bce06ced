"""Run all probes of a config's environment."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rft.batch import Prompt
from rft.config.environment import EnvironmentConfig
from rft.config.schema import Config
from rft.config.validate_environment import environment_checks
from rft.data import DataError, PromptSet, load_prompts
from rft.data.chat import Renderer
from rft.data.errors import RowProblem
from rft.environments.types import EnvironmentFault
from rft.errors import ConfigError, ModelError
from rft.learner.load import load_tokenizer
from rft.preflight.environment import loaded_problems, longest_prompts
from rft.preflight.machine import machine_facts
from rft.preflight.memory import ModelShape
from rft.preflight.model import resolve_model, resolve_optional, resolve_stops
from rft.rewards.runner import RewardRunner
from rft.rollout.session import Budget
from rft.rollout.tool_calls import format_of
from rft.tools.env_check import environment as probes
from rft.tools.env_check.policies import Policy, Random, Scripted, tiny_model
from rft.tools.env_check.report import Report
from rft.tools.env_check.sessions import Player, Run, WatchedRunner
from rft.tools.env_check.template import Probe, check_template
from rft.utils.ray_cluster import ray_cluster
from rft.utils.seeds import derive_seed

POLICIES = ("scripted", "random", "model")


@dataclass(frozen=True)
class Options:
    """rows, sessions: played with each policy. replies: of the policy `scripted` by row, from 1 on (0: all
    others); none: the data's solutions. reward_range: in which rewards must be. accept: probes whose problems
    do not count."""

    rows: int = 3
    sessions: int = 2
    policies: Sequence[str] = POLICIES
    replies: Mapping[int, Sequence[Any]] = field(default_factory=dict)
    reward_range: tuple[float, float] | None = None
    accept: Collection[str] = ()


@dataclass(frozen=True)
class Parts:
    """The parts of a config that a check needs."""

    config: Config
    environment: EnvironmentConfig
    path: str
    tokenizer: Any
    prompts: PromptSet
    shape: ModelShape


def load_parts(config: Config) -> Parts:
    """Load tokenizer, data and the model's sizes. Raises ConfigError with all problems."""
    if config.environment is None:
        raise ConfigError(
            ["the config has no section `environment`: add it, or give `file.py:name --kind KIND`"]
        )
    try:
        path = resolve_model(config)
        given = resolve_optional(config.model.tokenizer, config)
        shape = ModelShape.of(path, config.model, Path(config.output_dir) / ".cache")
        tokenizer = load_tokenizer(given or path, config.model.trust_remote_code)
    except ModelError as error:
        raise ConfigError([f"model: {error}"]) from None
    try:
        prompts = load_prompts(config.data, tokenizer, "train", config.rollout.sampling.max_prompt_length)
    except DataError as error:
        raise ConfigError([f"data: {error}"]) from None
    longest = longest_prompts(config, prompts)
    facts = replace(machine_facts(config, samples=True), rows=len(prompts), longest_prompt=longest)
    wrong = [text for is_wrong, text in environment_checks(config, facts) if is_wrong]
    if wrong:
        raise ConfigError(wrong)
    return Parts(config, config.environment, path, tokenizer, prompts, shape)


async def check(parts: Parts, options: Options) -> Report:
    """Play sessions of the environment, and report mistakes that would show up in a run."""
    report, begin = Report(options.accept), time.perf_counter()
    e, config = parts.environment, parts.config
    async with AsyncExitStack() as stack:
        cluster = stack.enter_context(ExitStack())  # ends after the runners
        try:
            runner, second = WatchedRunner(e, Path.cwd()), WatchedRunner(e, Path.cwd())
            stack.push_async_callback(runner.close)
            stack.push_async_callback(second.close)
            await asyncio.gather(runner.start(), second.start())
        except EnvironmentFault as error:
            report.problem("load", str(error), "correct this first")
            return report
        loaded = time.perf_counter() - begin
        if runner.over_http:
            cluster.enter_context(ray_cluster(None, 0.3))  # the endpoint is an actor
        tools = ", ".join(str(t["function"]["name"]) for t in runner.tools)
        what = f"{e.kind}: {e.path or e.kind}" + (f", tools {tools}" if tools else "")
        report.line("environment", f"{what}; loaded twice in {loaded:.1f} s", kind=e.kind, load_s=loaded / 2)
        wrong = loaded_problems(config, "", runner, parts.tokenizer, parts.prompts)
        for problem in wrong:
            report.problem("load", problem, "correct this first")
        if wrong:
            return report
        render = Renderer(config.data, parts.tokenizer)
        parser = _parser(e, render)
        if render.chat:
            await check_template(Probe(render, runner.tools, parser), report)
        rewards = None
        if config.rewards.functions:
            lenient = config.rewards.model_copy(update={"on_error": "drop", "on_timeout": "drop"})
            rewards = await stack.enter_async_context(RewardRunner(lenient, Path.cwd()))
            runner.rewards = second.rewards = rewards.in_environment
        budget = Budget.of(e, config.rollout.sampling)
        player = Player(e, render, budget, parser, rewards)
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rft-env-check-"))
        policies = await _policies(parts, options, render, parser, budget, Path(folder))
        rows = _rows(parts.prompts.prompts, options.rows)
        runs = await _play(player, runner, policies, rows, options.sessions, config.seed)
        probes.check_faults(runs, report)
        probes.check_tools(runs, runner.tools, report)
        probes.check_observations(runs, parts.tokenizer, report)
        probes.check_branches(runs, e.kind == "function", parts.tokenizer, report)
        written = [
            policy for policy in policies if policy.name != "model"
        ]  # the model would report nothing further
        if written:
            repeater = probes.Repeater(player, runner, second, parts.tokenizer, report)
            await repeater.check(written, rows[0], rows[-1], derive_seed(config.seed, "repeat"))
        probes.check_rewards(runs, options.reward_range, bool(options.replies), report)
        probes.check_tokens(runs, budget.context, e.max_turns, parts.shape.max_positions, report)
        probes.report_costs(runs, e.step_timeout_s, report)
    return report


def _parser(e: EnvironmentConfig, render: Renderer) -> str | None:
    if e.tool_parser != "auto":
        return e.tool_parser
    try:
        return format_of(render) if render.chat else None
    except RowProblem:  # of an environment with tools, `loaded_problems` reports it
        return None


def _rows(prompts: Sequence[Prompt], count: int) -> list[Prompt]:
    """Return rows that are spread over the data."""
    step = max(1, len(prompts) // count)
    return list(prompts[::step][:count])


async def _policies(
    parts: Parts, options: Options, render: Renderer, parser: str | None, budget: Budget, folder: Path
) -> list[Policy]:
    policies: list[Policy] = []
    if "scripted" in options.policies:
        policies.append(Scripted(render, parser, options.replies))
    if "random" in options.policies:
        policies.append(Random(render, parser))
    if "model" in options.policies:
        stops = resolve_stops(parts.config, parts.path, parts.tokenizer, parts.shape)
        model = await tiny_model(parts.config, parts.tokenizer, stops, budget.context, folder)
        policies.append(model)
    return policies


async def _play(
    player: Player,
    runner: WatchedRunner,
    policies: Sequence[Policy],
    rows: Sequence[Prompt],
    sessions: int,
    seed: int,
) -> list[Run]:
    """Play each row with each policy; the sessions of a policy run at the same time."""
    runs: list[Run] = []
    for policy in policies:
        played = await asyncio.gather(
            *(
                player.play(
                    runner,
                    policy,
                    row,
                    f"{policy.name}-{row.id}",
                    sessions,
                    derive_seed(seed, "check", row.id),
                )
                for row in rows
            )
        )
        runs += [run for part in played for run in part]
    return runs
