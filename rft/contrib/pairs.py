"""Sample pairs of completions (CORY): a pioneer answers first, then an observer who sees its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from rft.batch import Completion, Prompt
from rft.data.chat import Renderer
from rft.rollout.engine import Generate, Request, Sampling
from rft.rollout.sample import completions_of, text_length


async def sample_pairs(
    generate: Generate,
    name: str,
    prompt: Prompt,
    count: int,
    sampling: Sampling,
    render: Renderer,
    copies: Sequence[int],
) -> list[Completion]:
    """Sample `count` pairs, each a pioneer and then its observer, with `values["observer"]`, `["pair"]` and
    `["copy"]`. copies: which copy of the model is the pioneer, and which the observer."""
    params = replace(sampling, n=count)
    generated = await generate(Request(f"{name}-0", prompt.tokens, params, copies[0]))
    pioneers = completions_of(generated, render.tokenizer)

    async def observe(index: int) -> Completion:
        """Sample one answer to the prompt, the pioneer's answer, and the prompt again, as in a second turn.

        The tokens before the observer's answer are part of its sequence, but not of the mask.
        """
        pioneer = pioneers[index]
        tokenizer, answer, end = render.tokenizer, pioneer.tokens, render.end_ids
        if answer[-len(end) :] != end:  # truncated by the limit, or ended by another stop token
            answer = answer[: text_length(answer, tokenizer, stopped=pioneer.finish == "stop")] + end
        read = answer + prompt.tokens
        params = replace(sampling, n=1)
        if params.seed is not None:
            params = replace(params, seed=params.seed + 1000 * (index + 1))
        request = Request(f"{name}-observer-{index}", prompt.tokens + read, params, copies[1])
        (completion,) = completions_of(await generate(request), tokenizer)
        mask = (False,) * len(read) + (True,) * len(completion.tokens)
        versions = tuple((v, a + len(read), b + len(read)) for v, a, b in completion.versions)
        logps = (0.0,) * len(read) + (completion.logps or ())
        return replace(completion, tokens=read + completion.tokens, logps=logps, mask=mask, versions=versions)

    observers = await asyncio.gather(*(observe(index) for index in range(count)))
    return [
        replace(c, values={**c.values, "observer": float(r), "pair": float(i), "copy": float(copies[r])})
        for i, pair in enumerate(zip(pioneers, observers, strict=True))
        for r, c in enumerate(pair)
    ]
