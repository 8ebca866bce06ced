"""Load an object by its dotted path, so that the core can use rare features without importing them."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def load_dotted(path: str) -> Any:
    """Import and return the object `package.module.name`."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
