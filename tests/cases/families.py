"""Tiny models whose chat templates behave like those of the families that people train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, START, CLOSE = "<|endoftext|>", "<|im_start|>", "<|im_end|>"  # ids 0, 1, 2
_HEAD = "{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}"
_GENERATE = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
_THOUGHT = "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>\\n' -}}{%- endif -%}"

CHATML = "{%- for m in messages -%}" + _HEAD + "{%- endfor -%}" + _GENERATE
# Opens the thought in the generation prompt; R1 drops it from what it renders, the other keeps it.
PREFILL = "{%- for m in messages -%}" + _HEAD + "{%- endfor -%}" + _THOUGHT
R1 = (
    "{%- for m in messages -%}{%- set c = m.content -%}"
    "{%- if m.role == 'assistant' and '</think>' in c -%}{%- set c = c.split('</think>')[-1] -%}{%- endif -%}"
    "{{- '<|im_start|>' + m.role + '\\n' + c + '<|im_end|>\\n' -}}{%- endfor -%}" + _THOUGHT
)
# Drops the thoughts of earlier turns, and gives the last one an empty thought where it has none.
QWEN3 = (
    "{%- set ns = namespace(last=-1) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
    "{%- set c = m.content -%}{%- set r = m.reasoning_content or '' -%}"
    "{%- if '</think>' in c -%}{%- set r = c.split('</think>')[0].split('<think>')[-1].strip() -%}"
    "{%- set c = c.split('</think>')[-1].lstrip('\\n') -%}{%- endif -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- if loop.index0 > ns.last and (loop.last or r) -%}"
    "{{- '<think>\\n' + r + '\\n</think>\\n\\n' -}}{%- endif -%}"
    "{{- c + '<|im_end|>\\n' -}}{%- else -%}" + _HEAD + "{%- endif -%}{%- endfor -%}" + _GENERATE
)
# The same with tools: calls in tags, results as a user's message. `enable_thinking: false` writes an empty
# thought before the answer, and not before those of earlier turns.
QWEN3_TOOLS = (
    "{%- set ns = namespace(last=-1) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if tools -%}{{- '<|im_start|>system\n' ~ (tools | tojson) ~ '<|im_end|>\n' -}}{%- endif -%}"
    "{%- for m in messages -%}{%- if m.role == 'assistant' -%}"
    "{%- set c = m.content -%}{%- set r = m.reasoning_content or '' -%}"
    "{%- if '</think>' in c -%}{%- set r = c.split('</think>')[0].split('<think>')[-1].strip('\n') -%}"
    "{%- set c = c.split('</think>')[-1].lstrip('\n') -%}{%- endif -%}"
    "{{- '<|im_start|>assistant\n' -}}"
    "{%- if loop.index0 > ns.last and (loop.last or r) -%}"
    "{{- '<think>\n' + r.strip('\n') + '\n</think>\n\n' -}}{%- endif -%}{{- c -}}"
    "{%- for call in m.tool_calls or [] -%}{%- if c or not loop.first -%}{{- '\n' -}}{%- endif -%}"
    '{{- \'<tool_call>\n{"name": "\' ~ call.function.name ~ \'", "arguments": \' -}}'
    "{{- (call.function.arguments | tojson) ~ '}\n</tool_call>' -}}{%- endfor -%}{{- '<|im_end|>\n' -}}"
    "{%- elif m.role == 'tool' -%}"
    "{%- if messages[loop.index0 - 1].role != 'tool' -%}{{- '<|im_start|>user' -}}{%- endif -%}"
    "{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' -}}"
    "{%- if loop.last or messages[loop.index0 + 1].role != 'tool' -%}{{- '<|im_end|>\n' -}}{%- endif -%}"
    "{%- else -%}" + _HEAD + "{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}"
    "{%- if enable_thinking is defined and not enable_thinking -%}"
    "{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}"
    "{%- endif -%}"
)
# A BOS in the text, roles that take turns, no system message, contents trimmed.
GEMMA = (
    "{{- bos_token -}}{%- for m in messages -%}"
    "{%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) -%}"
    "{{- raise_exception('roles must alternate') -}}"
    "{%- endif -%}{{- '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' -}}"
    "{{- m['content'] | trim + '<eot>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<turn>model\\n' -}}{%- endif -%}"
)
# Nothing but the next role ends a turn.
GLM = (
    "{%- for m in messages -%}{{- '<|' + m.role + '|>\\n' + m.content -}}"
    "{%- if not loop.last -%}{{- '\\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}"
)
# Not even a special token there.
PLAIN_ROLES = (
    "{%- for m in messages -%}{{- m.role + ': ' + m.content + '\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"
)
# An end token behind the whole conversation, besides the one of each turn; no system message is written.
PHI = (
    "{%- for m in messages if m.role != 'system' -%}"
    "{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}"
)
PRINTS = (  # whatever the content is
    "{%- for m in messages -%}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' -}}"
    "{%- endfor -%}" + _GENERATE
)
# Tool calls as JSON in tags.
HERMES = (
    "{%- if tools -%}{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\\n' + m.content -}}"
    "{%- for c in m.tool_calls or [] -%}{{- '<tool_call>\\n' + c.function | tojson + '\\n</tool_call>' -}}"
    "{%- endfor -%}{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}" + _GENERATE
)
TOOLS = (
    "{%- if tools -%}{{- '<|im_start|>system\\nTools: ' ~ (tools | tojson) ~ '<|im_end|>\\n' -}}{%- endif -%}"
    "{%- for m in messages -%}{{- '<|im_start|>' ~ m.role ~ '\\n' ~ (m.content or '') -}}"
    "{%- if 'tool_calls' in m -%}{{- '<call>' ~ (m.tool_calls | tojson) ~ '</call>' -}}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}{%- endfor -%}" + _GENERATE
)

QWEN3_TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
GEMMA_TOKENS, GLM_TOKENS = ("<turn>", "<eot>"), ("<|user|>", "<|assistant|>", "<|system|>")


def make_tokenizer(
    template: str | None = CHATML, *, eos: str = CLOSE, bos_first: bool = False, extra: Sequence[str] = ()
) -> Any:
    """Byte-level BPE whose ids 0, 1, 2 are END, START, CLOSE, and 3, ... are `extra`.

    bos_first: the tokenizer puts a BOS (START) before a text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300 + len(extra),
        special_tokens=[END, START, CLOSE, *extra],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["What is 2+2? The answer is 4."] * 4, trainer)
    if bos_first:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{START} $A", special_tokens=[(START, 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=eos,
        pad_token=eos,
        extra_special_tokens=list(extra),
        chat_template=template,
    )


def gemma_tokenizer() -> Any:
    return make_tokenizer(GEMMA, bos_first=True, extra=GEMMA_TOKENS, eos=END)


def phi_tokenizer() -> Any:
    return make_tokenizer(PHI, extra=("<|end|>", *GLM_TOKENS), eos=END)


def glm_tokenizer() -> Any:
    return make_tokenizer(GLM, extra=GLM_TOKENS, eos=END)


def make_model(
    folder: Path,
    tokenizer: Any,
    *,
    generation_eos: int | list[int] | None = None,
    config_eos: int | list[int] | None = None,
) -> Path:
    """A random model of one tiny layer with this tokenizer; what is None is the tokenizer's eos, or (in the
    generation config) not there at all."""
    torch.manual_seed(0)
    eos = tokenizer.eos_token_id
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=eos if config_eos is None else config_eos,
        pad_token_id=eos,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=generation_eos, pad_token_id=eos)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if generation_eos is None:
        (folder / "generation_config.json").unlink()
    return folder


def hub_layout(cache: Path, name: str, folder: Path) -> None:
    """Put a model folder into a hub cache under its name, as a download leaves it there."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40, encoding="utf-8")
    for file in folder.iterdir():
        (snapshot / file.name).write_bytes(file.read_bytes())
