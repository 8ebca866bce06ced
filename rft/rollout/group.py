"""Sampling one prompt's group, as the algorithm plans it: plain samples, a greedy yardstick,
continuations of a demonstration's prefix, or an observer's answers to a pioneer's."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace

from rft.algorithms.base import Rollout
from rft.batch import Completion, Prompt
from rft.data.chat import Renderer
from rft.data.demonstrations import demonstrations_of
from rft.data.messages import read_tools
from rft.rollout.engine import Generated, Request, Sampling
from rft.rollout.sampling import completions_of, continued, decode, text_length

Generate = Callable[[Request], Awaitable[list[Generated]]]


@dataclass(frozen=True)
class Sampled:
    """A group's completions; `trained[i]` is False for a yardstick that takes no part in the batch."""

    completions: list[Completion]
    trained: list[bool]


@dataclass(frozen=True)
class _Group:
    """What the parts of a group share."""

    generate: Generate
    name: str
    prompt: Prompt
    sampling: Sampling
    render: Renderer
    copies: tuple[int, int]


def unsupported(plan: Sequence[Rollout]) -> list[str]:
    """What of a plan cannot be carried out, in words."""
    if any(r.role for r in plan) and [r.role for r in plan] != ["pioneer", "observer"] * (len(plan) // 2):
        return ["pioneers and observers must take turns, and take all places of the group"]
    return []


async def sample_group(
    generate: Generate,
    name: str,
    prompt: Prompt,
    plan: Sequence[Rollout],
    sampling: Sampling,
    render: Renderer,
    copies: tuple[int, int] = (0, 0),
) -> Sampled:
    """Get every completion of the plan; equal ones share a request. Order is the plan's.

    copies: which copy of the model is the pioneer, and which the observer.
    """
    group = _Group(generate, name, prompt, sampling, render, copies)
    if any(r.role for r in plan):
        return Sampled(await _sample_pairs(group, plan), [r.train for r in plan])
    demonstrations = []
    if any(r.prefix_share for r in plan):
        tools = read_tools(prompt.columns.get("tools"))
        demonstrations = [
            tuple(render.answer(prompt.text, text, tools)) for text in demonstrations_of(prompt)
        ]
    places = [
        _kind(rollout, demonstrations, sampling.max_tokens, random.Random(f"{sampling.seed}/{place}"))
        for place, rollout in enumerate(plan)
    ]
    kinds = list(dict.fromkeys(places))
    parts = await asyncio.gather(
        *(_one_kind(group, kind, places.count(kind), i) for i, kind in enumerate(kinds))
    )
    queues = {kind: iter(part) for kind, part in zip(kinds, parts, strict=True)}
    return Sampled([next(queues[kind]) for kind in places], [r.train for r in plan])


@dataclass(frozen=True)
class _Kind:
    """What the completions of one request have in common. `given` is what they start with; `whole` says
    that they end with it too."""

    greedy: bool = False
    mixture: float = 0.0
    train: bool = True
    given: tuple[int, ...] = ()
    whole: bool = False


def _kind(
    rollout: Rollout, demonstrations: Sequence[tuple[int, ...]], limit: int, dice: random.Random
) -> _Kind:
    """The kind of one place in the plan, with what is random about it drawn. limit: tokens of a completion.

    A prefix leaves two tokens of its demonstration, and of the limit, at least: the last one ends the answer,
    and a policy that is to be judged by its continuation must have one to write.
    """
    kind = _Kind(rollout.greedy, rollout.mixture, rollout.train)
    if not rollout.prefix_share or not demonstrations:
        return kind
    tokens, share = dice.choice(demonstrations), rollout.prefix_share
    if share == 1:
        return replace(kind, given=tokens, whole=True)
    if rollout.prefix_least is not None:
        share = dice.uniform(rollout.prefix_least, share)
    count = min(round(share * len(tokens)), len(tokens) - 2, limit - 2)
    return replace(kind, given=tokens[: max(count, 0)])


async def _one_kind(group: _Group, kind: _Kind, count: int, index: int) -> list[Completion]:
    sampling, tokenizer, given = group.sampling, group.render.tokenizer, kind.given
    if kind.whole:
        (text,) = decode([given[: text_length(given, tokenizer)]], tokenizer)
        whole = Completion(given, text, finish="demonstration", demonstrated=len(given))
        return [replace(whole, logps=(0.0,) * len(given))] * count
    params = replace(sampling, n=count, max_tokens=sampling.max_tokens - len(given), mixture=kind.mixture)
    if kind.greedy:
        params = replace(params, n=1, temperature=0.0, seed=None)
    elif sampling.seed is not None:
        params = replace(params, seed=sampling.seed + 1000 * index)
    name, tokens = f"{group.name}-{index}", group.prompt.tokens + given
    generated = await group.generate(Request(name, tokens, params, group.copies[0]))
    if kind.greedy:
        generated = generated * count
    if given:
        generated = [continued(given, g) for g in generated]
    return [replace(c, demonstrated=len(given)) for c in completions_of(generated, tokenizer)]


async def _sample_pairs(group: _Group, plan: Sequence[Rollout]) -> list[Completion]:
    """Pioneers answer the prompt; then an observer each, who has read its pioneer's answer."""
    count = len(plan) // 2
    pioneers = await _one_kind(group, _Kind(), count, 0)
    observers = await asyncio.gather(*(_observe(group, pioneers[i], i) for i in range(count)))
    return [
        replace(
            c, values={**c.values, "observer": float(r), "pair": float(i), "copy": float(group.copies[r])}
        )
        for i, pair in enumerate(zip(pioneers, observers, strict=True))
        for r, c in enumerate(pair)
    ]


async def _observe(group: _Group, pioneer: Completion, index: int) -> Completion:
    """One answer to the prompt, the pioneer's answer, and the prompt again, as in a second turn.

    What stands before the observer's own tokens is part of its sequence, but not of the mask.
    """
    tokenizer, answer, end = group.render.tokenizer, pioneer.tokens, group.render.end_ids
    if answer[-len(end) :] != end:  # cut by the limit, or ended by another stop token
        answer = answer[: text_length(answer, tokenizer, stopped=pioneer.finish == "stop")] + end
    read = answer + group.prompt.tokens
    params = replace(group.sampling, n=1)
    if params.seed is not None:
        params = replace(params, seed=params.seed + 1000 * (index + 1))
    tokens = group.prompt.tokens + read
    request = Request(f"{group.name}-observer-{index}", tokens, params, group.copies[1])
    (own,) = completions_of(await group.generate(request), tokenizer)
    mask = (False,) * len(read) + (True,) * len(own.tokens)
    versions = tuple((v, a + len(read), b + len(read)) for v, a, b in own.versions)
    logps = (0.0,) * len(read) + (own.logps or ())
    return replace(own, tokens=read + own.tokens, logps=logps, mask=mask, versions=versions)
