"""How much memory a run needs, from the model's config alone."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from rft.learner.config import LearnerConfig
from rft.learner.model import ModelError, resolve_dtype
from rft.rollout.engine import EngineSpec

if TYPE_CHECKING:
    from rft.config import ModelConfig


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal LM."""

    parameters: int
    hidden: int
    intermediate: int
    layers: int
    vocab: int
    heads: int
    max_positions: int
    linear: int = 0  # parameters of the layers' linear maps: what quantisation shrinks

    @classmethod
    def of(cls, path: str, model: ModelConfig) -> ModelShape:
        """Read a model's config and count its parameters without allocating them. Raises ModelError."""
        network = meta_network(path, model.trust_remote_code)
        text = network.config.get_text_config()
        head = network.get_output_embeddings()
        maps = (m for m in network.modules() if isinstance(m, nn.Linear) and m is not head)
        return cls(
            parameters=sum(p.numel() for p in {id(p): p for p in network.parameters()}.values()),
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            layers=text.num_hidden_layers,
            vocab=text.vocab_size,
            heads=text.num_attention_heads,
            max_positions=getattr(text, "max_position_embeddings", None) or 2**31,
            linear=sum(m.weight.numel() for m in maps),
        )


@lru_cache(maxsize=4)
def meta_network(path: str, trust_remote_code: bool) -> Any:
    """A model without weights, from its config alone. Raises ModelError naming the path."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        why = str(error).splitlines()[0]
        raise ModelError(f"{path!r} is neither a model folder nor a hub model: {why}") from error
    network.tie_weights()
    return network


MOMENTS = {"adamw": 8, "paged_adamw": 8, "adamw_8bit": 2.04, "paged_adamw_8bit": 2.04}  # bytes a parameter
# Bytes of a quantised weight with its scales: one byte for every 64 weights, and theirs once more (QLoRA).
QUANTIZED = {"nf4": 0.516, "fp4": 0.516, "int8": 1.0}


def learner_bytes(
    shape: ModelShape,
    config: LearnerConfig,
    *,
    reference: bool,
    device: str = "cpu",
    adapter: int = 0,
    tokens: int | None = None,
) -> int:
    """Peak bytes of a learner in one process.

    Full parameters: float32 weights, gradients and Adam's moments, and the reference's weights. With an
    adapter of `adapter` parameters: the base in the precision computed in (or quantised), and the states of
    the adapter alone; the reference is the base, unless `reference`
    says that another one is kept. On top comes the larger of the activations that one
    micro-batch of `tokens` keeps for its backward pass, and of the optimizer's working copies of the largest
    matrix. CPU offload and sharding over ranks are not counted.
    """
    width = resolve_dtype(config.dtype, device).itemsize
    states: float
    if config.adapter is None:
        states = shape.parameters * (4 + 4 + MOMENTS[config.optimizer] + (width if reference else 0))
        largest = 4 * shape.vocab * shape.hidden
    else:
        small = QUANTIZED[config.quantize] if config.quantize else width
        states = shape.linear * small + (shape.parameters - shape.linear) * width
        states += shape.parameters * width if reference else 0
        states += adapter * (4 + 4 + MOMENTS[config.optimizer])
        largest = width * shape.hidden * shape.intermediate if config.quantize else 0
    kept = tokens or config.tokens_per_micro_batch
    layer = 12 * shape.hidden + 4 * shape.intermediate
    floats = shape.layers * shape.hidden + layer if config.gradient_checkpointing else shape.layers * layer
    return int(states + max(kept * width * floats, 2 * largest))


def replica_bytes(shape: ModelShape, spec: EngineSpec) -> int:
    """Bytes of a rollout replica on CPU: its weights and its KV cache."""
    width = torch.finfo(getattr(torch, spec.dtype)).bits // 8
    return shape.parameters * width + int(spec.kv_cache_gib * 2**30)
