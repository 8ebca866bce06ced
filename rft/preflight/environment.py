"""Load the environment as a run does, and check its tools, rewards and columns, and the chat template."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from rft.batch import Prompt
from rft.config.environment import EnvironmentConfig
from rft.config.facts import environment_key, longest_session
from rft.config.mixture import COLUMN
from rft.config.rewards import PASSED
from rft.config.schema import Config
from rft.data import PromptSet
from rft.data.chat import Renderer
from rft.data.errors import DataError, RowProblem
from rft.environments.runner import EnvironmentRunner
from rft.environments.types import EnvironmentFault
from rft.rollout.tool_calls import format_of
from rft.utils.dotted import load_dotted

NOT_PASSED = (
    "{0} was passed from Python as an object, and this process does not have it: continue from Python, with "
    'rft.Run("RUN_FOLDER").resume({argument}={0}); or name it as file.py:{0} in the config of a new run'
)
REASONING_GYM = "rft.contrib.environments.reasoning_gym.COLUMNS"


def check_environment(config: Config, tokenizer: Any, prompts: PromptSet | None) -> list[str]:
    """Return the problems of the run's environments. prompts: the training data, if it could be read."""
    if not config.algorithm.online:
        return []
    parts = ((s, e, _rows_of(config, s, prompts)) for s, e in config.environments.items())
    return [problem for part in parts for problem in _check_one(config, tokenizer, *part)]


def longest_prompts(config: Config, prompts: PromptSet) -> dict[str, int]:
    """Return the tokens of the longest prompt of each environment in `Config.environments`, and of the other
    rows ("")."""
    longest: dict[str, int] = {}
    for prompt in prompts.prompts:
        source = environment_of(config, prompt)
        longest[source] = max(longest.get(source, 0), len(prompt.tokens))
    return longest


def environment_of(config: Config, prompt: Prompt) -> str:
    """Return the source whose environment a row is played in; "": the section `environment`, if there is
    one."""
    source = prompt.columns.get(COLUMN, "")
    return source if source in config.environments else ""


def _rows_of(config: Config, source: str, prompts: PromptSet | None) -> PromptSet | None:
    """Return the rows that are played in an environment."""
    if prompts is None or config.environments.keys() == {""}:
        return prompts
    rows = [prompt for prompt in prompts.prompts if environment_of(config, prompt) == source]
    return replace(prompts, prompts=rows)


def _check_one(
    config: Config, tokenizer: Any, source: str, settings: EnvironmentConfig, prompts: PromptSet | None
) -> list[str]:
    key = environment_key(source)
    lost = [name for name in settings.passed if name not in settings.payloads]
    if lost:
        argument = "environment" if lost[0] == settings.path else "tools"
        shown = lost[0].removeprefix(PASSED)
        return [f"{key}: {NOT_PASSED.format(shown, argument=argument)}"]
    try:
        runner = loaded(settings, Path.cwd())
    except EnvironmentFault as error:
        return [f"{key}: {error}"]
    return loaded_problems(config, source, runner, tokenizer, prompts)


def loaded_problems(
    config: Config, source: str, runner: EnvironmentRunner, tokenizer: Any, prompts: PromptSet | None
) -> list[str]:
    """Return the problems of an environment that could be loaded, with its template and data.

    source: whose environment it is; "" for the section `environment`. prompts: the rows that it plays.
    """
    settings, key = runner.config, environment_key(source)
    problems = []
    if not runner.gives_reward and not config.rewards.functions:
        problems.append(
            f"{key}: kind {settings.kind} "
            + ("without `get_reward` " if settings.kind == "class" else "")
            + "gives no reward; name at least one under rewards: `rewards: [{function: math}]`"
        )
    if tokenizer is not None:
        problems += _template_problems(config, source, runner, tokenizer, prompts)
    if prompts is not None:
        problems += _column_problems(key, settings, runner.columns, prompts)
    return problems


def loaded(config: EnvironmentConfig, base_dir: Path) -> EnvironmentRunner:
    """Load an environment in its process and end it again. Raises EnvironmentFault."""

    async def load() -> EnvironmentRunner:
        async with EnvironmentRunner(config, base_dir) as runner:
            return runner

    with ThreadPoolExecutor(1) as thread:  # an event loop may already run in this one
        return thread.submit(lambda: asyncio.run(load())).result()


def _template_problems(
    config: Config, source: str, runner: EnvironmentRunner, tokenizer: Any, prompts: PromptSet | None
) -> list[str]:
    """Check that the chat template shows tools, and that the longest prompt with them fits the budget."""
    settings, tools, key = runner.config, runner.tools, environment_key(source)
    try:
        render = Renderer(config.data.parts()[source] if source else config.data, tokenizer)
    except DataError:  # reported with the data
        return []
    if not render.chat:
        if settings.kind == "function":  # it may use token ids only
            return []
        return [
            f"{key}: kind {settings.kind} renders messages, and the tokenizer has no chat template, or "
            "data.chat_template is never; use a chat model"
        ]
    if tools:
        try:
            if settings.tool_parser == "auto":
                format_of(render)
            else:
                render.check_tools([{"role": "user", "content": "rft-asks"}], tools)
        except RowProblem as problem:
            return [f"{key}.tools: {problem}"]
    if prompts is None or not prompts.prompts:
        return []
    rendered = next((p for p in prompts.prompts if render.is_rendered(p.text)), None)
    if rendered is not None and settings.kind != "function":
        return [
            f"{key}: the prompt of row {rendered.id + 1} of {prompts.source} is already rendered with "
            "the chat template, so it cannot be continued; give its text, or a list of messages"
        ]
    longest = max(prompts.prompts, key=lambda prompt: len(prompt.tokens))
    try:
        count = len(render.prompt(longest.text, tools or None)[1])
    except RowProblem as problem:
        return [f"{key}: row {longest.id + 1} of {prompts.source} cannot be rendered: {problem}"]
    budget = longest_session(config, settings)
    if tools and len(longest.tokens) < budget <= count:  # without tools: `validate_environment`
        return [
            f"{key}.max_episode_tokens: {budget}, but the prompt of row {longest.id + 1} has {count} "
            "tokens with the schemas of the tools; raise it"
        ]
    return []


def _column_problems(
    key: str, settings: EnvironmentConfig, columns: list[str] | None, prompts: PromptSet
) -> list[str]:
    """Check the columns that `reset` of a class takes, and those that reasoning_gym needs."""
    have = sorted({"prompt", *(name for prompt in prompts.prompts for name in prompt.columns)})
    if settings.kind == "reasoning_gym":
        missing = [name for name in load_dotted(REASONING_GYM) if name not in have]
        if missing:
            return [
                f"{key}: kind reasoning_gym needs the column {missing[0]!r}, and the data has "
                f"{', '.join(have)}; write data: {{kind: reasoning_gym}}"
            ]
    if columns is None:
        return []
    refused = [name for name in have if name not in columns]
    if refused:
        return [
            f"{key}.path: {settings.path}.reset takes ({', '.join(columns)}), but is called with every "
            f"column of the row, also {', '.join(refused)}; write `def reset(self, **row)`"
        ]
    return []
