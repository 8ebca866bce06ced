"""A small language model as a GGUF file: Llama architecture, byte-level tokenizer, quantised weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, quantize
from transformers.convert_slow_tokenizer import bytes_to_unicode

HIDDEN, INTERMEDIATE, LAYERS, KEYS = 64, 128, 2, 32


def tensors() -> dict[str, np.ndarray]:
    """The float32 weights by their names in GGUF; the head is tied."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (300, HIDDEN), "output_norm": (HIDDEN,)}
    for i in range(LAYERS):
        shapes |= {
            f"blk.{i}.attn_norm": (HIDDEN,),
            f"blk.{i}.attn_q": (HIDDEN, HIDDEN),
            f"blk.{i}.attn_k": (KEYS, HIDDEN),
            f"blk.{i}.attn_v": (KEYS, HIDDEN),
            f"blk.{i}.attn_output": (HIDDEN, HIDDEN),
            f"blk.{i}.ffn_norm": (HIDDEN,),
            f"blk.{i}.ffn_gate": (INTERMEDIATE, HIDDEN),
            f"blk.{i}.ffn_up": (INTERMEDIATE, HIDDEN),
            f"blk.{i}.ffn_down": (HIDDEN, INTERMEDIATE),
        }
    return {
        f"{name}.weight": rng.normal(1.0 if len(shape) == 1 else 0.0, 0.1, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def write_gguf(path: Path, *, kind: str = "Q8_0", architecture: str = "llama") -> Path:
    """Write the model with its matrices in the quantisation `kind`."""
    writer = GGUFWriter(path, architecture)
    writer.add_name("small")
    writer.add_context_length(2048)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INTERMEDIATE)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(HIDDEN // 2)
    special, filler = ["<|endoftext|>", "<s>", "</s>"], [f"<{i}>" for i in range(40)]
    written = [*bytes_to_unicode().values(), "ab"]
    writer.add_vocab_size(300)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([*special, *written, *filler])
    writer.add_token_types([3] * len(special) + [1] * len(written) + [3] * len(filler))  # 3: control token
    writer.add_token_merges(["a b"])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    for name, values in tensors().items():
        if values.ndim == 1 or kind == "F32":
            writer.add_tensor(name, values)
        else:
            chosen = GGMLQuantizationType[kind]
            writer.add_tensor(name, quantize(values, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
