"""Kind `class`: TRL's environment class: `reset(**row)`, public methods as tools, `get_reward()`."""

from __future__ import annotations

import inspect
import statistics
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rft.environments.loop import first_messages, tool_loop
from rft.environments.rewards import read_reward, refuse_text
from rft.environments.tools import Toolbox, call_tool, kept, load_tools
from rft.environments.types import Episode, Message, Row, Session, ToolCall, WorkerDied, WorkerHung
from rft.rewards.load import ENVIRONMENTS, SpecError, checked_options, describe_error, load_spec
from rft.rewards.pool import Spec as RewardSpec
from rft.rewards.pool import spec_of
from rft.rewards.types import Outcome, Score
from rft.rewards.worker import decode, encode

if TYPE_CHECKING:
    from rft.environments.runner import Remote
    from rft.environments.zygote import Spec

NOT_TOOLS = ("reset", "get_reward")


class Host:
    """Operations in the worker. As in TRL, an instance is made once, and `reset` for each episode."""

    session: Any = None

    def __init__(self, spec: Spec) -> None:
        assert spec.path is not None
        self.spec, self.path = spec, spec.path
        self.factory = spec.resolve(spec.path)
        self.options = checked_options(spec.path, self.factory, spec.options, strict=False)
        self.stateful: list[Any] = []
        self.instance: Any = None
        self.rewards: dict[str, Any] = {}  # of the config, loaded at their first call
        self.kind: Any = self.factory if inspect.isclass(self.factory) else type(self._make())
        members = dict(inspect.getmembers(self.kind, predicate=inspect.isfunction))
        if "reset" not in members:
            raise SpecError(f"{spec.path} has no `reset`; an environment class needs `reset(self, **row)`")
        self.gives_reward = "get_reward" in members
        if self.gives_reward:
            refuse_text(members["get_reward"], f"{spec.path}.get_reward")
        self.methods = [n for n in members if not n.startswith("_") and n not in NOT_TOOLS]
        # Schemas are those of the class: an instance may open connections, which workers must not share.
        self.toolbox = Toolbox(
            [(f"{self.path}.{name}", members[name]) for name in self.methods]
            + load_tools(spec, self.stateful)
        )

    def _make(self) -> Any:
        return self.factory(**self.options)

    def describe(self) -> dict[str, Any]:
        parameters = inspect.signature(self.kind.reset).parameters.values()
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters)
        names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD][1:]  # without self
        return {
            "tools": self.toolbox.schemas,
            "gives_reward": self.gives_reward,
            "columns": None if takes_all else names,
        }

    def kept(self) -> set[int]:
        return kept(self.stateful)

    def reset(self, row: Mapping[str, Any]) -> Any:
        if self.instance is None:
            self.instance = self._make()
            for name in self.methods:
                self.toolbox.functions[name] = getattr(self.instance, name)
        return self.instance.reset(**row)

    def call(self, name: str, arguments: Mapping[str, Any]) -> Any:
        return self.toolbox.call(name, arguments)

    async def reward(self) -> dict[str, Any]:
        value = self.instance.get_reward()
        if inspect.isawaitable(value):
            value = await value
        reward, scores = read_reward(value, f"{self.path}.get_reward")
        return {"reward": reward, "scores": scores}

    def judge(
        self, label: str, spec: RewardSpec, prompt: Any, completion: list[Message], columns: dict[str, Any]
    ) -> tuple[Any, dict[str, list[float]]]:
        """Call a reward of the config with this environment, as TRL does; return its encoded score, and the
        values that it passed to `log_metric`. An exception is a failed score, never a zero."""
        try:
            if label not in self.rewards:
                self.rewards[label] = load_spec(spec.function, spec.options, spec.base_dir, spec.payload)
            reward, lists = self.rewards[label], {name: [value] for name, value in columns.items()}
            scores = reward.score([prompt], [completion], **lists, **{ENVIRONMENTS: [self.instance]})
            return encode(scores), reward.take_logged()
        except BaseException as error:  # SystemExit and similar must not end the worker
            return encode([Score(None, Outcome.error, describe_error(error))]), {}

    def end(self) -> None:
        for tool in self.stateful:
            tool.close()


async def play(row: Row, session: Session, remote: Remote) -> Episode:
    """Play one episode. A tool that overruns loses the state of the environment, which ends the episode."""
    observation = await remote.call("reset", row, setup=True)
    messages = first_messages(row, observation)
    start = len(messages)

    async def call(tool: ToolCall) -> str:
        return await call_tool(remote, tool)

    ending = await tool_loop(session, messages, remote.tools, call)
    given = await remote.call("reward") if remote.gives_reward else {"reward": None, "scores": {}}
    judged, logged = await judge(row, remote, messages[start:])
    return Episode(given["reward"], ending, {**given["scores"], **logged}, messages, start, judged=judged)


async def judge(
    row: Row, remote: Remote, completion: list[Message]
) -> tuple[dict[str, Score], dict[str, float]]:
    """Call the config's rewards that read the environment. Return their scores by label, and the means of the
    values they passed to `log_metric`. completion: the transcript. A hang or a crash is a failed score of its
    reward."""
    scores: dict[str, Score] = {}
    metrics: dict[str, float] = {}
    for c in remote.runner.rewards:
        columns = {name: value for name, value in row.items() if name != "prompt"}
        columns |= {parameter: row[column] for parameter, column in c.columns.items() if column in row}
        spec = spec_of(c, remote.runner.spec.base_dir)
        try:
            made, logged = await remote.call("judge", c.label, spec, row["prompt"], completion, columns)
            (score,) = (replace(each, steps=tuple(each.steps)) for each in decode(made))  # lists in JSON
        except WorkerHung as error:
            score, logged = Score(None, Outcome.timeout, str(error)), {}
        except WorkerDied as error:
            score, logged = Score(None, Outcome.error, str(error)), {}
        scores[c.label] = score
        metrics |= {name: statistics.fmean(values) for name, values in logged.items()}
        if not remote.running:
            left = [other.label for other in remote.runner.rewards if other.label not in scores]
            scores |= {label: replace(score, detail=f"not called: {score.detail}") for label in left}
            break  # the environment died with its worker
    return scores, metrics
