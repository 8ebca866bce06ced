"""Score programs with unit tests in a sandbox.

The tests run in a process that the program cannot reach (see `rft.sandbox.testing`). The program's output and
exit status affect only its stdin/stdout tests.
"""

from __future__ import annotations

import base64
import json
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

from rft.rewards.types import Outcome, Score
from rft.sandbox import PROTECTIONS, Backend, Limits, Sandbox, SandboxError

Scoring = Literal["all", "fraction"]
_FENCE = re.compile(r"^[ \t]*```[ \t]*([\w+#.-]*)[^\n]*\n(.*?)^[ \t]*```", re.DOTALL | re.MULTILINE)


def extract_code(completion: str) -> str | None:
    """Return the last fenced block of a completion, after any `</think>`; without fences the whole text.

    None if the result is empty, or if a fence is never closed (a cut-off program).
    """
    text = completion.rpartition("</think>")[2] if "</think>" in completion else completion
    blocks = _FENCE.findall(text)
    if blocks:
        return blocks[-1][1]
    if "```" in text:
        return None
    return text if text.strip() else None


def same_output(got: str, want: str, tolerance: float = 0.0) -> bool:
    """Compare outputs up to trailing spaces and blank lines at the end; numbers to a relative tolerance."""
    a, b = (["".join(line.rstrip()) for line in t.rstrip().splitlines()] for t in (got, want))
    if a == b:
        return True
    if not tolerance:
        return False
    x, y = got.split(), want.split()
    return len(x) == len(y) and all(_near(p, q, tolerance) for p, q in zip(x, y, strict=True))


def _near(a: str, b: str, tolerance: float) -> bool:
    try:
        got, want = float(a), float(b)
    except ValueError:
        return a == b
    if not (math.isfinite(got) and math.isfinite(want)):  # a tolerance relative to infinity accepts anything
        return got == want or (math.isnan(got) and math.isnan(want))
    return abs(got - want) <= tolerance * max(1.0, abs(want))


def stdio_cases(tests: Any) -> list[tuple[str, str]] | None:
    """Return (stdin, stdout) pairs from the formats that datasets use; None if `tests` has another format."""
    if isinstance(tests, Mapping) and "inputs" in tests and not tests.get("fn_name"):
        return [(_lines(i), _lines(o)) for i, o in zip(tests["inputs"], tests["outputs"], strict=True)]
    if isinstance(tests, Sequence) and not isinstance(tests, str) and tests:
        if all(isinstance(t, Mapping) for t in tests):
            return [(_lines(t["input"]), _lines(t["output"])) for t in tests]
        if all(not isinstance(t, str) and len(t) == 2 for t in tests):
            return [(_lines(i), _lines(o)) for i, o in tests]
    return None


_CALLS = """
try:
    _function = Solution().{name}
except NameError:
    _function = {name}
def _plain(value):
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
def _same(got, want):
    got, want = _plain(got), _plain(want)
    return got == want or isinstance(want, list) and len(want) == 1 and got == want[0]
"""


def call_asserts(tests: Mapping[str, Any]) -> str:
    """Write asserts for `{fn_name, inputs, outputs}`: argument lists and return values.

    Some datasets wrap each return value in a list. The function may be a method of a class `Solution`; tuples
    are compared as lists.
    """
    name = tests["fn_name"]
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"`fn_name` must be the name of a function, not {name!r}")
    lines = [_CALLS.format(name=name)]
    for given, want in zip(tests["inputs"], tests["outputs"], strict=True):
        if not isinstance(given, list):
            raise ValueError(f"`inputs` of {name} must be lists of arguments, not {given!r}")
        literals = [_literal(value) for value in (given, want)]
        lines.append(f"assert _same(_function(*{literals[0]}), {literals[1]})")
    return "\n".join(lines)


def _literal(value: Any) -> str:
    """Write JSON data, which may contain infinities, as Python source."""
    if isinstance(value, float) and not math.isfinite(value):
        return f"float({str(value)!r})"
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{k!r}: {_literal(v)}' for k, v in value.items())}}}"
    return repr(value)


def _from_json(tests: Any) -> Any:
    """Decode tests that a dataset stores as the text of a JSON object or list."""
    if isinstance(tests, str) and tests.lstrip()[:1] in ("{", "["):
        try:
            return json.loads(tests)
        except ValueError:
            return tests
    return tests


def _lines(value: Any) -> str:
    return "\n".join(map(str, value)) if isinstance(value, list) else str(value)


class _Runner:
    """Run programs in a sandbox with limits, and score the results."""

    def __init__(
        self,
        limits: Limits,
        scoring: Scoring,
        readable: Sequence[str],
        require: Sequence[str],
        backend: Backend,
    ) -> None:
        self.limits, self.scoring = limits, scoring
        self.sandbox = Sandbox(readable, require, backend)

    def scored(self, passed: int, total: int, detail: str, exceeded: str = "") -> Score:
        """Score all or nothing, or the fraction passed; exceeding a time limit is a `timeout` worth 0."""
        if total and passed == total and not exceeded:
            return Score(1.0, Outcome.correct, f"{total} of {total} tests passed")
        value = passed / total if self.scoring == "fraction" and total and not exceeded else 0.0
        outcome = Outcome.timeout if exceeded in ("wall time", "CPU time") else Outcome.wrong
        return Score(value, outcome, f"{passed} of {total} tests passed; {detail}")

    def stdio(
        self,
        cases: Sequence[tuple[str, str]],
        tolerance: float,
        *,
        program: str | None = None,
        argv: Sequence[str] | None = None,
        files: Mapping[str, bytes] | None = None,
    ) -> Score:
        if not cases:
            raise ValueError("the column `tests` has no tests")
        passed, detail, exceeded = 0, "", ""
        for i, (given, want) in enumerate(cases):
            limits = replace(
                self.limits, output=max(self.limits.output, 2 * len(want.encode("utf-8", "replace")) + 4096)
            )
            run = self.sandbox.run(program, argv=argv, files=files, stdin=given, limits=limits)
            if not run.exceeded and run.code == 0 and same_output(run.stdout, want, tolerance):
                passed += 1
                continue
            exceeded = exceeded or run.exceeded
            why = run.exceeded and f"exceeded its limit: {run.exceeded}"
            why = why or (
                f"ended with {run.code or run.signal}: {run.stderr[-300:]}" if run.code != 0 else ""
            )
            why = why or f"expected {want[:100]!r}, got {run.stdout[:100]!r}"
            detail = detail or f"test {i}: {why}"
            if self.scoring == "all":
                break
        value = self.scored(passed, len(cases), detail, exceeded if self.scoring == "all" else "")
        return value


class Code:
    """Score Python programs with asserts, stdin/stdout pairs, or HumanEval's `check`.

    scoring: `all` (1 if every test passes) or `fraction` of the tests passed; a program that crashes
        or exceeds its time limit in assert tests scores 0 in both modes.
    timeout_s: wall time of one program with its asserts, or of one stdin/stdout pair. cpu_s: its CPU time.
        memory_mb, processes: limits for the program and its descendants.
    readable: further folders that it may read. require: protections without which this reward refuses to
        start; all by default. sandbox: `bubblewrap`, `native` (namespaces made by rft), `landlock`, or
        `auto`: the first of them that works here. tolerance: relative, for numbers in stdout.
    Raises SandboxError where this machine lacks a required protection.
    """

    any_of: ClassVar[Sequence[str]] = ("tests", "test")  # columns of which it needs at least one

    def __init__(
        self,
        *,
        scoring: Scoring = "all",
        timeout_s: float = 10.0,
        cpu_s: int = 5,
        memory_mb: int = 512,
        processes: int = 16,
        tolerance: float = 0.0,
        readable: Sequence[str] = (),
        require: Sequence[str] = PROTECTIONS,
        sandbox: Backend = "auto",
        verbose: bool = True,
    ) -> None:
        limits = Limits(wall_s=timeout_s, cpu_s=cpu_s, memory=memory_mb << 20, processes=processes)
        self.runner = _Runner(limits, scoring, readable, require, sandbox)
        self.tolerance = tolerance
        if verbose:
            print(self.runner.sandbox.describe(), file=sys.stderr)

    def judge(
        self,
        prompt: Any,
        completion: str,
        tests: Any = None,
        test: str | None = None,
        entry_point: str | None = None,
    ) -> Score:
        """Score one completion.

        tests: asserts (a source, or a list of them), stdin/stdout pairs ([{input, output}],
            {inputs, outputs}), or calls ({fn_name, inputs, outputs}); the last two also as JSON text.
        test, entry_point: HumanEval's columns; the prompt is then part of the program.
        """
        program = extract_code(completion)
        if program is None:
            return Score(0.0, Outcome.unparseable, "no program found")
        if test is not None and entry_point:
            program = complete(str(prompt), program, entry_point)
            return self._asserts(program, [f"{test}\ncheck({entry_point})\n"], [entry_point])
        if tests is None or len(tests) == 0:
            raise ValueError("the code reward needs a non-empty column `tests`, or `test` and `entry_point`")
        tests = _from_json(tests)
        cases = stdio_cases(tests)
        if cases is not None:
            return self.runner.stdio(cases, self.tolerance, program=program)
        if isinstance(tests, Mapping) and "fn_name" in tests:
            return self._asserts(program, [call_asserts(tests)], [tests["fn_name"]])
        sources = [tests] if isinstance(tests, str) else list(tests)
        return self._asserts(program, sources, [entry_point] if entry_point else [])

    def _asserts(self, program: str, sources: Sequence[str], names: Sequence[str]) -> Score:
        result = self.runner.sandbox.test(program, sources, names=names, limits=self.runner.limits)
        if result.problem:
            total = max(result.total, 1)
            return self.runner.scored(
                0, total, f"{result.problem} {result.stderr[-300:]}".strip(), result.exceeded
            )
        return self.runner.scored(result.passed, result.total, "; ".join(result.failures))


def complete(prompt: str, code: str, entry_point: str) -> str:
    """Join a HumanEval prompt with a completion that is the function's body or the whole function."""
    definition = re.search(rf"^def\s+{re.escape(entry_point)}\b", prompt, re.MULTILINE)
    if re.search(rf"^(?:async\s+)?def\s+{re.escape(entry_point)}\b", code, re.MULTILINE) is None:
        return prompt + code
    return (prompt[: definition.start()] if definition else "") + code


# build command (None: no build), run command, file name
LANGUAGES: dict[str, tuple[list[str] | None, list[str], str]] = {
    "python": (None, ["python3", "main.py"], "main.py"),
    "javascript": (None, ["node", "--max-old-space-size=256", "main.js"], "main.js"),
    "bash": (None, ["bash", "main.sh"], "main.sh"),
    "c": (["gcc", "-O1", "-o", "main", "main.c", "-lm"], ["./main"], "main.c"),
    "cpp": (["g++", "-O1", "-std=c++17", "-o", "main", "main.cpp"], ["./main"], "main.cpp"),
    "java": (["javac", "Main.java"], ["java", "-Xmx256m", "-XX:+UseSerialGC", "Main"], "Main.java"),
}


class TranslatedCode:
    """Score a translated program with the stdin/stdout pairs of the original.

    language: of `LANGUAGES`; its compiler or interpreter must be installed below /usr. The program is
    built once, also in the sandbox, and run on every pair. Other options as in `Code`.
    """

    def __init__(
        self,
        *,
        language: Literal["python", "javascript", "bash", "c", "cpp", "java"],
        scoring: Scoring = "fraction",
        timeout_s: float = 10.0,
        cpu_s: int = 5,
        memory_mb: int = 1024,
        processes: int = 64,
        tolerance: float = 0.0,
        readable: Sequence[str] = (),
        require: Sequence[str] = PROTECTIONS,
        sandbox: Backend = "auto",
    ) -> None:
        self.build, self.command, self.file = LANGUAGES[language]
        limits = Limits(
            wall_s=timeout_s,
            cpu_s=cpu_s,
            memory=memory_mb << 20,
            processes=processes,
            output=1 << 20,
            address_space=language not in ("javascript", "java"),
        )
        self.tolerance = tolerance
        self.runner = _Runner(limits, scoring, readable, require, sandbox)
        tool = (self.build or self.command)[0]
        if self.runner.sandbox.run(argv=["sh", "-c", f"command -v {tool}"], limits=limits).code != 0:
            raise SandboxError(f"{language} needs {tool!r}, which is not installed below /usr")

    def judge(self, completion: str, tests: Any) -> Score:
        """Score one completion. tests: stdin/stdout pairs of the original program."""
        cases = stdio_cases(tests)
        if not cases:
            raise ValueError("translated code needs stdin/stdout pairs in the column `tests`")
        program = extract_code(completion)
        if program is None:
            return Score(0.0, Outcome.unparseable, "no program found")
        files = {self.file: program.encode("utf-8", "replace")}
        if self.build:
            limits = replace(self.runner.limits, wall_s=60.0, cpu_s=30, output=24 << 20)
            script = f"{' '.join(self.build)} >&2 && tar cf - * | base64"
            built = self.runner.sandbox.run(argv=["sh", "-c", script], files=files, limits=limits)
            if built.exceeded or not built.stdout:
                why = built.exceeded or built.stderr[-500:]
                return Score(0.0, Outcome.wrong, f"it does not compile: {why}")
            files = {"build.tar": base64.b64decode(built.stdout)}
            argv = ["sh", "-c", f"tar xf build.tar && exec {' '.join(self.command)}"]
        else:
            argv = self.command
        return self.runner.stdio(cases, self.tolerance, argv=argv, files=files)
