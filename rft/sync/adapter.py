"""The transport `adapter`: send only LoRA factors, which vLLM applies to its copy of the base."""

from __future__ import annotations

from typing import Any

import torch

from rft.config.learner import AdapterConfig

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # ranks that vLLM reserves memory for


def engine_args(adapter: AdapterConfig) -> dict[str, Any]:
    """Return vLLM's arguments for an adapter."""
    rank = next(r for r in _RANKS if r >= adapter.lora_rank)
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": rank}


def load_adapter(
    manager: Any, version: int, tensors: dict[str, torch.Tensor], settings: dict[str, Any]
) -> None:
    """Replace the adapter in a vLLM worker's LoRA manager.

    tensors: by peft's names. settings: peft's config of it. Raises ValueError for adapters that vLLM rejects.
    """
    from vllm.lora.lora_model import LoRAModel
    from vllm.lora.peft_helper import PEFTHelper

    helper = PEFTHelper.from_dict(settings)
    helper.validate_legal(manager.lora_config)
    inner = manager._adapter_manager
    mapper = getattr(inner.model, "hf_to_vllm_mapper", None)
    lora = LoRAModel.from_lora_tensors(
        lora_model_id=version + 1,
        tensors=tensors,
        peft_helper=helper,
        device="cpu",
        dtype=manager.lora_config.lora_dtype,
        model_vocab_size=manager.vocab_size,
        weights_mapper=None if mapper is None else mapper.get_rename_mapper(),
        skip_prefixes=getattr(inner.model, "lora_skip_prefixes", None),
    )
    with torch.no_grad():
        inner.remove_all_adapters()
        inner.add_adapter(lora)
        inner.activate_adapter(lora.id)
