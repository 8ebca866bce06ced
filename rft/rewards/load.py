"""Load a reward function from a spec (`math`, `file.py:function`, `package.module:function`).

A built-in is a plain function of one sample,

    def math(completion, answer, *, extraction=..., tolerance=...) -> Score

whose positional parameters are `prompt`, `completion` and dataset columns, and whose keyword-only
parameters are its options; or, if it keeps state (a sandbox, a model, a connection), a class whose
constructor takes the options: its `judge` is such a function, or its `score` takes whole lists.
"""

from __future__ import annotations

import asyncio
import copy
import functools
import importlib
import importlib.util
import inspect
import math
import pickle
import sys
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from numbers import Real
from pathlib import Path
from time import perf_counter
from typing import Any, get_type_hints

from rft.rewards.types import Outcome, RewardFunction, Score, Text, TrainerState, text_of
from rft.utils.did_you_mean import did_you_mean
from rft.utils.dotted import load_dotted

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
    "instructions": "rft.contrib.rewards.instructions:instructions",
    "judge": "rft.rewards.judge:Judge",
    "local_judge": "rft.rewards.judge:LocalJudge",
    "reward_model": "rft.contrib.rewards.models:RewardModel",
    "pairwise_model": "rft.contrib.rewards.models:PairwiseModel",
    "process_reward_model": "rft.contrib.rewards.models:ProcessRewardModel",
    "process": "rft.contrib.rewards.steps:Process",
}

VERL = "rft.contrib.rewards.verl.from_verl"

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
SAMPLED = ("num_tokens", "truncated", "completion_ids")
"""Columns provided by the sampler."""
PER_CALL = ("trainer_state", "log_extra", "log_metric")
"""Arguments other than lists that TRL, and therefore rft, passes to a reward."""
ENVIRONMENTS = "environments"
"""The list of environment instances that TRL passes to a reward, which is called where these are."""


class SpecError(ValueError):
    """A reward cannot be loaded from its spec; the message says how to correct it."""


class CallError(ValueError):
    """A call failed for all of its samples: wrong length, not a list, a missing column."""


def load_reward(spec: str, /, *, base_dir: Path | str = ".", **options: Any) -> RewardFunction:
    """Load the reward function that `spec` names, with its options bound.

    The result is called as `(prompts, completions, **columns) -> list[float | None]` (a coroutine for
    an async custom function), and has `.score(prompts, completions, **columns) -> list[Score]`.
    Paths are relative to `base_dir`. Raises SpecError if the spec cannot be resolved.
    """
    if spec.startswith("verl:"):
        target = resolve(spec.removeprefix("verl:"), base_dir)
        checked = checked_options(spec, target, options, strict=False)
        return Custom(spec, load_dotted(VERL)(target, **checked), {})
    if ":" not in spec:
        target = builtin(spec)
        if inspect.isclass(target) and not hasattr(target, "judge"):
            return Stateful(spec, target, options)
        return PerSample(spec, target, options)
    return Custom(spec, resolve(spec, base_dir), options)


def load_spec(
    spec: str, options: Mapping[str, Any], base_dir: Path | str, payload: bytes | None
) -> RewardFunction:
    """Load a reward from its spec, or from the pickle of an object that was passed. Raises SpecError."""
    if payload is None:
        return load_reward(spec, base_dir=base_dir, **options)
    return Custom(spec, unpickled(spec, payload, base_dir), options)


def unpickled(spec: str, payload: bytes, base_dir: Path | str) -> Any:
    """Return an object that was passed from Python. Raises SpecError."""
    try:
        return pickle.loads(payload)
    except Exception as error:
        raise SpecError(
            f"{spec} cannot be unpickled in a worker; a module that it needs must be importable from "
            f"{base_dir}:\n{describe_error(error)}"
        ) from error


def builtin(name: str) -> Any:
    """Return the function or class of a built-in. Raises SpecError with the nearest name if there is none."""
    if name not in BUILTINS:
        hint = did_you_mean(name, BUILTINS)
        if name.endswith(".py"):
            hint = f"; a file needs the function's name: {name}:reward"
        raise SpecError(f"no built-in reward {name!r}{hint}. Built-ins: {', '.join(sorted(BUILTINS))}")
    module, _, attribute = BUILTINS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


def resolve(spec: str, base_dir: Path | str = ".") -> Any:
    """Return the object that `file.py:name` or `package.module:name` names. Raises SpecError if missing."""
    where, _, name = spec.rpartition(":")
    if not where or not name:
        raise SpecError(
            f"{spec!r} does not name a function or class: write `file.py:name` or `package.module:name`"
        )
    module = _import_file(where, base_dir) if where.endswith(".py") else _import_module(where, base_dir)
    target: Any = module
    for part in name.split("."):
        if not hasattr(target, part):
            names = [n for n, v in vars(module).items() if callable(v) and not n.startswith("_")]
            raise SpecError(f"{where} has no function or class {name!r}{did_you_mean(name, names)}")
        target = getattr(target, part)
    if not callable(target):
        raise SpecError(f"{spec} is not a function or class, but of type {type(target).__name__}")
    return target


def _import_file(where: str, base_dir: Path | str) -> Any:
    path = (Path(base_dir) / Path(where).expanduser()).resolve()
    if not path.is_file():
        raise SpecError(f"no file {path} (paths are relative to {Path(base_dir).resolve()})")
    name = f"rft_reward_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise SpecError(f"{path} is not a Python file that can be imported")
    if str(path.parent) not in sys.path:  # so that the file can import its neighbours; last, so that none
        sys.path.append(str(path.parent))  # of them shadows a module of Python or of a package
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        raise SpecError(f"{path} cannot be imported:\n{describe_error(error)}") from error
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
        raise SpecError(f"{where} does not import:\n{describe_error(error)}") from error
    except (Exception, SystemExit) as error:
        raise SpecError(f"{where} does not import:\n{describe_error(error)}") from error


def describe_error(error: BaseException) -> str:
    """Format the traceback from the reward's frames on; a very long one is cut in the middle."""
    report = traceback.TracebackException.from_exception(error)
    part: traceback.TracebackException | None = report
    while part is not None:
        user_frames = [f for f in part.stack if not f.filename.startswith(_MACHINERY)]
        part.stack = traceback.StackSummary.from_list(user_frames or list(part.stack))
        part = part.__cause__ or (None if part.__suppress_context__ else part.__context__)
    text = "".join(report.format()).rstrip()
    if isinstance(error, SystemExit):
        text += f"\n(it asked Python to exit with status {error.code!r}; it must return or raise)"
    half = MAX_DETAIL // 2
    return text if len(text) <= MAX_DETAIL else f"{text[:half]}\n[...]\n{text[-half:]}"


MAX_DETAIL = 20_000  # longest error text, in characters
_MACHINERY = (str(Path(__file__).parents[1]) + "/", "<frozen importlib")  # frames of rft around the user's


def option_parameters(target: Any) -> dict[str, inspect.Parameter] | None:
    """Return the options that a built-in or custom function takes; None if it takes any (`**kwargs`)."""
    parameters = inspect.signature(target).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    if inspect.isclass(target):
        return dict(parameters)
    return {n: p for n, p in parameters.items() if p.kind is inspect.Parameter.KEYWORD_ONLY}


def checked_options(spec: str, target: Any, options: Mapping[str, Any], *, strict: bool) -> dict[str, Any]:
    """Convert the options to the types that `target` declares. Raises SpecError with a correction."""
    known = option_parameters(target)
    if not strict and not inspect.isclass(target):  # a custom function may take options by position
        known = None if known is None else dict(inspect.signature(target).parameters)
    result: dict[str, Any] = {}
    if known is not None:
        known = {n: p for n, p in known.items() if p.kind not in _VARIADIC}
        missing = [n for n, p in known.items() if p.default is p.empty and n not in options]
        if missing and (strict or inspect.isclass(target)):
            raise SpecError(f"{spec!r} needs the option {missing[0]!r}")
    hints: dict[str, Any] = {}
    if options:
        hints = get_type_hints(target.__init__ if inspect.isclass(target) else target)
    for name, value in options.items():
        if known is not None and name not in known:
            listing = ", ".join(sorted(known)) or "none"
            hint = did_you_mean(name, known)
            raise SpecError(f"{spec!r} has no option {name!r}{hint}. Its options: {listing}")
        result[name] = _converted(spec, name, value, hints[name]) if name in hints else value
    return result


def _converted(spec: str, name: str, value: Any, hint: Any) -> Any:
    from pydantic import ConfigDict, TypeAdapter, ValidationError
    from pydantic.errors import PydanticUserError

    try:
        adapter = TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True))
    except PydanticUserError:  # a hint that is a pydantic model does not accept a config
        adapter = TypeAdapter(hint)
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        problem = error.errors()[0]
        raise SpecError(f"{spec!r}, option {name!r}: {problem['msg']}, got {value!r}") from error


def _rows(columns: Mapping[str, Sequence[Any]], n: int, label: str) -> None:
    for name, values in columns.items():
        if len(values) != n:
            raise CallError(f"reward {label!r}: column {name!r} has {len(values)} values for {n} completions")


def require_columns(reward: Any, label: str, columns: Collection[str]) -> None:
    """Raise CallError if `columns` lack one that `reward` (the loaded function, or its `Loaded`) requires."""
    have = ", ".join(sorted(columns)) or "none"
    lacks = [(repr(name), name) for name in reward.required if name not in columns]
    if reward.any_of and not set(reward.any_of) & set(columns):
        lacks.append((" or ".join(map(repr, reward.any_of)), reward.any_of[0]))
    for shown, name in lacks[:1]:
        raise CallError(
            f"reward {label!r} needs the column {shown}; the columns are {have}. If the column has another "
            f"name, write columns: {{{name}: NAME_IN_YOUR_DATA}}; or give the parameter a default"
        )


def signature_columns(target: Any) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the columns that a built-in requires, and those that it can use."""
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
    reads_environments = False
    any_of: tuple[str, ...] = ()

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
        require_columns(self, self.spec, columns)
        return [name for name in self.columns or () if name in columns]

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        *,
        progress: Callable[[int], None] | None = None,
        **columns: Sequence[Any],
    ) -> list[Score]:
        """Return one Score per completion. An exception of the function is an `error`, never a zero.

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
                score = Score(None, Outcome.error, describe_error(error))
            scores.append(replace(score, seconds=perf_counter() - start))
        return scores

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float | None]:
        return _values(self.spec, self.score(prompts, completions, **columns))


class Stateful:
    """A built-in that keeps state and scores whole lists, such as a model or a judge."""

    per_sample = False
    reads_environments = False
    any_of: tuple[str, ...] = ()

    def __init__(self, spec: str, cls: Any, options: Mapping[str, Any]) -> None:
        self.spec = spec
        self.options = checked_options(spec, cls, options, strict=True)
        self.inner = cls(**self.options)
        self.required, self.optional = signature_columns(cls)
        known = self.required + self.optional
        self.columns: tuple[str, ...] | None = None if getattr(cls, "all_columns", False) else known

    def score(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[Score]:
        _rows(columns, len(completions), self.spec)
        start = perf_counter()
        scores = self.inner.score(prompts, completions, **columns)
        share = (perf_counter() - start) / max(1, len(completions))
        return [replace(s, seconds=s.seconds or share) for s in scores]

    def __call__(
        self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any
    ) -> list[float | None]:
        return _values(self.spec, self.score(prompts, completions, **columns))


class Arguments:
    """Match the values offered in a call to a user's function by name, whatever the kinds of its parameters.

    required: parameters without a default. takes_all: it has `**kwargs`. names: all of its parameters.
    """

    def __init__(self, spec: str, function: Any) -> None:
        try:
            self.parameters = inspect.signature(function).parameters
        except ValueError as error:  # some functions written in C
            raise SpecError(f"{spec} has no signature that Python can read; wrap it in a function") from error
        kinds = [p.kind for p in self.parameters.values()]
        self.takes_all = inspect.Parameter.VAR_KEYWORD in kinds
        named = {n: p for n, p in self.parameters.items() if p.kind not in _VARIADIC}
        self.names = tuple(named)
        self.required = tuple(n for n, p in named.items() if p.default is p.empty)

    def call(self, function: Any, offered: Mapping[str, Any]) -> Any:
        """Call `function` with those values of `offered` that it accepts."""
        by_place: list[Any] = []
        by_name = dict(offered) if self.takes_all else {k: v for k, v in offered.items() if k in self.names}
        for name, p in self.parameters.items():
            if p.kind is inspect.Parameter.POSITIONAL_ONLY:
                by_place.append(by_name.pop(name, p.default))
        return function(*by_place, **by_name)


_ATOMS = (str, int, float, bool, type(None), bytes)


def private(value: Any) -> Any:
    """Copy lists and dicts, so that changes made by a function stay invisible to other functions."""
    if type(value) is list:
        return [v if type(v) in _ATOMS else private(v) for v in value]
    if type(value) is dict:
        return {k: v if type(v) in _ATOMS else private(v) for k, v in value.items()}
    return value if type(value) in _ATOMS else copy.deepcopy(value)


class Custom:
    """A user's function (or class, instantiated with its options), sync or async, in TRL's convention.

    any_of: columns of which it needs at least one. state: progress of the run, for `trainer_state`.
    """

    per_sample = False

    def __init__(self, spec: str, target: Any, options: Mapping[str, Any]) -> None:
        self.spec = spec
        checked = checked_options(spec, target, options, strict=False)
        self.options: dict[str, Any] = {} if inspect.isclass(target) else checked
        self.function: Any = target(**checked) if inspect.isclass(target) else target
        if not callable(self.function):
            raise SpecError(f"{spec}: instances of this class cannot be called; give it a `__call__`")
        self.arguments = Arguments(spec, self.function)
        if "completions" not in self.arguments.names and not self.arguments.takes_all:
            raise SpecError(f"{spec} must take `completions` (and `prompts`, dataset columns, or **kwargs)")
        given = ("prompts", "completions", *PER_CALL, *self.options)
        self.required = tuple(n for n in self.arguments.required if n not in given)
        self.any_of: tuple[str, ...] = getattr(target, "any_of", ())
        self.columns: tuple[str, ...] | None = None
        if not self.arguments.takes_all:
            self.columns = tuple(n for n in self.arguments.names if n not in given)
        self.reads_environments = ENVIRONMENTS in self.arguments.names
        self.state: TrainerState | None = None
        self._logged: dict[str, list[float]] = {}
        self._extra: dict[str, list[Any]] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def __call__(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> Any:
        require_columns(self, self.spec, columns)
        lists = {"prompts": prompts, "completions": completions, **columns}
        taken = (
            lists if self.arguments.takes_all else {k: lists[k] for k in self.arguments.names if k in lists}
        )
        per_call = {"trainer_state": self.state, "log_extra": self._log_extra, "log_metric": self._log_metric}
        copies = {k: v if k == ENVIRONMENTS else private(v) for k, v in taken.items()}
        offered = {**per_call, **copies, **self.options}
        return self.arguments.call(self.function, offered)

    def score(self, prompts: Sequence[Text], completions: Sequence[Text], **columns: Any) -> list[Score]:
        """Return one Score per completion; an invalid item is an `error`. Do not call from a running loop.

        Raises the function's exceptions, and CallError for a result of the wrong length.
        """
        start = perf_counter()
        self._extra.clear()
        result = self(prompts, completions, **columns)
        if inspect.isawaitable(result):
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
            result = self._loop.run_until_complete(result)
        if hasattr(result, "tolist"):  # numpy array, torch tensor
            result = result.tolist()
        if not isinstance(result, Sequence) or isinstance(result, str | bytes):
            raise CallError(f"{self.spec} returned a {type(result).__name__}, not a list of numbers")
        values, n = list(result), len(completions)
        if len(values) != n:
            raise CallError(f"{self.spec} returned {len(values)} values for {n} completions")
        share = (perf_counter() - start) / max(1, n)
        scores = [as_score(self.spec, value, share) for value in values]
        return [replace(s, detail=self._with_extra(s.detail, i, n)) for i, s in enumerate(scores)]

    def take_logged(self) -> dict[str, list[float]]:
        """Return and clear the values passed to `log_metric`."""
        logged, self._logged = self._logged, {}
        return logged

    def _log_metric(self, name: str, value: Any) -> None:
        self._logged.setdefault(str(name), []).append(float(value))

    def _log_extra(self, column: str, values: Sequence[Any]) -> None:
        self._extra[str(column)] = list(values)

    def _with_extra(self, detail: str, i: int, n: int) -> str:
        """Append the `log_extra` values of sample `i` to its detail."""
        for name, values in self._extra.items():
            if len(values) != n:
                raise CallError(
                    f"{self.spec}: log_extra({name!r}) got {len(values)} values for {n} completions"
                )
            detail += f"{'; ' if detail else ''}{name}: {values[i]}"
        return detail


def as_score(spec: str, value: Any, seconds: float = 0.0) -> Score:
    """Convert a custom function's result to a Score: None abstains, all but finite numbers are errors."""
    if value is None:
        return Score(None, Outcome.abstain, "", seconds)
    if isinstance(value, Score):
        return _sound(spec, value, seconds)
    number = finite_number(value)
    if number is not None:
        return Score(number, Outcome.correct if number > 0 else Outcome.wrong, "", seconds)
    detail = f"{spec} returned {value!r:.200} ({type(value).__name__}): not a finite number and not None"
    return Score(None, Outcome.error, detail, seconds)


def finite_number(value: Any) -> float | None:
    """Return a finite float; None for anything else."""
    if hasattr(value, "item"):  # numpy or torch scalar
        value = value.item()
    if not isinstance(value, Real | Decimal):
        return None
    try:
        number = float(value)
    except OverflowError:  # an int too large for a float
        return None
    return number if math.isfinite(number) else None


def _sound(spec: str, score: Score, seconds: float) -> Score:
    """Validate a Score made by a custom function; an invalid one becomes an error that names the problem."""
    value = None if score.value is None else finite_number(score.value)
    steps = tuple(finite_number(step) for step in score.steps)
    problem = ""
    confidence = None if score.confidence is None else finite_number(score.confidence)
    if (score.value is not None and value is None) or None in steps:
        problem = "its value and steps must be finite numbers"
    elif score.confidence is not None and (confidence is None or not 0 <= confidence <= 1):
        problem = "its confidence must be a number from 0 to 1"
    elif score.outcome not in set(Outcome):
        problem = f"its outcome must be one of {', '.join(Outcome)}"
    elif value is None and score.outcome in (Outcome.correct, Outcome.wrong, Outcome.unparseable):
        problem = f"{score.outcome} needs a value"
    if problem:
        return Score(None, Outcome.error, f"{spec} returned {score!r:.200}: {problem}", seconds)
    outcome = Outcome(score.outcome)
    kept = tuple(step for step in steps if step is not None)
    lost = outcome in (Outcome.error, Outcome.abstain)  # their value is None
    return Score(
        None if lost else value,
        outcome,
        str(score.detail),
        score.seconds or seconds,
        kept,
        str(score.answer),
        confidence,
    )


def _values(spec: str, scores: Sequence[Score]) -> list[float | None]:
    for i, score in enumerate(scores):
        if score.outcome is Outcome.error:
            raise RuntimeError(f"reward {spec!r} failed on completion {i}:\n{score.detail}")
    return [score.value for score in scores]
