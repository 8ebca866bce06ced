"""Held-out evaluation of both loops: accuracy of sampled completions, and the loss on held-out groups."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from rft.algorithms.base import Rollout
from rft.batch import Batch, Completion, Group, Prompt
from rft.config.rollout import AlignConfig
from rft.config.schema import Config
from rft.learner.objective import Sums, add_sums
from rft.learner.workers import LearnerHandle
from rft.loops.step_metrics import sample_rows
from rft.metrics import RunLog
from rft.metrics.evaluation import (
    Evaluation,
    Problem,
    Sampled,
    change_metrics,
    evaluation_metrics,
    flips,
    read_evaluation,
    write_evaluation,
)
from rft.preflight.data import EvalSet
from rft.rewards.equal import equal_numbers
from rft.rewards.runner import RewardRunner
from rft.rewards.types import Outcome, SampleReward, Score, text_of
from rft.rollout.align import Aligner
from rft.rollout.engine import Generate, Request, Sampling
from rft.rollout.episodes import Episodes
from rft.rollout.sample import Judged, completions_of, judge
from rft.sync.channel import WeightChannel
from rft.utils.seeds import derive_seed


def is_correct(reward: SampleReward, primary: str) -> bool | None:
    """Whether the primary reward function judged it correct; None where it could not judge. Where the source
    of a mixture is not scored by it, the first reward of the source is the primary one."""
    score = primary_score(reward, primary)
    return None if score is None or score.value is None else score.outcome == Outcome.correct


def primary_score(reward: SampleReward, primary: str) -> Score | None:
    """Return the score of the primary reward, or else the first one; None if there is none."""
    return reward.scores.get(primary) or next(iter(reward.scores.values()), None)


def named(held_out: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Return the metrics of a held-out set ("" for the unnamed one) under their full names."""
    if held_out:
        return {f"eval/{held_out}/{name}": value for name, value in metrics.items()}
    return {f"eval/{name}": value for name, value in metrics.items()}


async def evaluate(
    generate: Generate,
    rewards: RewardRunner,
    tokenizer: Any,
    sets: Sequence[EvalSet],
    config: Config,
    *,
    label: str,
    progress: float = 0.0,
    episodes: Episodes | None = None,
    align: AlignConfig | None = None,
) -> tuple[dict[str, float], list[JudgedSet]]:
    """Sample and score every set; return the metrics (`eval/...`, `eval/NAME/...`) and the judged
    completions.

    The seeds depend only on the run's seed, the set and the prompt: two policies are evaluated with the same
    seeds. label: distinguishes the requests from others in flight. progress: share of the run that is done,
    for the rewards. episodes: samples in environments instead, where a set has no rewards. align: samples
    completions, except greedy ones, that its rewards favour.
    """
    parts = (generate, rewards, tokenizer)
    aligner = None
    if align is not None:
        aligner = Aligner(align, generate, rewards.other("rollout.align", align.rewards), tokenizer)
    judged = [await _sample_set(*parts, s, config, label, progress, episodes, aligner) for s in sets]
    metrics: dict[str, float] = {}
    for one in judged:
        metrics |= named(one.of.name, one.metrics(config.seed))
    if aligner is not None:
        metrics |= named("", aligner.metrics())
    return metrics, judged


@dataclass(frozen=True)
class JudgedSet:
    """The judged completions of a set: samples of each prompt, and its greedy completion where that is
    measured.

    sessions: metrics of its sessions in an environment.
    """

    of: EvalSet
    primary: str
    sampled: Sequence[Judged]
    greedy: Sequence[Judged]
    sessions: Mapping[str, float]

    @cached_property
    def problems(self) -> list[Problem]:
        """The prompts with their completions, as the metrics read them."""
        greedy: Sequence[Judged | None] = self.greedy or [None] * len(self.sampled)
        return [self._problem(j, g) for j, g in zip(self.sampled, greedy, strict=True)]

    def _problem(self, judged: Judged, greedy: Judged | None) -> Problem:
        shown = judged if greedy is None else greedy
        both = [*zip(judged.completions, judged.rewards, strict=True)]
        if greedy is not None:
            both += zip(greedy.completions, greedy.rewards, strict=True)
        samples = [self._sampled(c, r) for c, r in both]
        count = len(judged.completions)
        samples = _with_equal_answers(samples)
        return Problem(
            judged.prompt.id,
            samples[:count],
            samples[count] if len(samples) > count else None,
            text_of(judged.prompt.text),
            shown.completions[0].text if shown.completions else "",
        )

    def _sampled(self, completion: Completion, reward: SampleReward) -> Sampled:
        rerank, decline = self.of.settings.rerank, self.of.settings.decline
        scores = reward.scores.values()
        return Sampled(
            is_correct(reward, self.primary),
            reward.value,
            None if rerank is None or rerank not in reward.scores else reward.scores[rerank].value,
            next((s.answer for s in scores if s.answer), ""),
            next((s.confidence for s in scores if s.confidence is not None), None),
            None if decline is None else re.search(decline, completion.text) is not None,
            completion.tokens,
            completion.num_sampled,
            completion.finish == "length",
        )

    def metrics(self, seed: int) -> dict[str, float]:
        """Return the metrics of the set, without prefix."""
        metrics = evaluation_metrics(self.problems, seed)
        rewards = [r for j in self.sampled for r in j.rewards]
        values = [r.value for r in rewards if r.value is not None]
        if values:
            metrics["reward"] = sum(values) / len(values)
        count = max(len(rewards), 1)
        scores = [primary_score(r, self.primary) for r in rewards]
        outcomes = Counter(str(score.outcome) for score in scores if score is not None)
        return {
            **metrics,
            **{f"outcome/{k}": v / count for k, v in sorted(outcomes.items())},
            **self.sessions,
        }

    def digest(self) -> str:
        """Return a digest of the prompts: results are compared where it is equal."""
        rows = [(j.prompt.id, j.prompt.tokens) for j in self.sampled]
        return hashlib.sha256(repr(rows).encode()).hexdigest()[:16]


def evaluation_of(step: int, judged: Sequence[JudgedSet]) -> Evaluation:
    """Return the problems of the sets that were judged after `step` steps."""
    sets = {one.of.name: one.problems for one in judged}
    return Evaluation(step, sets, {one.of.name: one.digest() for one in judged})


def _with_equal_answers(samples: Sequence[Sampled]) -> list[Sampled]:
    """Give equal answers the text of the first of them: 0.5 and 1/2 are one vote."""
    known: list[str] = []
    out = []
    for sample in samples:
        answer = sample.answer.strip()
        if answer:
            same = next((k for k in known if (v := equal_numbers(k, answer)) is not None and v.equal), None)
            if same is None:
                known.append(answer)
            answer = same or answer
        out.append(replace(sample, answer=answer))
    return out


async def _sample_set(
    generate: Generate,
    rewards: RewardRunner,
    tokenizer: Any,
    held_out: EvalSet,
    config: Config,
    label: str,
    progress: float,
    episodes: Episodes | None,
    aligner: Aligner | None,
) -> JudgedSet:
    """Sample and score one set."""
    settings, prompts, primary = held_out.settings, held_out.prompts.prompts, config.rewards.primary
    if held_out.rewards is not None:
        rewards, primary = rewards.other(held_out.name, held_out.rewards), held_out.rewards.primary
        episodes = None
    where = [held_out.name] if held_out.name else []

    async def one(kind: str, prompt: Prompt, sampling: Sampling) -> Judged:
        name = "-".join([label, *where, kind, str(prompt.id)])
        if episodes is not None and (own := episodes.of(prompt)) is not None:
            plan = [Rollout()] * sampling.n
            played = await own.sample(name, prompt, plan, sampling, training=False)
            return await own.judge(played, rewards, progress, training=False)
        request = Request(name, prompt.tokens, sampling)
        if aligner is None or sampling.temperature == 0:
            generated = await generate(request)
        else:
            generated = await aligner.sample(request, prompt)
        completions = completions_of(generated, tokenizer)
        return await judge(prompt, completions, rewards, progress, training=False)

    work, limit = [], held_out.max_tokens
    for p in prompts:
        seed = derive_seed(config.seed, "eval", *where, p.id)
        sampling = Sampling(settings.samples, limit, settings.temperature, settings.top_p, seed=seed)
        work.append(one("sample", p, sampling))
    if settings.greedy:
        work += [one("greedy", p, Sampling(1, limit, temperature=0.0)) for p in prompts]
    judged = await asyncio.gather(*work)
    sessions = {} if episodes is None else episodes.take_metrics(training=False)
    return JudgedSet(held_out, primary, judged[: len(prompts)], judged[len(prompts) :], sessions)


@dataclass(frozen=True)
class SampledEvaluation:
    """Accuracy of completions to held-out prompts, sampled by the run's engines.

    channel: where the engines hold no current weights (an offline run), the way to push them.
    """

    generate: Generate
    rewards: RewardRunner
    tokenizer: Any
    sets: Sequence[EvalSet]
    config: Config
    log: RunLog
    channel: WeightChannel | None = None
    episodes: Episodes | None = None

    async def run(self, step: int) -> dict[str, float]:
        """Evaluate the policy after `step` steps; write its problems, and keep some samples in the log."""
        if self.channel is not None:
            await self.channel.push(step)
        parts = (self.generate, self.rewards, self.tokenizer, self.sets, self.config)
        progress = step / self.config.train.steps
        metrics, judged = await evaluate(
            *parts, label=f"eval-{step}", progress=progress, episodes=self.episodes
        )
        if self.channel is not None:
            await self.channel.proved()
            await self.channel.before_step()
        metrics |= self._changes(step, judged)
        if self.log.wants_samples(step):
            shown = [row for one in judged for row in _rows(one, self.tokenizer)]
            self.log.samples(step, shown)
        return metrics

    def _changes(self, step: int, judged: Sequence[JudgedSet]) -> dict[str, float]:
        """Write the evaluation's problems to the run folder; return their changes against step 0."""
        now = evaluation_of(step, judged)
        start = read_evaluation(self.log.run_dir, 0) if step else None
        metrics: dict[str, float] = {}
        if start is not None:
            same, broken = now.same(start), {}
            for one in judged:
                if (name := one.of.name) in same:
                    changes = change_metrics(start.sets[name], one.problems)
                    metrics |= named(name, changes)
                    broken[name] = flips(start.sets[name], one.problems).negative
            now = now.with_texts(broken)
        write_evaluation(self.log.run_dir, now)
        return metrics


def _rows(judged: JudgedSet, tokenizer: Any) -> list[dict[str, Any]]:
    """Return rows for samples.jsonl: the first completion of each prompt."""
    named = {"set": judged.of.name} if judged.of.name else {}
    return [row | named for j in judged.sampled for row in sample_rows(j, "eval", tokenizer)]


# -- held-out groups of an offline run -----------------------------------------------------------------------


@dataclass(frozen=True)
class OfflineEvaluation:
    """Evaluation of an offline run: the loss on held-out groups of each set, and samples where they are
    wanted."""

    held_out: Mapping[str, HeldOut]
    sampled: SampledEvaluation | None = None

    async def run(self, learner: LearnerHandle, step: int) -> dict[str, float]:
        """Evaluate the weights after `step` steps."""
        metrics: dict[str, float] = {}
        for name, groups in self.held_out.items():
            sums = [await learner.evaluate(batch, step) for batch in groups.batches()]
            metrics |= named(name, groups.metrics(sums))
        if self.sampled is not None:
            metrics |= await self.sampled.run(step)
        return metrics


@dataclass(frozen=True)
class HeldOut:
    """The loss and the algorithm's measures on held-out groups of an offline run.

    The groups are split into parts of at least `batch_size` groups, so that losses that compare within a
    batch have something to compare.
    """

    groups: Sequence[Group]
    batch_size: int
    share_prefix: bool
    arrange: Callable[[list[Group]], list[Group]]

    def batches(self) -> list[Batch]:
        """Lay out the groups in equal parts."""
        parts = max(1, len(self.groups) // self.batch_size)
        return [
            Batch.build(self.arrange(list(self.groups[i::parts])), share_prefix=self.share_prefix)
            for i in range(parts)
        ]

    def metrics(self, parts: Sequence[Sums]) -> dict[str, float]:
        """Return means over all units of all parts, without prefix; a measure without a unit is left out."""
        sums = add_sums(parts)
        means = {name: total / count for name, (total, count) in sums.items() if count}
        return {**means, "examples": float(len(self.groups))}
