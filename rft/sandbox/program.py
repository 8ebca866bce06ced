"""Run untrusted code: a program as `__main__`, as a module for tests, or as a session."""

from __future__ import annotations

import ast
import base64
import builtins
import json
import os
import signal
import sys
import traceback
import types
from typing import Any, NoReturn

from .wire import Gone, Link, Proxy, describe_exception, to_exception


def read_payload(fd: int) -> dict[str, Any]:
    """Read JSON from a file descriptor, and close it."""
    with open(fd, "rb") as file:
        return json.loads(file.read())


def write_files(files: dict[str, str]) -> None:
    """Write base64 contents into the working folder as executable files; folders in names are dropped."""
    for name, content in files.items():
        path = os.path.join(os.getcwd(), os.path.basename(name))
        with open(path, "wb") as file:
            file.write(base64.b64decode(content))
        os.chmod(path, 0o755)


def run_main(payload: dict[str, Any]) -> int:
    """Run a command, or a Python source as `__main__`, on the standard streams."""
    write_files(payload["files"])
    if "argv" in payload:
        _execute(payload["argv"])
    _text_streams()
    names = _new_module("__main__")
    exec(compile(payload["program"], "<program>", "exec"), names)
    return 0


def _new_module(name: str) -> dict[str, Any]:
    """Add an empty module to `sys.modules`, where dataclasses and pickle look; return its namespace."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    vars(module)["__builtins__"] = builtins
    return vars(module)


def _execute(argv: list[str]) -> NoReturn:
    for number in (signal.SIGPIPE, signal.SIGXFSZ):  # Python ignores them, and a command would inherit that
        signal.signal(number, signal.SIG_DFL)
    os.execvpe(argv[0], argv, dict(os.environ))


def _text_streams() -> None:
    sys.stdin = os.fdopen(0, "r", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stdout = os.fdopen(1, "w", encoding="utf-8", errors="surrogateescape", closefd=False)
    sys.stderr = os.fdopen(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)


class TestsObject(Proxy):
    """A function of the tests, as seen by the program."""

    def _ask(self, operation: str, *args: Any) -> Any:
        link: Link = self.__dict__["_link"]
        answer = link.ask(operation, self._id, *(link.pack(a) for a in args))
        if "error" in answer:
            raise to_exception(answer)
        return link.unpack(answer["ok"])

    def __call__(self, *args: Any, **named: Any) -> Any:
        return self._ask("call", list(args), named)


class ProgramLink(Link):
    """The program's end of the link: tests may request its names and operate on its objects."""

    def __init__(self, fd: int, names: dict[str, Any]) -> None:
        super().__init__(fd, TestsObject)
        self.names = names

    def unpack(self, data: Any) -> Any:
        if isinstance(data, dict) and "builtin" in data:
            return getattr(builtins, data["builtin"])
        return super().unpack(data)

    def perform(self, operation: str, args: list[Any]) -> dict[str, Any]:
        if operation != "name":
            return super().perform(operation, args)
        name = args[0]
        if name not in self.names:
            raise NameError(f"name {name!r} is not defined")
        value = self.names[name]
        if isinstance(value, type) and issubclass(value, BaseException):
            return {"exception": [k.__name__ for k in value.__mro__ if issubclass(k, BaseException)]}
        if callable(value):
            return {"ok": self.lend(value)}
        return {"ok": self.pack(value)}


def serve(payload: dict[str, Any], fd: int) -> int:
    """Run the program as a module, then serve the requests of its tests until they end."""
    sys.set_int_max_str_digits(0)
    names = _new_module("program")
    link = ProgramLink(fd, names)
    try:
        exec(compile(payload["program"], "<program>", "exec"), names)
    except BaseException as error:
        link.write(describe_exception(error))
        return 1
    link.write({"ok": None})
    try:
        link.wait()
    except Gone:
        return 0
    return 1


def interact(payload: dict[str, Any], fd: int) -> int:
    """Execute incoming sources one by one in one namespace.

    As in an interactive interpreter, the value of a last expression is printed. An answer is
    `{"error": traceback or ""}`.
    """
    write_files(payload["files"])
    _text_streams()
    link = Link(fd, Proxy)
    names = _new_module("__main__")
    while True:
        try:
            source = link.read()["code"]
        except Gone:
            return 0
        error = ""
        try:
            tree = ast.parse(source, "<session>")
            last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
            exec(compile(tree, "<session>", "exec"), names)
            if last is not None:
                value = eval(compile(ast.Expression(last.value), "<session>", "eval"), names)
                if value is not None:
                    print(repr(value))
        except BaseException as raised:  # SystemExit too: only the owner closes a session
            error = _traceback(raised)
        sys.stdout.flush()
        sys.stderr.flush()
        link.write({"error": error})


def _traceback(error: BaseException) -> str:
    """Format the traceback without the frames of this file."""
    frames = error.__traceback__
    while frames is not None and frames.tb_frame.f_code.co_filename == __file__:
        frames = frames.tb_next
    return "".join(traceback.format_exception(type(error), error, frames))[-4000:]
