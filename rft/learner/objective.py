"""Loss reduction: weight every unit of a loss by its share of the whole batch, before any split.

Micro-batching, packing, accumulation and data parallelism then only reorder a sum.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rft.algorithms.base import Algorithm, PolicyOutput
from rft.batch import Batch
from rft.kernels.logprob_common import RowGradient
from rft.samples import TURNS_MEASURED


def weigh(algorithm: Algorithm, batch: Batch, max_completion_length: int) -> tuple[Batch, float]:
    """Set the weight of each unit of the loss.

    Returns the batch with `weight` [T] filled (token losses), and the scale of one sequence or pair
    (sequence and pair losses). Weights of token losses, for a sequence of L masked-in tokens:
    `token` 1 / (tokens in the batch), `sequence` 1 / (M L), `constant` 1 / (N max_completion_length).
    M counts the sequences with a masked-in token: masked-out ones do not enter any average. N counts
    all sequences: a constant must not depend on the mask (Dr.GRPO, Liu et al. 2025, sec. 3.2).
    """
    if algorithm.unit != "token":
        return batch, 1.0 / max(int(_counted(algorithm, batch).sum()), 1)
    n = batch.num_sequences
    if algorithm.normalizer == "token":
        per_sequence = torch.full((n,), 1.0 / max(int(batch.mask.sum()), 1))
    elif algorithm.normalizer == "sequence":
        lengths = batch.lengths
        per_sequence = 1.0 / (lengths.count_nonzero().clamp(min=1) * lengths.clamp(min=1))
    else:
        per_sequence = torch.full((n,), 1.0 / (n * max_completion_length))
    return batch.with_(weight=batch.to_tokens(per_sequence.to(batch.tokens.device))), 1.0


def _counted(algorithm: Algorithm, batch: Batch) -> Tensor:
    """[N] or [P] bool: the sequences, or pairs, with a masked-in token; only these have a gradient."""
    trained = batch.lengths > 0
    if algorithm.unit == "sequence":
        return trained
    first, second = algorithm.pairs(batch)
    return trained[first] | trained[second]


def divide(algorithm: Algorithm, batch: Batch) -> tuple[Batch, Batch]:
    """Split a weighted batch into (trained, idle): sequences with a gradient, and the others with masked-in
    tokens (groups of equal rewards), which are only measured. Sequences without a masked-in token are in
    neither. Sequences are not split, since ratios and means may be over all their tokens."""
    acting = batch.sum_by_sequence(algorithm.acts_on(batch).float()) > 0
    trained = batch.to_tokens(acting)

    def part(mask: Tensor) -> Batch:
        return batch.with_(mask=mask).pruned(mask)[0]

    return part(trained), part(batch.mask & ~trained)


def has_units(algorithm: Algorithm, batch: Batch) -> bool:
    """Whether a prepared batch has a unit to train on: a masked-in token or, for a pair loss, a pair. Without
    one, skip the update: moments and weight decay would still move the weights."""
    return bool(batch.mask.any() if algorithm.unit == "token" else _counted(algorithm, batch).any())


def reduce_loss(algorithm: Algorithm, policy: PolicyOutput, micro: Batch, scale: float) -> Tensor:
    """Return this micro-batch's part of the objective, a scalar with gradient."""
    loss = algorithm.loss(policy, micro)
    if algorithm.unit == "token":
        if micro.weight is None:
            raise ValueError("weigh() was not called on this batch")
        return (loss * micro.weight)[micro.mask].sum()
    return loss[_counted(algorithm, micro)].sum() * scale


def predict_logp_grad(algorithm: Algorithm, micro: Batch, scale: float) -> Tensor | RowGradient | None:
    """Return the gradient [T] of this micro-batch's loss with respect to its log-probs if it does not depend
    on them (SFT, a policy gradient with one update per batch); a function if each element depends on its own
    log-prob only (a policy gradient that corrects for the sampler); or else None. Tried at a few points."""
    if algorithm.outputs or algorithm.unit != "token":
        return None

    @torch.enable_grad()
    def gradient(logps: Tensor) -> Tensor:
        leaf = logps.to(micro.tokens.device, torch.float32).detach().requires_grad_()
        loss = reduce_loss(algorithm, PolicyOutput(leaf), micro, scale)
        return torch.autograd.grad(loss, leaf)[0] if loss.requires_grad else torch.zeros_like(leaf)

    def equal(a: Tensor, b: Tensor) -> bool:
        return torch.allclose(a, b, rtol=1e-6, atol=0.0)

    far = -torch.linspace(1, 9, micro.num_tokens)
    at_zero, at_far = gradient(torch.zeros(micro.num_tokens)), gradient(far)
    if equal(at_zero, at_far):
        return at_zero if bool(at_zero.any()) else None
    near = far if micro.sampler_logps is None else micro.sampler_logps.nan_to_num()
    moved, at_near = near + far / 9, gradient(near)
    odd = torch.arange(micro.num_tokens) % 2 == 1
    for part in (odd, ~odd):  # changes of the other elements must not change it
        if not equal(gradient(torch.where(part, near, moved))[part], at_near[part]):
            return None
    used = (at_zero != 0) | (at_far != 0) | (at_near != 0)
    return RowGradient(gradient, used)


def zero_loss(policy: PolicyOutput) -> Tensor:
    """Return a loss of 0 whose zero gradient flows to everything that `policy` was computed from."""
    outputs = (policy.logps, policy.entropy, policy.values, policy.kl, policy.scores)
    return torch.stack([t.sum() * 0.0 for t in outputs if t is not None and t.requires_grad]).sum()


@dataclass
class TokenMeans:
    """Means over masked-in tokens, accumulated over micro-batches. Each metric counts only the tokens where
    it was measured (not NaN); a metric without such tokens is left out."""

    sums: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def add(self, metrics: Mapping[str, Tensor], mask: Tensor) -> None:
        for name, value in metrics.items():
            values = value.detach()[mask]
            values = values[~values.isnan()]
            self._add(name, float(values.sum(dtype=torch.float64)), values.numel())

    def _add(self, name: str, total: float, count: int) -> None:
        self.sums[name] = self.sums.get(name, 0.0) + total
        self.counts[name] = self.counts.get(name, 0) + count

    @staticmethod
    def merged(parts: Iterable[TokenMeans]) -> TokenMeans:
        """Add the sums of several ranks."""
        total = TokenMeans()
        for part in parts:
            for name, value in part.sums.items():
                total._add(name, value, part.counts[name])
        return total

    def means(self) -> dict[str, float]:
        return {name: total / self.counts[name] for name, total in self.sums.items() if self.counts[name]}


@dataclass
class LogpGap:
    """|learner's log-prob - sampler's log-prob| over tokens that the current version sampled."""

    total: float = 0.0
    largest: float = 0.0
    tokens: int = 0
    turns: dict[int, LogpGap] = field(default_factory=dict)  # of the turns of sessions, from 1 on

    def add(self, logps: Tensor, batch: Batch, version: int) -> None:
        if batch.sampler_logps is None or batch.version is None:
            return
        fresh = batch.mask & (batch.version == version)
        gap = (logps.detach() - batch.sampler_logps)[fresh].abs()
        self._add(gap)
        if batch.turn is not None and gap.numel():
            turn = batch.turn[fresh].clamp(max=TURNS_MEASURED - 1) + 1
            for number in turn.unique().tolist():
                self.turns.setdefault(number, LogpGap())._add(gap[turn == number])

    def _add(self, gap: Tensor) -> None:
        if gap.numel():
            self.total += float(gap.sum(dtype=torch.float64))
            # NaN must not hide behind max(): it counts as an infinite gap.
            self.largest = max(self.largest, float(gap.nan_to_num(nan=torch.inf).max()))
            self.tokens += gap.numel()

    def merge(self, parts: Iterable[LogpGap | None]) -> None:
        """Set this to the gaps of all ranks together; this rank's are one of the parts."""
        gaps = [part for part in parts if part is not None]
        self.total, self.tokens = sum(g.total for g in gaps), sum(g.tokens for g in gaps)
        self.largest = max(g.largest for g in gaps)
        for number in sorted({number for g in gaps for number in g.turns}):
            merged = LogpGap()
            merged.merge(g.turns.get(number) for g in gaps)
            self.turns[number] = merged

    @property
    def mean(self) -> float:
        """NaN if nothing was compared."""
        return self.total / self.tokens if self.tokens else math.nan

    @property
    def metrics(self) -> dict[str, float]:
        """Return the gaps; {} if nothing was compared."""
        metrics = {"sync/logp_gap": self.largest, "sync/logp_gap_mean": self.mean} if self.tokens else {}
        for number, gap in sorted(self.turns.items()):
            metrics |= {
                f"session/logp_gap/{number}": gap.largest,
                f"session/logp_gap_mean/{number}": gap.mean,
            }
        return metrics

    def where(self) -> str:
        """Name the turn with the largest gap, for a message; "" without turns."""
        worst = max(self.turns, key=lambda number: self.turns[number].largest, default=None)
        return "" if worst is None else f", the largest in turn {worst} of a session"


Sums = dict[str, tuple[float, float]]  # name -> (sum over units, number of units)


def add_sums(parts: Iterable[Sums]) -> Sums:
    """Add the sums and counts of several parts of a batch."""
    total: Sums = {}
    for part in parts:
        for name, (value, count) in part.items():
            before = total.get(name, (0.0, 0.0))
            total[name] = (before[0] + value, before[1] + count)
    return total


def merge_means(parts: Iterable[dict[str, float]]) -> dict[str, float]:
    """Average several updates' metrics, each over the updates that have it."""
    rows = list(parts)
    values = {name: [row[name] for row in rows if name in row] for row in rows for name in row}
    return {name: sum(column) / len(column) for name, column in values.items()}
