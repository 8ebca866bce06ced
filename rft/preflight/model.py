"""Resolve the policy, and check adapter and reference against the model config, without loading weights."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from rft.config.learner import AdapterConfig
from rft.config.schema import Config
from rft.data.chat import Renderer
from rft.data.stops import stop_ids
from rft.errors import ModelError
from rft.learner.adapters.methods import check_layers, check_targets, peft_config
from rft.preflight.gguf import PACKAGED, converted_folder, packaged_folder
from rft.preflight.memory import ModelShape, read_model_config
from rft.tasks import REVISION
from rft.utils.hashing import fingerprint
from rft.utils.paths import absolute_if_local, expand
from rft.utils.tensor_names import layer_number
from rft.utils.weight_files import INDEX, SINGLE, stored_tensors, weight_files


def resolve_model(config: Config, model: str | None = None) -> str:
    """Return the folder or hub name of the policy. Raises ModelError if it is a folder without a model."""
    name = model or config.model.path
    path = resolve_name(name, config)
    if Path(path).is_absolute() and not (Path(path) / "config.json").exists():
        raise ModelError(
            f"{name!r} is not a model folder: it has no config.json; name the folder that holds it"
        )
    return path


def resolve_optional(name: str | None, config: Config) -> str | None:
    """Return `resolve_name` of a model or tokenizer that need not be given."""
    return None if name is None else resolve_name(name, config)


def resolve_name(name: str, config: Config) -> str:
    """Return the folder or hub name of a model or tokenizer that a config names. Raises ModelError.

    `tiny`, the packaged models (`smollm2`) and GGUF files become folders in OUTPUT_DIR/.cache.
    """
    cache = Path(config.output_dir) / ".cache"
    if name == "tiny":
        return str(_tiny_folder(config, cache))
    if name in PACKAGED:
        return str(packaged_folder(name, cache))
    path = absolute_if_local(expand(name))
    return str(converted_folder(Path(path), cache)) if path.endswith(".gguf") else path


def _tiny_folder(config: Config, cache: Path) -> Path:
    options = {"seed": config.seed, **config.model.options}
    folder = cache / f"tiny-{fingerprint({**options, 'code': REVISION})}"
    if not (folder / "config.json").exists():
        from rft.tasks.tiny import build_tiny  # imports transformers' models

        try:
            build_tiny(folder, **options)
        except TypeError as error:
            raise ModelError(f"model.options: {error}") from error
    return folder.absolute()


def resolve_stops(config: Config, path: str, tokenizer: Any, shape: ModelShape) -> tuple[int, ...]:
    """Return the stop token ids of completions. Raises ModelError for a damaged generation config."""
    turn_end = Renderer(config.data, tokenizer).turn_end
    known = stop_ids(path, tokenizer, turn_end, of_config=shape.end_tokens, vocabulary=shape.vocab)
    return tuple(sorted({*known, *config.rollout.sampling.stop_token_ids}))


def check_adapter(key: str, adapter: AdapterConfig, network: torch.nn.Module | None) -> list[str]:
    """Check an adapter's method, options and, given a model on the meta device, its target modules."""
    try:
        peft_config(adapter)
        if network is not None:
            check_targets(adapter, network)
            check_layers(network, adapter)
    except ModelError as error:
        return [f"{key}.adapter: {error}"]
    return []


def count_adapter_parameters(network: torch.nn.Module, adapter: AdapterConfig) -> int | None:
    """Count an adapter's parameters on the meta device; None if the method needs the weights."""
    from peft import get_peft_model

    plain = {"init_lora_weights": True} if hasattr(peft_config(adapter), "init_lora_weights") else {}
    try:
        with torch.device("meta"):
            made = get_peft_model(copy.deepcopy(network), peft_config(adapter, **plain))
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        return None
    return sum(p.numel() for p in made.parameters() if p.requires_grad)


_WITHOUT_HEAD_DIM = ("qwen2", "qwen2_moe", "granitemoe", "granitemoeshared", "granitemoehybrid", "jamba")


def vllm_ignores_head_dim(config: Mapping[str, Any]) -> bool:
    """Return whether vLLM would build other attention heads than a config.json says.

    Its classes of these types (vLLM 0.32) compute the size of a head as hidden_size / num_attention_heads.
    transformers reads head_dim, which `rft prune` sets.
    """
    size = config.get("head_dim")
    if config.get("model_type") not in _WITHOUT_HEAD_DIM or size is None:
        return False
    return bool(size != config["hidden_size"] // config["num_attention_heads"])


def check_vllm_heads(path: str, engine_args: Mapping[str, Any]) -> list[str]:
    """Check that vLLM's class of a model in a folder builds the attention heads of its config.json."""
    file = Path(path) / "config.json"
    if engine_args.get("model_impl") == "transformers" or not file.is_file():
        return []
    config = json.loads(file.read_text(encoding="utf-8"))
    if not vllm_ignores_head_dim(config):
        return []
    return [
        f"model.path: vLLM computes the size of an attention head of {config['model_type']} from "
        f"hidden_size, and ignores the head_dim {config['head_dim']} in {file}; set rollout.engine to hf, or "
        "prune the original model with `--heads 1`"
    ]


def check_weights(key: str, path: str) -> list[str]:
    """Check that the weights of a model in a folder are there, whole, and of as many layers as its config
    says. Of safetensors files only the headers are read."""
    folder = Path(path)
    if not (folder / "config.json").is_file():
        return []  # a hub name
    try:
        files = weight_files(folder)
        names = [name for file in files for name in stored_tensors(folder, file)]
    except ModelError as error:
        return [f"{key}: {error}"]
    if not files and not any(folder.glob("pytorch_model*.bin")):
        return [f"{key}: {path} has no weights ({SINGLE}, or {INDEX}); copy the whole folder"]
    stored = {number for number in map(layer_number, names) if number is not None}
    layers = _layers_by_config(folder)
    if stored and layers is not None and not stored.issuperset(range(layers)):
        return [
            f"{key}: {path} has the weights of {len(stored)} layers, and its config.json says {layers}: the "
            "others would be random; copy the whole folder, or correct num_hidden_layers"
        ]
    return []


def _layers_by_config(folder: Path) -> int | None:
    """Return the number of layers that config.json gives; None if it gives none, or cannot be read."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        layers = config.get("text_config", config).get("num_hidden_layers")
    except (ValueError, AttributeError):
        return None  # reported where the config is read
    return layers if isinstance(layers, int) else None


def resolve_fusion(config: Config) -> tuple[tuple[str, float], ...]:
    """Return the folders or hub names of the fused models with their weights. Raises ModelError."""
    return tuple((resolve_name(name, config), weight) for name, weight in config.rollout.fusion.items())


def check_fusion(
    fusion: tuple[tuple[str, float], ...], vocabulary: int, trust_remote_code: bool, *, trains: bool
) -> list[str]:
    """Check that fused models have the policy's vocabulary, and that nothing is trained."""
    problems = []
    if fusion and trains:
        problems.append(
            "rollout.fusion: a run trains one model, and would sample from another distribution; remove "
            "it, and use it in `rft eval` and `rft serve`"
        )
    for path, _ in fusion:
        checked = check_reference(path, vocabulary, trust_remote_code)
        problems += [p.replace("model.reference", "rollout.fusion") for p in checked]
    return problems


def check_reference(reference: str, vocabulary: int, trust_remote_code: bool) -> list[str]:
    """Check that a reference model has the vocabulary size of the policy."""
    try:
        config = read_model_config(reference, trust_remote_code)
    except ModelError as error:
        return [f"model.reference: {error}"]
    size = config.get_text_config().vocab_size
    if size == vocabulary:
        return []
    return [
        f"model.reference: {reference} has a vocabulary of {size:,}, the policy one of {vocabulary:,}; "
        "so it cannot score the policy's tokens. Use a reference with the policy's tokenizer"
    ]
