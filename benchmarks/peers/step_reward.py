"""The reward of the step-time benchmark. Both libraries call this very function."""

from __future__ import annotations

from typing import Any


def exact(prompts: list[str], completions: list[str], answer: list[str], **columns: Any) -> list[float]:
    """1 where the text after the last `#### ` is the answer."""
    return [float(c.rsplit("#### ", 1)[-1].strip() == a) for c, a in zip(completions, answer, strict=True)]
