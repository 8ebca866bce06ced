"""Tiny random models of many architectures, for tests of attention: names and what their configs need."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

_SMALL: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_HEAD = {"head_dim": 8}
_WINDOW = {"sliding_window": 6}
_ALTERNATE = _WINDOW | {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
_EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_LATENT = {
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
}
_GPT = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64, "n_inner": 48}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 16,
    "block_size": 8,
}
_MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
}

# The forest attention function serves every layer.
MERGE: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": _HEAD,
    "qwen3_moe": _HEAD | _EXPERTS,
    "mistral": _HEAD | _WINDOW,
    "mixtral": _EXPERTS | _WINDOW,
    "ministral": _HEAD | _ALTERNATE,
    "ministral3": _HEAD,
    "gemma": _HEAD,
    "gemma2": _HEAD | _WINDOW,
    "gemma3_text": _HEAD | _ALTERNATE,
    "phi": {},
    "phi3": _WINDOW,
    "olmo": {},
    "olmo2": {},
    "olmo3": _ALTERNATE,
    "olmoe": _EXPERTS,
    "cohere": {},
    "cohere2": _HEAD | _ALTERNATE,
    "granite": {},
    "granitemoe": _EXPERTS,
    "gpt_oss": _HEAD | _EXPERTS | _ALTERNATE,
    "smollm3": {},
    "starcoder2": _WINDOW,
    "glm4": _HEAD,
    "glm4_moe": _HEAD | _LATENT | {"head_dim": 8},
    "deepseek_v3": _LATENT,
    "llama4_text": _HEAD
    | _EXPERTS
    | {
        "attention_chunk_size": 6,
        "intermediate_size_mlp": 48,
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
        "no_rope_layers": [1, 0, 1],
    },
    "gpt_neox": {},
    "gpt2": _GPT,
    "seed_oss": _HEAD,
    "exaone4": _ALTERNATE,
    "helium": _HEAD,
    "ernie4_5": _HEAD,
    "hunyuan_v1_dense": _HEAD,
    "arcee": {},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "afmoe": _ALTERNATE | _EXPERTS,
}

# Attention that cannot be replaced, but that takes an explicit mask.
MASK: dict[str, dict[str, Any]] = {
    "nemotron": {},
    "stablelm": {},
    "falcon": {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
    "gptj": _GPT | {"rotary_dim": 4},
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 3, "attention_heads": 4},
    "diffllama": {},
}

# Neither packed nor shared: states from token to token, or attention limited in other ways.
SEQUENCES: dict[str, dict[str, Any]] = {
    "bloom": {"n_layer": 3, "n_head": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3},
    "doge": {},
    "mamba2": {"state_size": 4, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
    "jamba": _EXPERTS
    | {"mamba_d_state": 4, "use_mamba_kernels": False, "attn_layer_period": 2, "attn_layer_offset": 1},
    "falcon_h1": _HEAD | _MAMBA | {"mamba_d_ssm": 32, "mamba_n_heads": 4},
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "qwen3_next": _HEAD | _EXPERTS | _LINEAR,
    "minimax": _HEAD | _EXPERTS | _LINEAR,
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 6},
    "rwkv": {"attention_hidden_size": 32},
}

ALL = MERGE | MASK | SEQUENCES


def build(name: str) -> PreTrainedModel:
    """A random model of this architecture, in fp32, dropout off."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(_SMALL | ALL[name]))
    return AutoModelForCausalLM.from_config(config).float().eval()
