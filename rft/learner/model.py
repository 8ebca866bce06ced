"""Loading a policy: any Hugging Face causal language model, with its head laid open."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


class ModelError(ValueError):
    """A model cannot be loaded or used; the message says which and why."""


@dataclass(frozen=True)
class Head:
    """The language-model head: logits = softcap(logit_scale * (hidden weight^T + bias)).

    weight: [V, H]. bias: [V] or None. softcap: Gemma's soft cap of the final logits, or None.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float


def load_causal_lm(path: str, dtype: torch.dtype, device: str, trust_remote_code: bool = False) -> Any:
    """Load a causal LM for training. Raises ModelError naming the path."""
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"model {path!r} cannot be loaded: {error}") from error
    return model.to(device)


def load_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """Load a tokenizer. Raises ModelError naming the path."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"tokenizer of {path!r} cannot be loaded: {error}") from error


def head_of(model: Any) -> Head:
    """The head of a causal LM, with what its family does to the logits."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear) and not hasattr(layer, "weight"):
        raise ModelError(f"{type(model).__name__} has no linear head; rft needs hidden states and a head")
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    if divisor := getattr(config, "logits_scaling", None):  # Granite divides
        scale /= float(divisor)
    return Head(layer.weight, getattr(layer, "bias", None), _softcap(config), scale)


def _softcap(config: Any) -> float | None:
    value = getattr(config, "final_logit_softcapping", None)
    return float(value) if value else None


def stop_ids(path: str) -> tuple[int, ...]:
    """Token ids that end a completion: the tokenizer's and the generation config's."""
    from transformers import GenerationConfig

    ids: set[int] = set()
    eos = load_tokenizer(path).eos_token_id
    if eos is not None:
        ids.add(int(eos))
    if (Path(path) / "generation_config.json").exists():
        more = GenerationConfig.from_pretrained(path).eos_token_id
        ids |= set(more if isinstance(more, list) else [more] if more is not None else [])
    return tuple(sorted(ids))


def count_parameters(model: nn.Module) -> int:
    """Parameters, each shared one counted once."""
    return sum(p.numel() for p in model.parameters())


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups: matrices decay, vectors (norms, biases) never do."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """`auto` is bfloat16 on a GPU and float32 on CPU."""
    if name == "auto":
        name = "bfloat16" if device == "cuda" else "float32"
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype
