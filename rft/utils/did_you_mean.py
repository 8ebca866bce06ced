"""Hints for misspelt names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest(word: object, known: Iterable[object]) -> str | None:
    """The known name that looks most like `word`; None where none does."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.5)
    return close[0] if close else None


def nearest(word: object, known: Iterable[object]) -> str:
    """`; did you mean 'x'?`, or nothing where no known name is close."""
    close = closest(word, known)
    return "" if close is None else f"; did you mean {close!r}?"


def nearest_or_all(word: object, known: Iterable[object]) -> str:
    """`; did you mean 'x'?`, or the list of what exists."""
    names = sorted(str(name) for name in known)
    return nearest(word, names) or f"; known: {', '.join(names)}"
