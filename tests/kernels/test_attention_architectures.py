"""Every architecture is exact or refused: log-probs and gradients of packed, shared batches against
separate sequences through the untouched model."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from rft.batch import Batch
from rft.kernels.attention import hidden_states, prepare_model, self_check
from rft.kernels.forest import Forest

sys.path.insert(0, str(Path(__file__).parent))
from architectures import ALL, MASK, MERGE, VOCABULARY, build  # noqa: E402


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


def logps(model: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """[n] log-probs of `targets` after `hidden` [n, H]."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return head(hidden).float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]


def separate_logps(model: nn.Module, batch: Batch) -> Tensor:
    """[T] log-probs of every token that has a predecessor, each sequence alone; 0 elsewhere."""
    out = [torch.zeros(())] * batch.num_tokens
    for path in Forest(batch.segment, batch.parent, batch.positions).paths():
        tokens = batch.tokens[path]
        base = model.base_model if model.base_model is not model else model.model
        hidden = base(input_ids=tokens[None], use_cache=False).last_hidden_state[0]
        for place, value in zip(path[1:], logps(model, hidden[:-1], tokens[1:]), strict=True):
            out[place] = value
    return torch.stack(out)


def packed_logps(model: nn.Module, batch: Batch) -> Tensor:
    hidden = hidden_states(model, batch)
    known = batch.mask.nonzero().flatten()
    values = logps(model, hidden[batch.source[known]], batch.tokens[known])
    return values.new_zeros(batch.num_tokens).index_copy(0, known, values)


def gradients(model: nn.Module, values: Tensor) -> dict[str, Tensor]:
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


@pytest.mark.parametrize("name", sorted(ALL))
def test_packed_and_shared_equals_separate_sequences(name: str) -> None:
    model = build(name)
    untouched = copy.deepcopy(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        route = prepare_model(model)
    said = [str(w.message) for w in caught if "cannot run packed" in str(w.message)]
    assert route.kind == ("merge" if name in MERGE else "mask" if name in MASK else "sequences"), route.reason
    assert len(said) == (route.kind == "sequences")

    batch = forest_batch()
    expected, actual = separate_logps(untouched, batch), packed_logps(model, batch)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)
    assert_same_gradients(gradients(model, actual), gradients(untouched, expected))
    assert self_check(model, batch) < 1e-4
