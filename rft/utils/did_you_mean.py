"""Suggest the known name that is closest to a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def closest_match(word: object, known: Iterable[object]) -> str | None:
    """Return the known name most similar to `word`; None if none is similar."""
    close = difflib.get_close_matches(str(word), [str(name) for name in known], n=1, cutoff=0.6)
    return close[0] if close else None


def did_you_mean(word: object, known: Iterable[object]) -> str:
    """Return ` (did you mean 'x'?)`, or "" if no known name is similar to `word`. It fits any place of a
    sentence."""
    close = closest_match(word, known)
    return "" if close is None else f" (did you mean {close!r}?)"


def did_you_mean_or_list(word: object, known: Iterable[object]) -> str:
    """Return ` (did you mean 'x'?)`, or else `; known:` with all known names."""
    names = sorted(str(name) for name in known)
    return did_you_mean(word, names) or f"; known: {', '.join(names)}"
