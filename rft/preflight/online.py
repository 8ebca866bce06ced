"""The preflight's part about sampling: what the algorithm's plan asks of engines and rewards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args, get_type_hints

from rft.algorithms.base import Algorithm, Rollout
from rft.config.schema import Config

STEP_JUDGES = ("process", "process_reward_model")  # rewards that give every step a score
_SEPARATOR = "\n\n"  # their default


def rollouts(config: Config, demonstration: bool = False) -> Sequence[Rollout]:
    """The group that the algorithm plans at the start of the run."""
    return config.algorithm.rollouts(config.train.num_generations, progress=0.0, demonstration=demonstration)


def longest_sequence(config: Config) -> int:
    """Tokens of the longest sequence that an engine sees: an observer's holds two prompts and two answers."""
    s = config.rollout.sampling
    turns = 2 if any(r.role for r in rollouts(config)) else 1
    return turns * (s.max_prompt_length + s.max_completion_length)


def mixes(config: Config) -> bool:
    """Whether engines have to mix the reference into the policy."""
    return config.algorithm.online and any(r.mixture for r in rollouts(config))


def online_problems(config: Config, demonstration: bool) -> list[str]:
    """What the algorithm asks for and the engines or rewards cannot give, each as one sentence."""
    roles = [rollout.role for rollout in rollouts(config, demonstration)]
    found = []
    if any(roles) and roles != ["pioneer", "observer"] * (len(roles) // 2):
        found.append("pioneers and observers must take turns, and take all places of the group")
    if not config.rewards.functions and "rewards" not in config.algorithm.needs:
        found.append("no reward is given; evaluation needs one: `rewards: [{function: math}]`")
    steps = config.algorithm.steps
    if steps is None or steps.branches:
        return found
    judges = [f for f in config.rewards.functions if f.function in STEP_JUDGES]
    if not judges:
        found.append(
            "source: process needs a reward that judges step by step; name one of "
            f"{', '.join(STEP_JUDGES)} under rewards, or write source: continuations"
        )
    for judge in judges[:1]:
        if judge.options.get("separator", _SEPARATOR) != steps.separator:
            found.append(
                f"separator: {steps.separator!r} is not where the reward {judge.label} ends its steps "
                f"({judge.options.get('separator', _SEPARATOR)!r}); give both the same"
            )
    return found


def online_warnings(config: Config) -> list[str]:
    """Settings that may well be meant and often are not, each as one sentence."""
    threshold = getattr(config.algorithm, "threshold", None)
    models = [f for f in config.rewards.functions if f.function == "reward_model" and f.weight != 0]
    if threshold is None or not models:
        return []
    instead = "threshold: null" if _may_be_null(config.algorithm) else "another algorithm"
    return [
        f"algorithm.threshold: {threshold:g} is compared with scores of the reward {models[0].label}, "
        f"which have no zero: all prompts may lie below it and be dropped, or all above; write {instead}, or "
        "a threshold that was read off the model's scores"
    ]


def _may_be_null(algorithm: Algorithm) -> bool:
    hints = get_type_hints(type(algorithm))
    return type(None) in get_args(hints["threshold"])
