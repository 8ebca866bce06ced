"""Kind `tools`: the policy calls plain Python functions, until it answers without a call."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rft.environments.loop import as_text, error_text, first_messages, tool_loop
from rft.environments.types import Ending, Episode, Row, Session, ToolCall, WorkerDied, WorkerHung
from rft.rewards.load import SpecError, describe_error, resolve
from rft.utils.did_you_mean import did_you_mean

if TYPE_CHECKING:
    from rft.environments.runner import Remote
    from rft.environments.zygote import Spec

BUILT_IN = {
    "calculator": "rft.environments.builtin_tools:calculator",
    "python": "rft.environments.builtin_tools:Python",
}


class Toolbox:
    """The tools of one environment, with the JSON schemas that the chat template shows to the policy.

    Raises SpecError for a tool without annotations or docstring, and for two tools of one name.
    """

    def __init__(self, functions: Sequence[tuple[str, Callable[..., Any]]]) -> None:
        """functions: each with the place that names it in error messages."""
        self.functions: dict[str, Callable[..., Any]] = {}
        self.schemas: list[dict[str, Any]] = []
        places: dict[str, str] = {}
        for place, function in functions:
            schema = tool_schema(place, function)
            name = schema["function"]["name"]
            if name in places:
                raise SpecError(
                    f"two tools are called {name!r} ({places[name]} and {place}): rename one of them"
                )
            places[name] = place
            self.functions[name] = function
            self.schemas.append(schema)

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        """Call a tool; the result is `{"content": text}`, or `{"error": text}` for the policy to read."""
        if name not in self.functions:
            known = ", ".join(self.functions) or "none"
            hint = did_you_mean(name, self.functions)
            return {"error": f"there is no tool {name!r}{hint}; the tools are {known}"}
        function = self.functions[name]
        try:
            inspect.signature(function).bind(**arguments)
            result = function(**arguments)
        except BaseException as error:  # SystemExit and similar must not end the worker
            return _failed(error)
        return _awaited(result) if inspect.isawaitable(result) else {"content": as_text(result)}


async def _awaited(result: Any) -> dict[str, str]:
    try:
        return {"content": as_text(await result)}
    except Exception as error:
        return _failed(error)


def _failed(error: BaseException) -> dict[str, str]:
    return {"error": f"{type(error).__name__}: {error}", "traceback": describe_error(error)}


def tool_schema(place: str, function: Callable[..., Any]) -> dict[str, Any]:
    """Return the JSON schema of a tool, from its signature and docstring. Raises SpecError.

    place: names the function in the error message.
    """
    from transformers.utils.chat_template_utils import get_json_schema

    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            raise SpecError(
                f"tool {place} takes *{name}, which a tool call cannot pass; name its parameters instead"
            )
    try:
        schema: dict[str, Any] = get_json_schema(function)
    except Exception as error:  # transformers' classes, and errors of the annotations
        raise SpecError(
            f"tool {place} needs an annotation for each parameter, and a docstring that describes each under "
            f"`Args:`: {error}"
        ) from None
    return schema


class Host:
    """Operations in the worker."""

    session: Any = None

    def __init__(self, spec: Spec) -> None:
        self.stateful: list[Any] = []
        self.toolbox = Toolbox(load_tools(spec, self.stateful))

    def describe(self) -> dict[str, Any]:
        return {"tools": self.toolbox.schemas, "gives_reward": False}

    def kept(self) -> set[int]:
        return kept(self.stateful)

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        return self.toolbox.call(name, arguments)

    def end(self) -> None:
        for tool in self.stateful:
            tool.close()


def load_tools(spec: Spec, stateful: list[Any]) -> list[tuple[str, Callable[..., Any]]]:
    """Load the tools that a spec names. Instances of built-in tools with state are added to `stateful`."""
    functions = []
    for name in spec.tools:
        if name in BUILT_IN:
            tool: Any = resolve(BUILT_IN[name])
            if name == "python":
                stateful.append(tool(spec.step_timeout_s, **dict(spec.options.get(name, {}))))
                tool = stateful[-1].python
        elif ":" not in name:
            raise SpecError(
                f"no built-in tool {name!r}{did_you_mean(name, BUILT_IN)}; the built-in tools are "
                f"{', '.join(BUILT_IN)}; write `file.py:function` for your own"
            )
        else:
            tool = spec.resolve(name)
        functions.append((name, tool))
    return functions


def kept(stateful: Sequence[Any]) -> set[int]:
    """Return the process ids that the tools keep for later episodes."""
    return {tool.pid for tool in stateful if tool.pid is not None}


async def call_tool(remote: Remote, call: ToolCall) -> str:
    """Call a tool in the worker, and return the text of its result. Raises WorkerHung and WorkerDied."""
    remote.tool_calls += 1
    result = await remote.call("call", call.name, call.arguments)
    if "error" not in result:
        return str(result["content"])
    remote.tool_errors += 1
    return error_text(result["error"])


async def play(row: Row, session: Session, remote: Remote) -> Episode:
    """Play one episode, which the config's rewards score. If a tool is killed, the policy sees an error."""

    async def call(tool: ToolCall) -> str:
        try:
            return await call_tool(remote, tool)
        except WorkerHung:
            problem = f"{tool.name} did not return within {remote.config.step_timeout_s:g} s and was stopped"
        except WorkerDied as death:
            problem = f"{tool.name} ended its process: {death}"
        remote.tool_errors += 1
        return error_text(problem)

    messages = first_messages(row)
    start = len(messages)
    ending: Ending = await tool_loop(session, messages, remote.tools, call)
    return Episode(None, ending, messages=messages, start=start)
