"""Rewards on the text itself."""

from __future__ import annotations

from rft.rewards.types import Score, correct, wrong


def exact_match(completion: str, answer: str, *, strip: bool = True, ignore_case: bool = False) -> Score:
    """1 where the completion equals the answer."""
    got, want = (completion.strip(), str(answer).strip()) if strip else (completion, str(answer))
    if ignore_case:
        got, want = got.casefold(), want.casefold()
    return correct() if got == want else wrong(detail=f"expected {want[:200]!r}, got {got[:200]!r}")
