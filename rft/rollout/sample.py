"""Sample one prompt's group according to the algorithm's plan, and score it.

algorithm.rollouts -> requests (equal completions share one) -> completions -> rewards -> Group
"""

from __future__ import annotations

import asyncio
import math
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from rft.algorithms.base import Algorithm, Rollout
from rft.algorithms.extras import ValuesSteps, copy_of
from rft.batch import Completion, Group, Prompt
from rft.data.chat import Renderer
from rft.data.messages import read_tools
from rft.data.prompts import demonstrations_of
from rft.rewards.runner import RewardRunner
from rft.rewards.types import SampleReward, Score
from rft.rollout.engine import Generate, Generated, Request, Sampling
from rft.utils.dotted import load_dotted

PAIRS = "rft.contrib.pairs.sample_pairs"  # an observer answers after a pioneer
STEPS = "rft.contrib.step_values.value_steps"  # credit for the steps of a completion


@dataclass(frozen=True)
class Judged:
    """A prompt with its completions and their rewards."""

    prompt: Prompt
    completions: list[Completion]
    rewards: list[SampleReward]


@dataclass(frozen=True)
class GroupSampler:
    """Sample and score groups; holds the state shared by all groups of a run."""

    algorithm: Algorithm
    generate: Generate
    rewards: RewardRunner
    render: Renderer

    async def sample(
        self, prompt: Prompt, sampling: Sampling, name: str, step: int, progress: float
    ) -> tuple[Group, float]:
        """Return the prompt's scored group, and the seconds that scoring took.

        sampling: for ordinary completions; `n` is the group size. name: unique among the requests in
        flight. step: finished steps. progress: fraction of the run that is done, 0 to 1.
        """
        demonstration = (
            bool(demonstrations_of(prompt))
            if self.algorithm.uses_demonstrations
            else bool(prompt.columns.get("completion"))
        )
        plan = self.algorithm.rollouts(sampling.n, progress=progress, demonstration=demonstration)
        if any(rollout.role for rollout in plan):
            copies = [copy_of(self.algorithm, step, observer=observer) for observer in (False, True)]
            sample_pairs = load_dotted(PAIRS)
            completions = await sample_pairs(
                self.generate, name, prompt, len(plan) // 2, sampling, self.render, copies
            )
        else:
            completions = await sample_group(self.generate, name, prompt, plan, sampling, self.render)
        begin = time.perf_counter()

        async def score(completions: list[Completion]) -> Judged:
            return await judge(prompt, completions, self.rewards, progress)

        judged = await score(completions)
        seconds = time.perf_counter() - begin
        if isinstance(self.algorithm, ValuesSteps):
            value_steps = load_dotted(STEPS)
            judged = await value_steps(
                judged, self.algorithm.steps, self.generate, score, sampling, name, self.render.tokenizer
            )
        trained = [r.train for r in plan] + [True] * (len(judged.completions) - len(plan))
        return scored_group(judged, trained), seconds


# -- sampling --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Kind:
    """Properties shared by the completions of one request. `given`: the demonstrated tokens that they start
    with; `whole`: these are the entire completion."""

    greedy: bool = False
    mixture: float = 0.0
    train: bool = True
    given: tuple[int, ...] = ()
    whole: bool = False


async def sample_group(
    generate: Generate,
    name: str,
    prompt: Prompt,
    plan: Sequence[Rollout],
    sampling: Sampling,
    render: Renderer,
) -> list[Completion]:
    """Sample every completion of the plan, in plan order; equal ones share a request."""
    demonstrations: list[tuple[int, ...]] = []
    if any(rollout.prefix_share for rollout in plan):
        tools = read_tools(prompt.columns.get("tools"))
        texts = demonstrations_of(prompt)
        demonstrations = [tuple(render.answer(prompt.text, text, tools)) for text in texts]
    places = [
        _kind(rollout, demonstrations, sampling.max_tokens, random.Random(f"{sampling.seed}/{place}"))
        for place, rollout in enumerate(plan)
    ]
    kinds = list(dict.fromkeys(places))

    async def sample_kind(index: int, kind: _Kind) -> list[Completion]:
        given, count, tokenizer = kind.given, places.count(kind), render.tokenizer
        if kind.whole:
            (text,) = decode([given[: text_length(given, tokenizer)]], tokenizer)
            logps = (0.0,) * len(given)
            whole = Completion(given, text, finish="demonstration", demonstrated=len(given), logps=logps)
            return [whole] * count
        params = replace(sampling, n=count, max_tokens=sampling.max_tokens - len(given), mixture=kind.mixture)
        if kind.greedy:
            params = replace(params, n=1, temperature=0.0, seed=None)
        elif sampling.seed is not None:
            params = replace(params, seed=sampling.seed + 1000 * index)
        generated = await generate(Request(f"{name}-{index}", prompt.tokens + given, params))
        if kind.greedy:
            generated = generated * count
        if given:
            generated = [continued(given, g) for g in generated]
        return [replace(c, demonstrated=len(given)) for c in completions_of(generated, tokenizer)]

    parts = await asyncio.gather(*(sample_kind(index, kind) for index, kind in enumerate(kinds)))
    queues = {kind: iter(part) for kind, part in zip(kinds, parts, strict=True)}
    return [next(queues[kind]) for kind in places]


def _kind(
    rollout: Rollout, demonstrations: Sequence[tuple[int, ...]], limit: int, rng: random.Random
) -> _Kind:
    """Return the kind of one planned completion, with random choices drawn. limit: tokens of a completion.

    A prefix leaves at least two tokens of its demonstration and of the limit: the last one ends the answer,
    and a policy that is scored by its continuation must have one to write.
    """
    kind = _Kind(rollout.greedy, rollout.mixture, rollout.train)
    if not rollout.prefix_share or not demonstrations:
        return kind
    tokens, share = rng.choice(demonstrations), rollout.prefix_share
    if share == 1:
        return replace(kind, given=tokens, whole=True)
    if rollout.prefix_least is not None:
        share = rng.uniform(rollout.prefix_least, share)
    count = min(round(share * len(tokens)), len(tokens) - 2, limit - 2)
    return replace(kind, given=tokens[: max(count, 0)])


# -- scoring ---------------------------------------------------------------------------------------------


async def judge(
    prompt: Prompt,
    completions: list[Completion],
    rewards: RewardRunner,
    progress: float = 0.0,
    *,
    training: bool = True,
    texts: list[Any] | None = None,
    given: Mapping[str, Sequence[Score]] | None = None,
) -> Judged:
    """Score one prompt's completions. progress: of the run, 0 to 1, for schedules. training False: held-out
    completions, which do not count in the metrics of training rewards. texts: the rewards' input,
    by default each completion in the format of its prompt: a text, or a list of messages. given: scores that
    an environment has of its completions already, by label."""
    n = len(completions)
    if texts is None and isinstance(prompt.text, str):
        texts = [c.text for c in completions]
    elif texts is None:
        texts = [[{"role": "assistant", "content": c.text}] for c in completions]
    scored = await rewards.score(
        [prompt.text] * n,
        texts,
        {name: [value] * n for name, value in prompt.columns.items()},
        {
            "num_tokens": [c.num_sampled for c in completions],
            "truncated": [c.finish == "length" for c in completions],
            "completion_ids": [list(c.tokens) for c in completions],
        },
        given=given,
        progress=progress,
        training=training,
    )
    return Judged(prompt, completions, scored)


def scored_group(judged: Judged, trained: list[bool]) -> Group:
    """The completions that could be scored, with their rewards; the others are removed. Baseline completions
    (not `trained`) are removed too; their reward becomes `values["baseline"]` of the others. A completion
    whose partner could not be scored is removed as well. A reward called `win_rate` is the column of that
    name, nan where it abstains."""
    rows = list(zip(judged.completions, judged.rewards, trained, strict=True))
    baselines = [r.value for _, r, train in rows if not train and r.value is not None]
    shared = {"baseline": sum(baselines) / len(baselines)} if baselines else {}
    lost = {c.values["pair"] for c, r, _ in rows if r.value is None and "pair" in c.values}
    kept = []
    for c, r, train in rows:
        if not train or r.value is None or c.values.get("pair") in lost:
            continue
        rates = {k: math.nan if s.value is None else s.value for k, s in r.scores.items() if k == "win_rate"}
        kept.append(replace(c, reward=r.value, scores=r.scores, values={**c.values, **shared, **rates}))
    return Group(judged.prompt, tuple(kept) if baselines or all(trained) else ())


# -- from tokens to text ---------------------------------------------------------------------------------


def continued(given: tuple[int, ...], g: Generated) -> Generated:
    """Prepend the given tokens to their continuation; given tokens have no sampler log-prob."""
    shift = len(given)
    versions = tuple((v, a + shift, b + shift) for v, a, b in g.versions)
    return Generated(given + g.tokens, (0.0,) * shift + g.logps, g.finish, versions)


def completions_of(generated: Sequence[Generated], tokenizer: Any) -> list[Completion]:
    """Convert to completions with text, without the tokens that ended it."""
    rows = [g.tokens[: text_length(g.tokens, tokenizer, stopped=g.finish == "stop")] for g in generated]
    return [
        Completion(tokens=g.tokens, text=text, finish=g.finish, logps=g.logps, versions=g.versions)
        for g, text in zip(generated, decode(rows, tokenizer), strict=True)
    ]


def decode(rows: Sequence[Sequence[int]], tokenizer: Any) -> list[str]:
    """Return each row's text, including special tokens: tags such as `<think>` may be special."""
    if not rows:  # a tokenizer returns one empty text for no rows
        return []
    texts: list[str] = tokenizer.batch_decode(
        [list(row) for row in rows], skip_special_tokens=False, spaces_between_special_tokens=False
    )
    return texts


def text_length(tokens: Sequence[int], tokenizer: Any, *, stopped: bool = False) -> int:
    """Return how many of the tokens are text: all but the trailing special ones that end or pad a sequence or
    mark turns, and the white space between those. (7, `</think>`, 8, `<|im_end|>`, "\\n", `<eos>`) gives 3.

    stopped: the last token stopped the engine: if it is special, it ends the sequence, unless it is half of
    a pair of tags.
    """
    ends, special = _turn_tokens(tokenizer)
    if stopped and tokens and tokens[-1] in special and not _paired(special[tokens[-1]], special):
        ends |= {tokens[-1]}
    length = place = len(tokens)
    while place:
        if tokens[place - 1] in ends:
            length = place - 1
        elif length == len(tokens) or decode([[tokens[place - 1]]], tokenizer)[0].strip():
            break
        place -= 1
    return length


@lru_cache(maxsize=16)
def _turn_tokens(tokenizer: Any) -> tuple[frozenset[int], dict[int, str]]:
    """Return (special tokens that end, pad or mark turns; all special tokens with their text)."""
    special = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    named = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id} - {None}
    marks = {
        i
        for written, around_user in _markup(tokenizer)
        for i, token in special.items()
        if token in written and (around_user or not _paired(token, special))
    }
    return frozenset(named | marks), special


def _markup(tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """Yield (text that the chat template puts around messages, whether it can never be part of an answer).
    The text around an assistant's message may contain a tag of the answer, such as an open `<think>`."""
    from jinja2 import TemplateError

    mark = "\ue000"
    system, user, assistant = (
        {"role": role, "content": f"{mark}{role}{mark}"} for role in ("system", "user", "assistant")
    )
    for messages in ([user], [user, assistant, user], [system, user]):
        for generate in (False, True):
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
            except (TemplateError, ValueError, TypeError):  # no template, or none for such messages
                continue
            first, *inner, last = text.split(mark)[::2]
            yield first, True
            yield "".join(inner), False
            yield last, not generate


def _paired(token: str, special: dict[int, str]) -> bool:
    """Whether a token is a tag whose other half is also a special token, as `</answer>` for `<answer>`."""
    tag = re.fullmatch(r"([<\[])(/?)(.*[>\]])", token)
    return tag is not None and f"{tag[1]}{'' if tag[2] else '/'}{tag[3]}" in special.values()
