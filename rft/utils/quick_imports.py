"""Make commands that run no model start quickly: import less of transformers, and collect garbage rarely."""

from __future__ import annotations

import gc
from importlib import import_module
from typing import Any

OBJECTS = 100_000  # new objects before a collection; the default is 700, and imports make over a million


def start_quickly() -> None:
    """Import transformers without the parts that only the use of models needs; call it before other imports.

    In this process transformers generates no docstrings of its classes: the generator imports the modules of
    all model classes, and torch's compiler with them, which takes over a second.
    """
    gc.set_threshold(OBJECTS, 50, 50)
    module: Any = import_module("transformers.utils.auto_docstring")
    if hasattr(module, "auto_class_docstring"):
        module.auto_class_docstring = _unchanged


def _unchanged(decorated: Any, *_: Any, **__: Any) -> Any:
    return decorated
