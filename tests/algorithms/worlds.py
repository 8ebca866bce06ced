"""Small batches for tests of algorithms, and the learner's own reduction of their losses.

Every completion token has an id of its own, so that what belongs to a token (a log-prob, a gradient)
can be found again however the batch is laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rft.algorithms import Algorithm, PolicyOutput
from rft.batch import Batch, Completion, Group, Prompt
from rft.learner.objective import reduce_loss, weigh

TOKEN_FIELDS = ("old_logps", "ref_logps", "sampler_logps", "old_entropy", "values")


def completion(tokens: Sequence[int], reward: float | None = None, **more: Any) -> Completion:
    return Completion(tuple(tokens), reward=reward, **more)


def group(number: int, *completions: Completion) -> Group:
    return Group(Prompt(number, (1, 2), "prompt"), completions)


def spread(batch: Batch, table: Mapping[int, float] | Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """[T]: each masked-in token's entry of `table`, by token id; 0 elsewhere."""
    if not isinstance(table, Tensor):
        dense = torch.zeros(max([*table, 0]) + 1, dtype=dtype)
        for token, value in table.items():
            dense[token] = value
        table = dense
    return torch.where(batch.mask, table[batch.tokens.clamp(max=len(table) - 1)], 0).to(dtype)


def fill(batch: Batch, tables: Mapping[str, Any]) -> Batch:
    """Fill token fields of a batch by token id. No completion was cut off: where there are values, those of
    the ends are 0."""
    ends = {"end_values": torch.zeros(batch.num_tokens)} if "values" in tables else {}
    return batch.with_(
        **{name: spread(batch, tables[name]) for name in TOKEN_FIELDS if name in tables}, **ends
    )


def chosen(x: Tensor, batch: Batch) -> Tensor:
    """The masked-in entries of [T]."""
    return x[batch.mask]


# -- the case of all hand-computed numbers ------------------------------------------------------------

# One prompt, two completions: a = (10, 11), right, and b = (12,), wrong.
LOGPS = {10: -1.0, 11: -2.0, 12: -3.0}
RATIO = {10: 1.5, 11: 1.0, 12: 0.5}  # current / old
OVER_REFERENCE = {10: 0.1, 11: 0.2, 12: -0.3}  # current log-prob - reference log-prob
VALUES, OLD_VALUES = {10: 0.7, 11: 0.6, 12: 0.2}, {10: 0.5, 11: 0.6, 12: 0.4}


def hand_batch(demonstrated: int = 0) -> Batch:
    a = completion(
        (10, 11),
        1.0,
        demonstrated=demonstrated,
        values={
            "baseline": 0.25,
            "step_ends": (1.0, 2.0),
            "step_values": (0.5, 0.8),
            "step_rewards": (1.0, 2.0),
        },
    )
    b = completion(
        (12,),
        0.0,
        values={"baseline": 0.25, "step_ends": (1.0,), "step_values": (0.4,), "step_rewards": (0.0,)},
    )
    tables = {
        "old_logps": {
            t: x - torch.tensor(RATIO[t], dtype=torch.float64).log().item() for t, x in LOGPS.items()
        },
        "ref_logps": {t: x - OVER_REFERENCE[t] for t, x in LOGPS.items()},
        "values": OLD_VALUES,
        "old_entropy": {10: 0.3, 11: 0.2, 12: 0.1},
    }
    return fill(Batch.build([group(0, a, b)]), tables)


def hand_policy(batch: Batch, dtype: torch.dtype = torch.float64) -> PolicyOutput:
    return PolicyOutput(
        logps=spread(batch, LOGPS, dtype).requires_grad_(),
        values=spread(batch, VALUES, dtype).requires_grad_(),
        entropy=spread(batch, {10: 0.3, 11: 0.2, 12: 0.1}, dtype),
        kl=spread(batch, {10: 0.4, 11: 0.5, 12: 0.6}, dtype).requires_grad_(),
    )


# -- random batches -----------------------------------------------------------------------------------


def random_groups(seed: int, groups: int = 3, size: int = 4, *, demonstrated: bool = False) -> list[Group]:
    """Groups with distinct rewards and every column that an algorithm may read."""
    g = torch.Generator().manual_seed(seed)
    found, token = [], 10
    for number in range(groups):
        rewards = torch.randperm(size, generator=g) / size
        completions = []
        for i in range(size):
            n = int(torch.randint(2, 6, (1,), generator=g))
            ends = tuple(float(e) for e in range(1, n + 1))
            values = {
                "baseline": 0.4,
                "pair": float(i // 2),
                "observer": float(i % 2),
                "step_ends": ends,
                "step_values": tuple(torch.rand(n, generator=g).tolist()),
                "step_rewards": tuple(torch.rand(n, generator=g).tolist()),
            }
            given = 2 if demonstrated and i == 0 else 0
            tokens = range(token, token + n)
            found_reward = float(rewards[i])
            completions.append(
                completion(tokens, found_reward, values=values, demonstrated=given, logps=(-1.0,) * n)
            )
            token += n
        found.append(group(number, *completions))
    return found


def random_tables(seed: int, tokens: int = 200) -> dict[str, Tensor]:
    """A number per token id, for every field."""
    g = torch.Generator().manual_seed(seed)
    logps = -2 * torch.rand(tokens, generator=g, dtype=torch.float64) - 0.1

    def near(scale: float) -> Tensor:
        return logps + scale * torch.randn(tokens, generator=g, dtype=torch.float64)

    def unit() -> Tensor:
        return torch.rand(tokens, generator=g, dtype=torch.float64)

    return {
        "logps": logps,
        "old_logps": near(0.2),
        "sampler_logps": near(0.2),
        "ref_logps": near(0.3),
        "old_entropy": unit(),
        "values": unit(),
        "new_values": unit(),
        "kl": unit(),
    }


def objective(
    algorithm: Algorithm,
    batch: Batch,
    tables: Mapping[str, Tensor],
    parts: Callable[[Batch], Iterable[list[int]]] | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, gradient by token id), with the learner's reduction over the given micro-batches."""
    batch = algorithm.prepare(
        fill(batch, tables).with_(state={"progress": 0.5, "max_completion_length": 8.0, "steps": 100.0})
    )
    batch, scale = weigh(algorithm, batch, max_completion_length=8)
    leaf = tables["logps"].clone().requires_grad_()
    total = torch.zeros((), dtype=torch.float64)
    for trees in parts(batch) if parts else [range(int((batch.parent < 0).sum()))]:
        micro = batch.select(trees)
        policy = PolicyOutput(
            logps=spread(micro, leaf, torch.float64),
            values=spread(micro, tables["new_values"], torch.float64),
            kl=spread(micro, leaf.square(), torch.float64),  # any function of the policy will do
            entropy=spread(micro, leaf.exp(), torch.float64),
        )
        total = total + reduce_loss(algorithm, policy, micro, scale)
    total.backward()
    assert leaf.grad is not None
    return total.detach(), leaf.grad
