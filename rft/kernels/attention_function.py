"""The attention function registered with transformers: forest attention if the call passes a layout,
ordinary attention otherwise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from rft.kernels.attention_flex import flex_forest_attention
from rft.kernels.attention_masked import dense_attention, masked_attention
from rft.kernels.attention_merge import merged_attention
from rft.kernels.attention_route import Kernel, LayerKind
from rft.kernels.forest import Forest

NAME = "rft_forest"

# Keywords that transformers passes to attention functions and that do not change the result here.
_HARMLESS = frozenset(
    {
        "position_ids",
        "position_embeddings",
        "cache_position",
        "past_key_values",
        "use_cache",
        "layer_idx",
        "deterministic",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "num_items_in_batch",
        "cu_seq_lens_q",
        "cu_seq_lens_k",
        "max_length_q",
        "max_length_k",
    }
)


@dataclass
class Layout:
    """The forest and layer kinds, passed through the model as the keyword `rft_layout`. Autograd keeps it
    alive, so a checkpointed layer still has it when it is recomputed during backward.

    kinds: the kind of each layer, or None if all are plain. kernel: see `AttentionRoute`.
    calls: number of attention layers that used it.
    """

    forest: Forest
    kinds: tuple[LayerKind, ...] | None
    kernel: Kernel = "auto"
    calls: int = field(default=0)


def forest_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    rft_layout: Layout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Compute attention for transformers: query [B, H, L, D] -> [B, L, H, Dv].

    With a layout (B = 1, L = T) a token attends to earlier tokens of its segment and to its segment's
    ancestors; without one this is ordinary attention under `attention_mask`.
    Raises ValueError for a layout together with dropout, with a mask made by the model, or with unknown
    keywords.
    """
    scale = scaling if scaling is not None else 1 / math.sqrt(query.shape[-1])
    if rft_layout is None:
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(
                module, query, key, value, attention_mask, dropout, scaling, is_causal, **kwargs
            )
        return _plain_dense(query, key, value, attention_mask, scale, softcap, s_aux), None
    kind = _layer_kind(module, rft_layout, sliding_window)
    unknown = sorted(k for k, v in kwargs.items() if v is not None and k not in _HARMLESS)
    if unknown:
        raise ValueError(
            f"{type(module).__name__} passes {unknown} to attention, which a packed batch ignores"
        )
    if attention_mask is not None and attention_mask.numel() > 1:
        raise ValueError(f"{type(module).__name__} makes its own mask, which a packed batch would ignore")
    if dropout:
        raise ValueError("a packed batch does not support attention dropout: set attention_dropout to 0")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise ValueError(f"{type(module).__name__} is not causal: a packed batch needs causal attention")
    rft_layout.calls += 1
    q, k, v = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    return _attend(q, k, v, rft_layout, scale, kind, softcap, s_aux).unsqueeze(0), None


AttentionInterface.register(NAME, forest_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)  # for forwards without a layout


def _layer_kind(module: nn.Module, layout: Layout, sliding_window: int | None) -> LayerKind:
    """Return this layer's window or chunk from the model's config, which must match the window passed."""
    if layout.kinds is None:
        return LayerKind(window=sliding_window)
    kind = layout.kinds[getattr(module, "layer_idx", 0) or 0]
    if sliding_window is not None and sliding_window != kind.window:
        raise ValueError(
            f"layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__}) attends with a window of "
            f"{sliding_window}, but the model's config says {kind.window}"
        )
    return kind


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: Layout,
    scale: float,
    kind: LayerKind,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attend with the layout's kernel: [T, H, D] queries, [T, Hk, D] keys. Raises ValueError if the kernel
    "merge" is requested and does not support the layer."""
    device, forest, kernel = q.device.type, layout.forest, layout.kernel
    if torch.is_autocast_enabled(device):  # the kernels below are not on autocast's list of operations
        q, k, v = (x.to(torch.get_autocast_dtype(device)) for x in (q, k, v))
    window = kind.window if kind.window is not None and kind.window < forest.longest else None
    chunk = kind.chunk if kind.chunk is not None and kind.chunk < forest.longest else None
    width = v.shape[-1]
    half = q.dtype in (torch.float16, torch.bfloat16)
    plain = window is None and chunk is None and softcap is None and width <= q.shape[-1]
    merges = plain and (device == "cpu" or (half and q.shape[-1] <= 256))
    if kernel == "auto":
        kernel = "merge" if merges else "flex" if device == "cuda" else "masked"
    if kernel == "merge":
        if not merges:
            raise ValueError(
                f"the kernel merge does not support a layer with window {window}, chunk {chunk}, softcap "
                f"{softcap}, heads of {q.shape[-1]} and {width} in {q.dtype} on {device}: use kernel auto"
            )
        # heads of unequal width (latent attention): zero-padding the values changes nothing
        v = F.pad(v, (0, q.shape[-1] - width))
        return merged_attention(q, k, v, forest, scale, sinks)[..., :width]
    attend = flex_forest_attention if kernel == "flex" else masked_attention
    return attend(q, k, v, forest, scale, window=window, chunk=chunk, softcap=softcap, sinks=sinks)


def _plain_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    if mask is None:
        shape = (query.shape[2], key.shape[2])
        mask = torch.ones(shape, dtype=torch.bool, device=query.device).tril(shape[1] - shape[0])[None, None]
    if mask.dtype != torch.bool:
        mask = mask >= 0
    return dense_attention(query, key, value, mask, scale, softcap, sinks).transpose(1, 2)
