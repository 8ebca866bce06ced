"""Read the names of a model's tensors."""

from __future__ import annotations

from itertools import pairwise


def layer_number(name: str) -> int | None:
    """Return the number of the layer that a tensor belongs to (`model.layers.3.mlp...`: 3); None for
    others."""
    parts = name.split(".")
    for before, part in pairwise(parts):
        if part.isdecimal() and before in ("layers", "h", "blocks", "block", "layer"):
            return int(part)
    return None
