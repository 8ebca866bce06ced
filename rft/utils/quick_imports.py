"""Make commands, learners and engines start quickly.

torch is loaded when it is used, less of transformers is imported, and garbage is collected rarely during
imports.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module, metadata, util
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

USUAL = gc.get_threshold()
SCANS = "transformers.utils.import_utils"  # it lists installed distributions, and reads every file of models


def load_torch_late() -> None:
    """Make `import torch` find the package only; it is loaded, for 2 seconds, once a part of it is used.

    Modules that a command imports without running a model take nothing from torch while they are imported:
    they write `torch.Tensor` instead of `from torch import Tensor`. Call `load_torch` before threads start:
    one that imports a part of torch and one that uses another would wait for each other.
    """
    spec = None if "torch" in sys.modules else util.find_spec("torch")
    if spec is not None:
        sys.modules["torch"] = module = util.module_from_spec(spec)
        module.__class__ = _UnloadedTorch
        sys.meta_path.insert(0, _TorchFirst())


def load_torch() -> None:
    """Load torch if `load_torch_late` has put it off. Raises what its import raises, each time."""
    global _loading
    with _LOCK:  # other threads wait for the one that loads; its own uses of torch do not
        module = sys.modules.get("torch")
        if not isinstance(module, _UnloadedTorch) or _loading:
            return
        _loading = True
        try:
            assert module.__spec__ is not None and module.__spec__.loader is not None
            module.__spec__.loader.exec_module(module)
            module.__class__ = ModuleType  # type: ignore[assignment] # now it is an ordinary module
            sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _TorchFirst)]
        finally:
            _loading = False


_LOCK = threading.RLock()
_loading = False


class _UnloadedTorch(ModuleType):
    """The module torch before it is loaded, in place: modules that have imported it hold this object."""

    def __getattr__(self, name: str) -> Any:
        load_torch()
        return ModuleType.__getattribute__(self, name)

    def __reduce__(self) -> tuple[Callable[[str], ModuleType], tuple[str]]:
        return import_module, (self.__name__,)  # as modules are pickled, with a reward that imports torch


class _TorchFirst(MetaPathFinder):
    """Loads torch before the import of a part of it. If torch imports the part itself, that one is taken."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith("torch.") or _loading:
            return None
        load_torch()
        part = sys.modules.get(fullname)
        if part is None:
            return None
        taken = _Taken(part)
        part.__spec__ = None  # with a spec, the import system would use that one, and run the part again
        return util.spec_from_loader(fullname, taken)


class _Taken(Loader):
    """The loader of a module that is there already, and keeps its own spec."""

    def __init__(self, module: ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self.module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec


@contextmanager
def quick_imports() -> Iterator[None]:
    """Make the imports of transformers and vLLM in the block quick, in a process that goes on to run a model:
    after the block, garbage is collected as before, since it may hold tensors."""
    thresholds = gc.get_threshold()
    start_quickly()
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def collect_rarely() -> None:
    """Collect garbage after 100,000 new objects instead of 700: imports make over a million, and free few."""
    gc.set_threshold(100_000, 50, 50)


def collect_as_usual() -> None:
    """Collect garbage as often as Python does by default, once a process has imported its libraries."""
    gc.set_threshold(*USUAL)


def start_quickly() -> None:
    """Import transformers without the parts that only its documentation needs; call it before other imports.

    In this process transformers generates no docstrings of its classes: the generator imports the modules of
    all model classes, and torch's compiler with them, which takes over a second. It looks for a package's
    distribution only when it asks for one, and splits only the end of a file to find its exported names.
    """
    collect_rarely()
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
