"""What of a learner's config cannot be trained, found from the model's config alone, without weights."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from rft.algorithms.base import Algorithm
from rft.config.learner import AdapterConfig, GaloreConfig, LearnerConfig, LisaConfig
from rft.learner.model import ModelError
from rft.learner.strategies.methods import check_layers, check_targets, peft_config

# Methods whose layers run, and merge, on a base in 4 or 8 bits: LoRA's family.
QUANTIZED = ("lora", "dora", "eva", "loftq")


def learner_problems(
    key: str, config: LearnerConfig, network: Any | None, algorithm: Algorithm | None
) -> list[str]:
    """Every problem of `adapter`, `quantize`, `strategy` and `optimizer` below `key`.

    network: the policy on the meta device, None where it cannot be read. algorithm: None for a warm start.
    """
    found = []
    if config.quantize is not None:
        found += _quantize_problems(config)
    if config.optimizer != "adamw":
        found += _needs_bitsandbytes(f"optimizer: {config.optimizer}")
        if isinstance(config.strategy, GaloreConfig):
            found.append(f"strategy: galore is an optimizer of its own, not {config.optimizer}; use adamw")
    if config.adapter is not None:
        found += _adapter_problems(config, config.adapter, network, algorithm)
    if isinstance(config.strategy, LisaConfig) and network is not None:
        layers = network.config.get_text_config().num_hidden_layers
        if config.strategy.layers >= layers:
            found.append(
                f"strategy.layers: {config.strategy.layers} at a time are all the model's {layers} layers; "
                "lower it, or leave the strategy out"
            )
    return [f"{key}.{problem}" for problem in found]


def _needs_bitsandbytes(what: str) -> list[str]:
    if importlib.util.find_spec("bitsandbytes") is not None:
        return []
    return [f"{what} needs bitsandbytes, which is not installed: install rft with the extra quant"]


def _quantize_problems(config: LearnerConfig) -> list[str]:
    found = _needs_bitsandbytes(f"quantize: {config.quantize}")
    if config.adapter is None:
        bits = 8 if config.quantize == "int8" else 4
        found.append(
            f"quantize: weights in {bits} bits cannot be trained themselves; add an adapter "
            "(adapter: {method: lora}), or leave quantize out for full fine-tuning"
        )
    elif config.adapter.method not in QUANTIZED:
        found.append(
            f"adapter.method: {config.adapter.method} does not work on a quantised base; "
            f"use one of {', '.join(QUANTIZED)}, or leave quantize out"
        )
    return found


def _adapter_problems(
    config: LearnerConfig, adapter: AdapterConfig, network: nn.Module | None, algorithm: Algorithm | None
) -> list[str]:
    found = []
    if config.strategy is not None:
        found.append(
            f"strategy: {config.strategy.name} chooses among the policy's own weights, which an adapter "
            "leaves frozen; use one of the two"
        )
    if adapter.method == "loftq" and config.quantize not in ("nf4", "fp4"):
        found.append("adapter.method: loftq makes up for 4-bit rounding; set quantize: nf4, or use lora")
    if algorithm is not None and algorithm.score_heads:
        found.append("adapter: a reward model's head cannot be trained through an adapter; leave it out")
    dropout = float(adapter.options.get("lora_dropout", 0) or 0)
    if algorithm is not None and algorithm.online and dropout > 0:
        found.append(
            "adapter.options.lora_dropout: with dropout the learner's log-probs are not those of the engine "
            "that sampled; set it to 0 for online training"
        )
    try:
        peft_config(adapter)
        if network is not None:
            check_targets(adapter, network)
            check_layers(network, adapter)
    except ModelError as error:
        found.append(f"adapter: {error}")
    return found


def trained_parameters(network: Any, adapter: AdapterConfig) -> int | None:
    """How many parameters the adapter has on a model on the meta device; None where peft cannot put the
    method on a model without weights."""
    import copy

    from peft import get_peft_model

    plain: dict[str, Any] = (
        {"init_lora_weights": True} if hasattr(peft_config(adapter), "init_lora_weights") else {}
    )
    try:
        with torch.device("meta"):
            made = get_peft_model(copy.deepcopy(network), peft_config(adapter, **plain))
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return None
    return sum(p.numel() for p in made.parameters() if p.requires_grad)


def describe_training(config: LearnerConfig, parameters: int | None) -> str:
    """What is trained, for the plan."""
    if config.adapter is None:
        part = "all parameters" if config.strategy is None else f"parts, by {config.strategy.name}"
        return f"{part}, {config.optimizer}"
    base = f"a base in {config.quantize}" if config.quantize else "a frozen base"
    count = "" if parameters is None else f" of {parameters:,} parameters"
    return f"an adapter ({config.adapter.method}){count} on {base}, {config.optimizer}"


def stored_quantized_problem(config: LearnerConfig, network: Any | None, algorithm: Algorithm) -> str | None:
    """A message where the model's own weights are stored quantised: they cannot be trained, and engines that
    hold them cannot take pushed weights. An offline run may train an adapter on them."""
    stored = getattr(getattr(network, "config", None), "quantization_config", None)
    if stored is None or (config.adapter is not None and not algorithm.online):
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return (
        f"model.path: its weights are stored quantised ({getattr(method, 'value', method)}); give the "
        "unquantised model, and set learner.quantize: nf4 with learner.adapter to hold it in 4 bits"
    )


def vocabulary_problem(tokenizer: Any, rows: int) -> str | None:
    """A message where the tokenizer makes tokens that the model's embedding of `rows` rows lacks."""
    largest = max(tokenizer.get_vocab().values())
    if largest < rows:
        return None
    return (
        f"model.tokenizer: makes token ids up to {largest}, but the model's vocabulary has {rows} entries; "
        "use the model's own tokenizer"
    )
