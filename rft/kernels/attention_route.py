"""Candidate routes for packed batches, derived from a model's config and modules.

This only excludes and orders routes; `prepare_model` then tests the remaining ones on real tokens.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

from torch import nn
from transformers import PreTrainedModel

RouteKind = Literal["merge", "mask", "sequences"]
Kernel = Literal["auto", "merge", "flex", "masked"]

_RECURRENT = re.compile(
    r"Mamba|Recurrent|Rwkv|RWKV|DeltaNet|ShortConv|LinearAttention|Lightning|RgLru|xLSTM|Hyena"
)
# Settings that make attention skip tokens, besides layer types; `_KNOWN` lists the harmless ones.
_SPARSE = re.compile(r"window|local_attention|attention_types|index_topk|sparse_attention|chunk_size")
_KNOWN = re.compile(
    r"_?sliding_window(_pattern)?|use_sliding_window|max_window_layers|attention_chunk_size|chunk_size_.*"
)


@dataclass(frozen=True)
class LayerKind:
    """Keys that a layer's attention skips: `window` or more positions back, or in another `chunk`."""

    window: int | None = None
    chunk: int | None = None


@dataclass(frozen=True)
class AttentionRoute:
    """How packed batches run through a model.

    kind: "merge" (the forest attention function), "mask" (one explicit mask over the packed batch,
        through the model's attention), "sequences" (unshared, one padded row each).
    reason: why no better route was chosen, for the log. layers: number of layers that must use the layout.
    layer_kinds: the windows of the layers; None if attention is plain or the model passes them.
    max_length: the longest sequence for which position encodings do not depend on the batch.
    max_tokens: the longest packed row that the model treats the same as separate sequences.
    kernel: how the route "merge" computes a layer's attention: log-sum-exp merge, FlexAttention (GPU),
        dense masks per tree, or "auto", the first of these that supports the layer.
    """

    kind: RouteKind
    reason: str = ""
    layers: int = 0
    layer_kinds: tuple[LayerKind, ...] | None = None
    max_length: int | None = None
    max_tokens: int | None = None
    kernel: Kernel = "auto"

    def because(self, reason: str) -> AttentionRoute:
        return replace(self, reason=reason)


def decoder_of(model: nn.Module) -> PreTrainedModel:
    """Return the base transformer of a causal language model, with or without a peft wrapper."""
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()  # type: ignore[operator]
    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"{type(model).__name__} is neither a transformers model nor a peft wrapper around one"
        )
    decoder = model.get_decoder()
    if not isinstance(decoder, PreTrainedModel) or (decoder is model and hasattr(model, "lm_head")):
        decoder = model.base_model if model.base_model is not model else getattr(model, "model", model)
    return decoder


def candidates(model: nn.Module, decoder: PreTrainedModel) -> list[AttentionRoute]:
    """List the routes to try, best first. Raises ValueError for unsupported models."""
    name = type(decoder).__name__
    whole = decoder.config
    config = whole.get_text_config()
    for adapter in getattr(model, "peft_config", {}).values():
        if getattr(adapter, "is_prompt_learning", False):
            raise ValueError(f"{adapter.peft_type} adds tokens or states to the prompt: use LoRA instead")
    if getattr(whole, "is_encoder_decoder", False):
        raise ValueError(f"{name} is an encoder-decoder: rft trains decoder-only models")
    if getattr(config, "use_bidirectional_attention", False):
        raise ValueError(f"{name} attends in both directions: rft trains causal models")
    limit = _batch_independent_length(config)
    plain = AttentionRoute("sequences", max_length=limit)
    kinds, unknown = _layer_kinds(config)
    if unknown:
        return [plain.because(f"layers of type {', '.join(unknown)}")]
    if recurrent := _recurrent_modules(decoder):
        return [plain.because(f"recurrent or convolutional layers: {', '.join(recurrent)}")]
    if sparse := _sparse_settings(config):
        return [plain.because(f"an unsupported kind of sparse attention: {', '.join(sparse)}")]
    merge = AttentionRoute("merge", "", config.num_hidden_layers, kinds, limit, _longest_row(config))
    if kinds is not None and any(k != LayerKind() for k in kinds):
        return [merge, plain]
    return [merge, AttentionRoute("mask", max_length=limit), plain]


def _layer_kinds(config: Any) -> tuple[tuple[LayerKind, ...] | None, list[str]]:
    """Return every layer's kind, and the names of layer types that are not attention over tokens."""
    window = getattr(config, "sliding_window", None)
    if getattr(config, "use_sliding_window", True) is False:
        window = None
    chunk = getattr(config, "attention_chunk_size", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        if window is None:
            return None, []
        return (LayerKind(window=window),) * config.num_hidden_layers, []
    known = {
        "full_attention": LayerKind(),
        "attention": LayerKind(),
        "sliding_attention": LayerKind(window=window),
        "chunked_attention": LayerKind(chunk=chunk),
    }
    unknown = sorted({t for t in types if t not in known})
    if unknown:
        return None, unknown
    if ("sliding_attention" in types and window is None) or ("chunked_attention" in types and chunk is None):
        raise ValueError(f"{type(config).__name__} has windowed layers but no window size")
    return tuple(known[t] for t in types), []


def _recurrent_modules(decoder: PreTrainedModel) -> list[str]:
    """List the classes of modules that carry state from token to token outside attention."""
    recurrent = {type(m).__name__ for m in decoder.modules() if isinstance(m, nn.Conv1d)}
    recurrent |= {type(m).__name__ for m in decoder.modules() if _RECURRENT.search(type(m).__name__)}
    return sorted(recurrent)


def _sparse_settings(config: Any) -> list[str]:
    settings = config.to_dict()
    sparse = [k for k, v in settings.items() if v and _SPARSE.search(k) and not _KNOWN.fullmatch(k)]
    if settings.get("attention_chunk_size") and not settings.get("layer_types"):
        sparse.append("attention_chunk_size")
    return sorted(f"{k} = {settings[k]}" for k in sparse)


def _longest_row(config: Any) -> int | None:
    """Return the longest row that Llama 4 leaves unscaled: it scales queries by their position in the row, in
    steps of `floor_scale`, and the first step is 1."""
    return int(config.floor_scale) - 1 if getattr(config, "attn_temperature_tuning", False) else None


def _batch_independent_length(config: Any) -> int | None:
    """Return the longest length at which RoPE frequencies are fixed: dynamic and long RoPE change all of them
    as soon as one sequence of the batch is longer."""
    rope = getattr(config, "rope_parameters", None) or {}
    for entry in (rope, *(v for v in rope.values() if isinstance(v, dict))):
        if entry.get("rope_type") in ("dynamic", "longrope"):
            limit = entry.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            return min(limit or config.max_position_embeddings, config.max_position_embeddings)
    return None
