"""Make commands that run no model start quickly: import less of transformers, and collect garbage rarely."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Mapping
from importlib import import_module, metadata
from typing import Any

OBJECTS = 100_000  # new objects before a collection; the default is 700, and imports make over a million


def start_quickly() -> None:
    """Import transformers without the parts that only the use of models needs; call it before other imports.

    In this process transformers generates no docstrings of its classes: the generator imports the modules of
    all model classes, and torch's compiler with them, which takes over a second. It finds the distribution of
    a package when asked, and does not list all installed files first (a quarter of a second).
    """
    gc.set_threshold(OBJECTS, 50, 50)
    if "transformers" not in sys.modules:
        list_all = metadata.packages_distributions
        metadata.packages_distributions = lambda: _Distributions(list_all)  # type: ignore[assignment]
        try:
            import_module("transformers")
        finally:
            metadata.packages_distributions = list_all
    module: Any = import_module("transformers.utils.auto_docstring")
    if hasattr(module, "auto_class_docstring"):
        module.auto_class_docstring = _unchanged


class _Distributions(dict[str, list[str]]):
    """The distributions of each top-level module; all are listed once one is not named like its module."""

    def __init__(self, list_all: Callable[[], Mapping[str, list[str]]]) -> None:
        super().__init__()
        self._list_all = list_all

    def get(self, module: str, default: Any = None) -> Any:
        if module not in self:
            try:
                self[module] = [metadata.distribution(module).metadata["Name"]]
            except metadata.PackageNotFoundError:
                self.update(self._list_all())
        return super().get(module, default)


def _unchanged(decorated: Any, *_: Any, **__: Any) -> Any:
    return decorated
