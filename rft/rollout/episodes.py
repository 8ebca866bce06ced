"""Sample a prompt's completions as episodes of an environment: one session each, repeated after a fault.

EnvironmentRunner.run(row, Session) -> Episode; Session.calls -> lay_out -> Completion -> rewards -> Group
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, count
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tenacity import AsyncRetrying, retry_if_result, stop_after_attempt, wait_exponential

from rft.algorithms.base import Rollout
from rft.batch import Batch, Completion, Group, Prompt
from rft.config.environment import EnvironmentConfig
from rft.config.mixture import COLUMN
from rft.config.rewards import ENVIRONMENT
from rft.config.schema import Config
from rft.data.chat import Renderer
from rft.data.errors import RowProblem
from rft.environments.runner import EnvironmentRunner
from rft.environments.sources import Environments
from rft.environments.types import Ending, Episode
from rft.metrics import RunLog
from rft.rewards.runner import RewardRunner
from rft.rewards.types import SampleReward, Score, graded
from rft.rollout.calls import Call, lay_out
from rft.rollout.engine import Generate, Sampling
from rft.rollout.lockstep import Lockstep
from rft.rollout.sample import GroupSampler, Judged, judge, scored_group
from rft.rollout.session import Budget, Session
from rft.rollout.tool_calls import format_of
from rft.samples import TURNS_MEASURED, Origin
from rft.utils.seeds import derive_seed

BUG = ": a bug in rft. The last checkpoint is sound; report this message with events.jsonl"


class RecordMismatch(RuntimeError):
    """The tokens of a session differ from those that the engine received and sampled: a bug in rft."""


@dataclass(frozen=True)
class Played:
    """A prompt's completions, and the planned rollouts that they belong to. Samples whose environment kept
    failing are missing. `prompt.tokens`: the common prefix of the first prompts of all sessions."""

    prompt: Prompt
    completions: list[Completion]
    plan: list[Rollout]


@dataclass
class EpisodeSampler:
    """Sample completions in an environment. parser: the format of tool calls, if it has tools. lockstep: the
    schedule of training sessions, in which each group is entered under its name."""

    runner: EnvironmentRunner
    generate: Generate
    render: Renderer
    config: EnvironmentConfig
    budget: Budget
    parser: str | None = None
    log: RunLog | None = None
    lockstep: Lockstep | None = None
    tallies: Tallies = field(default_factory=lambda: {True: _Tally(), False: _Tally()})

    async def sample(
        self,
        name: str,
        prompt: Prompt,
        plan: Sequence[Rollout],
        sampling: Sampling,
        *,
        version: int = -1,
        training: bool = True,
    ) -> Played:
        """Play one episode for each planned rollout. version: the oldest policy version that may sample.
        training False: held-out prompts, which are counted separately."""

        async def play(place: int, rollout: Rollout) -> tuple[Session, Episode] | None:
            seed = None if sampling.seed is None else derive_seed(sampling.seed, "sample", place)
            temperature = 0.0 if rollout.greedy else sampling.temperature
            params = replace(sampling, n=1, seed=seed, temperature=temperature)
            if self.lockstep is None or not training:
                return await self._play(f"{name}-{place}", prompt, params, training, self.generate)
            with self.lockstep.session(name, place) as generate:
                return await self._play(f"{name}-{place}", prompt, params, training, generate)

        played = await asyncio.gather(*(play(place, rollout) for place, rollout in enumerate(plan)))
        kept = [(p, rollout) for p, rollout in zip(played, plan, strict=True) if p is not None]
        firsts = [next(c.prompt for c in s.calls if c.trained and c.sampled) for (s, _), _ in kept]
        shared = _common_start(firsts) or prompt.tokens
        completions = []
        for (session, episode), _ in kept:
            check_versions(session.calls, version)
            completions.append(self._completion(shared, session, episode))
        return Played(replace(prompt, tokens=shared), completions, [rollout for _, rollout in kept])

    async def _play(
        self, name: str, prompt: Prompt, sampling: Sampling, training: bool, generate: Generate
    ) -> tuple[Session, Episode] | None:
        """Play one episode, again after a fault; None once `max_retries` are used up, or if the policy
        sampled nothing."""
        row = {**prompt.columns, "prompt": prompt.text}
        attempts = count(1)

        async def once() -> tuple[Session, Episode]:
            number = next(attempts)
            label = name if number == 1 else f"{name}-try-{number}"
            session = Session(generate, self.render, prompt, sampling, self.budget, label, self.parser)
            begin = time.perf_counter()
            try:
                episode = await self.runner.run(row, session)
            finally:
                session.close("the episode has ended")
            # `Episodes.take_metrics` may have begun another tally since this session began.
            self.tallies[training].add(session, episode, time.perf_counter() - begin)
            self._report(label, prompt, episode, number)
            return session, episode

        tries = AsyncRetrying(
            retry=retry_if_result(lambda result: result[1].failed),
            stop=stop_after_attempt(self.config.max_retries + 1),
            wait=wait_exponential(multiplier=0.5, max=30),
            retry_error_callback=lambda state: state.outcome and state.outcome.result(),  # the last one's
        )
        result: tuple[Session, Episode] = await tries(once)
        session, episode = result
        if episode.failed or not any(call.trained and call.sampled for call in session.calls):
            self.tallies[training].lost += 1
            return None
        return session, episode

    def _report(self, name: str, prompt: Prompt, episode: Episode, attempt: int) -> None:
        if episode.failed and self.log is not None:
            again = attempt <= self.config.max_retries
            action = "the episode is played again" if again else "its sample leaves the group"
            self.log.event(
                "fault/environment",
                request=name,
                prompt=prompt.id,
                outcome=str(episode.ending),
                what=episode.detail[-2000:],
                attempt=attempt,
                action=action,
            )

    def _completion(self, shared: tuple[int, ...], session: Session, episode: Episode) -> Completion:
        """Lay a session out. Context and turn limits flag it as cut, as the length limit does."""
        completion = lay_out(shared, session.calls)
        check_layout(shared, session.calls, completion)
        given = list(episode.messages)[episode.start :]
        answers = [str(m.get("content") or "") for m in given if m.get("role") == "assistant"]
        scores: dict[str, Score] = {} if episode.reward is None else {ENVIRONMENT: graded(episode.reward)}
        scores |= {f"{ENVIRONMENT}/{name}": graded(value) for name, value in episode.scores.items()}
        scores |= episode.judged
        cut = episode.ending in (Ending.context_full, Ending.turn_limit)
        return replace(
            completion,
            text=answers[-1] if answers else "",
            messages=tuple(given),
            finish="length" if cut else completion.finish,
            reward=episode.reward,
            scores=scores,
            origin=Origin(session.seed, str(episode.ending), tuple(episode.messages[: episode.start])),
        )

    async def judge(
        self,
        played: Played,
        rewards: RewardRunner | None,
        progress: float = 0.0,
        *,
        training: bool = True,
    ) -> Judged:
        """Score completions by the environment's reward plus that of the config's functions, which see the
        final message, or the transcript (`environment.transcript`)."""
        from_environment = [SampleReward(c.reward, c.scores) for c in played.completions]
        if rewards is None or not rewards.config.functions or not from_environment:
            return Judged(played.prompt, played.completions, from_environment)
        labels = [c.label for c in self.runner.rewards]
        given = {label: [c.scores[label] for c in played.completions] for label in labels}
        texts = [list(c.messages) for c in played.completions] if self.config.transcript else None
        judged = await judge(
            played.prompt, played.completions, rewards, progress, training=training, texts=texts, given=given
        )
        return replace(
            judged, rewards=[_added(a, b) for a, b in zip(judged.rewards, from_environment, strict=True)]
        )


@dataclass(frozen=True)
class Episodes:
    """The samplers of a run with environments, by source of a mixture; "" is that of all other rows."""

    by_source: Mapping[str, EpisodeSampler]
    environments: Environments
    tallies: Tallies
    lockstep: Lockstep | None

    def of(self, prompt: Prompt) -> EpisodeSampler | None:
        """Return the sampler of a row; None: it has one completion, without an environment."""
        return self.by_source.get(prompt.columns.get(COLUMN, ""), self.by_source.get(""))

    def take_metrics(self, *, training: bool = True) -> dict[str, float]:
        """Return and reset `session/...` of all environments' sessions since the last call, and, with those
        of training, `environment/...` of all calls."""
        return take(self.tallies, training) | (self.environments.take_metrics() if training else {})


def make_episodes(
    config: Config, environments: Environments, generate: Generate, tokenizer: Any, log: RunLog | None = None
) -> Episodes:
    """Return the samplers of a config's environments, which have been started. The messages of a source are
    rendered with its system message."""
    lockstep = Lockstep(generate) if config.rollout.turns == "lockstep" else None
    tallies: Tallies = {True: _Tally(), False: _Tally()}
    by_source = {}
    for source, data in {"": config.data, **config.data.parts()}.items():
        runner = environments.runners.get(source) or environments.runners.get("")
        if runner is None:
            continue
        render, budget = Renderer(data, tokenizer), Budget.of(runner.config, config.rollout.sampling)
        parser = _parser(runner, render)
        if log is not None:
            rules, why = render.bridge
            of = {"source": source} if source else {}
            log.event(
                "session/prompts",
                kept_by=["chat template", *(["renderers"] if rules else [])],
                what=why,
                **of,
            )
        by_source[source] = EpisodeSampler(
            runner, generate, render, runner.config, budget, parser, log, lockstep, tallies
        )
    return Episodes(by_source, environments, tallies, lockstep)


def _parser(runner: EnvironmentRunner, render: Renderer) -> str | None:
    """Return the format of tool calls. Raises RowProblem if it is not known, and there are tools."""
    if runner.config.tool_parser != "auto":
        return runner.config.tool_parser
    try:
        return format_of(render)
    except RowProblem:
        if runner.tools:
            raise
        return None


@dataclass(frozen=True)
class EpisodeGroupSampler(GroupSampler):
    """Sample and score groups in an environment, and single completions of rows that have none."""

    episodes: Episodes

    async def sample(
        self, prompt: Prompt, sampling: Sampling, name: str, step: int, progress: float
    ) -> tuple[Group, float]:
        """Return the prompt's scored group, a session for each completion, and the seconds of scoring."""
        episodes = self.episodes.of(prompt)
        if episodes is None:
            return await super().sample(prompt, sampling, name, step, progress)
        plan = self.algorithm.rollouts(sampling.n, progress=progress, demonstration=False)
        played = await episodes.sample(name, prompt, plan, sampling, version=step)
        begin = time.perf_counter()
        judged = await episodes.judge(played, self.rewards, progress)
        seconds = time.perf_counter() - begin
        return scored_group(judged, [rollout.train for rollout in played.plan]), seconds


def _added(config: SampleReward, own: SampleReward) -> SampleReward:
    """Add the environment's reward to that of the config's functions. A function that failed leaves no
    reward, one that abstains leaves the other."""
    scores = {**config.scores, **own.scores}
    if config.value is None and any(score.failed for score in config.scores.values()):
        return SampleReward(None, scores)
    values = [value for value in (config.value, own.value) if value is not None]
    return SampleReward(sum(values) if values else None, scores, config.vector)


def _common_start(prompts: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """Return the tokens with which all prompts begin."""
    if not prompts:
        return ()
    first, last = min(prompts), max(prompts)  # a prefix that these two share is shared by those in between
    pairs = enumerate(zip(first, last, strict=False))
    return first[: next((i for i, (a, b) in pairs if a != b), min(len(first), len(last)))]


# -- metrics ---------------------------------------------------------------------------------------------


def leaves(calls: Sequence[Call]) -> int:
    """Return the number of branches of a session: calls that no later one continues."""
    sequences = [call.prompt + call.sampled for call in calls]
    return sum(
        not any(later.prompt[: len(tokens)] == tokens for later in calls[k + 1 :])
        for k, tokens in enumerate(sequences)
    )


@dataclass
class _Tally:
    """Counts of training sessions since the last step."""

    values: dict[str, list[float]] = field(default_factory=dict)
    endings: Counter[str] = field(default_factory=Counter)
    lost: int = 0

    def add(self, session: Session, episode: Episode, seconds: float) -> None:
        self.endings[str(episode.ending)] += 1
        calls, record = session.calls, session.record
        if episode.failed or not calls:
            return
        numbers = {
            "turns": len(calls),
            "branches": leaves(calls),
            "tokens": sum(len(c.sampled) for c in calls),
            "context": max(len(c.prompt) + len(c.sampled) for c in calls),
            "seconds": seconds,
            "model_seconds": session.waited_s,
            **{f"score/{name}": value for name, value in episode.scores.items()},
            "retokenised": record.retokenised,
            "rewritten": record.rewritten,
            "bridged": record.bridged,
            "malformed": record.malformed,
            "tool_calls": record.tool_calls,
            "cached": record.cached,
        }
        turns = [
            (f"turn_reward/{min(number, TURNS_MEASURED)}", call.reward)
            for number, call in enumerate(calls, 1)
            if call.reward is not None
        ]
        for name, value in [*numbers.items(), *turns]:
            self.values.setdefault(name, []).append(float(value))

    def metrics(self) -> dict[str, float]:
        total = sum(self.endings.values())
        return {
            **{f"session/{name}": statistics.fmean(values) for name, values in sorted(self.values.items())},
            **{f"session/ending/{name}": count / total for name, count in sorted(self.endings.items())},
            "session/lost": float(self.lost),
        }


Tallies: TypeAlias = dict[bool, _Tally]
"""Counts of the sessions of training (True) and of held-out prompts."""


def take(tallies: Tallies, training: bool) -> dict[str, float]:
    """Return and reset one of the counts, as metrics."""
    metrics, tallies[training] = tallies[training].metrics(), _Tally()
    return metrics


# -- the check of every call -----------------------------------------------------------------------------


def check_versions(calls: Sequence[Call], oldest: int) -> None:
    """Raise RecordMismatch unless each call's version spans cover its tokens, none older than `oldest`."""
    for k, call in enumerate(calls):
        ends = [0, *(end for _, _, end in call.versions)]
        starts = [*(start for _, start, _ in call.versions), len(call.sampled)]
        if ends != starts or any(version < oldest for version, _, _ in call.versions):
            raise RecordMismatch(
                f"call {k} of a session has the version spans {call.versions} over {len(call.sampled)} "
                f"tokens; it was handed out at version {oldest}{BUG}"
            )


def check_layout(prompt: tuple[int, ...], calls: Sequence[Call], completion: Completion) -> None:
    """Raise RecordMismatch unless every sampled token is laid out once, after exactly the ids that the engine
    was given for it."""
    trained = [call for call in calls if call.trained and call.sampled]
    contexts = [context for context in _contexts(prompt, completion) if context]
    if contexts != [call.prompt + call.sampled for call in trained]:
        raise RecordMismatch(
            "a session's tokens are not laid out in the contexts in which they were sampled" + BUG
        )
    mask = completion.mask or (True,) * len(completion.tokens)
    if sum(mask) != sum(len(call.sampled) for call in trained):
        raise RecordMismatch(
            f"a session trains {sum(mask)} tokens, which are not those that were sampled{BUG}"
        )


def _contexts(prompt: tuple[int, ...], completion: Completion) -> Iterator[tuple[int, ...]]:
    """Yield, for each turn, all tokens up to its end; () for a turn that is not trained."""
    shared, tokens = len(prompt), completion.tokens
    branches = completion.branches or ((0, shared - 1),)
    for turn in completion.turns:
        parts: list[tuple[int, ...]] = []
        end = turn.end
        while turn.end > turn.start:
            start, after = max(b for b in branches if b[0] < end)
            parts.append(tokens[start:end])
            if after < shared:
                parts.append(prompt[: after + 1])
                break
            end = after - shared + 1
        yield tuple(chain.from_iterable(reversed(parts)))


def check_batch(groups: Sequence[Group], batch: Batch) -> None:
    """Raise RecordMismatch unless each turn's tokens in a batch follow the ids that the engine was given."""
    if batch.turn is None:
        return
    tokens, source, segment = batch.tokens.numpy(), batch.source.numpy(), batch.segment.numpy()
    starts = np.searchsorted(segment, np.arange(batch.parent.numel()))
    sampled = np.flatnonzero((batch.mask & (batch.turn >= 0)).numpy())[::-1]
    keys = np.stack([batch.sequence.numpy()[sampled], batch.turn.numpy()[sampled]])
    keys, first = np.unique(keys, axis=1, return_index=True)
    last = {(n, turn): int(sampled[i]) for (n, turn), i in zip(keys.T.tolist(), first, strict=True)}
    completions = [(g.prompt, c) for g in groups for c in g.completions]
    for n, (prompt, completion) in enumerate(completions):
        for turn, context in enumerate(_contexts(prompt.tokens, completion)):
            if not context:
                continue
            end = last.get((n, turn))
            if end is None or not np.array_equal(_path(end, tokens, source, segment, starts), context):
                raise RecordMismatch(
                    f"turn {turn + 1} of sequence {n} of the batch (prompt {prompt.id}): its tokens do not "
                    f"follow the ids that the engine was given{BUG}"
                )


Ids = NDArray[np.int64]


def _path(last: int, tokens: Ids, source: Ids, segment: Ids, starts: Ids) -> Ids:
    """Return the tokens on the way from the root of its tree to token `last`."""
    parts = []
    while last >= 0:
        start = int(starts[segment[last]])
        parts.append(tokens[start : last + 1])
        last = int(source[start])
    return np.concatenate(parts[::-1])
