"""Fixtures of the kernels' tests."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rft.kernels import logprob_linear

NARROW = (torch.bfloat16, torch.float16)


@pytest.fixture(
    params=[
        (torch.float64, "native"),
        (torch.float32, "native"),
        *((dtype, products) for dtype in NARROW for products in ("native", "widened")),
    ],
    ids=lambda p: f"{str(p[0]).removeprefix('torch.')} {p[1]}",
)
def dtype(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """A dtype. Those of 16 bits once with products as on a processor that has them (its logits are rounded to
    16 bits), and once as on one that has not (they run in float32), whatever the processor."""
    chosen: torch.dtype = request.param[0]
    widened = request.param[1] == "widened"

    def product_dtype(x: Tensor) -> torch.dtype:
        return torch.float32 if widened and x.dtype in NARROW else x.dtype

    monkeypatch.setattr(logprob_linear, "product_dtype", product_dtype)
    return chosen
