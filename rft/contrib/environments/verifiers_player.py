"""Load a taskset of verifiers and play its tasks: the program of kind `verifiers`, in a Python without rft.

Standard library and verifiers only. Arguments: the descriptor of a socket, and a JSON object with `id`,
`folder` (on the import path), `options`, `max_turns`. Over the socket go lines of JSON: first `{"loaded":
version}`, or `{"problem": text}` and the end; then an answer to each request for an episode, `{"problem":
text}` where the config or the row is wrong.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import json
import os
import random
import shutil
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

KEY = "RFT_SESSION_API_KEY"  # verifiers passes no variable with API_KEY in its name on to a harness
V1 = "verifiers>=0.4,<0.5"
V0 = "verifiers>=0.1.14,<0.4"


class PlayerProblem(Exception):
    """The config or a row is wrong; the message says how to correct it."""


def install(requirement: str) -> str:
    return f"{sys.executable} -m pip install '{requirement}'"


def load(given: Mapping[str, Any]) -> Tasks | Environment:
    """Load the taskset or environment of an id. Raises PlayerProblem."""
    try:
        installed = version("verifiers")
    except PackageNotFoundError:
        raise PlayerProblem(
            f"environment.python: {sys.executable} has no verifiers: {install(V1)}, or for an environment of "
            f"v0 {install(V0)}"
        ) from None
    numbers = tuple(int(part) for part in installed.split(".")[:3] if part.isdigit())
    if numbers < (0, 1, 14):
        raise PlayerProblem(f"environment.python: verifiers {installed} is too old: {install(V0)}")
    kind = Environment if numbers < (0, 4) else Tasks
    return kind(given, installed)


def missing(
    given: Mapping[str, Any], installed: str, what: str, error: ImportError, module: str
) -> PlayerProblem:
    """Return the error for an id whose module cannot be imported."""
    if isinstance(error, ModuleNotFoundError) and error.name == module:
        return PlayerProblem(
            f"environment.path: verifiers {installed} of {sys.executable} has no {what} {given['id']!r}, and "
            f"there is no module {module!r}; install its package there, or write the path of its folder or "
            "file"
        )
    return PlayerProblem(
        f"environment.path: the {what} {given['id']!r} needs a module that cannot be imported: {error}; "
        f"install it for {sys.executable}"
    )


def refuse_v0(given: Mapping[str, Any], installed: str, module: str) -> None:
    """Raise PlayerProblem if a module that cannot be loaded as a taskset is an environment of v0."""
    spec = importlib.util.find_spec(module)
    if (
        spec is None
        or spec.origin is None
        or "def load_environment(" not in Path(spec.origin).read_text(encoding="utf-8")
    ):
        return
    raise PlayerProblem(
        f"environment.path: {given['id']!r} is an environment of verifiers v0, and {sys.executable} has "
        f"verifiers {installed}; name the Python of another environment, with '{V0}'"
    )


class Tasks:
    """A taskset of verifiers v1 with its harness (0.4), played by an environment with one seat."""

    def __init__(self, given: Mapping[str, Any], installed: str) -> None:
        from verifiers.v1.configs.agent import AgentConfig
        from verifiers.v1.utils import loaders

        ident, options = given["id"], dict(given["options"])
        module = ident.rsplit("/", 1)[-1].split("@", 1)[0].replace("-", "_").lower()
        self.renderer = options.pop("renderer", None)
        try:
            loaders.taskset_class(ident)
        except ImportError as error:
            refuse_v0(given, installed, module)
            cause = error.__cause__
            raise missing(
                given, installed, "taskset", cause if isinstance(cause, ImportError) else error, module
            ) from error
        except (AttributeError, TypeError, ValueError) as error:
            refuse_v0(given, installed, module)
            raise PlayerProblem(f"environment.path: {error}") from error
        config = {**options, "taskset": {**options.get("taskset", {}), "id": ident}}
        try:
            fields = loaders.env_config_type(ident, config.get("id", "")).model_fields
            seats = [name for name, field in fields.items() if isinstance(field.default, AgentConfig)]
            if len(seats) != 1:
                raise PlayerProblem(
                    f"environment.path: {ident!r} has the seats {', '.join(seats)}, and rft trains "
                    "environments with one; write options: {id: single_agent}, or choose another"
                )
            seat = {"runtime": {"type": "subprocess"}, **config.get(seats[0], {})}
            if seat.get("harness"):
                seat["harness"] = {"id": loaders.default_harness_id(ident), **seat["harness"]}
            if given["max_turns"]:  # then it ends the episode, and scores it
                seat["max_turns"] = min(seat.get("max_turns") or given["max_turns"], given["max_turns"])
            self.env: Any = loaders.load_environment(loaders.resolve_env_config({**config, seats[0]: seat}))
        except (ImportError, TypeError, ValueError) as error:  # pydantic's errors are ValueErrors
            raise PlayerProblem(option_error(error)) from error
        self._check_harness(seats[0], seat["runtime"]["type"])
        self._tasks: Iterator[Any] = iter(self.env.taskset)
        self._known: list[Any] = []

    def _check_harness(self, seat: str, runtime: str) -> None:
        """Raise PlayerProblem for a harness that cannot run here."""
        harness = self.env._harnesses[seat]
        name = harness.config.id
        for what, part in (
            (f"the harness {name!r}", harness),
            ("the taskset", type(self.env.taskset).task_type()),
        ):
            if part.NEEDS_CONTAINER and runtime == "subprocess":
                raise PlayerProblem(
                    f"environment.options: {what} needs a container; name its runtime: "
                    f"{{{seat}: {{runtime: {{type: docker}}}}}}"
                )
        if type(harness).__module__.startswith("verifiers.") and shutil.which("uv") is None:
            raise PlayerProblem(
                f"environment.options: the harness {name!r} of verifiers needs uv, which is not installed: "
                f"{install('uv')}"
            )

    def _task(self, row: dict[str, Any]) -> Any:
        """Return the task that a row names by its column `task`, or describes. Raises PlayerProblem."""
        if "task" not in row:
            kind = type(self.env.taskset).task_type()
            data = kind.data_type()
            try:
                return kind(
                    data(**{k: v for k, v in row.items() if k in data.model_fields}),
                    self.env.taskset.config.task,
                )
            except ValueError as error:
                raise PlayerProblem(
                    f"the row has no column `task`, and is not a {data.__name__}: {error}"
                ) from error
        return pick(row["task"], self._known, self._tasks, lambda task: task.data.name)

    async def play(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Play one episode."""
        import verifiers.v1 as vf

        task = self._task(asked["row"])
        client = vf.TrainClientConfig(
            base_url=f"{asked['url']}/v1",
            api_key_var=KEY,
            renderer=self.renderer or known_renderer(asked["model"]),
            renderer_model_name=asked["tokenizer"],
        )
        context = vf.ModelContext(model="policy", client=client, sampling=vf.SamplingConfig())
        async with self.env.serving():
            episode = await self.env.run_episode(task, context)
        errors = [*episode.errors, *(error for trace in episode.traces for error in trace.errors)]
        if not episode.traces:
            return {"failure": describe(errors)}
        (trace,) = episode.traces
        paths = [branch.nodes for branch in trace.branches] or [[]]
        first, nodes = paths[0], paths[-1]
        scores = {name: reward.value for name, reward in trace.rewards.items() if reward is not None}
        return {
            "failure": "" if episode.ok else describe(errors),
            "reward": trace.reward,
            "scores": scores | {name: value for name, value in trace.metrics.items() if value is not None},
            "messages": [message(node.message) for node in nodes],
            "start": next((i for i, node in enumerate(first) if node.sampled), len(first)),
            "turn_limit": trace.stop_condition == "max_turns",
        }


class Environment:
    """An environment of verifiers v0 (0.1.14 to 0.3)."""

    def __init__(self, given: Mapping[str, Any], installed: str) -> None:
        import verifiers

        module = given["id"].split("/")[-1].replace("-", "_")
        try:
            loaded: ModuleType = importlib.import_module(module)
        except ImportError as error:
            raise missing(given, installed, "environment", error, module) from error
        if not hasattr(loaded, "load_environment"):
            raise PlayerProblem(
                f"environment.path: {given['id']!r} has no `load_environment`, and {sys.executable} has "
                f"verifiers {installed}; for a taskset of v1 name the Python of another environment, with "
                f"'{V1}'"
            )
        try:
            self.env: Any = verifiers.load_environment(given["id"], **given["options"])
        except Exception as error:
            raise PlayerProblem(f"environment.options: {error}") from error
        limits = [n for n in (getattr(self.env, "max_turns", 0), given["max_turns"]) if n and n > 0]
        if hasattr(self.env, "max_turns") and limits:
            self.env.max_turns = min(limits)
        self.limit = given["max_turns"]
        self._rows: Any = None

    def _input(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return the input that a row names by its column `task`, or is itself. Raises PlayerProblem."""
        if "task" in row and isinstance(row["task"], int):
            if self._rows is None:
                self._rows = self.env.get_dataset()
            if not 0 <= row["task"] < len(self._rows):
                raise PlayerProblem(
                    f"column `task`: {row['task']} is not among the {len(self._rows)} tasks of the "
                    f"environment; write "
                    f"0 to {len(self._rows) - 1}"
                )
            return dict(self._rows[row["task"]])
        prompt = row["prompt"]
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
            if self.env.system_prompt:
                prompt.insert(0, {"role": "system", "content": self.env.system_prompt})
        return {"example_id": 0, "answer": "", "info": {}, **row, "prompt": prompt}

    async def play(self, asked: dict[str, Any]) -> dict[str, Any]:
        """Play one episode."""
        from verifiers.types import ClientConfig

        client = ClientConfig(
            client_type="openai_chat_completions", api_base_url=f"{asked['url']}/v1", api_key_var=KEY
        )
        output = await self.env.run_rollout(self._input(asked["row"]), client, "policy", {})
        prompt, completion = output["prompt"] or [], output["completion"] or []
        turns = sum(dict(m).get("role") == "assistant" for m in completion)
        return {
            "failure": "" if output.get("error") is None else f"verifiers: {output['error']!s:.1900}",
            "reward": output["reward"],
            "scores": output.get("metrics") or {},
            "messages": [message(m) for m in [*prompt, *completion]],
            "start": len(prompt),
            "turn_limit": output.get("stop_condition") == "max_turns_reached" and turns >= self.limit,
        }


def option_error(error: Exception) -> str:
    """Return the message for options that verifiers refuses, with the key if pydantic found it."""
    details = error.errors() if hasattr(error, "errors") else []
    if not details:
        return f"environment.options: {error}"
    where = ".".join(map(str, ("environment.options", *details[0]["loc"])))
    return f"{where}: {details[0]['msg']}"


def pick(wanted: Any, known: list[Any], more: Iterator[Any], name: Callable[[Any], Any]) -> Any:
    """Return the task of a number, from 0 on, or of a name. Raises PlayerProblem."""
    if isinstance(wanted, int):
        known.extend(itertools.islice(more, max(0, wanted + 1 - len(known))))
        if 0 <= wanted < len(known):
            return known[wanted]
        raise PlayerProblem(
            f"column `task`: {wanted} is not among the {len(known)} tasks of the taskset; write 0 to "
            f"{len(known) - 1}"
        )
    for task in known:
        if name(task) == wanted:
            return task
    for task in more:
        known.append(task)
        if name(task) == wanted:
            return task
    raise PlayerProblem(f"column `task`: none of the {len(known)} tasks of the taskset is called {wanted!r}")


def known_renderer(model: str) -> dict[str, Any]:
    """Return the config of the renderer for a model's name; by default the one for chat templates."""
    from renderers.base import MODEL_RENDERER_MAP

    return {"name": MODEL_RENDERER_MAP.get(model, "default")}


def message(given: Any) -> dict[str, Any]:
    """Return a message in rft's form: a text, and tool calls with their arguments as objects."""
    raw = dict(given) if isinstance(given, Mapping) else given.model_dump(exclude_none=True)
    content = raw.get("content") or ""
    if not isinstance(content, str):
        content = "".join(str(part.get("text", "")) for part in content)
    plain: dict[str, Any] = {"role": raw["role"], "content": content}
    for key in ("reasoning_content", "tool_call_id", "name"):
        if isinstance(raw.get(key), str):
            plain[key] = raw[key]
    calls = [
        (call, call.get("function", call)) for call in raw.get("tool_calls") or [] if isinstance(call, dict)
    ]
    if calls:
        plain["tool_calls"] = [
            {
                "id": str(call.get("id", "")),
                "type": "function",
                "function": {
                    "name": function.get("name", ""),
                    "arguments": arguments(function.get("arguments")),
                },
            }
            for call, function in calls
        ]
    return plain


def arguments(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else text or {}
    except ValueError:
        return {}


def describe(errors: list[Any]) -> str:
    return "verifiers: " + (
        "; ".join(f"{e.type}: {e.message}" for e in errors)[:1900] or "the episode failed"
    )


def main(fd: int, given: dict[str, Any]) -> None:
    """Load, then play what is asked for until the other end closes."""
    stream = socket.socket(fileno=fd).makefile("rw", encoding="utf-8", newline="\n")

    def send(answer: dict[str, Any]) -> None:
        stream.write(json.dumps(answer, default=str) + "\n")
        stream.flush()

    sys.path[:] = [*(path for path in sys.path if path), given["folder"]]
    os.environ["PATH"] = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    try:
        host = load(given)
    except PlayerProblem as error:
        return send({"problem": str(error)})
    except BaseException:
        return send(
            {"problem": f"verifiers raised while it loaded {given['id']!r}: {traceback.format_exc()[-1900:]}"}
        )
    send({"loaded": version("verifiers")})
    with asyncio.Runner() as loop:
        for line in stream:
            asked = json.loads(line)
            os.environ[KEY] = asked["key"]
            random.seed(asked["seed"])
            try:
                send(loop.run(host.play(asked)))
            except PlayerProblem as error:
                send({"problem": str(error)})
            except Exception:
                send({"failure": traceback.format_exc()[-1900:]})


if __name__ == "__main__":
    main(int(sys.argv[1]), json.loads(sys.argv[2]))
