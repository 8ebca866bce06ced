"""Run unmodified Python tests against the names of a program in another process.

A test is one statement at the top level of a source: an `assert`, a block that contains one, a call of a
function or class that contains one; a function `test...` that nothing calls (with pytest's `parametrize`, or
without parameters); or a method `test...` of a class `Test...` or of a `TestCase`. Each counts once, however
often its asserts run.

Names are looked up in the tests first, then in the builtins, then in the program. `math.isclose` means the
standard library's `math` even if only the program imports it, and `from solution import f` gives the
program's `f`.
"""

from __future__ import annotations
import __future__

import ast
import builtins
import importlib
import inspect
import itertools
import json
import os
import sys
import types
from dataclasses import dataclass, field
from typing import Any

from .wire import BINARY, COMPARISONS, CannotPass, Gone, Link, Proxy, exception_class, to_exception


@dataclass
class Report:
    """Result of the tests.

    problem: why they ended early. invalid: why the tests cannot be run (no score for any program).
    """

    passed: int = 0
    total: int = 0
    failures: list[str] = field(default_factory=list)
    problem: str = ""
    invalid: str = ""


class ProgramObject(Proxy):
    """A function, class or object of the program, as seen by the tests."""

    def _ask(self, operation: str, *args: Any) -> Any:
        link: TestsLink = self.__dict__["_link"]
        answer = link.ask(operation, self._id, *(link.pack(a) for a in args))
        if "error" in answer:
            raise to_exception(answer)
        return link.unpack(answer["ok"])

    def __call__(self, *args: Any, **named: Any) -> Any:
        link: TestsLink = self.__dict__["_link"]
        sent = link.pack(list(args))
        answer = link.ask("call", self._id, sent, link.pack(named))
        if "error" in answer:
            raise to_exception(answer)
        for before, was, now in zip(args, sent, answer["args"], strict=False):
            if was != now:
                _copy_changes(before, link.unpack(now))
        return link.unpack(answer["ok"])

    def __eq__(self, other: object) -> bool:
        """Compare as the program defines it if both are its objects; unequal to any data of the tests."""
        if not isinstance(other, ProgramObject):
            return False
        return self is other or self._id == other._id or self._ask("eq", other) is True

    def __hash__(self) -> int:
        return int(self._ask("hash"))

    def __int__(self) -> int:
        return int(self._ask("int"))

    def __float__(self) -> float:
        return float(self._ask("float"))

    def __neg__(self) -> Any:
        return self._ask("neg")

    def __pos__(self) -> Any:
        return self._ask("pos")

    def __abs__(self) -> Any:
        return self._ask("abs")

    def __next__(self) -> Any:
        link: TestsLink = self.__dict__["_link"]
        answer = link.ask("next", self._id)
        if answer.get("error", [""])[:1] == ["StopIteration"]:
            raise StopIteration  # ends an iterator that the tests advance: not wrapped
        if "error" in answer:
            raise to_exception(answer)
        return link.unpack(answer["ok"])


def _between_objects(name: str) -> Any:
    """Make an operator for two objects of the program.

    It is undefined with data of the tests, because the program would see the data and could fake the answer.
    """

    def operate(self: ProgramObject, other: object) -> Any:
        return self._ask(name, other) if isinstance(other, ProgramObject) else NotImplemented

    return operate


for _name in (*COMPARISONS, *BINARY):
    setattr(ProgramObject, f"__{_name.rstrip('_')}__", _between_objects(_name))


async def _result_of(coroutine: ProgramObject) -> Any:
    return coroutine._ask("await")


async def _items_of(iterator: ProgramObject) -> Any:
    while True:
        answer = iterator.__dict__["_link"].ask("anext", iterator._id)
        if answer.get("error", [""])[:1] == ["StopAsyncIteration"]:
            return
        if "error" in answer:
            raise to_exception(answer)
        yield iterator.__dict__["_link"].unpack(answer["ok"])


def _copy_changes(before: Any, after: Any) -> None:
    """Apply the changes that a call made to the copy of a list, dict or set to the caller's object."""
    if type(before) is type(after):
        if isinstance(before, list | bytearray):
            before[:] = after
        elif type(before).__name__ == "ndarray" and before.shape == after.shape:
            before[...] = after
        elif isinstance(before, dict | set):
            before.clear()
            before.update(after)


class TestsLink(Link):
    """The tests' end of the link: the program may call functions lent to it, and nothing else."""

    def __init__(self, fd: int) -> None:
        super().__init__(fd, ProgramObject)

    def pack(self, value: Any) -> Any:
        name = getattr(value, "__name__", "") if callable(value) else ""
        if name and getattr(builtins, name, None) is value:
            return {"builtin": name}
        return super().pack(value)

    def unpack(self, data: Any) -> Any:
        value = super().unpack(data)
        if isinstance(value, ProgramObject) and isinstance(data, dict):
            if data.get("type") == "coroutine":
                return _result_of(value)
            if data.get("type") == "async":
                return _items_of(value)
        return value

    def perform(self, operation: str, args: list[Any]) -> dict[str, Any]:
        if operation != "call":  # an attribute of a function would give access to the tests' globals
            raise TypeError("a function of the tests can only be called")
        return super().perform(operation, args)

    def lend(self, value: Any) -> Any:
        if not callable(value) or isinstance(value, type):
            raise CannotPass(
                f"the tests pass a {type(value).__name__} to the program: only plain data and functions"
            )
        return super().lend(value)


class Names(dict[str, Any]):
    """Globals of the tests: a name that they do not define is looked up in the program.

    builtin: builtin names that mean the program's function, for example `sum`.
    """

    def __init__(self, link: TestsLink, builtin: set[str], attributes: dict[str, set[str]]) -> None:
        super().__init__(__name__="tests", __builtins__=builtins)
        self._link, self._builtin, self._attributes = link, builtin, attributes

    def __missing__(self, name: str) -> Any:
        if name.startswith("__") or (hasattr(builtins, name) and name not in self._builtin):
            raise KeyError(name)
        value = None if name in self._builtin else _trusted(name, self._attributes)
        self[name] = self.of_program(name) if value is None else value
        return self[name]

    def of_program(self, name: str) -> Any:
        """Return the program's object of that name. Raises KeyError."""
        answer = self._link.ask("name", name)
        if "exception" in answer:
            value: Any = exception_class(tuple(map(str, answer["exception"][:20])))
        elif "error" in answer:
            raise KeyError(name)
        else:
            value = self._link.unpack(answer["ok"])
        return value


def _trusted(name: str, attributes: dict[str, set[str]]) -> Any:
    """Return the trusted object for a name that only the program imports, so that it cannot judge itself.

    Applies to a module if the tests use its attributes, and to comparison functions; None for other names.
    """
    if name in _COMPARING:
        module, used = _COMPARING[name], {name}
    elif attributes.get(name) and (name in sys.stdlib_module_names or name in _MODULES):
        module, used = _MODULES.get(name, name), attributes[name]
    else:
        return None
    try:
        loaded = importlib.import_module(module)
    except ImportError:
        return None
    if not all(hasattr(loaded, attribute) for attribute in used):
        return None  # the program has an object of that name
    return getattr(loaded, name) if name in _COMPARING else loaded


_MODULES = {"np": "numpy", "numpy": "numpy", "pytest": "pytest"}
_COMPARING = {
    "isclose": "math",
    "approx": "pytest",
    "allclose": "numpy",
    "array_equal": "numpy",
    "assert_allclose": "numpy.testing",
}


def _attributes_used(trees: list[ast.Module]) -> dict[str, set[str]]:
    """Return the attributes used of each name that the tests use only for its attributes."""
    used: dict[str, set[str]] = {}
    bare = set()
    for tree in trees:
        bases = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                used.setdefault(node.value.id, set()).add(node.attr)
                bases.add(id(node.value))
            elif isinstance(node, ast.Name) and id(node) not in bases:
                bare.add(node.id)
    return {name: attributes for name, attributes in used.items() if name not in bare}


class Solution(types.ModuleType):
    """The module from which tests import the program's names."""

    def __init__(self, names: Names) -> None:
        super().__init__("solution")
        self.__dict__["_names"] = names

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        try:
            return self.__dict__["_names"].of_program(name)
        except KeyError:
            raise AttributeError(f"the program has no {name!r}") from None


# -- collecting tests --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """A part of a source to execute. test: whether it counts as a test; text: its name in reports.

    call: the function, or the class and its method, to call instead of the code.
    """

    code: Any
    test: bool
    text: str
    call: str = ""


def _checks(node: ast.AST) -> bool:
    """Whether a statement contains an assert or a raise."""
    return any(isinstance(n, ast.Assert | ast.Raise) for n in ast.walk(node))


def plan(source: str) -> list[Step]:
    """Split a source into steps. Raises SyntaxError."""
    tree, lines = ast.parse(source), source.splitlines()
    functions = {n.name: n for n in tree.body if isinstance(n, Definition)}
    checking = {name for name, node in functions.items() if _checks(node)}
    while True:  # a function that calls a checking function checks too
        more = {n for n, node in functions.items() if n not in checking and _mentions(node) & checking}
        if not more:
            break
        checking |= more
    used = _mentions(tree)  # functions with parameters are called by others, in any form
    called = {name for node in tree.body if not isinstance(node, Definition) for name in _calls(node)}
    flags = 0
    steps = []
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module == "__future__":
            for alias in node.names:
                flags |= getattr(__future__, alias.name).compiler_flag
        if _starts_a_runner(node):
            continue
        trivial = isinstance(node, ast.Assert) and isinstance(node.test, ast.Constant)
        test = (
            not isinstance(node, Definition)
            and not trivial
            and (_checks(node) or bool(_calls(node) and _mentions(node) & checking))
        )
        text = " ".join(line.strip() for line in lines[node.lineno - 1 : node.end_lineno])
        steps.append(_step([node], flags, test, text[:200]))
    for name, node in functions.items():
        if isinstance(node, ast.ClassDef):
            if name.startswith("Test") or any(ast.unparse(b).endswith("TestCase") for b in node.bases):
                methods = [n.name for n in node.body if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
                cases = [f"{name}.{method}" for method in methods if method.startswith("test")]
                steps += [Step(None, True, f"{case}()", case) for case in cases]
        elif name.startswith("test") and name not in (used if _parameters(node) else called):
            steps.append(Step(None, True, f"{name}()", name))
    return steps


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _starts_a_runner(node: ast.stmt) -> bool:
    """Whether a statement is `unittest.main()` or `pytest.main(...)`, which `run_tests` replaces."""
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and ast.unparse(call.func) in ("unittest.main", "pytest.main")


def _call(names: Names, path: str) -> None:
    """Run a test function, or a method of a test class with its setup and teardown."""
    owner, _, name = path.rpartition(".")
    if not owner:
        _call_function(names[name])
        return
    kind = names[owner]
    unittest = sys.modules.get("unittest")  # present if the tests have imported it
    if unittest is not None and issubclass(kind, unittest.TestCase):
        kind.setUpClass()
        try:
            kind(name).debug()  # raises the exceptions of the test
        finally:
            kind.tearDownClass()
        return
    instance = kind()
    getattr(instance, "setup_method", lambda: None)()
    try:
        _call_function(getattr(instance, name))
    finally:
        getattr(instance, "teardown_method", lambda: None)()


def _row(row: Any, parameters: int) -> Any:
    """Return the arguments of one case: a `pytest.param`, a tuple, or a single value."""
    if type(row).__name__ == "ParameterSet":
        return row.values
    return row if parameters > 1 else (row,)


def _call_function(function: Any) -> None:
    """Call a test function, once for each case of pytest's `parametrize`."""
    sets = []
    for mark in getattr(function, "pytestmark", []):
        if mark.name == "parametrize":
            given = mark.args[0]
            keys = given.replace(",", " ").split() if isinstance(given, str) else list(given)
            rows = [_row(row, len(keys)) for row in mark.args[1]]
            sets.append([dict(zip(keys, row, strict=True)) for row in rows])
    for chosen in itertools.product(*sets):
        case = {key: value for part in chosen for key, value in part.items()}
        parameters = inspect.signature(function).parameters.values()
        missing = [p.name for p in parameters if p.default is p.empty and p.name not in case]
        if missing:
            raise CannotPass(
                f"the test {function.__name__} takes {missing[0]!r}, but fixtures are not supported"
            )
        result = function(**case)
        if inspect.iscoroutine(result):
            importlib.import_module("asyncio").run(result)


def _step(body: list[ast.stmt], flags: int, test: bool, text: str) -> Step:
    code = compile(ast.Module(body, []), "<tests>", "exec", flags=flags, dont_inherit=True)
    return Step(code, test, text)


def _calls(node: ast.AST) -> set[str]:
    """Return the names that a statement calls; calls of other expressions are ignored."""
    calls = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
    return {f.id if isinstance(f, ast.Name) else "" for f in calls}


def _mentions(node: ast.AST) -> set[str]:
    return {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}


def _parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    args = node.args
    needed = len(args.posonlyargs) + len(args.args) - len(args.defaults)
    return needed > 0 or any(default is None for default in args.kw_defaults)


# -- running tests -----------------------------------------------------------------------------------


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
        attributes = _attributes_used([ast.parse(source) for source in payload["tests"]])
        names = Names(link, set(payload["names"]), attributes)
        sys.modules["tests"] = types.ModuleType("tests")  # where dataclasses look for their names
        sys.modules["solution"] = Solution(names)
        for steps in sources:
            _run_source(steps, names, report)
    except Gone as error:
        report.problem = str(error)[:500]
    except CannotPass as error:
        report.invalid = str(error)[:500]
    return _write(report, report_fd)


def _run_source(steps: list[Step], names: Names, report: Report) -> None:
    """Run one source. If a statement that is not a test fails, the rest of the source counts as failed."""
    for position, step in enumerate(steps):
        try:
            if step.call:
                _call(names, step.call)
            else:
                exec(step.code, names)
        except (Gone, CannotPass):
            raise
        except ModuleNotFoundError as error:
            if error.name:  # raised by an import of the tests: the program's exceptions lose `name`
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
                    report.total += 1  # otherwise nothing would show that the source did not run to its end
                return
        else:
            report.passed += step.test


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:  # the message is an object of the program
        return ""


def _write(report: Report, fd: int) -> int:
    report.failures = report.failures[:5]
    data = memoryview(json.dumps(vars(report)).encode())
    while data:
        data = data[os.write(fd, data) :]
    return 0
