"""Make imports of transformers quick for commands that run no model."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def skip_generated_docstrings() -> None:
    """Keep transformers from generating the docstrings of its classes in this process.

    The generator imports the modules of all model classes, and torch's compiler with them: the import of a
    config then takes over a second longer.
    """
    module: Any = import_module("transformers.utils.auto_docstring")
    if hasattr(module, "auto_class_docstring"):
        module.auto_class_docstring = _unchanged


def _unchanged(decorated: Any, *_: Any, **__: Any) -> Any:
    return decorated
