"""A packed forest, and log-probs and gradients of it: packed, and by separate sequences."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rft.batch import Batch
from rft.kernels.attention import hidden_states
from rft.kernels.forest import Forest

VOCABULARY = 96


def forest_batch() -> Batch:
    """Trees of all kinds, longer than the tiny models' windows: a pair, a group, a chain, a deep tree."""
    lengths = [9, 5, 4, 3, 6, 6, 6, 8, 5, 7, 4, 3, 4, 9]
    parent = [-1, 0, 0, -1, 3, 3, 3, -1, 7, -1, 9, 10, 10, -1]
    segment = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    ends = torch.tensor(lengths).cumsum(0).tolist()
    offset = [0] * len(lengths)
    source: list[int] = []
    for s, p in enumerate(parent):
        first = ends[s] - lengths[s]
        offset[s] = offset[p] + lengths[p] if p >= 0 else 0
        source += [ends[p] - 1 if p >= 0 else -1, *range(first, ends[s] - 1)]
    positions = torch.cat([torch.arange(o, o + n) for o, n in zip(offset, lengths, strict=True)])
    total = segment.numel()
    tokens = torch.randint(3, VOCABULARY, (total,), generator=torch.Generator().manual_seed(1))
    return Batch(
        tokens=tokens,
        positions=positions,
        segment=segment,
        source=torch.tensor(source),
        mask=torch.tensor(source) >= 0,
        sequence=torch.zeros(total, dtype=torch.int64),
        parent=torch.tensor(parent),
        group=torch.zeros(1, dtype=torch.int64),
    )


def logps(model: Any, hidden: Tensor, targets: Tensor) -> Tensor:
    """[n] log-probs of `targets` after `hidden` [n, H]."""
    head = model.get_output_embeddings()
    return head(hidden).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def separate_logps(model: Any, batch: Batch) -> Tensor:
    """[T] log-probs of every token that has a predecessor, each sequence alone; 0 elsewhere."""
    out = [torch.zeros(())] * batch.num_tokens
    for path in Forest(batch.segment, batch.parent, batch.positions).paths():
        tokens = batch.tokens[path]
        base = model.base_model if model.base_model is not model else model.model
        hidden = base(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
        for place, value in zip(path[1:], logps(model, hidden[:-1], tokens[1:]), strict=True):
            out[place] = value
    return torch.stack(out)


def packed_logps(model: Any, batch: Batch) -> Tensor:
    hidden = hidden_states(model, batch)
    known = batch.mask.nonzero().flatten()
    values = logps(model, hidden[batch.source[known]], batch.tokens[known])
    return values.new_zeros(batch.num_tokens).index_copy(0, known, values)


def gradients(model: Any, values: Tensor) -> dict[str, Tensor]:
    """Gradients of a fixed random combination of `values` [T] to all parameters that get one."""
    weights = torch.randn(values.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (values * weights).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_gradients(
    actual: dict[str, Tensor], expected: dict[str, Tensor], limit: float = 1e-4
) -> None:
    scale = max(float(g.norm()) for g in expected.values())
    assert scale > 0
    for name, reference in expected.items():
        got = actual.get(name, torch.zeros_like(reference))
        error = float((got - reference).norm()) / max(float(reference.norm()), 1e-3 * scale)
        assert error < limit, f"{name}: {error:.1e}"
