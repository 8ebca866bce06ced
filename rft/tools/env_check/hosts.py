"""Hosts of environment workers that also report the state a session starts from: run inside the workers.

State: the variables of the user's modules, of their classes and of the environment's instance, and
attributes and mutable defaults of functions.
"""

from __future__ import annotations

import hashlib
import pickle
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Any


class _Watched:
    """Two further operations of a host."""

    def ready(self) -> None:
        """Do nothing: the call takes as long as a worker needs to start."""

    def state(self) -> dict[str, str]:
        """Return a hash of each variable that a session could leave to the next one, by name. Values that
        cannot be pickled, such as open files, are left out."""
        hashes = {}
        for name, value in self._variables():
            writer = _Hash()
            try:
                pickle.Pickler(writer, protocol=5).dump(value)
            except Exception:
                continue
            hashes[name] = writer.digest.hexdigest()
        return hashes

    def _variables(self) -> Iterator[tuple[str, Any]]:
        for module in self._modules():
            shown = Path(module.__file__ or module.__name__).stem  # modules of files have made-up names
            for name, value in vars(module).items():
                if name.startswith("__") or isinstance(value, ModuleType):
                    continue
                if isinstance(value, type) and value.__module__ == module.__name__:
                    yield from _of_class(f"{shown}.{name}", value)
                elif isinstance(value, FunctionType):
                    yield from _of_function(f"{shown}.{name}", value)
                else:
                    yield f"{shown}.{name}", value
        instance = getattr(self, "instance", None)
        for name, value in getattr(instance, "__dict__", {}).items():
            yield f"self.{name}", value

    def _modules(self) -> list[ModuleType]:
        """Return the modules of the environment and its tools, without those of rft."""
        toolbox = getattr(self, "toolbox", None)
        made = [
            getattr(self, "factory", None),
            getattr(self, "function", None),
            getattr(self, "instance", None),
        ]
        made += [] if toolbox is None else [*toolbox.functions.values()]
        names = {getattr(getattr(m, "func", m), "__module__", None) or type(m).__module__ for m in made}
        known = (sys.modules.get(name) for name in sorted(names) if not name.startswith(("rft.", "builtins")))
        return [module for module in known if module is not None]


def _of_class(where: str, kind: type) -> Iterator[tuple[str, Any]]:
    for name, value in vars(kind).items():
        if isinstance(value, FunctionType):
            yield from _of_function(f"{where}.{name}", value)
        elif not name.startswith("__") and not hasattr(value, "__get__"):
            yield f"{where}.{name}", value


def _of_function(where: str, function: FunctionType) -> Iterator[tuple[str, Any]]:
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    if any(isinstance(value, list | dict | set) for value in defaults):
        yield f"the default of {where}", defaults
    yield from ((f"{where}.{name}", value) for name, value in function.__dict__.items())


class _Hash:
    """A file that keeps only the hash of its contents."""

    def __init__(self) -> None:
        self.digest = hashlib.blake2b(digest_size=8)

    def write(self, data: Any) -> int:
        self.digest.update(data)
        return len(data)


def __getattr__(name: str) -> Any:
    """Return the watched host of the kind in a module, whose dots are written as `__` in the name."""
    if not name.startswith("rft__"):
        raise AttributeError(name)
    return type("Host", (_Watched, import_module(name.replace("__", ".")).Host), {})
