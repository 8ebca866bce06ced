"""bitsandbytes as on a CPU with AVX512-BF16, on any machine: its layers repack their 4-bit weight in place.

The repacking is bitsandbytes' own. Only the fused product, which needs the processor, is made of plain ones:
bfloat16 operands from the packed weight, without a gradient, as the real one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

packed: list[tuple[int, ...]] = []  # shapes of the weights that were repacked


def unpack(weight: Tensor, state: Any) -> Tensor:
    """[N, K] bfloat16: the numbers of a packed weight, from the layout: blocks of 32 rows, in which 64
    nibbles are 32 rows of two columns, the lower half of each byte first."""
    n, k = state.shape
    nibbles = weight.reshape(n // 32, k // 2, 32)
    pairs = torch.cat([nibbles & 15, nibbles >> 4], dim=-1).reshape(n // 32, k // 2, 32, 2)
    codes = pairs.transpose(1, 2).reshape(n, k).long()
    scales = state.absmax.t().repeat_interleave(state.blocksize, dim=1)
    return (state.code[codes].float() * scales.float()).bfloat16()


@torch.no_grad()
def fused_product(A: Tensor, B: Tensor, out: Any = None, state: Any = None, **_: Any) -> Tensor:
    """What `bitsandbytes.functional.gemv_4bit` returns for a packed weight."""
    return (A.bfloat16() @ unpack(B.data, state).t()).to(A.dtype)


def emulate(set_attribute: Callable[[Any, str, Any], None]) -> None:
    """Put the processor's behaviour into bitsandbytes, by `set_attribute(module, name, value)`."""
    import bitsandbytes.functional
    import bitsandbytes.nn.modules as modules

    original = modules._convert_weight_packed_for_cpu

    def pack(weight: Tensor, state: Any, *more: Any) -> Any:
        packed.append(tuple(state.shape))
        return original(weight, state, *more)

    set_attribute(modules, "has_avx512bf16", lambda: True)
    set_attribute(modules, "_convert_weight_packed_for_cpu", pack)
    set_attribute(bitsandbytes.functional, "gemv_4bit", fused_product)
