"""Predict the memory of learner and replicas from the model config, without loading weights."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from rft.config.learner import LearnerConfig
from rft.config.schema import ModelConfig
from rft.data.stops import end_tokens
from rft.errors import ModelError
from rft.kernels.logprob_common import chunk_rows
from rft.preflight.gguf import PACKAGED
from rft.rollout.engine import EngineSpec
from rft.utils.did_you_mean import closest_match
from rft.utils.dtypes import item_bytes
from rft.utils.files import write_text_atomic
from rft.utils.hashing import fingerprint


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a causal LM."""

    parameters: int
    hidden: int
    intermediate: int
    layers: int
    vocab: int
    max_positions: int
    query: int  # total width of a token's queries, over all heads
    key: int  # total width of a token's keys, same for its values
    normed: bool  # whether queries and keys are normalised
    linear: int  # parameters of the layers' linear maps, which quantisation applies to
    quantization: str | None = None  # method of stored quantised weights (neither trained nor synced)
    end_tokens: tuple[int, ...] = ()  # end tokens of the model config

    def __post_init__(self) -> None:
        object.__setattr__(self, "end_tokens", tuple(self.end_tokens))  # a list where it was read from JSON

    @classmethod
    def of(cls, path: str, model: ModelConfig, cache: Path | None = None) -> ModelShape:
        """Read a model config and count the parameters without allocating them. Raises ModelError.

        cache: a folder to keep the sizes of local models in, because building a model takes about 2 seconds.
        """
        config = Path(path) / "config.json"
        if cache is None or model.trust_remote_code or not config.is_file():
            return cls._of(path, model)
        try:
            text = config.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ModelError(f"{path!r}: its config.json cannot be read: {error}") from None
        key = {"config": text, "fields": _FIELDS, "by": version("transformers")}
        file = cache / f"shape-{fingerprint(key)}.json"
        try:
            return cls(**json.loads(file.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # missing or damaged
            shape = cls._of(path, model)
        with suppress(OSError):  # a folder that cannot be written is reported elsewhere
            file.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomic(file, json.dumps(asdict(shape)))
        return shape

    @classmethod
    def _of(cls, path: str, model: ModelConfig) -> ModelShape:
        network = meta_network(path, model.trust_remote_code)
        text = network.config.get_text_config()
        head = network.get_output_embeddings()
        maps = (m for m in network.modules() if isinstance(m, torch.nn.Linear) and m is not head)
        heads = text.num_attention_heads
        width = getattr(text, "head_dim", None) or text.hidden_size // heads
        positions = getattr(text, "max_position_embeddings", None)  # none: of any length
        return cls(
            parameters=sum(p.numel() for p in {id(p): p for p in network.parameters()}.values()),
            hidden=text.hidden_size,
            intermediate=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
            layers=text.num_hidden_layers,
            vocab=text.vocab_size,
            max_positions=2**31 if positions is None else positions,
            query=heads * width,
            key=(getattr(text, "num_key_value_heads", None) or heads) * width,
            normed=any(name.endswith(("q_norm", "q_layernorm")) for name, _ in network.named_modules()),
            linear=sum(m.weight.numel() for m in maps),
            quantization=_stored_quantization(network.config),
            end_tokens=end_tokens(network.config),
        )


_FIELDS = sorted(field.name for field in fields(ModelShape))  # a new field makes old files stale


def _stored_quantization(config: Any) -> str | None:
    stored = getattr(config, "quantization_config", None)
    if stored is None:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return str(getattr(method, "value", method))


# Error messages of transformers when the hub is unreachable.
_UNREACHABLE = re.compile(r"couldn't connect|offline mode|[Oo]ffline|cannot reach|Max retries")


@lru_cache(maxsize=4)
def meta_network(path: str, trust_remote_code: bool) -> Any:
    """Build a model on the meta device from its config. Raises ModelError with the path."""
    from transformers import AutoModelForCausalLM

    config = read_model_config(path, trust_remote_code)
    with _model_errors(path), torch.device("meta"):
        try:
            network = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        except AssertionError as error:
            if "Padding_idx" not in str(error):
                raise
            text = config.get_text_config()
            raise ValueError(
                f"pad_token_id is {text.pad_token_id}, and the vocabulary has {text.vocab_size} tokens; "
                "write the id of a token, or null"
            ) from error
        network.tie_weights()
    return network


def read_model_config(path: str, trust_remote_code: bool) -> Any:
    """Return transformers' config of a model. Raises ModelError with the path."""
    from transformers import AutoConfig, PreTrainedConfig

    with _model_errors(path):
        raw, _ = PreTrainedConfig.get_config_dict(path)
        wrong = _wrong_size(raw)
    if wrong is not None:
        raise ModelError(f"{path!r}: in its config.json, {wrong}; correct it, or copy the file again")
    with _model_errors(path):
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)


# Sizes in a config.json, by the names that transformers' classes give them.
_SIZES = (
    *("vocab_size", "hidden_size", "n_embd", "d_model", "head_dim"),
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers"),
    *("num_attention_heads", "n_head", "n_heads", "num_heads", "num_key_value_heads"),
    *("max_position_embeddings", "n_positions", "max_seq_len", "context_length"),
)


def _wrong_size(raw: Mapping[str, Any]) -> str | None:
    """Return the first size in a config.json that no model can have; transformers accepts some of them."""
    text = raw.get("text_config") or raw
    for name in _SIZES:
        size = text.get(name)
        if isinstance(size, int) and size < 1:
            return f"{name} is {size}, and must be at least 1"
    heads, groups = text.get("num_attention_heads"), text.get("num_key_value_heads")
    if isinstance(heads, int) and isinstance(groups, int) and heads % groups:
        return f"num_attention_heads is {heads}, and must be a multiple of num_key_value_heads, {groups}"
    return None


@contextmanager
def _model_errors(path: str) -> Iterator[None]:
    """Raise ModelError for an error of transformers. Wrong values in a config raise errors of any kind."""
    try:
        yield
    except Exception as error:
        why = " ".join(str(error).split()) or type(error).__name__
        if (Path(path) / "config.json").is_file():
            kind = "" if isinstance(error, OSError | ValueError) else f"{type(error).__name__}: "
            raise ModelError(
                f"{path!r}: transformers cannot build a model from its config.json: {kind}{why[:400]}"
            ) from error
        if not isinstance(error, OSError | ValueError | KeyError):
            raise
        near = closest_match(path, ("tiny", *PACKAGED))
        hint = f" (did you mean the built-in model {near!r}?)" if near else ""
        if _UNREACHABLE.search(why):
            raise ModelError(
                f"{path!r} is neither a local folder nor in the local Hugging Face cache, and the hub cannot "
                f"be reached{hint}. Run `hf download {path}` where there is a network, with the same "
                "HF_HOME, or give a folder"
            ) from error
        raise ModelError(f"{path!r} is neither a model folder nor a hub model{hint}: {why[:400]}") from error


MOMENTS = {
    "adamw": 8,
    "muon": 4,
    "paged_adamw": 8,
    "adamw_8bit": 2.04,
    "paged_adamw_8bit": 2.04,
}  # bytes per parameter
# Memory of a learner or engine process besides tensors, on CPU: the interpreter with torch, transformers,
# Ray or vLLM, and their threads.
PROCESS_BYTES = 1 << 29
# Copies of a step's logits in vLLM's sampler: logits, log-probs, probabilities, noise, and their temporaries.
LOGIT_COPIES = 8
# Bytes of a quantised weight, including its scales (QLoRA): one byte per 64 weights, and second-level scales.
QUANTIZED = {"nf4": 0.516, "fp4": 0.516, "int8": 1.0}


def learner_bytes(
    shape: ModelShape,
    config: LearnerConfig,
    *,
    reference: bool,
    tokens: int,
    critic: bool = False,
    device: str = "cpu",
    adapter: int = 0,
    accumulates: bool = False,
) -> int:
    """Predict the peak bytes of one rank's tensors, on micro-batches of `tokens`.

    Peak = persistent + max(start of backward, end of backward) + working tensors.

    - persistent: the weights in float32 with Adam's moments; with an adapter of `adapter` parameters, the
      base in the compute dtype (or quantised), plus weights and moments of the adapter; with `reference`, a
      second model; with `critic`, a critic in float32 with its moments;
    - start of backward: all activations, and the head's gradient, which its forward computes. If the learner
      `accumulates` over several micro-batches, also the gradients of the earlier ones;
    - end of backward: the first layer's activations, all gradients, and the gradient that is being added to
      the embedding's. Between the two, activations are freed layer by layer as gradients are allocated, so
      the sum does not exceed the larger end.

    The optimizer step holds no more than the end of the backward: AdamW updates in place.

    With several ranks, persistent memory and gradients are sharded. Not counted: CPU offload, a critic's
    activations, mixtures of experts, and the memory of a process besides tensors (`PROCESS_BYTES`).
    """
    width = item_bytes(config.dtype, device)
    full = config.adapter is None
    trained = shape.parameters if full else adapter
    held = float(trained * (4 + MOMENTS[config.optimizer]) + (shape.parameters * width if reference else 0))
    if not full:
        small = QUANTIZED[config.quantize] if config.quantize else width
        held += shape.linear * small + (shape.parameters - shape.linear) * width
    held += shape.parameters * (4 + MOMENTS[config.optimizer]) if critic else 0
    layer = tokens * _kept(shape, width, full)
    between = tokens * shape.hidden * 4  # hidden states between layers
    embedding = 4 * shape.vocab * shape.hidden if full else 0
    copies = width * (shape.linear + shape.vocab * shape.hidden) if full and width < 4 else 0  # of autocast
    gradients = 4.0 * (trained + (shape.parameters if critic else 0))
    if config.parallel != "single":
        held, gradients = held / config.ranks, gradients / config.ranks
    if config.gradient_checkpointing:
        at_start = max(shape.layers * between + layer, copies)
    else:
        at_start = shape.layers * layer + copies
    at_start += embedding + (gradients if accumulates else 0)
    at_end = gradients + embedding + (between + layer if config.gradient_checkpointing else layer)
    working = _head_bytes(shape, tokens, width) + tokens * width * (3 * shape.intermediate + 2 * shape.hidden)
    if config.quantize:  # one matrix at a time is dequantised
        working += width * shape.hidden * shape.intermediate
    return int(held + max(at_start, at_end) + working)


def saved_bytes(shape: ModelShape, config: LearnerConfig, adapter: int = 0) -> int:
    """Return the bytes of a copy of the trained weights and their moments, for a checkpoint that is written
    in the background."""
    trained = shape.parameters if config.adapter is None else adapter
    return int(trained * (4 + MOMENTS[config.optimizer]))


def _kept(shape: ModelShape, width: int, full: bool) -> float:
    """Return the bytes per token that a decoder layer saves for the backward pass.

    Counted on Llama and Qwen3: the inputs of linear maps, queries, keys, values and output of attention, the
    four inner states of a gated MLP, and the inputs of norms. A trained norm also saves its normalised input.
    Norms compute in float32: with a narrower compute dtype, a float32 copy of their inputs is saved too.
    """
    attention = 2 * shape.query + 2 * shape.key
    headwise = shape.query + shape.key if shape.normed else 0
    if width == 4:
        per_layer = (6 if full else 4) * shape.hidden + (2 if full else 1) * headwise
        return 4 * (per_layer + attention + 4 * shape.intermediate)
    wide = (4 if full else 2) * shape.hidden + headwise
    narrow = (5 if full else 6) * shape.hidden + (headwise if full else 0)
    return 4 * wide + width * (narrow + attention + 4 * shape.intermediate)


def _head_bytes(shape: ModelShape, count: int, width: int) -> int:
    """Return the bytes of the final hidden states and of a chunk of logits with its gradient."""
    rows = chunk_rows(count, shape.vocab, width)
    return 4 * 3 * count * shape.hidden + 2 * rows * shape.vocab * width


def replica_bytes(shape: ModelShape, spec: EngineSpec) -> int:
    """Predict the peak bytes of a rollout replica on CPU, with its processes.

    vLLM runs in a process below the replica's actor. It packs the weights of each layer for its products; the
    loaded ones are freed, but their blocks mostly stay with the process, and the head stays unpacked as well,
    since the embeddings read it. Sampling keeps several float32 copies of a step's logits. Not counted: the
    cache of keys and values of the engine hf, which grows with the lengths of one request.
    """
    width = item_bytes(spec.dtype)
    weights = shape.parameters * width
    if spec.kind == "hf":
        return PROCESS_BYTES + weights
    head = shape.vocab * shape.hidden * width
    logits = LOGIT_COPIES * spec.config.max_num_seqs * shape.vocab * 4
    return 2 * PROCESS_BYTES + 2 * weights + head + spec.config.kv_cache_bytes + logits
