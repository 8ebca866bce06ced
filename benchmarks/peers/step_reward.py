"""The reward of the step-time benchmarks. Both libraries call this very function."""

from __future__ import annotations

from typing import Any


def exact(prompts: list[Any], completions: list[Any], answer: list[str], **columns: Any) -> list[float]:
    """1 where the text after the last `#### ` is the answer. Completions are texts, or lists of messages."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(t.rsplit("#### ", 1)[-1].strip() == a) for t, a in zip(texts, answer, strict=True)]


def parity(prompts: list[Any], completions: list[Any], **columns: Any) -> list[float]:
    """1 for texts of odd length: differs within nearly every group, so that every completion is trained."""
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [float(len(text) % 2) for text in texts]
