"""Seeds derived from names and numbers."""

from __future__ import annotations

import hashlib


def derive_seed(*parts: int | str) -> int:
    """Derive a sampling seed from `parts`: equal parts give equal rollouts."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 2  # leaves room for seed + sample index in an int64
