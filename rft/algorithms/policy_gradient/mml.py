"""Marginal likelihood of several saved solutions of a prompt, fully or partially correct."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from rft.algorithms.base import Algorithm, PolicyOutput, column, required, setting
from rft.algorithms.extras import Steps
from rft.algorithms.math.sequences import to_grid
from rft.batch import Batch


@dataclass(frozen=True)
class MML(Algorithm):
    """Maximum marginal likelihood of self-sampled correct solutions.

    Ni et al., "Learning math reasoning from self-sampled correct and partially-correct solutions" (2023,
    arXiv:2205.14318): for the distinct correct solutions y of a prompt x, sampled now or saved,

        loss = -(1 / beta) log sum_y p(y | x)^beta

    `beta` 1 is MML, 0 its limit: the mean of -log p (the paper's MLE on augmented data). The gradient is
    -sum_y w(y) grad log p(y | x) with w(y) = p(y | x)^beta / sum p^beta. The loss here is -w(y) log p per
    token, with w of the policy before the step as a constant: with one update per step it has that gradient.

    Unlike `raft`, it need not raise every solution: with beta 1 the likeliest one of a prompt has most of the
    weight, and unlike the policy gradients it learns nothing from wrong ones. `saved` solutions of each
    prompt are kept over the run. A prompt without a correct solution is left out.
    """

    min_generations: ClassVar[int] = 1

    beta: float = setting(1.0, "exponent of the likelihoods: 1 is MML, 0 the mean log-likelihood", ge=0, le=1)
    threshold: float = setting(0.0, "rewards above it count as correct")
    saved: int = setting(8, "correct solutions kept of each prompt, the newest; 0: none", ge=0)

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"rewards", "old_logps"})

    @property
    def prescored(self) -> bool:
        return True

    @property
    def reads_order(self) -> bool:
        return True

    @property
    def hooks(self) -> str:
        return "rft.contrib.saved_solutions.start" if self.saved else ""

    def keep_group(self, rewards: Sequence[float]) -> bool:
        return bool(self.saved) or any(r > self.threshold for r in rewards)

    def kept(self, batch: Batch) -> torch.Tensor:
        """Return the number of first tokens of each sequence that are (part of) a solution, [N] int64."""
        right = required(batch.rewards, "rewards") > self.threshold
        return torch.where(right, to_grid(batch)[1].sum(1), 0)

    def prepare(self, batch: Batch) -> Batch:
        grid, real = to_grid(batch)
        kept = self.kept(batch)
        real = real & (torch.arange(grid.shape[1], device=grid.device) < kept[:, None])
        rows = zip(batch.group.tolist(), batch.tokens[grid].tolist(), kept.tolist(), strict=True)
        seen: set[tuple[int, tuple[int, ...]]] = set()
        first = []
        for group, tokens, length in rows:
            solution = (group, tuple(tokens[:length]))
            first.append(length > 0 and solution not in seen)
            seen.add(solution)
        distinct = torch.tensor(first, dtype=torch.bool, device=grid.device)
        mask = torch.zeros_like(batch.mask)
        mask[grid[real & distinct[:, None]]] = True
        batch = batch.with_(mask=mask)
        likelihood = batch.sum_by_sequence(required(batch.old_logps, "old_logps"))
        weights = _softmax(self.beta * likelihood, batch.group, distinct)
        return batch.with_(advantages=batch.to_tokens(weights))

    def acts_on(self, batch: Batch) -> torch.Tensor:
        return batch.mask & (required(batch.advantages, "advantages") != 0)

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        weights = required(batch.advantages, "advantages")
        return -(weights * policy.logps).masked_fill(~batch.mask, 0)

    def report(self, batch: Batch) -> dict[str, float]:
        """Return solutions/trained, the number of solutions of each prompt that are trained on."""
        trained = float((batch.lengths > 0).sum())
        return {"solutions/trained": trained / max(batch.num_groups, 1)}


@dataclass(frozen=True)
class MMLPartial(MML):
    """MML of correct solutions, and of verified prefixes of wrong ones.

    The paper's partially-correct solutions are prefixes whose intermediate state is that of a correct one. A
    text has no such state: here a prefix is verified by its continuations. A completion is split into steps
    at `separator`, `branches` continuations are sampled at each boundary, and a wrong completion's longest
    prefix after which one of them is correct joins the solutions of its prompt, as p(prefix | x). Prefixes
    are not saved for later steps: what follows them depends on the policy.
    """

    branches: int = setting(4, "continuations sampled at each step boundary", ge=1)
    separator: str = setting("\n", "text that ends a step")

    @property
    def steps(self) -> Steps:
        return Steps(self.separator, self.branches)

    def keep_group(self, rewards: Sequence[float]) -> bool:
        return True

    def kept(self, batch: Batch) -> torch.Tensor:
        """Read `columns["step_ends"]` and `columns["step_values"]`, see `Steps`; padded with nan."""
        ends, values = column(batch, "step_ends"), column(batch, "step_values")
        boundary = ends[:, :-1].nan_to_num(nan=0.0)  # before each step but the first
        verified = boundary.where(values[:, 1:] > self.threshold, 0.0)
        longest = verified.amax(1) if verified.shape[1] else verified.new_zeros(len(verified))
        return torch.maximum(super().kept(batch), longest.to(torch.int64))


def _softmax(x: torch.Tensor, group: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Return the softmax [N] of `x` [N] over the counted sequences of each group; 0 for the others."""
    groups = int(group.max()) + 1 if group.numel() else 0
    x = x.masked_fill(~counted, -torch.inf)
    largest = x.new_full((groups,), -torch.inf).scatter_reduce(0, group, x, "amax")
    e = (x - largest[group].nan_to_num(neginf=0.0)).exp()
    return e / x.new_zeros(groups).index_add(0, group, e)[group].clamp(min=1e-30)
