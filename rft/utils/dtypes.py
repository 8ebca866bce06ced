"""Dtypes by their names in a config, for code that makes a plan without torch."""

from __future__ import annotations

_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def dtype_name(name: str, device: str) -> str:
    """Resolve `auto`, which a plan does not contain: without a plan, it is float32 on CPU."""
    return ("bfloat16" if device == "cuda" else "float32") if name == "auto" else name


def item_bytes(name: str, device: str = "cpu") -> int:
    """Return the bytes of an element of a dtype, which may be `auto`."""
    return _BYTES[dtype_name(name, device)]
