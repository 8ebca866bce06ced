"""The tests' side: tests as unmodified Python, against names of a program in another process.

A test is one statement at the top level of a source: an `assert`, a block that contains one, a call of a
function that contains one; or a function `test...` without parameters that nothing calls. Each counts once,
however often its asserts run.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import json
import os
from dataclasses import dataclass, field
from typing import Any

from .wire import CannotPass, Gone, Link, Proxy, exception_class, to_exception


@dataclass
class Report:
    """How the tests went.

    problem: what ended them early. invalid: why the tests themselves cannot be run (nobody's score).
    """

    passed: int = 0
    total: int = 0
    failures: list[str] = field(default_factory=list)
    problem: str = ""
    invalid: str = ""


class ProgramObject(Proxy):
    """A function, class or object of the program, as the tests see it."""

    def _ask(self, operation: str, *args: Any) -> Any:
        link: TestsLink = self.__dict__["_link"]
        answer = link.ask(operation, self._id, *(link.pack(a) for a in args))
        if "error" in answer:
            raise to_exception(answer)
        return link.unpack(answer["ok"])

    def __call__(self, *args: Any, **named: Any) -> Any:
        link: TestsLink = self.__dict__["_link"]
        answer = link.ask("call", self._id, link.pack(list(args)), link.pack(named))
        if "error" in answer:
            raise to_exception(answer)
        for before, after in zip(args, link.unpack(answer["args"]), strict=False):
            _copy_changes(before, after)
        return link.unpack(answer["ok"])

    def __next__(self) -> Any:
        link: TestsLink = self.__dict__["_link"]
        answer = link.ask("next", self._id)
        if answer.get("error", [""])[:1] == ["StopIteration"]:
            raise StopIteration  # the end of an iterator that the tests advance: not wrapped
        if "error" in answer:
            raise to_exception(answer)
        return link.unpack(answer["ok"])


def _copy_changes(before: Any, after: Any) -> None:
    """Change a list, dict or set that was passed to a call as the call has changed its copy."""
    if type(before) is type(after) and before != after:
        if isinstance(before, list | bytearray):
            before[:] = after
        elif isinstance(before, dict | set):
            before.clear()
            before.update(after)


class TestsLink(Link):
    """The tests' end: functions may be lent to the program, and it may do nothing with them but call them."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, ProgramObject)

    def pack(self, value: Any) -> Any:
        name = getattr(value, "__name__", "") if callable(value) else ""
        if name and getattr(builtins, name, None) is value:
            return {"builtin": name}
        return super().pack(value)

    def perform(self, operation: str, args: list[Any]) -> dict[str, Any]:
        if operation != "call":  # an attribute of a function leads to the tests' globals
            raise TypeError("a function of the tests can only be called")
        return super().perform(operation, args)

    def lend(self, value: Any) -> Any:
        if not callable(value) or isinstance(value, type):
            raise CannotPass(
                f"the tests pass a {type(value).__name__} to the program: only plain data and functions"
            )
        return super().lend(value)


class Names(dict[str, Any]):
    """Globals of the tests: a name that they do not define is the program's.

    builtin: builtin names that mean the program's function, for example `sum`.
    """

    def __init__(self, link: TestsLink, builtin: set[str]) -> None:
        super().__init__(__name__="tests", __builtins__=builtins)
        self._link, self._builtin = link, builtin

    def __missing__(self, name: str) -> Any:
        if name.startswith("__") or (hasattr(builtins, name) and name not in self._builtin):
            raise KeyError(name)
        answer = self._link.ask("name", name)
        if "exception" in answer:
            value: Any = exception_class(tuple(map(str, answer["exception"][:20])))
        elif "error" in answer:
            raise KeyError(name)
        else:
            value = self._link.unpack(answer["ok"])
        self[name] = value
        return value


# -- what is a test ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A piece of a source to execute, and whether it counts as a test. `text`: how reports call it."""

    code: Any
    test: bool
    text: str


def _checks(node: ast.AST) -> bool:
    """Whether a statement can fail by itself: it holds an assert of something, or raises."""
    return any(isinstance(n, ast.Assert | ast.Raise) for n in ast.walk(node))


def plan(source: str) -> list[Step]:
    """Cut a source into steps. Raises SyntaxError."""
    tree, lines = ast.parse(source), source.splitlines()
    functions = {n.name: n for n in tree.body if isinstance(n, ast.FunctionDef)}
    checking = {name for name, node in functions.items() if _checks(node)}
    while True:  # a function that calls a checking function checks too
        more = {n for n, node in functions.items() if n not in checking and _calls(node) & checking}
        if not more:
            break
        checking |= more
    called = {name for node in tree.body if not isinstance(node, ast.FunctionDef) for name in _calls(node)}
    flags = 0
    steps = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            for alias in node.names:
                flags |= getattr(__future__, alias.name).compiler_flag
        trivial = isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant)
        definition = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        test = not definition and not trivial and (_checks(node) or bool(_calls(node) & checking))
        text = " ".join(line.strip() for line in lines[node.lineno - 1 : node.end_lineno])
        steps.append(_step([node], flags, test, text[:200]))
    for name, node in functions.items():
        if name.startswith("test") and name not in called and not _parameters(node):
            steps.append(_step(ast.parse(f"{name}()").body, flags, True, f"{name}()"))
    return steps


def _step(body: list[ast.stmt], flags: int, test: bool, text: str) -> Step:
    code = compile(ast.Module(body, []), "<tests>", "exec", flags=flags, dont_inherit=True)
    return Step(code, test, text)


def _calls(node: ast.AST) -> set[str]:
    return {n.func.id for n in ast.walk(node) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}


def _parameters(node: ast.FunctionDef) -> bool:
    args = node.args
    needed = len(args.posonlyargs) + len(args.args) - len(args.defaults)
    return needed > 0 or any(default is None for default in args.kw_defaults)


# -- running them ------------------------------------------------------------------------------------


def run_tests(payload: dict[str, Any], fd: int, report_fd: int) -> int:
    """Run the tests against the program at `fd`; write a `Report` as JSON to `report_fd`."""
    report = Report()
    try:
        sources = [plan(source) for source in payload["tests"]]
    except (SyntaxError, ValueError, RecursionError) as error:
        report.invalid = f"the tests are not valid Python: {error}"
        return _write(report, report_fd)
    report.total = sum(1 for steps in sources for step in steps if step.test)
    if report.total == 0:
        report.invalid = "the tests check nothing: there is no assert, and no function test..."
        return _write(report, report_fd)
    link = TestsLink(fd)
    try:
        loaded = link.read()
        if "error" in loaded:
            cause = to_exception(loaded)
            raise Gone(f"the program does not load: {type(cause).__name__}: {cause}")
        names = Names(link, set(payload["names"]))
        for steps in sources:
            _run_source(steps, names, report)
    except Gone as error:
        report.problem = str(error)[:500]
    except CannotPass as error:
        report.invalid = str(error)[:500]
    return _write(report, report_fd)


def _run_source(steps: list[Step], names: Names, report: Report) -> None:
    """Run one source. After a statement that is no test and fails, the rest of the source has failed too."""
    for position, step in enumerate(steps):
        try:
            exec(step.code, names)
        except (Gone, CannotPass):
            raise
        except ModuleNotFoundError as error:
            if error.name:  # raised by an import of the tests: the program's arrive without a name
                raise CannotPass(
                    f"the tests import {error.name!r}, which the sandbox's Python does not have"
                ) from None
            report.failures.append(f"{step.text}: {error}"[:300])
        except BaseException as error:
            text = _text(error)
            why = "" if type(error) is AssertionError and not text else f": {type(error).__name__}: {text}"
            report.failures.append(f"{step.text}{why}"[:300])
            if not step.test:
                if not any(later.test for later in steps[position:]):
                    report.total += 1  # nothing else would show that the source did not run to its end
                return
        else:
            report.passed += step.test


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # a message that is an object of the program
        return ""


def _write(report: Report, fd: int) -> int:
    report.failures = report.failures[:5]
    data = memoryview(json.dumps(vars(report)).encode())
    while data:
        data = data[os.write(fd, data) :]
    return 0
