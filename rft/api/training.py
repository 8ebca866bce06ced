"""`train`, `check` and `evaluate`, as a program calls them."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

from rft import run_dir, run_training
from rft.api.callbacks import CallbackObserver, check_callbacks
from rft.api.inputs import (
    AlgorithmArgument,
    Arguments,
    ConfigArgument,
    DataArgument,
    EnvironmentArgument,
    ModelArgument,
    Resolved,
    RewardArgument,
    RewardsArgument,
    Sections,
    ToolArgument,
    as_plain,
    resolve,
)
from rft.api.runs import Callback, Run
from rft.api.thread import in_thread
from rft.config.data import DataConfig
from rft.config.environment import EnvironmentConfig
from rft.config.load import load_config, parse_config
from rft.config.rewards import PASSED
from rft.config.schema import Config
from rft.errors import ConfigError
from rft.plan import Plan, check_plan, make_plan
from rft.report.history import CONFIG_FILE
from rft.tools.evaluate import evaluate_model
from rft.utils.quiet import quiet_libraries
from rft.utils.signals import StopRequests


def train(
    config: ConfigArgument | None = None,
    *,
    model: ModelArgument | None = None,
    data: DataArgument | None = None,
    eval_data: DataArgument | None = None,
    rewards: RewardsArgument | None = None,
    algorithm: AlgorithmArgument | None = None,
    environment: EnvironmentArgument | None = None,
    tools: Sequence[ToolArgument] = (),
    callbacks: Sequence[Callback] = (),
    resume: str | os.PathLike[str] = "auto",
    **sections: Unpack[Sections],
) -> Run:
    """Train, as `rft train` does; returns the run, complete or stopped by a callback.

    Args:
        config: a `Config`, a dict, or the path of a YAML file; the other arguments are laid over it.
        model: a folder, a hub name or a built-in name; or the section `model`.
        data: rows (a list of dicts, a `Dataset`; of a `DatasetDict` the splits train and test), which are
            saved in the run folder; a path or hub name; or the section `data`, whose `rows` may be rows.
        eval_data: like `data`, rows or a path, for evaluation.
        rewards: built-in names, functions (sync or async), objects with `__call__`, or sections with a
            `function`; or the section `rewards`. Functions run in worker processes.
        algorithm: an algorithm, its name, or its section.
        environment: a class with `reset` and tools as methods, or with `step`; an async function of a row and
            a session; or the section `environment`. It runs in worker processes.
        tools: functions that the policy may call, and names of built-in ones.
        callbacks: instances of `Callback`.
        resume: "auto" (continue from the run's last checkpoint), "never", or a checkpoint's folder.
        sections: every other section of the config (a dict or its class), and shorthands such as `steps`.

    Raises:
        ConfigError: something is wrong with the arguments, found before anything is started.
        CallbackError: a callback raised an exception.
        KeyboardInterrupt: the caller was interrupted; a checkpoint was saved.
        Others, such as RewardError or EngineError: as the command line reports them.
    """
    check_callbacks(callbacks)
    arguments = Arguments(model, data, eval_data, rewards, algorithm, environment, tools, sections)
    with quiet_libraries():
        return _train(resolve(config, arguments), callbacks, os.fspath(resume))


def _train(resolved: Resolved, callbacks: Sequence[Callback], resume: str = "auto") -> Run:
    config, stops = resolved.config, StopRequests()
    observer = CallbackObserver(callbacks, config.run_dir, stops)

    def work(stops: StopRequests) -> None:
        run_training.run(config, resume, stops, (observer,), resolved.files)
        observer.end()

    folder = str(config.run_dir)
    in_thread(work, stops, f"the run was stopped; rft.Run({folder!r}).resume() goes on")
    return Run(config.run_dir)


def check(
    config: ConfigArgument | None = None,
    *,
    model: ModelArgument | None = None,
    data: DataArgument | None = None,
    eval_data: DataArgument | None = None,
    rewards: RewardsArgument | None = None,
    algorithm: AlgorithmArgument | None = None,
    environment: EnvironmentArgument | None = None,
    tools: Sequence[ToolArgument] = (),
    **sections: Unpack[Sections],
) -> Plan:
    """Resolve everything that `train` with these arguments would use, without training.

    `print` shows the plan. Raises ConfigError with all problems.
    """
    arguments = Arguments(model, data, eval_data, rewards, algorithm, environment, tools, sections)
    with quiet_libraries():
        resolved = resolve(config, arguments)
        with run_dir.with_files(resolved.files, keep=False):
            plan = check_plan(resolved.config)
            plan.text  # noqa: B018  (computed while the rows exist)
            return plan


def evaluate(
    model: ModelArgument,
    data: DataArgument | None = None,
    rewards: RewardsArgument | None = None,
    *,
    config: ConfigArgument | None = None,
    **sections: Unpack[Sections],
) -> dict[str, float]:
    """Measure a model on held-out rows, as `rft eval` does; returns the `eval/...` metrics.

    Args:
        model: a folder, a hub name or a built-in name.
        data: rows or a path; None: the held-out rows of the config.
        rewards: as for `train`; the first one decides whether a completion is correct.
        config: settings of the evaluation (`eval`, `rollout`), as for `train`.
        sections: as for `train`; `eval={"samples": 8}` samples 8 completions of each prompt.

    Raises ConfigError, RunStopped and the errors of engines and rewards.
    """
    least = {"algorithm": "grpo", "train": {"batch_size": 1}}  # a config needs them; an evaluation does not
    given: dict[str, Any] = {**sections, "train": {"batch_size": 1, "minibatches": 1}}
    held_out = _held_out(data)
    if held_out is not None and not isinstance(held_out, str | os.PathLike):
        given["eval"] = {"problems": max(len(held_out), 1), **as_plain(given.get("eval", {}))}  # all of them
    arguments = Arguments(model=model, data=data, eval_data=held_out, rewards=rewards, sections=given)

    def work(stops: StopRequests) -> dict[str, float]:
        with run_dir.with_files(resolved.files, keep=False):
            plan = make_plan(resolved.config, evaluate=True)
            return asyncio.run(evaluate_model(plan, stops))

    with quiet_libraries():
        resolved = resolve(least if config is None else config, arguments)
        return in_thread(work, StopRequests(), "the evaluation was stopped")


def _held_out(data: DataArgument | None) -> Any:
    """Return rows, or a file, that serve as held-out rows; None: the data says which rows do."""
    if isinstance(data, Mapping):
        return data.get("rows")
    if data is None or isinstance(data, DataConfig):
        return None
    return data if not isinstance(data, str | os.PathLike) or Path(data).is_file() else None


def resume(
    path: Path,
    rewards: Sequence[RewardArgument],
    environment: EnvironmentArgument | None,
    tools: Sequence[ToolArgument],
    callbacks: Sequence[Callback],
    sections: Mapping[str, Any],
) -> Run:
    """Go on with the run in a folder; see `Run.resume`."""
    check_callbacks(callbacks)
    config = load_config(path / CONFIG_FILE)
    raw = config.to_dict()
    raw["output_dir"], raw["name"] = str(path.parent), path.resolve().name
    for key in ("path", "eval_path"):
        file = raw["data"][key]
        if file and Path(file).parent == config.run_dir / run_dir.DATA_FOLDER:
            raw["data"][key] = str(path / run_dir.DATA_FOLDER / Path(file).name)
    raw["rewards"]["functions"] = _with_objects(config, rewards)
    given = parse_config(raw)
    if environment is not None or tools:
        given = given.model_copy(
            update={"environment": _environment_with_objects(config, environment, tools)}
        )
    with quiet_libraries():
        return _train(resolve(given, Arguments(sections=sections)), callbacks)


def _environment_with_objects(
    config: Config, environment: EnvironmentArgument | None, tools: Sequence[ToolArgument]
) -> EnvironmentConfig:
    """Return the run's environment with the objects that were passed again. Raises ConfigError."""
    old = config.environment
    if old is None:
        raise ConfigError(["environment: the run has none; leave environment and tools out"])
    arguments = Arguments(environment=environment, tools=tools)
    given = resolve({"algorithm": "grpo"}, arguments).config.environment
    assert given is not None
    unknown = [name for name in given.payloads if name not in old.passed]
    if unknown:
        known = ", ".join(name.removeprefix(PASSED) for name in old.passed) or "none"
        shown = unknown[0].removeprefix(PASSED)
        raise ConfigError([f"environment: {shown} was not passed to the run; its objects are {known}"])
    changed = old.model_copy(update={"passed": {**old.passed, **given.passed}})
    return changed.with_payloads(given.payloads)


def _with_objects(config: Config, rewards: Sequence[RewardArgument]) -> list[Any]:
    """Return the run's rewards with the functions that were passed again. Raises ConfigError."""
    functions: list[Any] = list(config.rewards.functions)
    labels = [c.label for c in config.rewards.functions]
    problems = []
    for reward in rewards:
        given = parse_config({"algorithm": "sft", "rewards": [reward]}).rewards.functions[0]
        if given.label not in labels:
            problems.append(
                f"rewards: the run has no reward {given.label!r}; its rewards are {', '.join(labels)}"
            )
            continue
        index = labels.index(given.label)
        if given.payload is not None and functions[index].passed is None:
            problems.append(
                f"rewards: {given.label!r} of the run is {functions[index].function}, which was not "
                "passed: leave it out"
            )
        elif given.payload is not None:
            changed = functions[index].model_copy(update={"passed": given.passed})
            functions[index] = changed.with_payload(given.payload)
    if problems:
        raise ConfigError(problems)
    return functions
