"""Config section `environment`: the multi-turn task, its budgets, deadlines and worker processes."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rft.config.base import ConfigModel
from rft.utils.paths import PathText

Kind = Literal["tools", "class", "text", "function", "reasoning_gym"]
ToolParser = Literal["auto", "json", "llama3", "pythonic", "xml"]


class EnvironmentConfig(ConfigModel):
    """The environment in which the policy acts, over several turns."""

    kind: Kind = Field(
        description="tools (functions that the policy may call), class (TRL's environment class: `reset`, "
        "methods as tools, `get_reward`), text (`reset` or `init`, and `step(text)`), function (an async "
        "function of a row and a session), reasoning_gym (several tries with feedback)"
    )
    path: PathText | None = Field(
        None, description="the class or function: `file.py:name` or `package.module:name`"
    )
    tools: list[PathText] = Field(
        [],
        description="tools of kind `tools`: `python`, `calculator`, `file.py:function` or "
        "`package.module:function`",
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
        600.0, gt=0, description="deadline of a session in seconds, with the time of its model calls"
    )
    concurrency: int = Field(64, ge=1, description="maximum concurrent sessions, each in a worker process")
    max_retries: int = Field(
        2,
        ge=0,
        description="repetitions of a session that a fault ended (not the policy), with growing pauses, "
        "before its sample leaves the group",
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
        description="memory limit of a worker process with its children, in GiB, above which it is killed "
        "(none: no limit)",
    )
