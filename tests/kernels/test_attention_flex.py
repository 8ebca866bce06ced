"""FlexAttention's block masks against explicit masks: the forward on CPU, uncompiled; everything on a GPU."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rft.kernels.attention import hidden_states, prepare_model
from rft.kernels.attention_flex import bucket, flex_forest_attention, intervals
from rft.kernels.attention_masked import masked_attention

sys.path.insert(0, str(Path(__file__).parent))
from architectures import build
from attention_helpers import assert_same_gradients, forest_batch, gradients, packed_logps, separate_logps
from test_attention import forest_of, qkv

# not in depth-first order: segment 3 continues 1, segment 4 continues 2, segment 5 continues 3
SCATTERED = forest_of([40, 30, 50, 20, 10, 9, 60, 1, 33], [-1, 0, 0, 1, 2, 3, -1, 6, 6])
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 17},
    "chunk": {"chunk": 16},
    "softcap": {"softcap": 2.0},
    "sinks": {"sinks": None},
    "all": {"window": 40, "softcap": 3.0, "sinks": None},
}


def test_intervals_say_who_continues_whom() -> None:
    enter, leave = intervals(SCATTERED)
    assert sorted(enter.tolist()) == list(range(9))
    above = (enter[None] <= enter[:, None]) & (enter[:, None] < leave[None])
    assert torch.equal(above, SCATTERED.sees)


@pytest.mark.parametrize(
    ("tokens", "length"), [(1, 128), (128, 128), (129, 256), (1025, 1280), (16385, 20480)]
)
def test_bucket(tokens: int, length: int) -> None:
    assert bucket(tokens) == length


@pytest.mark.parametrize("name", OPTIONS)
def test_flex_equals_masks(name: str) -> None:
    q, k, v, sinks = qkv(SCATTERED.num_tokens)
    options = {key: sinks if key == "sinks" else value for key, value in OPTIONS[name].items()}
    with torch.no_grad():
        found = flex_forest_attention(q, k, v, SCATTERED, 0.3, **options)
        expected = masked_attention(q, k, v, SCATTERED, 0.3, **options)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt_oss"])
def test_whole_models_by_flex(name: str) -> None:
    """Windows, soft caps and sinks through transformers: hidden states as the other kernels give them."""
    model, batch = build(name), forest_batch()
    with torch.no_grad():
        prepare_model(model, kernel="flex")
        by_flex = hidden_states(model, batch)
        prepare_model(model)
        torch.testing.assert_close(by_flex, hidden_states(model, batch), atol=1e-5, rtol=1e-4)


def test_what_a_kernel_cannot_serve_is_refused() -> None:
    model = build("qwen3")
    prepare_model(model, kernel="flex")
    with pytest.raises(ValueError, match="no backward on CPU"):
        hidden_states(model, forest_batch())
    windowed = build("gemma2")
    with pytest.raises(ValueError, match="the kernel merge does not support a layer with window"):
        prepare_model(windowed, kernel="merge")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt_oss"])
def test_flex_trains_on_a_gpu(name: str) -> None:
    """float32: log-probs and gradients of a packed forest as those of separate sequences."""
    reference, model = build(name).cuda(), build(name).cuda()
    batch = forest_batch().to("cuda")
    prepare_model(model, kernel="flex")
    expected = separate_logps(reference, batch)
    found = packed_logps(model, batch)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert_same_gradients(gradients(model, found), gradients(reference, expected), 1e-3)
