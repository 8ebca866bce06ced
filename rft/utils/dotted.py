"""Load an object by its dotted path: how the core reaches rare features without importing them."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def load_dotted(path: str) -> Any:
    """The object that `package.module.name` names."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name)
