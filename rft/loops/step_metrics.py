"""Metrics, samples and messages of an online step, from the groups that it trained on."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any

from rft.batch import Batch, Completion, Group, Prompt
from rft.config.mixture import COLUMN
from rft.data.sampler import PromptSampler, tokens_by_source
from rft.metrics import Progress, RunLog
from rft.metrics.diversity import diversity
from rft.rollout.buffer import SlotBuffer, State, Work
from rft.rollout.sample import Judged, decode


@contextmanager
def phase(log: RunLog, progress: Progress, name: str, step: int) -> Iterator[None]:
    """Report a part of a step when it begins and, unless it raises, when it ends."""
    begin = time.perf_counter()
    progress.phase(name, 0, 1)
    log.event("phase/started", phase=name, step=step)
    yield
    log.event("phase/ended", phase=name, step=step, seconds=round(time.perf_counter() - begin, 4))


def batch_metrics(works: list[Work], batch: Batch, seconds: float) -> dict[str, float]:
    """Rewards, groups and completions that a step trained on, and its throughput."""
    groups = [w.group for w in works if w.group is not None]
    completions = [c for g in groups for c in g.completions]
    rewards = [c.reward for c in completions if c.reward is not None]
    owners = [i for i, g in enumerate(groups) for _ in g.completions]
    lengths = [c.num_sampled for c in completions]
    outcomes = Counter(str(next(iter(c.scores.values())).outcome) for c in completions)
    return {
        "reward/mean": statistics.fmean(rewards),
        "reward/std": statistics.pstdev(rewards),
        "reward/min": min(rewards),
        "reward/max": max(rewards),
        **{f"reward/outcome/{k}": v / len(completions) for k, v in sorted(outcomes.items())},
        **_source_metrics(groups),
        "group/count": float(len(groups)),
        "completion/length_mean": sum(lengths) / len(lengths),
        "completion/length_std": statistics.pstdev(lengths),
        "completion/length_min": float(min(lengths)),
        "completion/length_max": float(max(lengths)),
        "completion/truncated": sum(c.finish == "length" for c in completions) / len(completions),
        **diversity([c.tokens for c in completions], owners),
        "rollout/tokens": float(sum(lengths)),
        "rollout/versions_mean": sum(len({v for v, _, _ in c.versions}) for c in completions) / len(lengths),
        "throughput/tokens_per_s": float(batch.mask.sum()) / seconds,
        "throughput/samples_per_s": batch.num_sequences / seconds,
    }


def _source_metrics(groups: list[Group]) -> dict[str, float]:
    """Mean reward and sampled tokens of each source of a mixture in a step's batch."""
    metrics = {f"data/{name}/tokens": float(count) for name, count in tokens_by_source(groups).items()}
    by_source: dict[str, list[float]] = {}
    for group in groups:
        name = group.prompt.columns.get(COLUMN)
        if name is not None:
            rewards = (c.reward for c in group.completions if c.reward is not None)
            by_source.setdefault(name, []).extend(rewards)
    return metrics | {f"reward/{name}/mean": statistics.fmean(r) for name, r in by_source.items() if r}


def age_metrics(ages: list[int]) -> dict[str, float]:
    """Ages of the trained groups: policy versions between dispatch and training."""
    shares = Counter(ages)
    return {
        "rollout/age_mean": sum(ages) / len(ages),
        "rollout/age_max": float(max(ages)),
        **{f"rollout/age/{age}": count / len(ages) for age, count in sorted(shares.items())},
    }


def slot_metrics(slots: SlotBuffer, sampler: PromptSampler) -> dict[str, float]:
    """Progress through the data, and the states of the prompts that were handed out."""
    dropped = {k: v for k, v in slots.counts.items() if k.startswith("dropped/")}
    busy = [w.state for w in slots.live.values() if w.state != State.trained]
    return {
        "data/epoch": float(sampler.seen) / sampler.size,
        "data/prompts": float(sampler.seen),
        "data/dropped": float(sum(dropped.values())),
        **{f"data/{name}": float(count) for name, count in dropped.items()},
        **sampler.metrics(),
        "rollout/inflight": float(busy.count(State.inflight)),
        "rollout/waiting": float(slots.capacity - len(busy)),
    }


def reward_faults(metrics: Mapping[str, float], known: float) -> tuple[float, dict[str, Any]]:
    """Return the number of reward workers lost so far and, where it exceeds `known`, the fields of an event
    `fault/reward`. The runner has replaced them already."""
    killed, crashed = metrics["reward/workers/killed"], metrics["reward/workers/crashed"]
    if killed + crashed <= known:
        return known, {}
    what = f"so far {killed:.0f} exceeded their time and were killed, {crashed:.0f} died"
    action = "replaced; the call that ended them counts as a timeout or an error, never as a wrong answer"
    return killed + crashed, {"part": "reward workers", "what": what, "action": action}


def without_signal(dropped: Counter[str], step: int, limit: int, where: str) -> str:
    """Return the message about too many groups in a row that were dropped, counted by reason. where: to look
    for the causes of faults."""
    causes = []
    if filtered := dropped["filtered"]:
        causes.append(f"in {filtered} the rewards are too similar: the task may be too easy or too hard")
    if unjudged := dropped["unjudged"]:
        causes.append(f"in {unjudged} too few completions could be judged: {where}")
    return (
        f"{dropped.total()} groups in a row were dropped while step {step} was sampled "
        f"({'; '.join(causes)}). train.max_filtered allows {limit}"
    )


# -- rows for samples.jsonl ------------------------------------------------------------------------------


def train_rows(works: list[Work], tokenizer: Any) -> list[dict[str, Any]]:
    """Return a row for every completion of the step."""
    groups = [work.group for work in works if work.group is not None]
    return [_row(g.prompt, c, "train", tokenizer) for g in groups for c in g.completions]


def sample_rows(judged: Judged, split: str, tokenizer: Any) -> list[dict[str, Any]]:
    """Return a row for a judged prompt's first completion."""
    if not judged.completions:
        return []
    first = replace(judged.completions[0], reward=judged.rewards[0].value, scores=judged.rewards[0].scores)
    return [_row(judged.prompt, first, split, tokenizer)]


def _row(prompt: Prompt, c: Completion, split: str, tokenizer: Any) -> dict[str, Any]:
    session = {"messages": c.messages, "spans": spans(prompt, c, tokenizer)} if c.turns else {}
    return {
        "split": split,
        "prompt": prompt.text,
        "completion": c.text,
        **session,
        "reward": c.reward,
        "scores": {name: score.value for name, score in c.scores.items()},
        "outcome": {name: str(score.outcome) for name, score in c.scores.items()},
        "finish": c.finish,
        "version": c.versions[-1][0] if c.versions else None,
    }


def spans(prompt: Prompt, c: Completion, tokenizer: Any) -> list[dict[str, Any]]:
    """Return the tokens of a session as text, in parts that one side wrote, from its prompt on.

    text, tokens: the part, with special tokens, and its length. turn: the number of the model call that
    sampled it, from 1 on; absent where it was given to the policy. versions, reward: of that turn.
    branch: True where the part does not follow the one before, as the conversation was encoded afresh.
    """
    turns = {turn.start: (number, turn) for number, turn in enumerate(c.turns, 1) if turn.end > turn.start}
    starts = {0, *turns, *(turn.end for _, turn in turns.values()), *(b.start for b in c.branches)}
    cuts = [*sorted(start for start in starts if start < len(c.tokens)), len(c.tokens)]
    parts = [(-1, prompt.tokens), *((a, c.tokens[a:b]) for a, b in pairwise(cuts))]
    texts = decode([tokens for _, tokens in parts], tokenizer)
    branches = {b.start for b in c.branches if b.after != len(prompt.tokens) + b.start - 1}
    rows: list[dict[str, Any]] = []
    for (start, tokens), text in zip(parts, texts, strict=True):
        row: dict[str, Any] = {"text": text, "tokens": len(tokens)}
        if start in turns:
            number, turn = turns[start]
            versions = sorted({v for v, a, b in c.versions if a < turn.end and b > turn.start})
            row |= {"turn": number, "versions": versions, "reward": turn.reward}
        rows.append(row | ({"branch": True} if start in branches else {}))
    return rows
