"""How two models differ in weight space: changed share, rank of the update, intruder dimensions, masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rft.tools.model_files import ModelFiles

TOLERANCE = 1e-5  # bfloat16 values within it count as equal (Mukherjee et al. 2025, arXiv 2505.11711)
INTRUDERS = 10  # first singular vectors that are examined (Shuttleworth et al. 2024, arXiv 2410.21228)
SIMILAR = 0.6  # cosine below which a singular vector is new (there)


@dataclass(frozen=True)
class MatrixChange:
    """The change of one tensor.

    changed: share of its weights that differ in bfloat16. norm: Frobenius norm of the update, relative to the
    start's. rank: numerical rank of the update as a share of the full one. energy: number of singular values
    that hold 99 % of its squared norm. intruders: of the first ten left singular vectors of the tuned matrix,
    those whose cosine with every one of the start's is below 0.6. The last three: None for a tensor that is
    not a matrix.
    """

    name: str
    size: int
    changed: float
    norm: float
    rank: float | None = None
    energy: int | None = None
    intruders: int | None = None


@dataclass(frozen=True)
class WeightChanges:
    """The changes from a start to a model, over all tensors and by tensor. rank: mean over changed
    matrices."""

    start: str
    model: str
    weights: int
    changed: float
    rank: float | None
    intruders: int | None
    tensors: list[MatrixChange] = field(default_factory=list)


def changed_mask(start: Tensor, tuned: Tensor) -> Tensor:
    """Return which weights differ: by more than `TOLERANCE` after rounding to bfloat16."""
    before, after = start.to(torch.bfloat16).float(), tuned.to(torch.bfloat16).float()
    return (after - before).abs() > TOLERANCE


def spectrum(start: Tensor, tuned: Tensor) -> tuple[float, int, int]:
    """Return (rank share, energy, intruders) of an update; see `MatrixChange`. start, tuned: [m, n],
    float32."""
    update = tuned - start
    values = torch.linalg.svdvals(update)
    largest = float(values[0])
    if largest == 0:
        return 0.0, 0, 0
    limit = largest * max(update.shape) * torch.finfo(torch.float32).eps  # as torch.linalg.matrix_rank
    rank = int((values > limit).sum()) / min(update.shape)
    cumulated = values.square().cumsum(0)
    energy = int((cumulated < 0.99 * cumulated[-1]).sum()) + 1
    before = torch.linalg.svd(start, full_matrices=False)[0]
    after = torch.linalg.svd(tuned, full_matrices=False)[0][:, :INTRUDERS]
    cosines = (before.T @ after).abs().max(dim=0).values
    return rank, energy, int((cosines < SIMILAR).sum())


def weight_changes(
    start: ModelFiles,
    model: ModelFiles,
    *,
    spectra: bool = True,
    note: Callable[[str], None] = lambda _: None,
) -> WeightChanges:
    """Compare two models tensor by tensor; two tensors are in memory at a time. Both need the same shapes."""
    rows = []
    for name in start.tensors:
        before, after = start.read(name).float(), model.read(name).float()
        changed = int(changed_mask(before, after).sum())
        norm = float((after - before).norm() / before.norm().clamp(min=1e-30))
        measures: tuple[float | None, int | None, int | None] = (None, None, None)
        if spectra and before.dim() == 2 and min(before.shape) > 1:
            measures = spectrum(before, after)
        rows.append(MatrixChange(name, before.numel(), changed / max(before.numel(), 1), norm, *measures))
        note(f"{name}: {rows[-1].changed:.1%} changed")
    total = sum(row.size for row in rows)
    ranks = [row.rank for row in rows if row.rank is not None and row.energy]
    counts = [row.intruders for row in rows if row.intruders is not None]
    return WeightChanges(
        start.name,
        model.name,
        total,
        sum(row.changed * row.size for row in rows) / max(total, 1),
        sum(ranks) / len(ranks) if ranks else None,
        sum(counts) if counts else None,
        rows,
    )


@dataclass(frozen=True)
class Overlap:
    """Overlap of the weights that two models changed.

    of_a, of_b: share of A's (B's) changed weights that the other changed as well. chance_a, chance_b: the
    same if the other one's were spread at random: its changed share.
    """

    both: int
    of_a: float
    of_b: float
    chance_a: float
    chance_b: float


def mask_overlap(start: ModelFiles, a: ModelFiles, b: ModelFiles) -> Overlap:
    """Compare the changed weights of two models that began at `start`, tensor by tensor."""
    both = of_a = of_b = total = 0
    for name in start.tensors:
        before = start.read(name)
        one, two = changed_mask(before, a.read(name)), changed_mask(before, b.read(name))
        both += int((one & two).sum())
        of_a, of_b, total = of_a + int(one.sum()), of_b + int(two.sum()), total + one.numel()
    return Overlap(both, both / max(of_a, 1), both / max(of_b, 1), of_b / max(total, 1), of_a / max(total, 1))
