"""Loading a policy: any Hugging Face causal language model, with its head laid open."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rft.utils.quantized import keep_row_major


class ModelError(ValueError):
    """A model cannot be loaded or used; the message says which and why."""


@dataclass(frozen=True)
class Head:
    """The language-model head: logits = softcap(logit_scale * (hidden weight^T + bias)).

    weight: [V, H]. bias: [V] or None. softcap: Gemma's soft cap of the final logits, or None.
    lora: (A [r, H], B [V, r], scale): scale * B A is added to the weight; None: nothing is.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    lora: tuple[Tensor, Tensor, float] | None = None

    def detached(self) -> Head:
        """The same numbers without gradient; they stay what they are when the policy moves on."""
        lora = None if self.lora is None else (self.lora[0].detach(), self.lora[1].detach(), self.lora[2])
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias, lora=lora)


def load_causal_lm(
    path: str,
    dtype: torch.dtype,
    device: str,
    trust_remote_code: bool = False,
    quantize: str | None = None,
) -> Any:
    """Load a causal LM for training; `quantize` (nf4, fp4, int8) holds its linear layers, but for the head,
    in 4 or 8 bits through bitsandbytes. Raises ModelError naming the path."""
    from transformers import AutoModelForCausalLM

    extra: dict[str, Any] = {}
    if quantize is not None:
        extra = {"quantization_config": quantization(quantize, dtype), "device_map": {"": device}}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, **extra
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(f"model {path!r} cannot be loaded: {error}") from error
    keep_row_major(model)
    return model if quantize is not None else model.to(device)


def quantization(quantize: str, dtype: torch.dtype) -> Any:
    """transformers' config of a base in 4 bits (the scales are quantised too) or 8 bits, computed in
    `dtype`. Raises ModelError where bitsandbytes is not installed."""
    from transformers import BitsAndBytesConfig

    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise ModelError(
            f"learner.quantize: {quantize} needs bitsandbytes: install rft with the extra quant"
        ) from error
    if quantize == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantize,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


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
    return Head(layer.weight, getattr(layer, "bias", None), _softcap(config), scale, _lora(layer))


def _lora(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """The factors of plain LoRA on the head; None where it has none, or they are switched off."""
    if not hasattr(layer, "lora_A") or layer.disable_adapters:
        return None
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])


def _softcap(config: Any) -> float | None:
    value = getattr(config, "final_logit_softcapping", None)
    return float(value) if value else None


def count_parameters(model: nn.Module) -> int:
    """Parameters, each shared one counted once."""
    shapes = (getattr(getattr(p, "quant_state", None), "shape", p.shape) for p in model.parameters())
    return sum(torch.Size(shape).numel() for shape in shapes)


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
