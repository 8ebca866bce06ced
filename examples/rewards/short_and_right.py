"""A custom reward: right answers, a little more for short ones. `rft reward` tries it out:

rft reward examples/rewards/short_and_right.py:reward samples.jsonl
"""

from __future__ import annotations

from typing import Any

from rft.rewards import load_reward

math = load_reward("math")


def reward(
    prompts: list[Any], completions: list[str], answer: list[str], bonus: float = 0.1, **columns: Any
) -> list[float | None]:
    """1 for a right answer, and up to `bonus` more the shorter it is; None where there is no answer
    to compare with, which leaves the sample out instead of calling it wrong."""
    known = [a is not None for a in answer]
    right = math(prompts, completions, answer=[a if k else "0" for a, k in zip(answer, known, strict=True)])
    return [
        None if not k or r is None else r * (1 + bonus / (1 + len(c.split()) / 100))
        for c, r, k in zip(completions, right, known, strict=True)
    ]
