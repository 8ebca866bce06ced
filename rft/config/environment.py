"""Config section `environment`: the multi-turn task, its budgets, deadlines and worker processes."""

from __future__ import annotations

import inspect
import shlex
from collections.abc import Callable, Mapping
from typing import Any, Literal

from pydantic import Field, ModelWrapValidatorHandler, PrivateAttr, field_validator, model_validator

from rft.config.base import ConfigModel
from rft.config.rewards import PASSED, PassedReward, pass_object
from rft.utils.paths import PathText

Kind = Literal[
    "tools", "class", "text", "function", "reasoning_gym", "command", "mcp", "openenv", "verifiers"
]
ToolParser = Literal["auto", "json", "llama3", "pythonic", "xml"]


def kind_of(target: Callable[..., Any]) -> Kind:
    """Return the kind of a class or function that a Python program passes. Raises ValueError."""
    if inspect.iscoroutinefunction(target):
        return "function"
    if callable(getattr(target, "step", None)):
        return "text"
    if callable(getattr(target, "reset", None)):
        return "class"
    if inspect.isclass(target) and any(
        inspect.iscoroutinefunction(getattr(target, name, None)) for name in ("__call__", "run")
    ):
        return "function"
    raise ValueError(
        f"{getattr(target, '__name__', target)} is neither an async function nor a class with `reset` or "
        "`step`; say what it is: environment={'kind': ..., 'path': ...}"
    )


class EnvironmentConfig(ConfigModel):
    """The environment in which the policy acts, over several turns."""

    kind: Kind = Field(
        description="tools (functions that the policy may call), class (TRL's environment class: `reset`, "
        "methods as tools, `get_reward`), text (`reset` or `init`, and `step(text)`), function (an async "
        "function of a row and a session), reasoning_gym (several tries with feedback), command (a program "
        "that calls the policy by HTTP), mcp (the tools of an MCP server), openenv (an OpenEnv server), "
        "verifiers (a taskset or environment of verifiers)"
    )
    path: PathText | None = Field(
        None,
        description="the class or function: `file.py:name` or `package.module:name`; from Python also "
        "the object itself. Of kind verifiers: the name of the taskset or environment, or its file or folder",
    )
    tools: list[PathText] = Field(
        [],
        description="functions that the policy may call (kinds tools and class): `python`, `calculator`, "
        "`file.py:function` or `package.module:function`; from Python also the functions themselves",
    )
    command: list[str] | None = Field(
        None,
        description="the program of kind command, mcp or openenv, as one text or as a list; names "
        "of files are relative to the working folder of the run",
    )
    python: PathText | None = Field(
        None, description="kind verifiers: the `python` of the virtual environment that has verifiers"
    )
    passed: dict[str, PassedReward] = Field(
        {}, description="written by rft for objects that were passed from Python, by name: not set by hand"
    )
    max_turns: int = Field(8, ge=1, description="maximum model calls per session")
    max_tokens_per_turn: int | None = Field(
        None, ge=1, description="maximum sampled tokens per call (none: `sampling.max_completion_length`)"
    )
    max_episode_tokens: int | None = Field(
        None,
        ge=2,
        description="maximum length of a session's context, in tokens, with its prompt (none: "
        "`sampling.max_prompt_length` + `sampling.max_completion_length`)",
    )
    setup_timeout_s: float = Field(
        60.0, gt=0, description="deadline of a session's start, in seconds, up to its first model call"
    )
    step_timeout_s: float = Field(
        30.0,
        gt=0,
        description="deadline of one tool call or step, in seconds, after which its process is killed",
    )
    episode_timeout_s: float = Field(
        600.0, gt=0, description="deadline of a session in seconds, including its model calls"
    )
    concurrency: int = Field(64, ge=1, description="maximum concurrent sessions, each in a worker process")
    max_retries: int = Field(
        2,
        ge=0,
        description="retries of a session after a fault (not of the policy), with growing "
        "delays, before its sample is removed from the group",
    )
    transcript: bool = Field(
        False,
        description="give the config's rewards the whole transcript, as a list of messages, instead of the "
        "final message",
    )
    tool_parser: ToolParser = Field(
        "auto", description="format of the policy's tool calls; auto: that of the chat template"
    )
    options: dict[str, Any] = Field({}, description="options passed to the class or function")
    load_timeout_s: float = Field(
        120.0, gt=0, description="deadline for loading the environment at the start, in seconds"
    )
    recycle_after: int = Field(
        256, ge=1, description="sessions after which a worker process is replaced (1: a new one for each)"
    )
    worker_memory_gib: float | None = Field(
        4.0,
        gt=0,
        description="memory limit of a worker process and its children, in GiB, above which it is killed "
        "(none: no limit)",
    )

    _payloads: dict[str, bytes] = PrivateAttr(default_factory=dict)

    @field_validator("command", mode="before")
    @classmethod
    def _words(cls, value: Any) -> Any:
        """Split a text into words, as a shell does."""
        if not isinstance(value, str):
            return value
        words = shlex.split(value)
        if not words:
            raise ValueError("write the program, such as `python agent.py`")
        return words

    @model_validator(mode="wrap")
    @classmethod
    def _from_objects(
        cls, value: Any, handler: ModelWrapValidatorHandler[EnvironmentConfig]
    ) -> EnvironmentConfig:
        """Accept a class or function in place of the section, and objects as path and tools; pickle them."""
        if callable(value) and not isinstance(value, ConfigModel):
            value = {"path": value}
        if not isinstance(value, Mapping):
            return handler(value)
        value, passed, payloads = dict(value), dict(value.get("passed") or {}), dict[str, bytes]()

        def name_of(what: str, target: Any) -> Any:
            if not callable(target):
                return target
            name, identity, payload = pass_object(what, target, "the environment's workers")
            passed[name], payloads[name] = identity, payload
            return name

        if callable(value.get("path")):
            value.setdefault("kind", kind_of(value["path"]))
        elif value.get("tools") and not value.get("path"):
            value.setdefault("kind", "tools")
        if "path" in value:
            value["path"] = name_of("the environment", value["path"])
        if isinstance(value.get("tools"), list | tuple):
            value["tools"] = [name_of("the tool", tool) for tool in value["tools"]]
        made = handler({**value, "passed": passed} if passed else value)
        made._payloads = payloads
        return made

    @model_validator(mode="after")
    def _known_objects(self) -> EnvironmentConfig:
        for name in (*([] if self.path is None else [self.path]), *self.tools):
            if name.startswith(PASSED) and name not in self.passed:
                raise ValueError(
                    f"{name} refers to an object passed from Python; in a config file write "
                    "`file.py:name` or `package.module:name`"
                )
        return self

    @property
    def payloads(self) -> dict[str, bytes]:
        """Return the pickles of passed objects by name; none in a config that was read."""
        return self._payloads

    def with_payloads(self, payloads: Mapping[str, bytes]) -> EnvironmentConfig:
        """Return a copy with the pickles of passed objects, by name."""
        copy = self.model_copy()
        copy._payloads = dict(payloads)
        return copy
