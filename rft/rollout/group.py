"""Sampling one prompt's group, as the algorithm plans it: plain samples, a greedy yardstick, or
continuations of a demonstration's prefix."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rft.algorithms.base import Rollout
from rft.batch import Completion, Prompt
from rft.rollout.engine import Generated, Request, Sampling
from rft.rollout.sampling import completions_of

Generate = Callable[[Request], Awaitable[list[Generated]]]


@dataclass(frozen=True)
class Sampled:
    """A group's completions; `trained[i]` is False for a yardstick that takes no part in the batch."""

    completions: list[Completion]
    trained: list[bool]


def unsupported(plan: Sequence[Rollout]) -> list[str]:
    """What of a plan these engines cannot do, in words."""
    found = []
    if any(r.mixture for r in plan):
        found.append("sampling from a mixture of policy and reference is not supported; write mixture: 0")
    if any(r.role for r in plan):
        found.append("pioneer and observer roles are not supported by the online loop yet")
    return found


async def sample_group(
    generate: Generate, name: str, prompt: Prompt, plan: Sequence[Rollout], sampling: Sampling, tokenizer: Any
) -> Sampled:
    """Get every completion of the plan; equal ones share a request. Order is the plan's."""
    demonstration = demonstration_tokens(prompt, tokenizer) if any(r.prefix_share for r in plan) else ()
    kinds = list(dict.fromkeys(plan))
    parts = await asyncio.gather(
        *(
            _one_kind(
                generate, f"{name}-{i}", prompt, kind, plan.count(kind), i, sampling, demonstration, tokenizer
            )
            for i, kind in enumerate(kinds)
        )
    )
    queues = {kind: iter(part) for kind, part in zip(kinds, parts, strict=True)}
    return Sampled([next(queues[r]) for r in plan], [r.train for r in plan])


async def _one_kind(
    generate: Generate,
    name: str,
    prompt: Prompt,
    kind: Rollout,
    count: int,
    index: int,
    sampling: Sampling,
    demonstration: tuple[int, ...],
    tokenizer: Any,
) -> list[Completion]:
    given = demonstration[: round(kind.prefix_share * len(demonstration))]
    left = sampling.max_tokens - len(given)
    if given and (len(given) == len(demonstration) or left < 1):
        text = tokenizer.decode(list(given), skip_special_tokens=True)
        whole = Completion(given, text, finish="demonstration", demonstrated=len(given))
        return [replace(whole, logps=(0.0,) * len(given))] * count
    params = replace(sampling, n=count, max_tokens=left)
    if kind.greedy:
        params = replace(params, n=1, temperature=0.0, seed=None)
    elif sampling.seed is not None:
        params = replace(params, seed=sampling.seed + 1000 * index)
    generated = await generate(Request(name, prompt.tokens + given, params))
    if kind.greedy:
        generated = generated * count
    if given:
        generated = [_after(given, g) for g in generated]
    return [replace(c, demonstrated=len(given)) for c in completions_of(generated, tokenizer)]


def _after(given: tuple[int, ...], g: Generated) -> Generated:
    """A continuation with the given prefix put before it; given tokens have no log-prob of a sampler."""
    shift = len(given)
    versions = tuple((v, a + shift, b + shift) for v, a, b in g.versions)
    return Generated(given + g.tokens, (0.0,) * shift + g.logps, g.finish, versions)


def demonstration_tokens(prompt: Prompt, tokenizer: Any) -> tuple[int, ...]:
    """The demonstrated completion (column `completion`) with its end token; () where there is none."""
    text = prompt.columns.get("completion")
    if not text:
        return ()
    return (*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id)
