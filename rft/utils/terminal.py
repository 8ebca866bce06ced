"""Make untrusted text safe to print: model output must not control a terminal."""

from __future__ import annotations

import sys
import unicodedata
from typing import IO

# Format characters that reorder or hide the surrounding text: bidirectional controls and tags.
_FORMAT = {0x061C, 0x200E, 0x200F, 0x2028, 0x2029, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A)}


def printable(text: str) -> str:
    r"""Replace characters that control a terminal by escapes (`\x1b`); keep newlines and tabs.

    Replaces control characters (C0, DEL, C1), bidirectional and tag characters, line separators and lone
    surrogates. Letters of every script and emoji are kept.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escape(c) if _steers(c) else c for c in text)


def _steers(char: str) -> bool:
    code = ord(char)
    if code < 0x20 or 0x7F <= code < 0xA0:
        return char not in "\n\t"
    return code in _FORMAT or 0xE0000 <= code < 0xE0080 or unicodedata.category(char) == "Cs"


def _escape(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def say(text: str, stream: IO[str] | None = None) -> None:
    """Print a line of untrusted text made printable (default: to stderr)."""
    print(printable(text), file=sys.stderr if stream is None else stream, flush=True)
