"""Checks of the environments of a config; `rft/preflight/environment.py` checks the parts that are loaded."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

from rft.algorithms.extras import ValuesSteps
from rft.config.environment import EnvironmentConfig
from rft.config.facts import Check, Facts, environment_key, longest_session, rollouts
from rft.config.schema import Config, algorithm_name

GIVE_NO_PATH = ("tools", "reasoning_gym", "command", "mcp", "openenv")
"""Kinds of environment that load no class or function."""


def environment_checks(config: Config, facts: Facts) -> Iterator[Check]:
    """Check the section `environment`, and those of the sources of a mixture."""
    lockstep = config.rollout.turns == "lockstep"
    yield (
        lockstep and not config.environments,
        "rollout.turns: lockstep orders the model calls of sessions, and the config has no environment; "
        "remove it, or add the section environment",
    )
    yield (
        lockstep and config.rollout.staleness > 0,
        f"rollout.turns: lockstep needs rollout.staleness 0, not {config.rollout.staleness}: otherwise the "
        "time of a weight sync decides which calls run together; write rollout.turns: free",
    )
    of_sources = [name for name in config.environments if name]
    yield (
        lockstep and bool(of_sources),
        "rollout.turns: lockstep orders the sessions of one environment, and "
        f"{', '.join(map(environment_key, of_sources))} is another one; write turns: free",
    )
    for source, e in config.environments.items():
        key = environment_key(source)
        yield from _algorithm_checks(config, key)
        yield from _kind_checks(e, key)
        yield from _limit_checks(config, e, key, (facts.longest_prompt or {}).get(source))


def _algorithm_checks(config: Config, key: str) -> Iterator[Check]:
    """Check that the algorithm trains on sessions."""
    a, name = config.algorithm, algorithm_name(config.algorithm)
    continues = any(r.role or r.prefix_share or r.mixture for r in rollouts(config, True))
    yield (
        not a.online,
        f"{key}: {name} trains on rows of a dataset, without sampling; remove it, or choose an online "
        "algorithm",
    )
    yield (
        isinstance(a, ValuesSteps),
        f"{key}: {name} values the steps of one completion, and a session has turns; choose grpo "
        "with turn_returns: turn",
    )
    yield (
        a.online and continues,
        f"{key}: the completions of {name} continue a demonstration or another completion, or are "
        "sampled from a mixture with the reference; sessions do not; choose another algorithm: grpo",
    )
    yield (
        bool(getattr(a, "overlong_buffer", 0)),
        f"{key}: overlong_buffer of {name} measures whole sessions against the limit of one call "
        "(sampling.max_completion_length); write overlong_buffer: 0",
    )
    yield (
        bool(a.hooks) and not (continues or isinstance(a, ValuesSteps)),
        f"{key}: {name} trains on past groups, or on a second copy of the model, which sessions do not "
        "support; choose another algorithm, or remove environment",
    )


def _kind_checks(e: EnvironmentConfig, key: str) -> Iterator[Check]:
    """Check the keys that a kind of environment needs, or does not take."""
    yield (
        e.kind in GIVE_NO_PATH and e.path is not None,
        f"{key}.path: kind {e.kind} loads no class or function; remove it",
    )
    yield (
        e.kind not in GIVE_NO_PATH and e.path is None,
        f"{key}.path: kind {e.kind} needs "
        + (
            "a taskset; write its name, or its file or folder"
            if e.kind == "verifiers"
            else "the class or function; write `file.py:name` or `package.module:name`"
        ),
    )
    yield (
        (e.kind == "verifiers") != (e.python is not None),
        f"{key}.python: "
        + (
            "kind verifiers needs the Python that has verifiers; write the path of FOLDER/bin/python, made "
            "by python3 -m venv FOLDER && FOLDER/bin/pip install 'verifiers>=0.4,<0.5'"
            if e.python is None
            else f"kind {e.kind} runs in the Python of rft; remove python, or write kind: verifiers"
        ),
    )
    yield (
        e.kind not in ("mcp", "openenv") and (e.kind == "command") != bool(e.command),
        f"{key}.command: "
        + (
            "kind command needs a program; write `command: python agent.py`"
            if e.kind == "command"
            else f"kind {e.kind} does not start a program; remove command, or write kind: command"
        ),
    )
    yield (
        e.kind == "command" and find_spec("aiohttp") is None,
        f"{key}: kind command needs aiohttp, which is not installed: pip install 'rft[agents]'",
    )
    yield (
        e.kind == "tools" and not e.tools,
        f"{key}.tools: kind tools needs at least one; name `python`, `calculator` or `file.py:function`",
    )
    yield (
        e.kind not in ("tools", "class") and bool(e.tools),
        f"{key}.tools: kind {e.kind} takes no tools; remove them, or write kind: tools",
    )


def _limit_checks(config: Config, e: EnvironmentConfig, key: str, longest: int | None) -> Iterator[Check]:
    """Check the limits of sessions: number, tokens and seconds. longest: tokens of the longest prompt."""
    sessions = config.train.batch_size * len(rollouts(config, True))
    yield (
        config.rollout.turns == "lockstep" and sessions > e.concurrency,
        f"{key}.concurrency: {e.concurrency}, but with rollout.turns: lockstep the {sessions} sessions of a "
        f"step (batch_size x num_generations) wait for each other; write {sessions} or more, or turns: free",
    )
    budget = longest_session(config, e)
    origin = "" if e.max_episode_tokens else " (sampling.max_prompt_length + max_completion_length)"
    yield (
        longest is not None and longest >= budget,
        f"{key}.max_episode_tokens: {budget}{origin}, but the longest prompt has {longest} tokens; raise it",
    )
    yield (
        e.max_tokens_per_turn is not None and e.max_tokens_per_turn >= budget,
        f"{key}.max_tokens_per_turn: {e.max_tokens_per_turn} tokens do not fit into an episode of "
        f"{budget}{origin}; lower it, or raise max_episode_tokens",
    )
    for name in ("setup_timeout_s", "step_timeout_s"):
        yield (
            getattr(e, name) > e.episode_timeout_s,
            f"{key}.{name}: {getattr(e, name):g} s exceed the episode's {e.episode_timeout_s:g} s; lower it, "
            "or raise episode_timeout_s",
        )
