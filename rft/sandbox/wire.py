"""Exchange plain data and calls between a program and its tests, which run in two processes.

Values of exact builtin types are passed by value. Any other object stays with its owner and is passed as a
reference; the other side sees a `Proxy`. Either side may call back while it waits for an answer.
"""

from __future__ import annotations

import base64
import builtins
import collections
import datetime
import functools
import json
import operator
import os
import types
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

LONGEST_LINE = 64 << 20
_CONTAINERS: dict[str, type] = {"tuple": tuple, "set": set, "frozenset": frozenset}
_MAPPINGS: dict[str, type] = {"Counter": collections.Counter, "OrderedDict": collections.OrderedDict}
_FACTORIES: dict[str, Any] = {kind.__name__: kind for kind in (int, float, str, list, dict, set, bool, tuple)}
# Types passed as values, as in `f(3) == int`; only types whose calls do nothing but make a value.
_TYPES = {kind: name for name, kind in {**_FACTORIES, "bytes": bytes, "complex": complex}.items()}
_ARRAYS = "biufcUSMm"  # kinds of numpy arrays that are fully described by their bytes
# IntEnum and other subclasses are passed as values of their base class.
_BASES: tuple[Any, ...] = (bool, int, float, str, tuple, list, dict, set, frozenset)
_TEXTS: dict[str, Callable[[str], Any]] = {
    "Fraction": Fraction,
    "Decimal": Decimal,
    "date": datetime.date.fromisoformat,
    "datetime": datetime.datetime.fromisoformat,
    "time": datetime.time.fromisoformat,
}


class Gone(BaseException):
    """The other side has ended. Not an Exception: a test that expects an exception must not catch it."""


class CannotPass(BaseException):
    """Tests passed the program a value that cannot be transferred: an error in the tests only."""


class Link:
    """Lines of JSON over a socket, and the objects lent to the other side."""

    def __init__(self, fd: int, proxy: type[Proxy]) -> None:
        self._input = os.fdopen(fd, "rb", closefd=False)
        self._output = os.fdopen(fd, "wb", buffering=0, closefd=False)
        self._proxy = proxy
        self.lent: dict[int, Any] = {}

    def write(self, message: Any) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            data = data[self._output.write(data) :]

    def read(self) -> Any:
        """Return the next message. Raises Gone at the end, or if the other side violates the protocol."""
        line = self._input.readline(LONGEST_LINE)
        if not line.endswith(b"\n"):
            raise Gone("the program ended before it answered")
        try:
            return json.loads(line)
        except (ValueError, RecursionError):
            raise Gone("the program answered with something that is not a message") from None

    def pack(self, value: Any) -> Any:
        """Convert a value to JSON data; an object that is not plain data is lent."""
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            return value if abs(value) < 1 << 53 else {"int": hex(value)}
        if kind is float:
            return {"float": value.hex()}
        if kind is list:
            return [self.pack(v) for v in value]
        if kind in (tuple, set, frozenset):
            return {kind.__name__: [self.pack(v) for v in value]}
        if kind is dict:
            return {"dict": [[self.pack(k), self.pack(v)] for k, v in value.items()]}
        if kind in (bytes, bytearray):
            return {kind.__name__: base64.b64encode(value).decode()}
        if kind is complex:
            return {"complex": [value.real.hex(), value.imag.hex()]}
        if kind is range:
            return {"range": [value.start, value.stop, value.step]}
        if kind in (Fraction, Decimal):
            return {kind.__name__: str(value)}
        if kind in (datetime.date, datetime.datetime, datetime.time):
            return {kind.__name__: value.isoformat()}
        if isinstance(value, Proxy):
            return {"yours": value._id}
        return self._pack_other(value, kind)

    def _pack_other(self, value: Any, kind: type) -> Any:
        """Convert types of the standard library and of numpy, and subclasses."""
        if kind is type and value in _TYPES:
            return {"kind": _TYPES[value]}
        if kind is datetime.timedelta:
            return {"timedelta": [value.days, value.seconds, value.microseconds]}
        if kind in (collections.Counter, collections.OrderedDict):
            return {kind.__name__: [[self.pack(k), self.pack(v)] for k, v in value.items()]}
        if kind is collections.defaultdict and value.default_factory in _TYPES:
            pairs = [[self.pack(k), self.pack(v)] for k, v in value.items()]
            return {"defaultdict": [_TYPES[value.default_factory], pairs]}
        if kind is collections.deque:
            return {"deque": [[self.pack(v) for v in value], value.maxlen]}
        if kind in (type({}.keys()), type({}.items())):
            return {"keys" if kind is type({}.keys()) else "items": [self.pack(v) for v in value]}
        if isinstance(value, tuple) and isinstance(getattr(value, "_fields", None), tuple):
            return {
                "named": [
                    kind.__name__,
                    list(map(str, getattr(value, "_fields", ()))),
                    [self.pack(v) for v in value],
                ]
            }
        for base in _BASES:
            if isinstance(value, base):
                return self.pack(base(value))
        if kind.__module__ == "numpy" and hasattr(value, "tobytes") and hasattr(value, "dtype"):
            return self._pack_array(value, kind)
        return self.lend(value)

    def _pack_array(self, value: Any, kind: type) -> Any:
        if kind.__name__ != "ndarray":
            item = value.item() if getattr(value, "ndim", 1) == 0 else value
            return self.lend(value) if item is value or type(item) is kind else self.pack(item)
        if value.dtype.kind in _ARRAYS:
            content: Any = base64.b64encode(value.tobytes()).decode()
        elif value.dtype.kind == "O":
            content = [self.pack(v) for v in value.ravel()]
        else:
            return self.lend(value)
        return {"ndarray": [value.dtype.str, list(value.shape), content]}

    def lend(self, value: Any) -> Any:
        self.lent[id(value)] = value
        kinds: dict[type, str] = {types.CoroutineType: "coroutine", types.AsyncGeneratorType: "async"}
        return {"lent": id(value), "type": kinds.get(type(value), "object")}

    def unpack(self, data: Any) -> Any:
        """Convert data from the other side's `pack` back to a value."""
        if isinstance(data, list):
            return [self.unpack(v) for v in data]
        if not isinstance(data, dict):
            return data
        kind, value = next(iter(data.items()))
        if kind in _CONTAINERS:
            return _CONTAINERS[kind](self.unpack(v) for v in value)
        if kind == "dict":
            return {self.unpack(k): self.unpack(v) for k, v in value}
        if kind == "int":
            return int(value, 16)
        if kind == "float":
            return float.fromhex(value)
        if kind == "complex":
            return complex(float.fromhex(value[0]), float.fromhex(value[1]))
        if kind in ("bytes", "bytearray"):
            return (bytes if kind == "bytes" else bytearray)(base64.b64decode(value))
        if kind == "range":
            return range(*value)
        if kind in _TEXTS:
            return _TEXTS[kind](value)
        if kind in _MAPPINGS:
            return _MAPPINGS[kind]({self.unpack(k): self.unpack(v) for k, v in value})
        if kind in _OTHERS:
            return _OTHERS[kind](self.unpack, value)
        if kind == "yours":
            return self.lent[value]
        if kind == "lent":
            return self._proxy(self, value, str(data.get("type", "object")))
        raise ValueError(f"unknown data {kind!r}")

    def ask(self, operation: str, *args: Any) -> dict[str, Any]:
        """Request an operation from the other side; serve its calls until the answer arrives."""
        self.write({"do": [operation, *args]})
        return self.wait()

    def wait(self) -> dict[str, Any]:
        """Serve the other side until it answers."""
        while True:
            message = self.read()
            if not isinstance(message, dict):
                raise Gone("the program answered with something that is not a message")
            if "do" not in message:
                return message
            self.write(self.answer(message["do"]))

    def answer(self, request: list[Any]) -> dict[str, Any]:
        """Perform a request of the other side; an exception is returned as an answer too."""
        try:
            operation, *args = request
            return self.perform(operation, args)
        except (Gone, CannotPass):
            raise
        except BaseException as error:
            return describe_exception(error)

    def perform(self, operation: str, args: list[Any]) -> dict[str, Any]:
        if operation not in OPERATIONS:
            raise ValueError(f"unknown operation {operation!r}")
        target = self.lent[args[0]]
        given = [self.unpack(v) for v in args[1:]]
        if operation == "call":
            result = target(*given[0], **given[1])
            return {"ok": self.pack(result), "args": self.pack(given[0])}
        return {"ok": self.pack(OPERATIONS[operation](target, *given))}


def _isinstance(target: Any, value: Any) -> bool:
    return isinstance(value, target)


def _iterate(target: Any) -> list[Any] | None:
    """Return all items; None for an iterator, which is advanced item by item because it may be infinite."""
    iterator = iter(target)
    if iterator is target:
        return None
    items = []
    for item in iterator:
        items.append(item)
        if len(items) > 1_000_000:
            raise ValueError("more than a million items")
    return items


def _unpack_named(unpack: Callable[[Any], Any], value: Any) -> Any:
    name, fields, values = value
    items = [unpack(v) for v in values]
    try:
        return _named_tuple(str(name), tuple(map(str, fields)))(*items)
    except (ValueError, TypeError):  # a named tuple with unusual field names
        return tuple(items)


@functools.lru_cache(maxsize=256)
def _named_tuple(name: str, fields: tuple[str, ...]) -> Any:
    return collections.namedtuple(name, fields)


def _unpack_array(unpack: Callable[[Any], Any], value: Any) -> Any:
    import numpy as np

    kind, shape, content = value
    if str(kind) == "|O":
        array = np.empty(len(content), dtype=object)
        for i, item in enumerate(content):
            array[i] = unpack(item)
        return array.reshape(shape)
    dtype = np.dtype(str(kind))
    if dtype.kind not in _ARRAYS:
        raise ValueError(f"no array of {kind!r}")
    return np.frombuffer(base64.b64decode(content), dtype=dtype).reshape(shape).copy()


_OTHERS: dict[str, Callable[[Callable[[Any], Any], Any], Any]] = {
    "timedelta": lambda unpack, value: datetime.timedelta(*value),
    "kind": lambda unpack, value: {**_FACTORIES, "bytes": bytes, "complex": complex}[value],
    "deque": lambda unpack, value: collections.deque([unpack(v) for v in value[0]], value[1]),
    "defaultdict": lambda unpack, value: collections.defaultdict(
        _FACTORIES[value[0]], [(unpack(k), unpack(v)) for k, v in value[1]]
    ),
    "keys": lambda unpack, value: dict.fromkeys(unpack(v) for v in value).keys(),
    "items": lambda unpack, value: dict(unpack(v) for v in value).items(),
    "named": _unpack_named,
    "ndarray": _unpack_array,
}


def _finish(awaitable: Any) -> Any:
    """Run a coroutine, or an asynchronous iterator's next step, in this side's event loop."""
    return _event_loop().run_until_complete(awaitable)


@functools.cache
def _event_loop() -> Any:
    import asyncio

    return asyncio.new_event_loop()


COMPARISONS = ("lt", "le", "gt", "ge")
BINARY = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "and_", "or_", "xor")
OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda: None,  # answered by `perform`, which also reports changes to the arguments
    "get": getattr,
    "set": setattr,
    "item": lambda target, key: target[key],
    "set_item": lambda target, key, value: target.__setitem__(key, value),
    "iterate": _iterate,
    "next": next,
    "len": len,
    "str": str,
    "repr": repr,
    "bool": bool,
    "enter": lambda target: target.__enter__(),
    "exit": lambda target: target.__exit__(None, None, None),
    "isinstance": _isinstance,
    "delete_item": operator.delitem,
    "hash": hash,
    "int": int,
    "float": float,
    "await": _finish,
    "anext": lambda target: _finish(target.__anext__()),
    **{name: getattr(operator, name) for name in ("eq", *COMPARISONS, *BINARY, "neg", "pos", "abs")},
}


class Proxy:
    """An object of the other side, which never learns the data it is compared with."""

    def __init__(self, link: Link, number: int, kind: str) -> None:
        self.__dict__.update(_link=link, _id=number, _kind=kind)

    def _ask(self, operation: str, *args: Any) -> Any:
        raise NotImplementedError

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Proxy) and other._id == self._id

    def __hash__(self) -> int:
        return hash(self._id)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", key)

    def __setitem__(self, key: Any, value: Any) -> None:
        self._ask("set_item", key, value)

    def __delitem__(self, key: Any) -> None:
        self._ask("delete_item", key)

    def __iter__(self) -> Any:
        items = self._ask("iterate")
        return self if items is None else iter(items)

    def __next__(self) -> Any:
        return self._ask("next")

    def __len__(self) -> int:
        return int(self._ask("len"))

    def __bool__(self) -> bool:
        return self._ask("bool") is True

    def __str__(self) -> str:
        return str(self._ask("str"))

    def __repr__(self) -> str:
        return str(self._ask("repr"))

    def __enter__(self) -> Any:
        return self._ask("enter")

    def __exit__(self, *error: object) -> None:
        self._ask("exit")

    def __instancecheck__(self, value: object) -> bool:
        return isinstance(value, Proxy) and self._ask("isinstance", value) is True


# -- exceptions --------------------------------------------------------------------------------------

# Raised through tests, these would silently end a loop, a generator or an event loop.
CONTROL_FLOW = ("StopIteration", "StopAsyncIteration", "GeneratorExit", "CancelledError")


def describe_exception(error: BaseException) -> dict[str, Any]:
    """Describe an exception: the names of its class and bases down to a builtin one, and its text."""
    names = [kind.__name__ for kind in type(error).__mro__ if issubclass(kind, BaseException)]
    try:
        text = str(error)[:500]
    except BaseException:  # an exception whose __str__ raises
        text = ""
    return {"error": names, "text": text}


@functools.lru_cache(maxsize=256)
def exception_class(names: tuple[str, ...]) -> type[BaseException]:
    """Return the class of that name on this side: the builtin one, or one made with the same bases.

    Equal names give the same class, so that `except` matches a class that the program defined.
    """
    name, *bases = names
    known = getattr(builtins, name, None)
    if name in CONTROL_FLOW:
        return type(
            name, (RuntimeError,), {"__doc__": "Raised by the program; wrapped, so that it ends nothing."}
        )
    if isinstance(known, type) and issubclass(known, BaseException):
        return known
    if not bases:
        return type(name, (Exception,), {})
    base = exception_class(tuple(bases))
    return type(name, (base if issubclass(base, Exception) else Exception,), {})


def to_exception(answer: dict[str, Any]) -> BaseException:
    """Rebuild the exception from an answer of `describe_exception`."""
    names = answer["error"] if isinstance(answer["error"], list) else [answer["error"]]
    kind = exception_class(tuple(str(name) for name in names[:20]) or ("Exception",))
    text = str(answer.get("text", ""))
    try:
        return kind(text)
    except TypeError:  # it needs more arguments, such as UnicodeDecodeError
        return type(kind.__name__, (ValueError if issubclass(kind, ValueError) else RuntimeError,), {})(text)
