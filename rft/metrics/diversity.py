"""Metrics of how much the completions of a batch differ from each other."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import pairwise


def diversity(completions: Sequence[Sequence[Hashable]], groups: Sequence[int]) -> dict[str, float]:
    """Return diversity metrics of a batch's completions.

    completions: the tokens (or words) of each, [N]; groups: the prompt's group of each, [N].

    Returns `completion/shared` (share of completions whose exact tokens also answer another prompt),
    `completion/duplicates` (share that repeat an earlier one of the same group), and
    `completion/distinct_2` (distinct bigrams as a share of all; Li et al. 2016, "A Diversity-Promoting
    Objective Function", section 5). {} for an empty batch.
    """
    if not completions:
        return {}
    keys = [tuple(completion) for completion in completions]
    answered: dict[tuple[Hashable, ...], set[int]] = {}
    for key, group in zip(keys, groups, strict=True):
        answered.setdefault(key, set()).add(group)
    pairs, distinct = 0, set[tuple[Hashable, Hashable]]()
    for key in keys:
        distinct.update(pairwise(key))
        pairs += max(len(key) - 1, 0)
    metrics = {
        "completion/shared": sum(len(answered[key]) > 1 for key in keys) / len(keys),
        "completion/duplicates": 1 - len(set(zip(keys, groups, strict=True))) / len(keys),
    }
    if pairs:
        metrics["completion/distinct_2"] = len(distinct) / pairs
    return metrics
