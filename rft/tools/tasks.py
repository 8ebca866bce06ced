"""`rft eval --tasks FILE.yaml`: local task files of lm-eval, answered by the config's engine.

lm-eval runs as a child process, and asks the engine through the endpoint of `rft serve`
(`local-completions`). Nothing is downloaded: a task whose data are not on this machine is refused by name.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from rft.endpoint.handle import Endpoint
from rft.endpoint.server import Open
from rft.errors import ConfigError
from rft.plan import Plan
from rft.tools.serve import NAME, Served
from rft.utils.deadlines import stop_event, unless_stopped
from rft.utils.ray_cluster import ray_cluster
from rft.utils.signals import StopRequests

LOADERS = ("json", "csv", "parquet", "text", "arrow")  # of `datasets`, which read files
CONCURRENT = 16  # requests of lm-eval in flight
SHOWN = 2000  # characters of lm-eval's output in an error


class TasksFailed(RuntimeError):
    """lm-eval ended with an error."""


class _Loader(yaml.SafeLoader):
    """YAML of lm-eval, whose tag `!function` names a Python function."""


_Loader.add_constructor("!function", lambda loader, node: str(node.value))


def run_tasks(
    plan: Plan,
    files: Sequence[Path],
    out: Path | None,
    signals: StopRequests,
    *,
    python: str = sys.executable,
) -> dict[str, float]:
    """Return the metrics `eval/TASK/METRIC` of the tasks. Raises ConfigError, TasksFailed, RunStopped.

    out: folder for lm-eval's results and samples. python: the Python that has lm-eval.
    """
    if problems := task_problems(files):
        raise ConfigError(problems)
    if python == sys.executable and find_spec("lm_eval") is None:
        raise ConfigError(["--tasks: install lm-eval (the extra `lm_eval`)"])
    config = plan.config
    with (
        tempfile.TemporaryDirectory(prefix="rft-tasks-") as scratch,
        ray_cluster(config.ray.address, config.ray.object_store_gib),
    ):
        results = out or Path(scratch) / "results"
        asyncio.run(_ask(plan, files, results, scratch, signals, python))
        newest = max(results.rglob("results_*.json"), key=lambda file: file.stat().st_mtime)
        return metrics_of(json.loads(newest.read_text(encoding="utf-8")))


async def _ask(
    plan: Plan, files: Sequence[Path], results: Path, scratch: str, signals: StopRequests, python: str
) -> None:
    """Serve the plan's model for the length of lm-eval's run."""
    stop = stop_event(signals)
    served = Served(plan)
    context = served.pool.spec.max_model_len
    endpoint = Endpoint("127.0.0.1", 0, Open(NAME, "", context))
    endpoint.share(NAME, served.reply)
    try:
        await unless_stopped(served.start(), stop)
        url = await unless_stopped(endpoint.start(), stop)
        model = {
            "model": NAME,
            "base_url": f"{url}/v1/completions",
            "tokenizer": plan.tokenizer_path,
            "max_length": context,
            "num_concurrent": CONCURRENT,
        }
        arguments = ",".join(f"{key}={value}" for key, value in model.items())
        command = [
            *(python, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments),
            *("--tasks", ",".join(str(file.resolve()) for file in files)),
            *("--output_path", str(results), "--log_samples"),
        ]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": f"{scratch}/cache"}
        pipe, shared = asyncio.subprocess.PIPE, asyncio.subprocess.STDOUT
        child = await asyncio.create_subprocess_exec(
            *command, stdout=pipe, stderr=shared, env={**os.environ, **offline}
        )
        try:
            output, _ = await unless_stopped(child.communicate(), stop)
        finally:
            if child.returncode is None:
                child.kill()
                await child.wait()
        if child.returncode:
            raise TasksFailed(f"lm-eval ended with code {child.returncode}: {output.decode()[-SHOWN:]}")
    finally:
        await endpoint.close()
        await served.close()


def metrics_of(results: Mapping[str, Any]) -> dict[str, float]:
    """Return the numbers of an lm-eval result. A metric keeps the name of its filter, unless it is `none`."""
    metrics = {}
    for task, values in results["results"].items():
        for key, value in values.items():
            name, _, chosen = key.partition(",")
            if isinstance(value, int | float) and chosen:
                metrics[f"eval/{task}/{name}" + ("" if chosen == "none" else f"/{chosen}")] = float(value)
    return metrics


# -- task files --------------------------------------------------------------------------------------------


def task_problems(files: Sequence[Path]) -> list[str]:
    """Return why task files cannot be run here: not readable, or with data that are not on this machine."""
    problems = []
    for file in files:
        try:
            problems += [f"--tasks {file}: {problem}" for problem in _problems(read_task(file))]
        except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError) as error:
            problems.append(f"--tasks {file}: not a task file of lm-eval: {error}")
    return problems


def read_task(file: Path) -> dict[str, Any]:
    """Return a task file with those that it includes. Raises OSError, YAMLError, ValueError."""
    task = yaml.load(file.read_text(encoding="utf-8"), _Loader)
    if not isinstance(task, dict):
        raise ValueError("write a mapping with `task`, `dataset_path`, ...")
    included = task.pop("include", None) or ()
    whole: dict[str, Any] = {}
    for name in [included] if isinstance(included, str) else included:
        whole |= read_task(file.parent / name)
    return {**whole, **task}


def _problems(task: Mapping[str, Any]) -> Iterator[str]:
    name = task.get("task")
    if isinstance(name, list) or "group" in task:
        yield "it is a group; name the files of its tasks"
        return
    if not isinstance(name, str):
        yield "it has no name; write `task: NAME`"
        return
    if "custom_dataset" in task:  # a function of the task's author, which runs without the hub
        return
    path = task.get("dataset_path")
    if not isinstance(path, str):
        yield f"task {name} has no data; write `dataset_path: json` and `dataset_kwargs: {{data_files: ...}}`"
        return
    if path not in LOADERS:
        if not Path(path).exists():
            yield (
                f"task {name} needs the hub dataset {path}, and nothing is downloaded; save its "
                "rows to a file, and write `dataset_path: json`, `dataset_kwargs: {data_files: {test: FILE}}`"
            )
        return
    kwargs = task.get("dataset_kwargs")
    places = list(_files(kwargs.get("data_files") if isinstance(kwargs, dict) else None))
    if not places:
        yield f"task {name} reads {path} files, and names none: `dataset_kwargs: {{data_files: ...}}`"
    for place in places:
        if not Path(place).exists():
            what = "is not on this machine" if "://" in place else "does not exist"
            yield f"task {name}: {place} {what}"


def _files(value: Any) -> Iterator[str]:
    """Yield the names in `data_files`: a name, a list, or a mapping from splits to these."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _files(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _files(inner)
