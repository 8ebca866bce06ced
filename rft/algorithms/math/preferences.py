"""Preferences within groups, from scalar rewards or a pairwise judge."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rft.algorithms.math.groups import rank_in_group
from rft.batch import Batch

Preference = Literal["bradley_terry", "compare"]


def win_probability(reward: Tensor, other: Tensor, preference: Preference) -> Tensor:
    """P(first is preferred), same shape: sigmoid(reward - other) of a Bradley-Terry reward model, or,
    for verifiable rewards, 1, 1/2, 0 as the first is better, equal, worse."""
    if preference == "bradley_terry":
        return torch.sigmoid(reward - other)
    return (torch.sign(reward - other) + 1) / 2


def win_rate(rewards: Tensor, group: Tensor, preference: Preference) -> Tensor:
    """[N]: mean probability that a sequence is preferred to another of its group; 1/2 for one alone.

    The mean over *others* leaves out the comparison with oneself.
    """
    same = (group[:, None] == group[None, :]) & ~torch.eye(len(group), dtype=torch.bool, device=group.device)
    wins = win_probability(rewards[:, None], rewards[None, :], preference).masked_fill(~same, 0)
    count = same.sum(1)
    return torch.where(count > 0, wins.sum(1) / count.clamp(min=1), 0.5)


def best_and_worst(rewards: Tensor, group: Tensor) -> tuple[Tensor, Tensor]:
    """([P], [P]): each group's best and worst sequence; groups with all rewards equal have none.
    Ties go to the first in order."""
    best = rank_in_group(rewards, group) == 0
    worst = rank_in_group(-rewards, group) == 0
    first, last = best.nonzero().squeeze(1), worst.nonzero().squeeze(1)
    first, last = first[torch.argsort(group[first])], last[torch.argsort(group[last])]
    keep = rewards[first] > rewards[last]
    return first[keep], last[keep]


def all_pairs(group: Tensor) -> tuple[Tensor, Tensor]:
    """([P], [P]): every two sequences of the same group, the earlier one first."""
    same = (group[:, None] == group[None, :]).triu(diagonal=1)
    first, second = same.nonzero(as_tuple=True)
    return first, second


def sequence_log_ratio(logps: Tensor, other: Tensor, batch: Batch) -> Tensor:
    """[N]: log of policy over `other` of whole sequences, in nats."""
    return batch.sum_by_sequence(logps - other)


def dpo(margin: Tensor, beta: float, loss_type: Literal["sigmoid", "ipo"]) -> Tensor:
    """The DPO loss [P] of margins [P] (log-ratio of the preferred minus that of the other).

    sigmoid: -log sigmoid(beta * margin) (Rafailov et al. 2023, eq. 7). ipo: (margin - 1/(2 beta))^2
    (Azar et al. 2023, eq. 17).
    """
    if loss_type == "sigmoid":
        return -F.logsigmoid(beta * margin)
    return (margin - 1 / (2 * beta)).square()
