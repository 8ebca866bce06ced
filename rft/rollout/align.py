"""Decoding-time alignment: the best of n completions by a reward, or a Markov chain over completions."""

from __future__ import annotations

import asyncio
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from rft.config.rollout import AlignConfig
from rft.rewards.runner import RewardRunner
from rft.rollout.engine import Generate, Generated, Request
from rft.rollout.sample import completions_of, judge
from rft.samples import Prompt
from rft.utils.seeds import derive_seed


def acceptance(reward: float, proposed: float, length: int, proposed_length: int, beta: float) -> float:
    """Return the probability of moving from a completion to a proposed one.

    The target is p(y) exp(r(y) / beta), where p is the distribution that the engine samples from. QAlign's
    proposal (arXiv:2504.03790, after QUEST, arXiv:2406.00049) draws a position uniformly from the |y| tokens
    and samples everything from it on anew. The likelihoods of the two suffixes cancel in the ratio of
    Metropolis and Hastings; the 1 / |y| of the position does not:

        min(1, exp((r(y') - r(y)) / beta) * |y| / |y'|)

    length, proposed_length: tokens, with the stop token. Rewards of -inf (not judged): a move towards one is
    never made, a move away from one always.
    """
    if proposed == -math.inf:
        return 0.0
    exponent = (proposed - reward) / beta + math.log(length / proposed_length)
    return math.exp(min(exponent, 0.0))


@dataclass
class Aligner:
    """Sample completions that a reward favours. rewards: those of the config, which the caller closes."""

    config: AlignConfig
    generate: Generate
    rewards: RewardRunner
    tokenizer: Any
    proposed: int = 0
    accepted: int = 0

    async def sample(self, request: Request, prompt: Prompt) -> list[Generated]:
        """Return `request.sampling.n` completions. prompt: its text and columns are for the rewards."""
        if self.config.method == "best_of_n":
            return await self._best(request, prompt)
        states = await self.generate(request)
        chains = (self._chain(request, prompt, state, place) for place, state in enumerate(states))
        return list(await asyncio.gather(*chains))

    async def _best(self, request: Request, prompt: Prompt) -> list[Generated]:
        """Return the best of each n completions; the first of equally good ones."""
        n = self.config.n
        sampling = replace(request.sampling, n=request.sampling.n * n)
        generated = await self.generate(replace(request, sampling=sampling))
        values = await self._values(generated, prompt)
        best = [max(range(i, i + n), key=values.__getitem__) for i in range(0, len(values), n)]
        return [generated[i] for i in best]

    async def _chain(self, request: Request, prompt: Prompt, state: Generated, place: int) -> Generated:
        """Return the last state of a chain of n proposals that begins at a sampled completion."""
        seed = request.sampling.seed
        rng = random.Random(None if seed is None else f"{seed}/{place}")
        (value,) = await self._values([state], prompt)
        for step in range(self.config.n):
            start = rng.randrange(len(state.tokens))
            sampling = replace(
                request.sampling,
                n=1,
                max_tokens=request.sampling.max_tokens - start,
                seed=None if seed is None else derive_seed(seed, "align", place, step),
            )
            name, prefix = f"{request.id}-{place}-{step}", request.tokens + state.tokens[:start]
            (suffix,) = await self.generate(replace(request, id=name, tokens=prefix, sampling=sampling))
            proposal = _joined(state, start, suffix)
            (new,) = await self._values([proposal], prompt)
            self.proposed += 1
            lengths = len(state.tokens), len(proposal.tokens)
            if rng.random() < acceptance(value, new, *lengths, self.config.beta):
                self.accepted += 1
                state, value = proposal, new
        return state

    async def _values(self, generated: Sequence[Generated], prompt: Prompt) -> list[float]:
        """Return the combined reward of each completion; -inf where it could not be judged."""
        completions = completions_of(generated, self.tokenizer)
        judged = await judge(prompt, completions, self.rewards, training=False)
        return [-math.inf if reward.value is None else reward.value for reward in judged.rewards]

    def metrics(self) -> dict[str, float]:
        """Return the share of proposals that were accepted; {} without proposals."""
        return {"align/accepted": self.accepted / self.proposed} if self.proposed else {}


def _joined(state: Generated, start: int, suffix: Generated) -> Generated:
    """Return the first `start` tokens of a completion with another suffix."""
    kept = tuple((v, a, min(b, start)) for v, a, b in state.versions if a < start)
    moved = tuple((v, a + start, b + start) for v, a, b in suffix.versions)
    tokens, logps = state.tokens[:start] + suffix.tokens, state.logps[:start] + suffix.logps
    return Generated(tokens, logps, suffix.finish, kept + moved)
