"""Credit for the steps of a completion: their scores from a step-wise reward, or the mean reward of policy
continuations sampled before each step (VinePPO)."""

from __future__ import annotations

import asyncio
import math
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from rft.algorithms.extras import Steps
from rft.batch import Completion
from rft.rollout.engine import Generate, Request, Sampling
from rft.rollout.sample import Judged, completions_of, continued, decode, text_length
from rft.utils.seeds import derive_seed

Judge = Callable[[list[Completion]], Awaitable[Judged]]
Tokens = tuple[int, ...]


def step_ends(pieces: Sequence[str], separator: str) -> tuple[int, ...]:
    """Return the end of each step of a completion, in tokens; the last step ends with the completion.

    pieces: the text of each token. Steps are separated by `separator`, blank ones skipped, so there are as
    many as `rft.contrib.rewards.steps.split_steps` returns. ("1+", "1\\n", "=2") with "\\n" gives (2, 3).
    """
    reached = list(accumulate(len(piece) for piece in pieces))
    text, ends, start = "".join(pieces), [], 0
    while start < len(text):
        end = text.find(separator, start)
        stop = len(text) if end < 0 else end + len(separator)
        if text[start : len(text) if end < 0 else end].strip():
            ends.append(bisect_left(reached, stop) + 1)
        start = stop
    return (*ends[:-1], len(pieces)) if pieces else ()


async def value_steps(
    judged: Judged,
    steps: Steps,
    generate: Generate,
    judge: Judge,
    sampling: Sampling,
    name: str,
    tokenizer: Any,
) -> Judged:
    """Return the group with `step_ends` and `step_values` or `step_rewards` in its completions' values.

    Completions whose steps could not be judged lose their reward, which removes them from the group.
    """
    ends = [step_ends(_pieces(c, tokenizer), steps.separator) for c in judged.completions]
    if not steps.branches:
        return _with_scores(judged, ends)
    limit = sampling.max_tokens
    starts = {
        c.tokens[:e] for c, cuts in zip(judged.completions, ends, strict=True) for e in cuts[:-1] if e < limit
    }
    ordered = sorted(starts)
    continued_from = await asyncio.gather(
        *(
            _continue_from(
                judged, start, generate, judge, sampling, steps.branches, f"{name}-step-{i}", tokenizer
            )
            for i, start in enumerate(ordered)
        )
    )
    values = [_mean_reward(judgement) for judgement in continued_from]
    judged = _with_values(judged, ends, dict(zip(ordered, values, strict=True)))
    return _with_pairs(judged, ordered, continued_from) if steps.pairs else judged


async def _continue_from(
    judged: Judged,
    start: Tokens,
    generate: Generate,
    judge: Judge,
    sampling: Sampling,
    branches: int,
    name: str,
    tokenizer: Any,
) -> Judged:
    """Return `branches` judged continuations of `start`, each with the start."""
    seed = None if sampling.seed is None else derive_seed(sampling.seed, *start)
    params = replace(sampling, n=branches, max_tokens=sampling.max_tokens - len(start), seed=seed)
    generated = await generate(Request(name, judged.prompt.tokens + start, params))
    return await judge(completions_of([continued(start, g) for g in generated], tokenizer))


def _mean_reward(judgement: Judged) -> float | None:
    """Return the mean reward of completions; None if none could be judged."""
    rewards = [r.value for r in judgement.rewards if r.value is not None]
    return sum(rewards) / len(rewards) if rewards else None


def _with_pairs(judged: Judged, starts: Sequence[Tokens], continuations: Sequence[Judged]) -> Judged:
    """Add the best and the worst continuation of each start, where their rewards differ."""
    completions, rewards = list(judged.completions), list(judged.rewards)
    for number, (start, judgement) in enumerate(zip(starts, continuations, strict=True), 1):
        rows = [
            (r.value, c, r)
            for c, r in zip(judgement.completions, judgement.rewards, strict=True)
            if r.value is not None and len(c.tokens) > len(start)
        ]
        if not rows:
            continue
        best, worst = max(rows, key=lambda row: row[0]), min(rows, key=lambda row: row[0])
        for value, c, reward in (best, worst) if best[0] > worst[0] else ():
            mask = tuple(i >= len(start) for i in range(len(c.tokens)))
            values = {**c.values, "prefix": float(number)}
            completions.append(replace(c, mask=mask, demonstrated=len(start), values=values))
            rewards.append(replace(reward, value=value))
    return replace(judged, completions=completions, rewards=rewards)


def _with_values(
    judged: Judged, ends: Sequence[tuple[int, ...]], values: dict[Tokens, float | None]
) -> Judged:
    """Set the step values. A boundary without a value is dropped: the steps around it are merged."""
    completions = []
    for c, completion_ends in zip(judged.completions, ends, strict=True):
        inner = [(e, v) for e in completion_ends[:-1] if (v := values.get(c.tokens[:e])) is not None]
        columns: dict[str, tuple[float, ...]] = {
            "step_ends": (*(float(e) for e, _ in inner), float(len(c.tokens))),
            "step_values": (math.nan, *(v for _, v in inner)),
        }
        completions.append(replace(c, values={**c.values, **columns}))
    return replace(judged, completions=completions)


def _with_scores(judged: Judged, ends: Sequence[tuple[int, ...]]) -> Judged:
    completions, rewards = [], []
    for c, reward, completion_ends in zip(judged.completions, judged.rewards, ends, strict=True):
        scores = next((s.steps for s in reward.scores.values() if s.steps), ())
        fits = len(scores) == len(completion_ends)
        columns = {"step_ends": tuple(map(float, completion_ends)), "step_rewards": scores} if fits else {}
        completions.append(replace(c, values={**c.values, **columns}))
        rewards.append(reward if fits else replace(reward, value=None))
    return replace(judged, completions=completions, rewards=rewards)


def _pieces(c: Completion, tokenizer: Any) -> list[str]:
    """Return the text of each token, '' after the end of the completion's text."""
    length = text_length(c.tokens, tokenizer, stopped=c.finish == "stop")
    return decode([[t] for t in c.tokens[:length]], tokenizer) + [""] * (len(c.tokens) - length)
