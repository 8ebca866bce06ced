"""Make commands, learners and engines start quickly.

Libraries are loaded when they are used, less of transformers is imported, and garbage is collected rarely
during imports.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module, metadata, util
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

USUAL = gc.get_threshold()
OBJECTS = 100_000  # new objects before a collection; the default is 700, and imports make over a million
SCANS = "transformers.utils.import_utils"  # it lists installed distributions, and reads every file of models


def load_torch_late() -> None:
    """Make `import torch` find the package only; it is loaded, for 2 seconds, once a part of it is used.

    Modules that a command imports without running a model take nothing from torch while they are imported:
    they write `torch.Tensor` instead of `from torch import Tensor`.
    """
    load_late("torch")


def load_late(name: str) -> None:
    """Make the import of a package find it only; it is loaded once a part of it is used. No effect on one
    that is loaded, or not installed."""
    try:
        spec = None if name in sys.modules else util.find_spec(name)
    except ModuleNotFoundError:  # the package that it is a part of
        return
    if spec is not None:
        sys.modules[name] = module = util.module_from_spec(spec)
        del module.__path__  # so that the import of a submodule loads the package first
        module.__class__ = _Unloaded


class _Unloaded(ModuleType):
    """A package before it is loaded, in place: modules that have imported it hold this object."""

    loading = threading.RLock()  # other threads wait for the one that loads; its own imports do not

    def __getattr__(self, name: str) -> Any:
        with self.loading:
            spec = self.__spec__
            if spec is not None and spec.loader is not None and "__path__" not in self.__dict__:
                self.__path__ = spec.submodule_search_locations or []
                spec.loader.exec_module(self)
                self.__class__ = ModuleType  # type: ignore[assignment] # now it is an ordinary module
            return ModuleType.__getattribute__(self, name)

    def __reduce__(self) -> tuple[Callable[[str], ModuleType], tuple[str]]:
        return import_module, (self.__name__,)  # as modules are pickled, with a reward that imports torch


@contextmanager
def quick_imports() -> Iterator[None]:
    """Make the imports of transformers and vLLM in the block quick, in a process that goes on to run a model:
    after the block, garbage is collected as before, since it may hold tensors."""
    thresholds = gc.get_threshold()
    start_engine_quickly()
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def start_engine_quickly() -> None:
    """Import transformers and vLLM without the parts that generating text does not need: `start_quickly`."""
    start_quickly()
    load_late("scipy.signal")  # vLLM imports it to resample audio


def collect_as_usual() -> None:
    """Collect garbage as often as Python does by default, once a process has imported its libraries."""
    gc.set_threshold(*USUAL)


def start_quickly() -> None:
    """Import transformers without the parts that only its documentation needs; call it before other imports.

    In this process transformers generates no docstrings of its classes: the generator imports the modules of
    all model classes, and torch's compiler with them, which takes over a second. It looks for a package's
    distribution only when it asks for one, and splits only the end of a file to find its exported names.
    """
    gc.set_threshold(OBJECTS, 50, 50)
    sys.meta_path.insert(0, _QuickScans())
    try:
        module: Any = import_module("transformers.utils.auto_docstring")
    finally:
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _QuickScans)]
    if hasattr(module, "auto_class_docstring"):
        module.auto_class_docstring = _unchanged


def _unchanged(decorated: Any, *_: Any, **__: Any) -> Any:
    return decorated


class _QuickScans(MetaPathFinder):
    """Finds the module SCANS alone, as Python does, for a loader that makes its two scans quick."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == SCANS else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _Loader(spec.loader.name, spec.loader.path)
        return spec


class _Loader(SourceFileLoader):
    """Executes the module SCANS with distributions that are looked up one by one."""

    def exec_module(self, module: Any) -> None:
        full = metadata.packages_distributions
        metadata.packages_distributions = Distributions
        try:
            super().exec_module(module)
        finally:
            metadata.packages_distributions = full
        if hasattr(module, "fetch__all__"):
            module.fetch__all__ = _of_the_end(module.fetch__all__)


class Distributions(dict[str, list[str]]):
    """`metadata.packages_distributions()`, whose table is made once a package is asked for that needs it.

    A package whose distribution has the same name does not: its version is found under that name.
    """

    def get(self, package: str, default: Any = None) -> Any:
        if not self:
            try:
                metadata.distribution(package)
            except metadata.PackageNotFoundError:
                self.update(metadata.packages_distributions())
            else:
                return [package]
        return super().get(package, default)


def _of_the_end(exported_names: Callable[[str], list[str]]) -> Callable[[str], list[str]]:
    """Return a parser of `__all__` that reads a file from its last line that starts with it."""
    return lambda text: exported_names(text[text.rfind("\n__all__") + 1 :])
