"""Linear layers quantised to 4 or 8 bits by bitsandbytes: dequantised weights and rounding."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def is_quantized(module: torch.nn.Module) -> bool:
    """Whether a layer's weight is held in 4 or 8 bits by bitsandbytes."""
    return type(getattr(module, "weight", None)).__name__ in ("Params4bit", "Int8Params")


def full_weight(module: Any) -> torch.Tensor:
    """Return a layer's weight, dequantised if it is quantised. The layer is not changed.

    Every reader of a quantised weight (merge, push, export, comparison) uses this function.
    """
    weight: Any = module.weight
    if not is_quantized(module):
        plain: torch.Tensor = weight.detach()
        return plain
    if hasattr(weight, "SCB"):  # int8: one scale a row, of which 127 is the largest; in the state once it ran
        scale = weight.SCB if weight.SCB is not None else module.state.SCB
        return weight.data.float() * (scale.float() / 127)[:, None]
    from bitsandbytes.functional import dequantize_4bit

    numbers: torch.Tensor = dequantize_4bit(*_row_major(weight.data, weight.quant_state))
    return numbers


def keep_row_major(model: torch.nn.Module) -> None:
    """Prevent bitsandbytes from repacking the 4-bit weights of a model, and undo a repacking.

    On a CPU with AVX512-BF16, bitsandbytes repacks the weights in place at the first forward in evaluation
    mode. The layers then compute in bfloat16 and propagate no gradient, even in training mode, and code that
    reads the weight directly (peft, for DoRA) gets wrong values.
    """
    for module in model.modules():
        if not is_quantized(module) or hasattr(module.weight, "SCB"):
            continue
        layer: Any = module
        layer.support_avx512bf16_for_cpu = False
        if layer.weight.quant_state is not None:
            layer.weight.data, layer.weight.quant_state = _row_major(
                layer.weight.data, layer.weight.quant_state
            )
            layer.quant_state = layer.weight.quant_state


def _row_major(data: torch.Tensor, state: Any) -> tuple[torch.Tensor, Any]:
    """Return a 4-bit weight and its state in row-major order, as quantised; copies if the weight is packed.

    Packing rounds the scales to bfloat16; that rounding remains.
    """
    if not getattr(state, "packing_format_for_cpu", False):
        return data, state
    from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse

    state = copy.copy(state)
    state.original_nested = False  # otherwise the scales would be quantised again, differently
    data, state = _convert_weight_packed_for_cpu_inverse(data, state)
    state.absmax = state.absmax.t().float().flatten()  # packed: [blocks of a row, rows]
    return data, state


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Disable dropout in the block. Quantised layers keep their mode, which selects their arithmetic:
    in 8 bits on a CPU, activations are quantised in evaluation mode only."""
    before = {module: module.training for module in model.modules()}
    model.eval()
    for module in before:
        if is_quantized(module):
            module.training = before[module]
    try:
        yield
    finally:
        for module, training in before.items():
            module.training = training


def rounding(model: torch.nn.Module) -> float:
    """Return the largest machine epsilon in a model's arithmetic: parameter dtypes, the autocast dtype, and
    the compute dtype of its quantised layers."""
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    device = next(model.parameters()).device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    quantized: list[Any] = [module for module in model.modules() if is_quantized(module)]
    dtypes |= {
        layer.compute_dtype for layer in quantized if getattr(layer, "compute_dtype", None) is not None
    }
    eps = [torch.finfo(dtype).eps for dtype in dtypes]
    if any(hasattr(q.weight, "SCB") and not (device == "cpu" and q.training) for q in quantized):
        eps.append(1 / 127)  # activations in 8 bits
    return max(eps)
