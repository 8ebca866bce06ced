"""A tiny from-scratch model with its tokenizer: Qwen3 architecture, tied embeddings.

It is an ordinary Hugging Face folder, which transformers and vLLM load like any other. The tokenizer
is byte-level BPE, so any text can be encoded; each digit is a separate token, so that the model sees
numbers as written. There are two exceptions: in sums, which it only has to copy, digits come in
pairs, and each number that is guessed is one token. Same arguments, same files.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rft.tasks.arithmetic import Arithmetic
from rft.tasks.guess import Guess
from rft.tasks.sums import Sums

BOS, EOS, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = {role: f"<|{role}|>" for role in ("system", "user", "assistant")}
SPECIAL = (BOS, EOS, PAD, *ROLES.values())
Vocabulary = Literal["arithmetic", "sums", "guess"]

# `generation` marks the assistant's text, including the closing token, for response-only losses. Tool calls
# and results are written as Hermes and Qwen do it. Of the tools' schemas only names are shown: a tiny model
# learns the use of a tool from demonstrations, and a schema would be most of its prompt.
CHAT_TEMPLATE = (
    "{%- if tools -%}"
    '{{- \'<|system|>Tools, called by <tool_call>{"name": ..., "arguments": {...}}</tool_call>:\' -}}'
    "{%- for tool in tools -%}{%- set f = tool['function'] or tool -%}"
    "{{- '\n' ~ f['name'] ~ '(' ~ ((f['parameters'] or {})['properties'] or {}) | join(', ') ~ ')' -}}"
    "{%- endfor -%}{{- eos_token -}}"
    "{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'tool' -%}"
    "{{- '<|user|><tool_response>' + message['content'] + '</tool_response>' + eos_token -}}"
    "{%- elif message['role'] == 'assistant' -%}"
    "{{- '<|assistant|>' -}}"
    "{%- generation -%}{{- message['content'] -}}"
    "{%- for call in message['tool_calls'] or [] -%}"
    "{{- '<tool_call>{\"name\": ' + call['function']['name'] | tojson + ', \"arguments\": ' -}}"
    "{{- call['function']['arguments'] | tojson + '}</tool_call>' -}}"
    "{%- endfor -%}{{- eos_token -}}{%- endgeneration -%}"
    "{%- else -%}{{- '<|' + message['role'] + '|>' + message['content'] + eos_token -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)


def build_tiny(
    folder: str | Path,
    *,
    seed: int = 1,
    hidden_size: int = 64,
    layers: int = 3,
    heads: int = 2,
    intermediate_size: int = 256,
    vocab_size: int = 512,
    max_positions: int = 2048,
    task: Vocabulary = "arithmetic",
) -> None:
    """Write a freshly initialised model, its tokenizer and its generation config to `folder`.

    `vocab_size` is an upper bound, and `task` the one whose words are tokens (see `build_tokenizer`). The
    size of an attention head is hidden_size / heads; vLLM on CPU needs a multiple of 32. The global random
    state is preserved.
    Raises ValueError for inconsistent sizes.
    """
    if hidden_size % heads:
        raise ValueError(f"hidden_size ({hidden_size}) must be a multiple of heads ({heads})")
    folder = Path(folder)
    tokenizer = build_tokenizer(vocab_size, max_positions, task)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=hidden_size // heads,
        max_position_embeddings=max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with contextlib.redirect_stdout(sys.stderr):  # modules imported here may print
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tokenizer(
    vocab_size: int = 512, max_positions: int = 2048, task: Vocabulary = "arithmetic"
) -> PreTrainedTokenizerFast:
    """Train byte-level BPE on a task's text: 6 special tokens, 256 bytes, then merges.

    The text of a task has few words, those of arithmetic fit into some 370 entries; no more are made.
    Raises ValueError for an unknown task, and if `vocab_size` leaves no room for bytes and special tokens.
    """
    if task not in CORPORA:
        raise ValueError(
            f"no tiny vocabulary exists for the task {task!r}; choose one of {', '.join(CORPORA)}"
        )
    if vocab_size < 256 + len(SPECIAL):
        raise ValueError(f"vocab_size must be at least {256 + len(SPECIAL)}, got {vocab_size}")
    number, corpus = CORPORA[task]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"{number}| ?\p{{L}}+|[^\d\p{{L}}]+"), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        corpus(),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=list(SPECIAL),
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    return _fast(tokenizer, max_positions)


def _fast(tokenizer: Tokenizer, max_positions: int) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        extra_special_tokens=list(ROLES.values()),
        model_max_length=max_positions,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def _arithmetic() -> list[str]:
    """Return problems and solutions in every form and format."""
    styles = dict.fromkeys(("lines", "chain", "prose", "code"), 1)
    task = Arithmetic(form="mixed", operators=["+", "-", "*"], styles=styles)
    return [row["prompt"] + row["completion"] for row in task.rows("train", 2000, seed=0)]


def _conversations(task: Any) -> list[str]:
    """Return the texts between the special tokens of a task's demonstrations, as the template writes them."""
    writer, texts = _fast(Tokenizer(models.BPE()), 2048), list[str]()
    for row in task.rows("train", 500, seed=0):
        messages = [{"role": "user", "content": row["prompt"]}, *row["completion"]]
        written = str(writer.apply_chat_template(messages, tools=row.get("tools"), tokenize=False))
        texts += re.split("|".join(map(re.escape, SPECIAL)), written)
    return texts


CORPORA: dict[str, tuple[str, Callable[[], list[str]]]] = {
    "arithmetic": (r"\d", _arithmetic),
    "sums": (r"\d{1,2}", lambda: _conversations(Sums(calls=1))),
    "guess": (r"\d{1,3}", lambda: _conversations(Guess())),
}
"""By the name of the task: how digits are split, and the text that a tokenizer is trained on."""
