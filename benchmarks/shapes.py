"""Qwen3-shaped models with random weights, in the sizes of the benchmarks, and their operation counts."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from rft.batch import Batch
from rft.work import segment_pairs


@dataclass(frozen=True)
class Shape:
    """Widths of the hidden states and the MLP, layers, heads of queries and of keys, the width of a head,
    and tokens of the vocabulary; `tied`: the head is the embedding."""

    width: int
    mlp: int
    layers: int
    heads: int
    key_heads: int
    head_width: int
    vocabulary: int
    tied: bool = False

    def config(self) -> Qwen3Config:
        return Qwen3Config(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            intermediate_size=self.mlp,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.key_heads,
            head_dim=self.head_width,
            max_position_embeddings=1 << 16,
            tie_word_embeddings=self.tied,
        )

    def build(self) -> Qwen3ForCausalLM:
        """The same float32 weights at every call."""
        torch.manual_seed(0)
        return Qwen3ForCausalLM(self.config())

    def operations(self, batch: Batch) -> float:
        """Floating-point operations of the layers' forward over a packed batch: two per weight and token,
        and the attention's."""
        queries, keys = self.heads * self.head_width, self.key_heads * self.head_width
        weights = 2 * self.width * (queries + keys) + 3 * self.width * self.mlp
        pairs = int(segment_pairs(batch.segment, batch.parent).sum())
        return float(self.layers * (2 * weights * batch.num_tokens + 4 * queries * pairs))


SMALL = Shape(256, 768, 4, 4, 2, 64, 512)
TOY = Shape(128, 256, 1, 2, 1, 64, 512, tied=True)
SMOLLM2 = Shape(576, 1536, 30, 9, 3, 64, 49_152, tied=True)  # with the norms of Qwen3
QWEN3_600M = Shape(1024, 3072, 28, 16, 8, 128, 151_936, tied=True)
SMOLLM2 = Shape(576, 1536, 30, 9, 3, 64, 49_152, tied=True)  # of the 135M model
