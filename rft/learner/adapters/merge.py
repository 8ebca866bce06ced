"""Merge adapters into plain weights, one layer at a time, leaving the base unchanged."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from rft.learner.strategy import FullTensor
from rft.utils.quantized import full_weight, is_quantized


def plain_name(name: str) -> str:
    """Return a parameter's name before peft wrapped its module."""
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")


@torch.no_grad()
def merged_layer(layer: Any) -> dict[str, Tensor]:
    """Return the parameters of one layer with its adapter merged in, float32, as new tensors.

    layer: a peft tuner layer. Its `merge` does the arithmetic on a copy of the base layer, so the base is
    unchanged bit for bit, and peft's formula is the only one.
    """
    base = layer.get_base_layer()
    stand_in = _copy(base)
    owner = _owner(layer, base)
    owner.base_layer = stand_in
    merge = type(layer).merge
    if is_quantized(base):  # the quantised class would round the result to 4 bits again
        unquantized = importlib.import_module(type(layer).__module__.replace(".bnb", ".layer"))
        merge = next(
            getattr(unquantized, n) for n in ("Linear", "SVDLinear") if hasattr(unquantized, n)
        ).merge
    try:
        merge(layer)
        return {name: p.detach() for name, p in stand_in.named_parameters()}
    finally:
        layer.merged_adapters.clear()
        owner.base_layer = base


def _owner(layer: Any, base: nn.Module) -> Any:
    """Return the module that holds the base: tuner layers may be nested."""
    while layer.base_layer is not base:
        layer = layer.base_layer
    return layer


def _copy(base: nn.Module) -> nn.Module:
    """Copy to a float32 layer of the same kind and weights; quantised ones become plain linear layers."""
    if is_quantized(base):
        weight, bias = full_weight(base).float(), getattr(base, "bias", None)
        with torch.device("meta"):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().float().clone(), requires_grad=False)
        return linear
    memo: dict[int, Any] = {}
    for parameter in base.parameters():
        memo[id(parameter)] = nn.Parameter(
            parameter.detach().to(torch.float32, copy=True), requires_grad=False
        )
    import copy

    return copy.deepcopy(base, memo)


@contextmanager
def gathered(layer: nn.Module, full_tensor: FullTensor) -> Iterator[None]:
    """Gather all parameters of a layer within the block. Unsharded ones are left unchanged."""
    parts = (m for m in layer.modules() if not is_quantized(m))  # quantised layers are never sharded
    kept = [(m, name, p) for m in parts for name, p in m.named_parameters(recurse=False)]
    for module, name, parameter in kept:
        full = full_tensor(parameter)
        if type(full) is not type(parameter.data) or full.shape != parameter.shape:
            module._parameters[name] = nn.Parameter(full, requires_grad=False)
    try:
        yield
    finally:
        for module, name, parameter in kept:
            module._parameters[name] = parameter


def merged_weights(
    model: nn.Module, names: list[str], full_tensor: FullTensor, dtype: torch.dtype | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of every parameter of the plain model, adapters merged, in the order of `names`.

    names: the parameters' names before adapters were inserted. At most one layer's merged weights exist at
    a time, besides those that the consumer keeps. Collective if `full_tensor` is.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    at = ""
    merged: dict[str, Tensor] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        module = model.get_submodule(path)
        if isinstance(module, BaseTunerLayer):
            if path != at:
                merged = {}  # freed before the next one is made
                with gathered(module, full_tensor):
                    at, merged = path, merged_layer(module)
            yield name, merged[leaf]
        elif isinstance(module, ModulesToSaveWrapper):
            yield name, full_tensor(getattr(module.modules_to_save[module.active_adapters[0]], leaf), dtype)
        elif is_quantized(module) and leaf == "weight":
            yield name, full_weight(module)
        else:
            yield name, full_tensor(getattr(module, leaf), dtype)
