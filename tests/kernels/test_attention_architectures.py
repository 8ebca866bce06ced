"""Every architecture is exact or refused: log-probs and gradients of packed, shared batches against
separate sequences through the untouched model."""

from __future__ import annotations

import copy
import sys
import warnings
from pathlib import Path

import pytest
import torch

from rft.kernels.attention import prepare_model, self_check

sys.path.insert(0, str(Path(__file__).parent))
from architectures import ALL, MASK, MERGE, build
from attention_helpers import (
    assert_same_gradients,
    forest_batch,
    gradients,
    packed_logps,
    separate_logps,
)


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
