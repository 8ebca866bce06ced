"""From a spec (`math`, `file.py:function`, `package.module:function`) to a reward function.

A built-in is a plain function of one sample,

    def math(completion, answer, *, extraction=..., tolerance=...) -> Score

whose positional parameters are `prompt`, `completion` and dataset columns, and whose keyword-only
parameters are its options; or, where it keeps state (a sandbox, a model, a connection), a class whose
constructor takes the options: its `judge` is such a function, or its `score` takes whole lists.
"""

from __future__ import annotations

import asyncio
import functools
import importlib
import importlib.util
import inspect
import math
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any, get_type_hints

from rft.rewards.types import Outcome, RewardFunction, Score, Text, text_of
from rft.spelling import nearest

BUILTINS: dict[str, str] = {
    "math": "rft.rewards.math:math",
    "code": "rft.rewards.code:Code",
    "translated_code": "rft.rewards.code:TranslatedCode",
    **{
        name: f"rft.rewards.text:{name}"
        for name in (
            "choice",
            "class_label",
            "exact_match",
            "f1",
            "format",
            "iou",
            "json_schema",
            "length",
            "not_truncated",
            "overlong",
            "regex",
            "repetition",
            "rouge_l",
        )
    },
    "instructions": "rft.rewards.instructions:instructions",
    "judge": "rft.rewards.judge:Judge",
    "local_judge": "rft.rewards.local_judge:LocalJudge",
    "reward_model": "rft.rewards.models:RewardModel",
    "pairwise_model": "rft.rewards.models:PairwiseModel",
    "process_reward_model": "rft.rewards.models:ProcessRewardModel",
    "process": "rft.rewards.steps:Process",
}

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class SpecError(ValueError):
    """A reward cannot be loaded as written; the message says what to write instead."""


class CallError(ValueError):
    """A call that concerns all of its samples failed: wrong length, no list, a missing column."""


def load_reward(spec: str, /, *, base_dir: Path | str = ".", **options: Any) -> RewardFunction:
    """The reward function that `spec` names, with its options bound.

    The result is called as `(prompts, completions, **columns) -> list[float | None]` (a coroutine for
    an async custom function), and has `.score(prompts, completions, **columns) -> list[Score]`.
    Paths are relative to `base_dir`. Raises SpecError for anything that does not exist.
    """
    if spec.startswith("verl:"):
        from rft.rewards.verl import from_verl

        return Custom(spec, from_verl(resolve(spec.removeprefix("verl:"), base_dir)), options)
    if ":" not in spec:
        target = builtin(spec)
        if inspect.isclass(target) and not hasattr(target, "judge"):
            return Stateful(spec, target, options)
        return PerSample(spec, target, options)
    return Custom(spec, resolve(spec, base_dir), options)


def builtin(name: str) -> Any:
    """The function or class of a built-in; SpecError with the nearest name where there is none."""
    if name not in BUILTINS:
        hint = nearest(name, BUILTINS)
        if name.endswith(".py"):
            hint = f"; a file needs the function's name: {name}:reward"
        raise SpecError(f"no built-in reward {name!r}{hint}. Built-ins: {', '.join(sorted(BUILTINS))}")
    module, _, attribute = BUILTINS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def resolve(spec: str, base_dir: Path | str = ".") -> Any:
    """The object that `file.py:name` or `package.module:name` names; SpecError where it does not exist."""
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise SpecError(f"{spec!r} is not `file.py:function` or `package.module:function`")
    module = _import_file(where, base_dir) if where.endswith(".py") else _import_module(where, base_dir)
    target: Any = module
    for part in name.split("."):
        if not hasattr(target, part):
            names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise SpecError(f"{where} has no function {name!r}{nearest(name, names)}")
        target = getattr(target, part)
    if not callable(target):
        raise SpecError(f"{spec} is a {type(target).__name__}, not a function")
    return target


def _import_file(where: str, base_dir: Path | str) -> Any:
    path = (Path(base_dir) / where).expanduser().resolve()
    if not path.is_file():
        raise SpecError(f"no file {path} (paths are relative to {Path(base_dir).resolve()})")
    name = f"rft_reward_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SpecError(f"{path} cannot be imported as Python")
    if str(path.parent) not in sys.path:  # so that the file can import its neighbours
        sys.path.insert(0, str(path.parent))
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise SpecError(f"{path} does not import:\n{_traceback(error)}") from error
    return module


def _import_module(where: str, base_dir: Path | str) -> Any:
    base = str(Path(base_dir).resolve())
    if base not in sys.path:
        sys.path.append(base)
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        if error.name and (where == error.name or where.startswith(error.name + ".")):
            raise SpecError(f"no module {error.name!r} (looked in sys.path and in {base})") from error
        raise SpecError(f"{where} does not import:\n{_traceback(error)}") from error
    except Exception as error:
        raise SpecError(f"{where} does not import:\n{_traceback(error)}") from error


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def option_parameters(target: Any) -> dict[str, inspect.Parameter] | None:
    """The options that a built-in or custom function takes; None: any (it takes `**kwargs`)."""
    parameters = inspect.signature(target).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    if inspect.isclass(target):
        return dict(parameters)
    return {n: p for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def checked_options(spec: str, target: Any, options: Mapping[str, Any], *, strict: bool) -> dict[str, Any]:
    """The options, converted to the types that `target` declares. Raises SpecError with what to write."""
    known = option_parameters(target)
    if not strict and not inspect.isclass(target):  # a custom function may take options by position
        known = None if known is None else dict(inspect.signature(target).parameters)
    result: dict[str, Any] = {}
    if known is not None:
        missing = [n for n, p in known.items() if p.default is p.empty and n not in options]
        if missing and (strict or inspect.isclass(target)):
            raise SpecError(f"reward {spec!r} needs the option {missing[0]!r}")
    hints: dict[str, Any] = {}
    if options:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    for name, value in options.items():
        if known is not None and name not in known:
            listing = ", ".join(sorted(known)) or "none"
            hint = nearest(name, known)
            raise SpecError(f"reward {spec!r} has no option {name!r}{hint}. Its options: {listing}")
        result[name] = _converted(spec, name, value, hints[name]) if name in hints else value
    return result


def _converted(spec: str, name: str, value: Any, hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # the hint is a model of its own and takes no config
        adapter = TypeAdapter(hint)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        raise SpecError(f"reward {spec!r}, option {name!r}: {problem['msg']}, got {value!r}") from error


def _rows(columns: Mapping[str, Sequence[Any]], n: int, label: str) -> None:
    for name, values in columns.items():
        if len(values) != n:
            raise CallError(f"reward {label!r}: column {name!r} has {len(values)} values for {n} completions")


def signature_columns(target: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The columns that a built-in must have, and those that it can use."""
    if inspect.isclass(target):
        judge = getattr(target, "judge", None)
        if judge is None:
            return tuple(getattr(target, "required", ())), tuple(getattr(target, "optional", ()))
        target = judge
    parameters = inspect.signature(target).parameters
    columns = {n: p for n, p in parameters.items() if p.kind in _POSITIONAL}
    columns = {n: p for n, p in columns.items() if n not in ("self", "prompt", "completion")}
    required = tuple(n for n, p in columns.items() if p.default is p.empty)
    return required, tuple(n for n in columns if n not in required)


class PerSample:
    """A built-in that judges one sample at a time.

    required, optional: the dataset columns that it reads.
    """

    per_sample = True

    def __init__(self, spec: str, target: Any, options: Mapping[str, Any]) -> None:
        self.spec = spec
        self.options = checked_options(spec, target, options, strict=True)
        self.inner: Any = None
        function: Callable[..., Score] = target
        if inspect.isclass(target):
            self.inner = target(**self.options)
            function = self.inner.judge
        elif self.options:
            function = functools.partial(target, **self.options)
        self.takes_prompt = "prompt" in inspect.signature(function).parameters
        self.required, self.optional = signature_columns(target)
        self.columns: tuple[str, ...] | None = self.required + self.optional
        self.function = function

    def _present(self, columns: Mapping[str, Sequence[Any]]) -> list[str]:
        for name in self.required:
            if name not in columns:
                have = ", ".join(sorted(columns)) or "none"
                raise CallError(f"reward {self.spec!r} needs the column {name!r}; the columns here: {have}")
        return [name for name in self.columns or () if name in columns]

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        *,
        progress: Callable[[int], None] | None = None,
        **columns: Sequence[Any],
    ) -> list[Score]:
        """One Score per completion. What the function raises is an `error`, never a zero.

        `progress` is called with each index before its sample is judged.
        """
        _rows(columns, len(completions), self.spec)
        names = self._present(columns)
        lists = [columns[name] for name in names]
        function, scores = self.function, []
        for i, completion in enumerate(completions):
            if progress is not None:
                progress(i)
            row = {name: values[i] for name, values in zip(names, lists, strict=True)}
            if self.takes_prompt:
                row["prompt"] = prompts[i]
            text = completion if isinstance(completion, str) else text_of(completion)
            start = perf_counter()
            try:
                score = function(completion=text, **row)
            except Exception as error:
                score = Score(None, Outcome.error, _traceback(error))
            scores.append(replace(score, seconds=perf_counter() - start))
        return scores

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float | None]:
        return _values(self.spec, self.score(prompts, completions, **columns))


class Stateful:
    """A built-in that keeps state and judges whole lists: models, judges."""

    per_sample = False

    def __init__(self, spec: str, cls: Any, options: Mapping[str, Any]) -> None:
        self.spec = spec
        self.options = checked_options(spec, cls, options, strict=True)
        self.inner = cls(**self.options)
        self.required, self.optional = signature_columns(cls)
        known = self.required + self.optional
        self.columns: tuple[str, ...] | None = None if getattr(cls, "all_columns", False) else known

    def score(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[Score]:
        """One Score per completion."""
        _rows(columns, len(completions), self.spec)
        start = perf_counter()
        scores = self.inner.score(prompts, completions, **columns)
        share = (perf_counter() - start) / max(1, len(completions))
        return [replace(s, seconds=s.seconds or share) for s in scores]

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float | None]:
        return _values(self.spec, self.score(prompts, completions, **columns))


class Custom:
    """A user's function (or class, made with its options), sync or async, in TRL's convention."""

    per_sample = False

    def __init__(self, spec: str, target: Any, options: Mapping[str, Any]) -> None:
        self.spec = spec
        checked = checked_options(spec, target, options, strict=False)
        self.options: dict[str, Any] = {} if inspect.isclass(target) else checked
        self.function: Any = target(**checked) if inspect.isclass(target) else target
        if not callable(self.function):
            raise SpecError(f"{spec}: instances of this class cannot be called; give it a `__call__`")
        parameters = inspect.signature(self.function).parameters
        names = [n for n, p in parameters.items() if p.kind in (*_POSITIONAL, inspect.Parameter.KEYWORD_ONLY)]
        takes_all = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
        self._takes_prompts = takes_all or "prompts" in names
        self.columns: tuple[str, ...] | None = None
        if not takes_all:
            self.columns = tuple(n for n in names if n not in ("prompts", "completions", *self.options))
        if "completions" not in names and not takes_all:
            raise SpecError(f"{spec} must take `completions` (and `prompts`, dataset columns, or **kwargs)")
        self.required = tuple(
            n
            for n in self.columns or ()
            if n in parameters and parameters[n].default is inspect.Parameter.empty
        )
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> Any:
        given = columns if self.columns is None else {k: v for k, v in columns.items() if k in self.columns}
        if self._takes_prompts:
            given = {"prompts": prompts, **given}
        return self.function(completions=completions, **given, **self.options)

    def score(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[Score]:
        """One Score per completion; garbage in a place is an `error` there. Not from a running loop.

        Raises what the function raises, and CallError for a result of the wrong length.
        """
        start = perf_counter()
        result = self(prompts, completions, **columns)
        if inspect.isawaitable(result):
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
            result = self._loop.run_until_complete(result)
        if hasattr(result, "tolist"):  # numpy array, torch tensor
            result = result.tolist()
        if not isinstance(result, Sequence) or isinstance(result, str):
            raise CallError(f"{self.spec} returned a {type(result).__name__}, not a list of numbers")
        if len(result) != len(completions):
            raise CallError(f"{self.spec} returned {len(result)} values for {len(completions)} completions")
        share = (perf_counter() - start) / max(1, len(completions))
        return [as_score(self.spec, value, share) for value in result]


def as_score(spec: str, value: Any, seconds: float = 0.0) -> Score:
    """A custom function's return value as a Score: None abstains, what is no finite number is an error."""
    if isinstance(value, Score):
        return value if value.seconds else replace(value, seconds=seconds)
    if value is None:
        return Score(None, Outcome.abstain, "", seconds)
    if hasattr(value, "item"):  # numpy or torch scalar
        value = value.item()
    if isinstance(value, bool | int | float) and math.isfinite(value):
        outcome = Outcome.correct if value > 0 else Outcome.wrong
        return Score(float(value), outcome, "", seconds)
    detail = f"{spec} returned {value!r:.200} ({type(value).__name__}): not a finite number and not None"
    return Score(None, Outcome.error, detail, seconds)


def _values(spec: str, scores: Sequence[Score]) -> list[float | None]:
    for i, score in enumerate(scores):
        if score.outcome is Outcome.error:
            raise RuntimeError(f"reward {spec!r} failed on completion {i}:\n{score.detail}")
    return [score.value for score in scores]
