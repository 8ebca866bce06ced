"""Kind `text`: environments that answer texts, with the methods of Gymnasium, SkyRL-Gym and TextArena.

Gymnasium: `reset(seed=, options=)` returns an observation, or (observation, info); `step(text)` returns
    (observation, reward, terminated, truncated, info), or (observation, reward, done, info).
SkyRL-Gym: `init(prompt)` returns (messages, info); `step(text)` a dict with observations, reward, done.
TextArena: `reset(num_players=1, seed=)`, `get_observation()`; `step(text)` returns (done, info), and
    `close()` (rewards, info).
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from rft.environments.loop import as_text, first_messages, is_messages
from rft.environments.rewards import read_reward
from rft.environments.types import ContextFull, Ending, Episode, Message, Row, Session, TurnLimit
from rft.rewards.load import Arguments, SpecError, checked_options

if TYPE_CHECKING:
    from rft.environments.runner import Remote
    from rft.environments.zygote import Spec

SEPARATOR = "\n\n"  # between the prompt and the first observation


class Host:
    """Operations in the worker. A new instance of the environment is made for each episode."""

    session: Any = None

    def __init__(self, spec: Spec) -> None:
        assert spec.path is not None
        self.path = spec.path
        self.factory = spec.resolve(spec.path)
        self.options = dict(spec.options)
        self.needs_row = _takes_row(self.factory)
        if not self.needs_row:
            self.options = checked_options(spec.path, self.factory, spec.options, strict=False)
        self.instance: Any = None
        if inspect.isclass(self.factory) and not _can_start(self.factory):
            raise SpecError(
                f"{spec.path} has neither `reset` nor `init`: a text environment needs one, and `step(text)`"
            )
        if inspect.isclass(self.factory) and not callable(getattr(self.factory, "step", None)):
            raise SpecError(
                f"{spec.path} has no `step(text)`, which a text environment needs; if its methods are "
                "tools, write kind: class"
            )

    def describe(self) -> dict[str, Any]:
        return {"tools": [], "gives_reward": True}

    async def reset(self, row: Mapping[str, Any], max_turns: int) -> list[Message]:
        """Start an episode, and return its first messages."""
        self.instance = self._make(row, max_turns)
        if hasattr(self.instance, "init") and not hasattr(self.instance, "reset"):
            messages, _ = await _value(self.instance.init(first_messages(row)))
            return list(messages)
        if hasattr(self.instance, "get_observation"):
            self.instance.reset(num_players=1, seed=self.session.seed)
            return first_messages(row, self._player_observation(), SEPARATOR)
        offered = {"options": dict(row), **row, "seed": self.session.seed}
        reset = self.instance.reset
        result = await _value(Arguments(f"{self.path}.reset", reset).call(reset, offered))
        observation = result[0] if isinstance(result, tuple) and len(result) == 2 else result
        return first_messages(row, observation, SEPARATOR)

    def _make(self, row: Mapping[str, Any], max_turns: int) -> Any:
        if not self.needs_row:
            return self.factory(**self.options)
        # SkyRL-Gym: the options are its `env_config`, the columns its `extras`.
        name = {"id": self.options["id"]} if "id" in self.options else {}
        config = {key: value for key, value in self.options.items() if key != "id"}
        columns = {key: value for key, value in row.items() if key != "prompt"}
        return self.factory(**name, env_config=_omega(config), extras={"max_turns": max_turns, **columns})

    def _player_observation(self) -> str:
        player, observation = self.instance.get_observation()
        if player != 0:
            raise ValueError(
                f"{self.path} asks player {player} to act; only games of one player are supported"
            )
        if isinstance(observation, list):  # (sender, message, type) without TextArena's observation wrapper
            return "\n".join(str(text) for sender, text, *_ in observation if sender != player)
        return str(observation)

    async def step(self, text: str) -> dict[str, Any]:
        """Return the next messages, the reward of the step (None: none), and whether the episode is over.

        action: the text that the environment takes for the policy's, if it is another one.
        """
        result = await _value(self.instance.step(text))
        if isinstance(result, Mapping):
            observation, value, done = result["observations"], result["reward"], bool(result["done"])
        elif isinstance(result, tuple) and len(result) in (4, 5):
            observation, value, *ends = result[:-1]
            done = any(map(bool, ends))
        elif isinstance(result, tuple) and len(result) == 2:
            done = bool(result[0])
            value = self.instance.close()[0][0] if done else None
            observation = "" if done else self._player_observation()
        else:
            raise ValueError(
                f"{self.path}.step returned {result!r:.200}: return (observation, reward, terminated, "
                "truncated, info), or a dict with observations, reward and done"
            )
        reward, _ = read_reward(value, f"{self.path}.step")
        action = result.get("postprocessed_action") if isinstance(result, Mapping) else None
        return {"messages": _messages(observation), "reward": reward, "done": done, "action": action}

    def metrics(self) -> dict[str, float]:
        """Return the numbers of SkyRL-Gym's `get_metrics`."""
        values = self.instance.get_metrics() if hasattr(self.instance, "get_metrics") else {}
        return {str(k): float(v) for k, v in values.items() if isinstance(v, int | float)}

    def end(self) -> None:
        instance, self.instance = self.instance, None
        if instance is not None and hasattr(instance, "close") and not hasattr(instance, "get_observation"):
            instance.close()


def _takes_row(factory: Any) -> bool:
    """Whether it is SkyRL-Gym's: its class takes `extras`, or it is that package's `make`."""
    if (getattr(factory, "__module__", "") or "").startswith("skyrl_gym.envs.registration"):
        return True
    try:
        return "extras" in inspect.signature(factory).parameters
    except ValueError:  # written in C
        return False


def _can_start(kind: type) -> bool:
    return any(callable(getattr(kind, name, None)) for name in ("reset", "init"))


def _omega(config: dict[str, Any]) -> Any:
    """Return the config as SkyRL-Gym's environments expect it: readable by attribute."""
    try:
        from omegaconf import OmegaConf  # a dependency of SkyRL-Gym
    except ImportError:
        return config
    return OmegaConf.create(config)


async def _value(result: Any) -> Any:
    return await result if inspect.isawaitable(result) else result


def _messages(observation: Any) -> list[Message]:
    if observation is None or observation == "" or observation == []:
        return []
    if is_messages(observation):
        return list(observation)
    return [{"role": "user", "content": as_text(observation)}]


async def play(row: Row, session: Session, remote: Remote) -> Episode:
    """Play one episode; its reward is the sum of the steps' rewards, each also recorded for its turn."""
    messages = await remote.call("reset", row, remote.config.max_turns, setup=True)
    start, total, ending = len(messages), 0.0, Ending.finished
    while True:
        try:
            reply = await session.chat(messages)
        except (ContextFull, TurnLimit) as limit:
            ending = Ending.context_full if isinstance(limit, ContextFull) else Ending.turn_limit
            break
        step = await remote.call("step", reply.content)
        answer = reply.message()
        messages.append(answer if step["action"] is None else {**answer, "content": step["action"]})
        if step["reward"] is not None:
            session.reward(step["reward"], call=reply.call)
            total += step["reward"]
        if step["done"]:  # nobody answers the last observation
            break
        messages += step["messages"]
    return Episode(total, ending, await remote.call("metrics"), messages, start)
