"""Hashes that name cached and saved files, and verify their contents."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODEL_FILES = ("config.json", "*.safetensors", "*.bin")


def json_digest(value: Any, *, compact: bool = False) -> str:
    """Return the SHA-256 of plain data as JSON with sorted keys.

    compact: no spaces, and NaN refused with ValueError (the form of a checkpoint's manifest).
    """
    separators = (",", ":") if compact else None
    text = json.dumps(value, sort_keys=True, separators=separators, allow_nan=not compact)
    return hashlib.sha256(text.encode()).hexdigest()


def fingerprint(config: Mapping[str, Any]) -> str:
    """Return a short hash of plain config data, to name a cache entry."""
    return json_digest(config)[:16]


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(path: str) -> str:
    """Return a hash of a model folder's weights and config; for a hub model, its name with its commit."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        from transformers import AutoConfig

        return f"{path}@{AutoConfig.from_pretrained(path)._commit_hash}"
    digest = hashlib.sha256()
    for file in sorted({f for pattern in MODEL_FILES for f in folder.glob(pattern)}):
        digest.update(file.name.encode())
        digest.update(bytes.fromhex(file_digest(file)))
    return digest.hexdigest()


def short_digest(text: str) -> str:
    """Return 12 hex digits that represent a text in a file name."""
    return hashlib.blake2b(text.encode(), digest_size=6).hexdigest()


def hash64(text: str) -> int:
    """Return a 64-bit hash of a text, for seeds and for splits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
