"""The transport `adapter`: LoRA factors alone, which vLLM computes beside its own copy of the base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from rft.config.schema import Config

# peft's methods whose result is an ordinary LoRA adapter, by factor of its rank over the config's: where the
# method moves a part of the base into the adapter, giving it back doubles the rank.
PLAIN_LORA = {"lora": 1, "eva": 1, "pissa": 2, "olora": 2, "corda": 2, "lora_ga": 2}
_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM reserves room for


def adapter_problems(config: Config) -> list[str]:
    """What keeps a config from the transport `adapter`; [] where nothing does."""
    from rft.contrib.strategies.data_init import MAKERS  # not in engines, which import this module too

    adapter, found = config.learner.adapter, []
    if adapter is None:
        return ["adapter sends a LoRA adapter, and learner.adapter trains none; use auto"]
    if adapter.method not in PLAIN_LORA:
        found.append(
            f"vLLM does not compute learner.adapter.method {adapter.method} as an adapter (it knows "
            f"{', '.join(PLAIN_LORA)}); use auto, which pushes the merged weights"
        )
    elif adapter.method in MAKERS:
        found.append(
            f"learner.adapter.method {adapter.method} is made of the first batch, before which there "
            "is nothing to send; use auto, which pushes the merged weights"
        )
    elif adapter_rank(config) > _RANKS[-1]:
        found.append(f"vLLM's adapters have a rank of at most {_RANKS[-1]}; lower learner.adapter.r")
    if config.learner.quantize is not None:
        found.append(
            "the learner's base is quantised (learner.quantize), the engine's is not: adapter would sample "
            "from another base than is trained on; use auto"
        )
    if config.rollout.update in ("keep", "continue"):
        found.append("adapter cannot change under completions in flight; set rollout.update to wait or abort")
    return found


def adapter_rank(config: Config) -> int:
    """The rank of what is sent."""
    adapter = config.learner.adapter
    assert adapter is not None
    return (adapter.r or 8) * PLAIN_LORA[adapter.method]  # 8: peft's default


def engine_args(config: Config) -> dict[str, Any]:
    """What vLLM's engine has to be told."""
    rank = next(r for r in _RANKS if r >= adapter_rank(config))
    return {"enable_lora": True, "max_loras": 1, "max_cpu_loras": 1, "max_lora_rank": rank}


def load_adapter(manager: Any, version: int, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
    """Put an adapter in the place of the one before, in a vLLM worker's LoRA manager.

    tensors: by peft's names. settings: peft's config of it. Raises ValueError for what vLLM refuses.
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
