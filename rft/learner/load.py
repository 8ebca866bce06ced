"""Load language models, reward models and tokenizers; imports transformers inside its functions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rft.data.reward_texts import TEXTS
from rft.errors import ModelError
from rft.utils.dtypes import dtype_name
from rft.utils.quantized import keep_row_major


def load_causal_lm(
    path: str,
    dtype: torch.dtype,
    device: str,
    trust_remote_code: bool = False,
    quantize: str | None = None,
) -> Any:
    """Load a causal LM for training; `quantize` (nf4, fp4, int8) stores its linear layers, except the head,
    in 4 or 8 bits through bitsandbytes. Raises ModelError naming the path."""
    from transformers import AutoModelForCausalLM

    extra: dict[str, Any] = {}
    if quantize is not None:
        extra = {"quantization_config": quantization(quantize, dtype), "device_map": {"": device}}
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, trust_remote_code=trust_remote_code, **extra
        )
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"model {path!r} cannot be loaded: {error}") from error
    keep_row_major(model)
    return model if quantize is not None else model.to(device)


def quantization(quantize: str, dtype: torch.dtype) -> Any:
    """Return transformers' config for a base in 4 bits (with quantised scales) or 8 bits, computed in
    `dtype`. Raises ModelError if bitsandbytes is not installed."""
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
    try:
        if _is_plain_fast(Path(path)):
            # AutoTokenizer would import transformers' models first, which takes over a second.
            from transformers import PreTrainedTokenizerFast

            tokenizer = PreTrainedTokenizerFast.from_pretrained(path)
        else:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except Exception as error:  # damaged files raise errors of any kind, tokenizers' own are plain Exceptions
        kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
        raise ModelError(f"tokenizer of {path!r} cannot be loaded: {kind}{error}") from error
    limit = tokenizer.model_max_length
    if not isinstance(limit, int | float) or limit <= 0:
        raise ModelError(f"tokenizer of {path!r}: its model_max_length is {limit!r}, not a number of tokens")
    return tokenizer


def _is_plain_fast(folder: Path) -> bool:
    """Return whether tokenizer.json alone defines a folder's tokenizer, without a class of its model."""
    file = folder / "tokenizer_config.json"
    if not file.is_file() or not (folder / "tokenizer.json").is_file():
        return False
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        return False  # AutoTokenizer explains it
    plain = ("PreTrainedTokenizerFast", "TokenizersBackend")
    return isinstance(config, dict) and config.get("tokenizer_class") in plain and "auto_map" not in config


def load_scoring_model(
    path: str,
    heads: int,
    *,
    per_token: bool,
    texts: Mapping[str, Any] | None,
    dtype: torch.dtype,
    device: str,
    trust_remote_code: bool = False,
) -> Any:
    """Load a model with `heads` outputs per sequence, or with `per_token` per token. From a causal model's
    folder, a new head is initialised, small and random; a scoring model's is loaded. `texts` is stored in the
    config. Raises ModelError naming the path."""
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    kind = AutoModelForTokenClassification if per_token else AutoModelForSequenceClassification
    try:
        model = kind.from_pretrained(
            path,
            num_labels=heads,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            problem_type="regression",
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path!r} cannot be loaded as a reward model: {error}") from error
    score_layer(model)
    config = model.config.get_text_config()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.pad_token_id in ends:
        config.pad_token_id = None  # otherwise transformers pads with the end token, and reads before it
    if texts is not None:
        setattr(model.config, TEXTS, dict(texts))
    return model.to(device)


def score_layer(model: Any) -> torch.nn.Linear | None:
    """Return the linear layer that computes the scores; None for a language model. Raises ModelError if a
    classification model stores its head elsewhere."""
    if "Classification" not in type(model).__name__:
        return None
    layer = getattr(model, "score", None) or getattr(model, "classifier", None)
    if not isinstance(layer, torch.nn.Linear):
        raise ModelError(
            f"{type(model).__name__} has no linear layer named score or classifier; choose a model with one"
        )
    return layer


def count_parameters(model: torch.nn.Module) -> int:
    """Count parameters, shared ones once."""
    shapes = (getattr(getattr(p, "quant_state", None), "shape", p.shape) for p in model.parameters())
    return sum(torch.Size(shape).numel() for shape in shapes)


def resolve_dtype(name: str, device: str) -> torch.dtype:
    """Return the dtype of a config's name, which may be `auto`."""
    dtype: torch.dtype = getattr(torch, dtype_name(name, device))
    return dtype
