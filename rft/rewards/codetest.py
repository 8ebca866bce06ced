"""Inside the jail: a program that is called, and the tests that call it, in two processes.

The tests run in a process that the program cannot reach, so it cannot patch `assert`, leave before
they run, or forge their result: all it can do is answer calls. Arguments and results travel as plain
data of exact builtin types; an object of another type stays with the program and is handed around as
a reference, which is equal to nothing but itself. Standard library only.
"""

from __future__ import annotations

import ast
import base64
import builtins
import json
import os
import sys
from decimal import Decimal
from fractions import Fraction
from typing import Any, NoReturn

MAX_ITEMS = 1_000_000


def read_all(fd: int) -> dict[str, Any]:
    """The JSON payload at a file descriptor, which is closed."""
    with open(fd, "rb") as file:
        return json.loads(file.read())


# -- plain data --------------------------------------------------------------------------------------


def pack(value: Any, refs: dict[int, Any] | None) -> Any:
    """A value as JSON. Other objects are kept in `refs` and sent as references."""
    kind = type(value)
    if value is None or kind in (bool, str):
        return value
    if kind is int:
        return value if abs(value) < 1 << 53 else {"int": hex(value)}
    if kind is float:
        return {"float": value.hex()}
    if kind is list:
        return [pack(v, refs) for v in value]
    if kind in (tuple, set, frozenset):
        return {kind.__name__: [pack(v, refs) for v in value]}
    if kind is dict:
        return {"dict": [[pack(k, refs), pack(v, refs)] for k, v in value.items()]}
    if kind in (bytes, bytearray):
        return {kind.__name__: base64.b64encode(value).decode()}
    if kind is complex:
        return {"complex": [value.real.hex(), value.imag.hex()]}
    if kind is range:
        return {"range": [value.start, value.stop, value.step]}
    if kind in (Fraction, Decimal):
        return {kind.__name__: str(value)}
    if isinstance(value, Ref):
        return {"mine": value._id}
    bases: tuple[Any, ...] = (int, float, str, tuple, list, dict, set)
    for base in bases:  # named tuples, Counter, IntEnum
        if isinstance(value, base):
            return pack(base(value), refs)
    if refs is None:
        raise TypeError(f"tests may only pass plain data, not {kind.__name__}")
    refs[id(value)] = value
    return {"ref": id(value), "type": kind.__name__}


_SIMPLE = {"tuple": tuple, "set": set, "frozenset": frozenset}


def unpack(data: Any, refs: dict[int, Any] | None, link: Link | None = None) -> Any:
    """Back from `pack`."""
    if isinstance(data, list):
        return [unpack(v, refs, link) for v in data]
    if not isinstance(data, dict):
        return data
    ((kind, value), *_) = data.items()
    if kind in _SIMPLE:
        return _SIMPLE[kind](unpack(v, refs, link) for v in value)
    if kind == "dict":
        return {unpack(k, refs, link): unpack(v, refs, link) for k, v in value}
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
    if kind in ("Fraction", "Decimal"):
        return (Fraction if kind == "Fraction" else Decimal)(value)
    if kind == "mine" and refs is not None:
        return refs[value]
    if kind == "ref" and link is not None:
        return Ref(link, value, data.get("type", "object"))
    raise ValueError(f"unknown data {kind!r}")


class Link:
    """Lines of JSON over a socket."""

    def __init__(self, fd: int) -> None:
        self.input = os.fdopen(fd, "rb", closefd=False)
        self.output = os.fdopen(fd, "wb", buffering=0, closefd=False)

    def write(self, message: Any) -> None:
        data = json.dumps(message).encode() + b"\n"
        while data:
            data = data[self.output.write(data) :]

    def read(self) -> Any:
        line = self.input.readline(64 << 20)
        if not line.endswith(b"\n"):
            raise Gone("the program ended before it answered")
        return json.loads(line)

    def ask(self, op: str, *args: Any) -> Any:
        """A question of the tests to the program; what it raised is raised here."""
        self.write([op, *args])
        reply = self.read()
        if "error" in reply:
            raise _exception(str(reply["error"]), str(reply.get("text", "")))
        return reply


class Gone(BaseException):
    """The program is gone. Not an Exception: tests that expect one must not take this for it."""


def _exception(name: str, text: str) -> Exception:
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
        try:
            return kind(text)
        except TypeError:
            pass  # one that needs more arguments, such as UnicodeDecodeError
    return RuntimeError(f"{name}: {text}")


# -- the program's side ------------------------------------------------------------------------------


def serve(job: dict[str, Any], fd: int) -> int:
    """Run the program as a module, then answer calls."""
    if hasattr(sys, "set_int_max_str_digits"):
        sys.set_int_max_str_digits(0)
    link = Link(fd)
    names: dict[str, Any] = {"__name__": "program", "__builtins__": builtins}
    try:
        exec(compile(job["program"], "<program>", "exec"), names)
    except BaseException as error:
        link.write({"error": type(error).__name__, "text": str(error)[:500]})
        return 1
    link.write({"ok": None})
    refs: dict[int, Any] = {}
    while True:
        try:
            op, *args = link.read()
        except Gone:  # the tests are through
            return 0
        try:
            reply = _answer(op, args, names, refs)
        except BaseException as error:
            reply = {"error": type(error).__name__, "text": str(error)[:500]}
        link.write(reply)


def _answer(op: str, args: list[Any], names: dict[str, Any], refs: dict[int, Any]) -> dict[str, Any]:
    if op == "name":
        if args[0] not in names:
            raise NameError(f"name {args[0]!r} is not defined")
        value = names[args[0]]
        if callable(value):
            refs[id(value)] = value
            return {"ok": {"ref": id(value), "type": type(value).__name__}}
        return {"ok": pack(value, refs)}
    target = refs[args[0]]
    rest = [unpack(v, refs) for v in args[1:]]
    if op == "call":
        given, named = rest
        result = target(*given, **named)
        return {"ok": pack(result, refs), "args": pack(given, refs)}
    if op == "get":
        return {"ok": pack(getattr(target, rest[0]), refs)}
    if op == "item":
        return {"ok": pack(target[rest[0]], refs)}
    if op == "list":
        items = []
        for item in target:
            items.append(pack(item, refs))
            if len(items) > MAX_ITEMS:
                raise ValueError("more items than tests can take")
        return {"ok": items}
    plain: dict[str, Any] = {"len": len, "str": str, "repr": repr, "bool": bool}
    return {"ok": plain[op](target)}


# -- the tests' side ---------------------------------------------------------------------------------


class Ref:
    """An object of the program, as the tests see it."""

    def __init__(self, link: Link, number: int, kind: str) -> None:
        self._link, self._id, self._kind = link, number, kind

    def _ask(self, op: str, *args: Any) -> Any:
        return unpack(self._link.ask(op, self._id, *(pack(a, None) for a in args))["ok"], None, self._link)

    def __call__(self, *args: Any, **named: Any) -> Any:
        reply = self._link.ask("call", self._id, pack(list(args), None), pack(named, None))
        for before, after in zip(args, unpack(reply["args"], None, self._link), strict=False):
            _mutate(before, after)
        return unpack(reply["ok"], None, self._link)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", name)

    def __getitem__(self, key: Any) -> Any:
        return self._ask("item", key)

    def __iter__(self) -> Any:
        return iter(self._ask("list"))

    def __len__(self) -> int:
        return int(self._ask("len"))

    def __bool__(self) -> bool:
        return self._ask("bool") is True

    def __str__(self) -> str:
        return str(self._ask("str"))

    def __repr__(self) -> str:
        return str(self._ask("repr"))


def _mutate(before: Any, after: Any) -> None:
    """What a call did to a list, dict or set that it was given."""
    if type(before) is type(after) and before != after:
        if isinstance(before, list | bytearray):
            before[:] = after
        elif isinstance(before, dict | set):
            before.clear()
            before.update(after)


class Names(dict[str, Any]):
    """Globals of the tests: what they do not define is the program's."""

    def __init__(self, link: Link, own: set[str]) -> None:
        super().__init__(__name__="tests", __builtins__=builtins)
        self.link, self.own = link, own

    def __missing__(self, name: str) -> Any:
        if hasattr(builtins, name) and name not in self.own:
            raise KeyError(name)
        try:
            value = unpack(self.link.ask("name", name)["ok"], None, self.link)
        except NameError:
            raise KeyError(name) from None
        self[name] = value
        return value


class Asserts(ast.NodeTransformer):
    """Turns `assert x` into a record of whether x held; asserts of constants do not count."""

    def visit_Assert(self, node: ast.Assert) -> Any:
        if isinstance(node.test, ast.Constant):
            return ast.Pass()
        text = ast.Constant(ast.unparse(node)[:200])
        thunk = ast.Lambda(
            args=ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[]),
            body=node.test,
        )
        call = ast.Call(func=ast.Name("__record__", ast.Load()), args=[thunk, text], keywords=[])
        return ast.Expr(call)


def test(job: dict[str, Any], fd: int, report: int) -> int:
    """Run the tests against the program at `fd`; write the result as JSON to `report`."""
    link = Link(fd)
    passed, failures, total = 0, list[str](), 0

    def record(check: Any, text: str) -> None:
        nonlocal passed, total
        total += 1
        try:
            if check():
                passed += 1
                return
            failures.append(text)
        except Exception as error:
            failures.append(f"{text}: {type(error).__name__}: {error}"[:300])

    problem = ""
    try:
        loaded = link.read()
        if "error" in loaded:
            raise Gone(f"the program does not load: {loaded['error']}: {loaded.get('text', '')}")
        names = Names(link, set(job.get("names", ())))
        names["__record__"] = record
        for source in job["tests"]:
            try:
                tree = ast.fix_missing_locations(Asserts().visit(ast.parse(source)))
                exec(compile(tree, "<tests>", "exec"), names)
            except Exception as error:
                total += 1
                failures.append(f"{type(error).__name__}: {error}"[:300])
    except (Gone, SystemExit, json.JSONDecodeError, OSError) as error:
        problem = str(error)[:500] or type(error).__name__
    except BaseException as error:
        problem = f"{type(error).__name__}: {error}"[:500]
    answer = {"passed": passed, "total": total, "failures": failures[:5], "problem": problem}
    os.write(report, json.dumps(answer).encode())
    return 0


# -- whole programs ----------------------------------------------------------------------------------


def run_program(job: dict[str, Any]) -> int:
    """Files into the scratch folder, stdin from the job, then the command or the Python program."""
    for name, content in job.get("files", {}).items():
        path = os.path.join(os.getcwd(), os.path.basename(name))
        with open(path, "wb") as file:
            file.write(base64.b64decode(content))
        os.chmod(path, 0o755)
    with open(".stdin", "w+", encoding="utf-8", errors="surrogateescape") as given:
        given.write(job.get("stdin", ""))
        given.flush()
        os.lseek(given.fileno(), 0, os.SEEK_SET)
        os.dup2(given.fileno(), 0)
    if "argv" in job:
        _execute(job["argv"])
    sys.stdin = os.fdopen(0, "r", encoding="utf-8", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", closefd=False)
    names: dict[str, Any] = {"__name__": "__main__", "__builtins__": builtins}
    exec(compile(job["program"], "<program>", "exec"), names)
    return 0


def _execute(argv: list[str]) -> NoReturn:
    os.execvpe(argv[0], argv, dict(os.environ))
