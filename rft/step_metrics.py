"""What a step of an online run writes down: pure functions of the works it trained on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rft.batch import Batch, Completion, Group
from rft.evaluation import Judged
from rft.metrics.diversity import diversity
from rft.rollout.slots import Work


def scored_group(judged: Judged, trained: Sequence[bool]) -> Group:
    """The completions that could be judged, with their rewards; the others leave the group.

    A yardstick (not `trained`) leaves too; its reward becomes `values["baseline"]` of the others.
    """
    rows = list(zip(judged.completions, judged.rewards, trained, strict=True))
    yardsticks = [r.value for _, r, train in rows if not train and r.value is not None]
    values = {"baseline": sum(yardsticks) / len(yardsticks)} if yardsticks else {}
    kept = [
        replace(c, reward=r.value, scores=r.scores, values={**c.values, **values})
        for c, r, train in rows
        if train and r.value is not None
    ]
    return Group(judged.prompt, tuple(kept) if yardsticks or all(trained) else ())


def batch_metrics(works: list[Work], batch: Batch) -> dict[str, float]:
    """Rewards, groups and completions of a batch."""
    groups = [w.group for w in works if w.group is not None]
    completions = [c for g in groups for c in g.completions]
    rewards = batch.rewards
    assert rewards is not None
    lengths = [len(c.tokens) for c in completions]
    outcomes = Counter(str(next(iter(c.scores.values())).outcome) for c in completions)
    return {
        "reward/mean": float(rewards.mean()),
        "reward/std": float(rewards.std(unbiased=False)),
        **{f"reward/outcome/{k}": v / len(completions) for k, v in sorted(outcomes.items())},
        "group/count": float(len(groups)),
        "completion/length_mean": sum(lengths) / len(lengths),
        "completion/length_min": float(min(lengths)),
        "completion/length_max": float(max(lengths)),
        "completion/truncated": sum(c.finish == "length" for c in completions) / len(completions),
        **diversity([c.tokens for c in completions], batch.group.tolist()),
        "rollout/tokens": float(sum(lengths)),
    }


def age_metrics(ages: list[int]) -> dict[str, float]:
    """How many versions behind the trained groups were dispatched."""
    shares = Counter(ages)
    return {
        "rollout/age_mean": sum(ages) / len(ages),
        "rollout/age_max": float(max(ages)),
        **{f"rollout/age/{age}": count / len(ages) for age, count in sorted(shares.items())},
    }


def train_rows(works: list[Work]) -> list[dict[str, Any]]:
    """Rows for samples.jsonl: every completion of the step."""
    rows = []
    for work in works:
        assert work.group is not None
        rows += [_row(work.group.prompt.text, c, "train") for c in work.group.completions]
    return rows


def sample_rows(judged: Judged, split: str) -> list[dict[str, Any]]:
    """Rows for samples.jsonl: a judged prompt's first completion."""
    first = replace(judged.completions[0], reward=judged.rewards[0].value, scores=judged.rewards[0].scores)
    return [_row(judged.prompt.text, first, split)]


def _row(prompt: Any, c: Completion, split: str) -> dict[str, Any]:
    return {
        "split": split,
        "prompt": prompt,
        "completion": c.text,
        "reward": c.reward,
        "scores": {name: score.value for name, score in c.scores.items()},
        "outcome": {name: str(score.outcome) for name, score in c.scores.items()},
        "finish": c.finish,
        "version": c.versions[-1][0] if c.versions else None,
    }
