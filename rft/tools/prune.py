"""`rft prune MODEL --out OUT`: a model without a part of its neurons and heads, to train an adapter on.

LoRAM (Zhang et al., "Train small, infer large", 2025, arXiv:2502.13533) with random structured pruning: of
each layer the pruned weight W_P = P(W_0) has a random part of the MLP neurons (rows of gate_proj and up_proj,
columns of down_proj) and of the key/value heads with the query heads that share them (rows of q_proj, k_proj
and v_proj, columns of o_proj). LoRA on W_P learns B_P A_P. Its recovery R has zeros where W_P has nothing,
and `rft merge loram MODEL OUT ADAPTER` writes W_0 + R(scale B_P A_P).

The paper leaves the first and the last layers whole. Here all layers are pruned alike, since OUT is an
ordinary model, whose config.json has one intermediate_size and one number of heads. The paper also trains the
pruned model on general text first; that is left to the user.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rft.errors import ConfigError, ModelError
from rft.preflight.memory import read_model_config
from rft.preflight.model import vllm_ignores_head_dim
from rft.tools.model_files import (
    PRUNING,
    ModelFiles,
    folder_problems,
    quantised_problems,
    read_object,
    write_like,
)
from rft.utils.files import folder_atomic
from rft.utils.hashing import hash64, model_digest

_PARTS = {  # part of a layer to the tensors that are pruned, and the one of them that has it in its columns
    "neurons": (re.compile(r"\.layers\.(\d+)\.mlp\.(gate|up|down)_proj\.(weight|bias)$"), "down"),
    "heads": (re.compile(r"\.layers\.(\d+)\.self_attn\.(q|k|v|o)_proj\.(weight|bias)$"), "o"),
}
_ALL_HEADS = "keep all heads (`--heads 1`)"
# Part ("neurons", "heads": key/value heads) to layer to those that are kept, sorted.
Kept = Mapping[str, Mapping[str, list[int]]]


def prune(folder: str, name: str, out: Path, share: float, seed: int, heads: float | None = None) -> str:
    """Write the pruned model of `folder`; return lines that describe it.

    name: the model as the user wrote it. share: part of each layer's MLP neurons that is kept. heads: part of
    its key/value heads that is kept, None: `share`. Raises ConfigError before anything is written.
    """
    check_request(out, share, heads)
    heads = share if heads is None else heads
    model = ModelFiles(folder, name)
    config, totals, kept = model.config(), dict[str, int](), dict[str, dict[str, list[int]]]()
    problems = quantised_problems(model, "pruned")
    if share < 1:
        problems += _neuron_problems(model)
    if heads < 1:
        problems += _head_problems(model)
    if problems:
        raise ConfigError(problems)
    if share < 1:
        totals["neurons"] = width = config["intermediate_size"]
        config["intermediate_size"] = count = max(1, round(share * width))
        kept["neurons"] = {
            layer: _draw(width, count, hash64(f"prune/{seed}/{layer}")) for layer in _layers(model, "neurons")
        }
    if heads < 1:
        totals["heads"] = groups = _groups(config)
        config, count = _with_fewer_heads(config, heads, name)
        kept["heads"] = {
            layer: _draw(groups, count, hash64(f"prune/heads/{seed}/{layer}"))
            for layer in _layers(model, "heads")
        }

    def pruned(key: str) -> Tensor:
        tensor = model.read(key)
        if (place := _place(key, kept)) is None:
            return tensor
        part, layer, dim = place
        return tensor.index_select(dim, _index(kept[part][layer], tensor.shape[dim] // totals[part]))

    if heads < 1:
        _check_shapes(model, config, kept, totals)
    with folder_atomic(out) as temporary:
        write_like(model, temporary, pruned)
        (temporary / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        base = {"name": name, "weights": model_digest(folder)}
        facts = {"base": base, "share": share, "heads": heads, "seed": seed}
        facts |= {"kept": kept.get("neurons", {}), "kept_heads": kept.get("heads", {})}
        (temporary / PRUNING).write_text(json.dumps(facts) + "\n", encoding="utf-8")
    return "\n".join(_lines(name, config, totals, kept))


def check_request(out: Path, share: float, heads: float | None) -> None:
    """Raise ConfigError with all that is wrong with the options, before a model is read."""
    problems = [
        f"{option}: {value:g} is not a share above 0, up to 1"
        for option, value in (("--share", share), ("--heads", heads))
        if value is not None and not 0 < value <= 1
    ]
    if share == 1 and heads in (None, 1):
        problems.append(
            "--share: 1 keeps all neurons, and all heads; give a smaller share, or `--heads SHARE`"
        )
    if problems := problems + folder_problems(out):
        raise ConfigError(problems)


def read_kept(folder: str, name: str, base: ModelFiles) -> Kept:
    """Return the parts that a pruned model kept. Raises ConfigError unless it was pruned from `base`."""
    file = Path(folder) / PRUNING
    if not file.exists():
        raise ConfigError([f"{name}: it has no {PRUNING}; give the folder that `rft prune` wrote"])
    facts = read_object(file, name, "base", "kept")
    if (digest := model_digest(str(base.folder))) != facts["base"]["weights"]:
        raise ConfigError(
            [
                f"{name}: wrong base: it was pruned from {facts['base']['name']} with weights "
                f"{facts['base']['weights'][:12]}, and {base.name} has {digest[:12]}"
            ]
        )
    return {"neurons": facts["kept"], "heads": facts.get("kept_heads", {})}


def recover(key: str, change: Tensor, shape: torch.Size, kept: Kept) -> Tensor:
    """Return R(change): the change of a pruned weight in the whole weight's shape, 0 where it was pruned."""
    if (place := _place(key, kept)) is None:
        return change
    part, layer, dim = place
    index = _index(kept[part][layer], change.shape[dim] // len(kept[part][layer]))
    return change.new_zeros(shape).index_copy(dim, index, change)


# -- places ------------------------------------------------------------------------------------------------


def _place(key: str, kept: Kept) -> tuple[str, str, int] | None:
    """Return the part, the layer and the dimension in which a tensor is pruned; None for other tensors."""
    for part, layers in kept.items():
        pattern, across = _PARTS[part]
        match = pattern.search(key)
        if match and match[1] in layers and match.group(2, 3) != (across, "bias"):
            return part, match[1], int(match[2] == across)
    return None


def _index(kept: list[int], size: int) -> Tensor:
    """Return the rows or columns of the kept parts, of which each has `size` adjacent ones."""
    return (torch.tensor(kept)[:, None] * size + torch.arange(size)).flatten()


def _layers(model: ModelFiles, part: str) -> list[str]:
    """Return the layers that have a part, in order."""
    pattern = _PARTS[part][0]
    return sorted({match[1] for key in model.tensors if (match := pattern.search(key))}, key=int)


def _draw(width: int, count: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed % 2**63)
    drawn: list[int] = torch.randperm(width, generator=generator)[:count].sort().values.tolist()
    return drawn


# -- can it be pruned? -------------------------------------------------------------------------------------


def _neuron_problems(model: ModelFiles) -> list[str]:
    width = model.config().get("intermediate_size")
    remedy = (
        "keep all neurons (`--share 1 --heads SHARE`), or train an adapter on the whole model, or on a "
        "quantised one (learner.adapter.quantize)"
    )
    if not isinstance(width, int) or any(".experts." in key for key in model.tensors):
        return [
            f"{model.name}: neurons are pruned only where MLPs are dense, of one intermediate_size; {remedy}"
        ]
    return _part_problems(model, "neurons", {"up": width, "down": width}, remedy)


def _head_problems(model: ModelFiles) -> list[str]:
    config = model.config()
    if not isinstance(config.get("num_attention_heads"), int):
        return [f"{model.name}: its config.json has no num_attention_heads; {_ALL_HEADS}"]
    queries, groups = (n * _head_size(config) for n in (config["num_attention_heads"], _groups(config)))
    sizes = {"q": queries, "k": groups, "v": groups, "o": queries}
    return _part_problems(model, "heads", sizes, _ALL_HEADS)


def _part_problems(model: ModelFiles, part: str, sizes: Mapping[str, int], remedy: str) -> list[str]:
    """Return the first tensor of a part that is missing, or has another size than config.json says."""
    pattern, across = _PARTS[part]
    matches = [match for key in model.tensors if (match := pattern.search(key)) and match[3] == "weight"]
    for layer in sorted({match[1] for match in matches}, key=int) or ["0"]:
        for projection in sizes:
            if (layer, projection) not in {(match[1], match[2]) for match in matches}:
                return [f"{model.name}: layer {layer} has no {projection}_proj, which is pruned; {remedy}"]
    for match in matches:
        shape, dim = model.tensors[match.string].shape, int(match[2] == across)
        expected = sizes.get(match[2])
        if expected is not None and shape[dim] != expected:
            return [
                f"{model.name}: {match.string} has shape {list(shape)}, and by config.json it has {expected} "
                f"{'columns' if dim else 'rows'}; {remedy}"
            ]
    return []


def _groups(config: Mapping[str, Any]) -> int:
    return int(config.get("num_key_value_heads") or config["num_attention_heads"])


def _head_size(config: Mapping[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _with_fewer_heads(config: Mapping[str, Any], share: float, name: str) -> tuple[dict[str, Any], int]:
    """Return the config with about `share` of its key/value heads, and their number: the nearest one that the
    model's class accepts, as some want hidden_size to be a multiple of the number of heads."""
    groups, size = _groups(config), _head_size(config)
    queries = config["num_attention_heads"] // groups
    first = ""
    for count in sorted(range(1, groups + 1), key=lambda n: (abs(n - share * groups), -n)):
        fewer = {"num_attention_heads": count * queries, "num_key_value_heads": count, "head_dim": size}
        try:
            _model_config({**config, **fewer})
        except ValueError as error:
            first = first or str(error)
        else:
            return {**config, **fewer}, count
    raise ConfigError([f"{name}: transformers rejects it with fewer heads: {first}"])


def _model_config(config: Mapping[str, Any]) -> Any:
    """Return transformers' object of a config. Raises ValueError with the reason."""
    with tempfile.TemporaryDirectory(prefix="rft-prune-") as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        try:
            return read_model_config(scratch, trust_remote_code=False)
        except ModelError as error:  # it names the scratch folder
            raise ValueError(" ".join(str(error.__cause__).split())) from error


def _check_shapes(
    model: ModelFiles, config: Mapping[str, Any], kept: Kept, totals: Mapping[str, int]
) -> None:
    """Raise ConfigError unless transformers builds the pruned shapes from the pruned config.

    A family that computes the size of a head by hidden_size / heads, or that has a tensor with values per
    head under another name, is found by this.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            built = AutoModelForCausalLM.from_config(_model_config(config), trust_remote_code=False)
    except (ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(
            [f"{model.name}: transformers cannot build it with fewer heads: {error}; {_ALL_HEADS}"]
        ) from error
    for key, tensor in built.state_dict().items():
        if key not in model.tensors:
            continue
        shape = list(model.tensors[key].shape)
        if place := _place(key, kept):
            part, layer, dim = place
            shape[dim] = shape[dim] // totals[part] * len(kept[part][layer])
        if list(tensor.shape) != shape:
            raise ConfigError(
                [
                    f"{model.name}: with fewer heads, transformers builds {key} of {config['model_type']} "
                    f"with shape {list(tensor.shape)}, and the pruned one has {shape}; {_ALL_HEADS}"
                ]
            )


def _lines(name: str, config: Mapping[str, Any], totals: Mapping[str, int], kept: Kept) -> list[str]:
    words = {"neurons": "MLP neurons", "heads": "key/value heads, with their query heads,"}
    lines = []
    for part, layers in kept.items():
        count = len(next(iter(layers.values())))
        lines.append(f"{name}: {count} of {totals[part]} {words[part]} in each of {len(layers)} layers kept")
    if vllm_ignores_head_dim(config):
        lines.append(
            f"{name}: vLLM cannot run {config['model_type']} with fewer heads: train with "
            "rollout.engine: hf, or prune with `--heads 1`"
        )
    return lines
