"""Credit for the turns of sessions: each turn as a sample, with its return, among the turns like it."""

from __future__ import annotations

from typing import Literal

import torch

from rft.algorithms.base import column, required
from rft.batch import Batch

TurnGroups = Literal["turn", "group", "state"]


def turn_returns(batch: Batch, rewards: torch.Tensor, discount: float) -> torch.Tensor:
    """Return the discounted sum of each turn's rewards and all later ones, [N, K]; 0 beyond the last turn.

    rewards: [N], the sessions' whole rewards. `columns["turn_rewards"]` gives parts of them to turns; the
    last turn earns the rest. discount: factor per turn (GiGPO, arXiv:2505.10978, eq. 5).
    """
    given = column(batch, "turn_rewards")
    real = ~given.isnan()
    earned = given.nan_to_num(nan=0.0)
    last = (real.sum(1, keepdim=True) - 1).clamp(min=0)
    earned = earned.scatter_add(1, last, (rewards - earned.sum(1))[:, None])
    returns = torch.zeros_like(earned)
    total = earned.new_zeros(len(earned))
    for k in reversed(range(earned.shape[1])):
        total = earned[:, k] + discount * total
        returns[:, k] = total
    return returns.masked_fill(~real, 0)


def as_sequences(batch: Batch, returns: torch.Tensor, groups: TurnGroups) -> Batch:
    """Return the batch with each trained turn as a sequence, its return [N, K] as the reward.

    A turn's group are the turns of the same number, all turns of its session's group, or those of them in
    equal states, whatever their numbers (GiGPO's anchor states, eq. 6). Other columns are those of the turn's
    session.
    """
    turn, width = required(batch.turn, "turn"), returns.shape[1]
    place = batch.sequence * width + turn  # of masked-in tokens: (session, turn) as one number
    cells = torch.unique(place[batch.mask])
    session, number = cells // width, cells % width
    group = batch.group[session]
    if groups == "turn":
        group = group * width + number
    elif groups == "state":
        group = column(batch, "turn_states")[session, number].long()
    group, order = torch.sort(group, stable=True)
    session, number = session[order], number[order]
    rank = torch.empty_like(order).scatter(0, order, torch.arange(len(order), device=order.device))
    sequence = torch.full_like(batch.sequence, -1)
    sequence[batch.mask] = rank[torch.searchsorted(cells, place[batch.mask])]
    return batch.with_(
        sequence=sequence,
        group=torch.unique_consecutive(group, return_inverse=True)[1],
        rewards=returns[session, number],
        truncated=None if batch.truncated is None else batch.truncated[session],
        columns={name: values[session] for name, values in batch.columns.items()},
    )
