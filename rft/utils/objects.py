"""Identify Python objects by their content, and send them to other processes.

A function is identified by its source (a lambda by its bytecode) and by the values that it uses: its
defaults, its closure, and the functions and values of its module that it names. The same content has the
same hash in every process.
"""

from __future__ import annotations

import builtins
import dis
import functools
import hashlib
import inspect
import io
import sys
import textwrap
import types
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

VALUE_LENGTH = 200  # characters of a value that are recorded
_ATOMS = (str, int, float, complex, bool, bytes, type(None), type(...))


class NotPicklable(ValueError):
    """An object cannot be sent to another process; the message says which part and why."""


@dataclass(frozen=True)
class Identity:
    """The content of an object: a name, its source, and the values that it uses, by name."""

    name: str
    source: str
    values: dict[str, str]
    sha256: str


def identify(target: Any) -> Identity:
    """Return the identity of a function, a method, a class or an instance."""
    parts = dict(_parts(target))
    values = {name: _short(value) for name, value in parts.items()}
    digest = hashlib.sha256()
    for text in _tokens(target, []):
        digest.update(f"{len(text)}:{text}".encode("utf-8", "surrogatepass"))
    return Identity(name_of(target), _source(target), values, digest.hexdigest())


def name_of(target: Any) -> str:
    """Return a short name: that of the function, or of the instance's class."""
    if isinstance(target, functools.partial):
        return name_of(target.func)
    name = getattr(target, "__name__", None) or type(target).__name__
    return "lambda" if name == "<lambda>" else str(name)


def pickled(target: Any) -> bytes:
    """Pickle an object, by value where it was defined in a script or a notebook. Raises NotPicklable."""
    import cloudpickle

    try:
        return bytes(cloudpickle.dumps(target))
    except Exception as error:  # of any type: an object's own `__reduce__` may raise
        inner = [name for name, value in _parts(target) if not _can_be_pickled(value)]
        where = f" (in {', '.join(map(repr, inner))})" if inner else ""
        raise NotPicklable(f"{type(error).__name__}: {error}{where}") from error


def _can_be_pickled(value: Any) -> bool:
    import cloudpickle

    try:
        cloudpickle.dump(value, io.BytesIO())
    except Exception:  # as above
        return False
    return True


# -- values that an object uses----------------------------------------------------------------------------


def _parts(target: Any) -> Iterator[tuple[str, Any]]:
    """Yield the named values that an object uses."""
    if isinstance(target, functools.partial):
        yield from _parts(target.func)
        yield from ((str(i), value) for i, value in enumerate(target.args))
        yield from target.keywords.items()
    elif isinstance(target, types.MethodType):
        yield from _parts(target.__self__)
        yield from _parts(target.__func__)
    elif isinstance(target, types.FunctionType):
        function = inspect.unwrap(target)
        parameters = inspect.signature(function).parameters.values()
        yield from ((p.name, p.default) for p in parameters if p.default is not p.empty)
        yield from _free(function)
    elif not isinstance(target, type) and hasattr(target, "__dict__"):
        yield from vars(target).items()


def _free(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yield the closure's values, and the globals of the function's module that its code names."""
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    for name in sorted(_names(code)):
        value = function.__globals__.get(name, builtins)
        if value is not builtins and not isinstance(value, types.ModuleType):
            yield name, value


def _names(code: types.CodeType) -> set[str]:
    """Return the global names in a function's code, with those of the functions inside it."""
    inner = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    named = {i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME")}
    return named.union(*map(_names, inner))


def _source(target: Any) -> str:
    """Return the source of a function or of an instance's class; of its code where there is none."""
    if isinstance(target, functools.partial):
        return _source(target.func)
    shown = target if isinstance(target, type | types.FunctionType | types.MethodType) else type(target)
    for _ in range(5):
        try:
            return textwrap.dedent(inspect.getsource(shown)).strip()
        except (OSError, TypeError):  # typed into an interpreter, or built in
            break
        except SystemError:  # beside other threads, CPython 3.11 now and then fails to parse a class
            continue
    return f"{_NO_SOURCE} {getattr(shown, '__qualname__', shown)}"


_NO_SOURCE = "# no source:"


def _short(value: Any) -> str:
    shown = value.__name__ if isinstance(value, type | types.FunctionType) else repr(value)
    return shown if len(shown) <= VALUE_LENGTH else f"{shown[:VALUE_LENGTH]}... ({len(shown)} characters)"


# -- the hash ------------------------------------------------------------------------------------------


def _tokens(value: Any, above: list[int]) -> Iterator[str]:
    """Yield texts that determine the content of a value, the same in every process.

    above: ids of the objects that contain it, so that a cycle ends.
    """
    if isinstance(value, _ATOMS):
        yield f"{type(value).__name__} {value!r}"
        return
    if id(value) in above:
        yield f"cycle {len(above) - above.index(id(value))}"
        return
    above = [*above, id(value)]
    if isinstance(value, list | tuple):
        yield f"{type(value).__name__} of {len(value)}"
        for item in value:
            yield from _tokens(item, above)
    elif isinstance(value, set | frozenset):
        yield f"{type(value).__name__} of {len(value)}"
        yield from sorted("".join(_tokens(item, above)) for item in value)
    elif isinstance(value, Mapping):
        yield f"{type(value).__name__} of {len(value)}"
        for key, item in value.items():
            yield from _tokens(key, above)
            yield from _tokens(item, above)
    elif isinstance(value, types.ModuleType):
        yield f"module {value.__name__}"
    elif isinstance(value, type | types.FunctionType | types.MethodType | functools.partial):
        yield from _code_tokens(value, above)
    else:
        yield from _instance_tokens(value, above)


def _code_tokens(value: Any, above: list[int]) -> Iterator[str]:
    """Yield the texts of a class or a callable: its name if it belongs to an installed package."""
    home = getattr(value, "__module__", None)
    if not isinstance(value, functools.partial | types.MethodType) and _is_installed(home):
        yield f"from {home}.{value.__qualname__}"
        return
    source = _source(value)
    nameless = getattr(value, "__name__", "") == "<lambda>"  # its source is that of a whole statement
    if isinstance(value, types.FunctionType) and (nameless or source.startswith(_NO_SOURCE)):
        yield from _bytecode(value.__code__)
    else:
        yield source
    for name, part in _parts(value):
        yield name
        yield from _tokens(part, above)


def _bytecode(code: types.CodeType) -> Iterator[str]:
    """Yield the texts of compiled code: the same for the same version of Python."""
    yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars}"
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _bytecode(constant)
        else:
            yield repr(constant)


def _instance_tokens(value: Any, above: list[int]) -> Iterator[str]:
    """Yield the texts of an instance: its class, and the state that a pickle of it would hold."""
    yield from _tokens(type(value), above)
    if hasattr(value, "tobytes") and hasattr(value, "shape"):  # an array
        yield f"{value.shape} {value.dtype} {hashlib.sha256(value.tobytes()).hexdigest()}"
    elif hasattr(value, "detach") and hasattr(value, "numpy"):  # a tensor
        yield from _tokens(value.detach().cpu().numpy(), above)
    else:
        try:
            reduced = value.__reduce_ex__(2)
        except Exception:  # values that cannot be pickled are refused elsewhere
            return
        if isinstance(reduced, str):
            yield reduced
            return
        for part in reduced[1:3]:  # arguments and state
            yield from _tokens(part, above)
        for items in reduced[3:5]:
            yield from _tokens(list(items or ()), above)


def _is_installed(module: str | None) -> bool:
    """Whether a module belongs to Python or to an installed package: its content changes with a version."""
    if module is None or module == "__main__":
        return False
    if module.partition(".")[0] in (*sys.stdlib_module_names, "builtins", "rft"):
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file
