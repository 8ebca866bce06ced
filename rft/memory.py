"""How much memory a run needs, from the model's config alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from rft.learner.config import LearnerConfig
from rft.learner.model import ModelError
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

    @classmethod
    def of(cls, path: str, model: ModelConfig) -> ModelShape:
        """Read a model's config and count its parameters without allocating them. Raises ModelError."""
        from transformers import AutoConfig, AutoModelForCausalLM

        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=model.trust_remote_code)
            with torch.device("meta"):
                network = AutoModelForCausalLM.from_config(config, trust_remote_code=model.trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            why = str(error).splitlines()[0]
            raise ModelError(f"{path!r} is neither a model folder nor a hub model: {why}") from error
        network.tie_weights()
        text = config.get_text_config()
        return cls(
            parameters=sum(p.numel() for p in {id(p): p for p in network.parameters()}.values()),
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            layers=text.num_hidden_layers,
            vocab=text.vocab_size,
            heads=text.num_attention_heads,
            max_positions=getattr(text, "max_position_embeddings", None) or 2**31,
        )


def learner_bytes(shape: ModelShape, config: LearnerConfig, *, reference: bool) -> int:
    """Peak bytes of a full-parameter learner: float32 weights, gradients and two Adam moments, the
    reference's weights, and the activations that one micro-batch keeps for its backward pass."""
    states = shape.parameters * (4 + 4 + 8 + (4 if reference else 0))
    tokens = config.tokens_per_micro_batch
    width = 2 if config.dtype == "bfloat16" else 4
    per_layer = shape.hidden if config.gradient_checkpointing else 12 * shape.hidden + 4 * shape.intermediate
    return states + tokens * width * shape.layers * per_layer


def replica_bytes(shape: ModelShape, spec: EngineSpec) -> int:
    """Bytes of a rollout replica on CPU: its weights and its KV cache."""
    width = torch.finfo(getattr(torch, spec.dtype)).bits // 8
    return shape.parameters * width + int(spec.kv_cache_gib * 2**30)
