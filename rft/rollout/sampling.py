"""Completions from what an engine sampled."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rft.batch import Completion, Prompt
from rft.rollout.engine import Generated


def continued(given: tuple[int, ...], g: Generated) -> Generated:
    """A continuation with what it continues put before it; given tokens have no log-prob of a sampler."""
    shift = len(given)
    versions = tuple((v, a + shift, b + shift) for v, a, b in g.versions)
    return Generated(given + g.tokens, (0.0,) * shift + g.logps, g.finish, versions)


def completions_of(generated: Sequence[Generated], tokenizer: Any) -> list[Completion]:
    """Completions with their text; special tokens are left out of the text, never of the tokens."""
    texts = tokenizer.batch_decode([list(g.tokens) for g in generated], skip_special_tokens=True)
    return [
        Completion(tokens=g.tokens, text=text, finish=g.finish, logps=g.logps, versions=g.versions)
        for g, text in zip(generated, texts, strict=True)
    ]


def as_text(prompt: Prompt, text: str) -> str | list[dict[str, Any]]:
    """A completion the way its prompt is written: a string, or an assistant's message."""
    return text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}]
