"""One sample's model calls in an environment, each with its exact ids, log-probs and policy versions."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rft.batch import Prompt
from rft.config.environment import EnvironmentConfig
from rft.config.rollout import SamplingConfig
from rft.data.chat import Renderer
from rft.data.dialogue import Dialogue, Exchange, NextPrompt, Tools
from rft.data.errors import RowProblem
from rft.data.messages import Messages, read_messages, read_tools
from rft.environments.types import ContextFull, Reply, TurnLimit
from rft.rollout.calls import Call
from rft.rollout.engine import Generate, Request, Sampling
from rft.rollout.sample import decode, text_length
from rft.rollout.tool_calls import Parsed, parse
from rft.utils.seeds import derive_seed


class SessionClosed(RuntimeError):
    """A model call after the end of its session, as of an environment that exceeded its time."""


@dataclass(frozen=True)
class Budget:
    """Limits of a session, in calls and tokens. context: prompt and sampled tokens of one call."""

    turns: int
    tokens_per_turn: int
    context: int

    @staticmethod
    def of(config: EnvironmentConfig, sampling: SamplingConfig) -> Budget:
        per_turn = config.max_tokens_per_turn or sampling.max_completion_length
        whole = config.max_episode_tokens or sampling.max_prompt_length + sampling.max_completion_length
        return Budget(config.max_turns, per_turn, whole)


@dataclass
class Record:
    """Counts over the calls of one session, for its metrics."""

    retokenised: int = 0  # prompts that contain an earlier turn, encoded afresh
    rewritten: int = 0  # turns kept as sampled that the template would write differently
    bridged: int = 0  # prompts that the rules of the model's family extend, and the template does not
    malformed: int = 0  # answers with a tool call that could not be parsed
    tool_calls: int = 0  # those that could be parsed
    cached: int = 0  # tokens of prompts that the engine had read before


class Session:
    """One sample of a row in an environment (`rft.environments.types.Session`). It owns no loop: the
    environment decides on the calls.

    sampling: of every call; its seed is the session's, from which those of the calls follow. parser: the
    format of tool calls (`tool_calls.FORMATS`), for chats with tools. name: unique among those in flight.
    """

    def __init__(
        self,
        generate: Generate,
        render: Renderer,
        prompt: Prompt,
        sampling: Sampling,
        budget: Budget,
        name: str,
        parser: str | None = None,
    ) -> None:
        self._generate, self._render, self._sampling = generate, render, sampling
        self.budget, self.name, self.seed, self._parser = budget, name, sampling.seed, parser
        self.record = Record()
        self.rewards: dict[str, float] = {}
        self.waited_s = 0.0  # in model calls
        self.tools = read_tools(prompt.columns.get("tools"))
        self._dialogue: Dialogue | None = None
        self._prompt = prompt
        self._calls: list[Call] = []  # in the order in which they were answered
        self._started = 0
        self._turn_rewards: dict[int, float] = {}
        self._closed = ""

    @property
    def tokenizer(self) -> Any:
        return self._render.tokenizer

    @property
    def messages(self) -> Messages:
        """The row's messages, as the template gets them: with the config's system message."""
        return self._render.as_messages(self._prompt.text)

    @property
    def calls(self) -> list[Call]:
        """The calls with their rewards, in the order in which they were answered."""
        rewards = self._turn_rewards
        return [replace(c, reward=rewards[i]) if i in rewards else c for i, c in enumerate(self._calls)]

    def close(self, reason: str) -> None:
        """Refuse later calls."""
        self._closed = reason

    def reward(self, value: float, *, name: str = "reward", call: int | None = None) -> None:
        """Add a reward: to the turn `call`, or to the whole session under a name. Raises ValueError."""
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"a reward is a finite number, not {value!r}")
        if call is None:
            self.rewards[name] = self.rewards.get(name, 0.0) + float(value)
            return
        if not 0 <= call < len(self._calls):
            raise ValueError(f"reward of call {call}: this session has {len(self._calls)} calls, from 0 on")
        self._turn_rewards[call] = self._turn_rewards.get(call, 0.0) + float(value)

    async def generate(
        self,
        tokens: Sequence[int],
        *,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        stop_token_ids: Sequence[int] = (),
        trained: bool = True,
    ) -> Call:
        """Continue a prompt of token ids. trained False: a call that is not part of the task (a title).
        Raises ContextFull, TurnLimit, ValueError for unusable arguments, SessionClosed."""
        prompt = self._checked(tokens)
        limit = self._room(len(prompt), max_tokens)
        call, _ = await self._call(prompt, limit, stop, stop_token_ids, trained)
        return call

    async def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        max_tokens: int | None = None,
        stop: Sequence[str] = (),
        trained: bool = True,
    ) -> Reply:
        """Answer a conversation: all of its messages so far, with the earlier replies' `message()`.

        A prompt that is not proved to extend that of the last reply is rendered afresh. Raises as `generate`.
        """
        if self._closed:
            raise SessionClosed(self._closed)
        dialogue = self._dialogue = self._dialogue or Dialogue(self._render, self.messages, self._read)
        try:
            given = self._render.as_messages(read_messages(_encodable(list(messages)), "messages"))
            schemas = [dict(tool) for tool in tools] if tools else None
            if schemas and self._parser is None:
                raise RowProblem("`tools` need a chat template with tools, or environment.tool_parser")
            self.check_length(sum(len(message["content"]) for message in given))
            following = dialogue.prompt(given, schemas)
        except RowProblem as problem:
            raise ValueError(f"session.chat: {problem}") from None
        limit = self._room(len(following.ids), max_tokens)
        call, index = await self._call(following.ids, limit, stop, (), trained)
        self.record.retokenised += following.follows and not following.extends
        self.record.rewritten += following.rewritten
        self.record.bridged += following.bridged
        return self._reply(dialogue, given, schemas, following, call, index)

    def check_length(self, characters: int) -> None:
        """Raise ContextFull for a text that cannot fit, before it is encoded: megabytes take seconds, for
        which no other session goes on."""
        fewest = self._render.fewest_tokens(characters)
        if fewest >= self.budget.context:
            raise ContextFull(
                f"the prompt of turn {self._started + 1} has {fewest} tokens or more, and "
                f"environment.max_episode_tokens is {self.budget.context}"
            )

    # -- one call ------------------------------------------------------------------------------------------

    def _checked(self, tokens: Sequence[int]) -> tuple[int, ...]:
        size = len(self._render.tokenizer)
        bad = next((t for t in tokens if type(t) is not int or not 0 <= t < size), None)
        if bad is not None or not len(tokens):
            what = "a prompt without tokens" if bad is None else f"{bad!r}, not a token id below {size}"
            raise ValueError(f"session.generate: {what}")
        return tuple(tokens)

    def _room(self, length: int, max_tokens: int | None) -> int:
        """Return how many tokens a call may sample after a prompt of `length` tokens."""
        if self._closed:
            raise SessionClosed(self._closed)
        if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
            raise ValueError(f"max_tokens must be a whole number from 1 on, not {max_tokens!r}")
        if self._started >= self.budget.turns:
            raise TurnLimit(f"the session has made {self.budget.turns} calls (environment.max_turns)")
        room = self.budget.context - length
        if room < 1:
            raise ContextFull(
                f"the prompt of turn {self._started + 1} has {length} tokens, and "
                f"environment.max_episode_tokens is {self.budget.context}"
            )
        return min(room, self.budget.tokens_per_turn, max_tokens or room)

    async def _call(
        self, prompt: tuple[int, ...], limit: int, stop: Sequence[str], stop_ids: Sequence[int], trained: bool
    ) -> tuple[Call, int]:
        number = self._started
        self._started += 1
        base = self._sampling
        sampling = replace(
            base,
            n=1,
            max_tokens=limit,
            stop=(*base.stop, *stop),
            stop_token_ids=(*base.stop_token_ids, *stop_ids),
            seed=None if self.seed is None else derive_seed(self.seed, "turn", number),
        )
        begin = time.perf_counter()
        request = Request(f"{self.name}-{number}", prompt, sampling, session=self.name)
        (generated,) = await self._generate(request)
        self.record.cached += generated.cached
        self.waited_s += time.perf_counter() - begin
        call = Call(
            prompt, generated.tokens, generated.logps, generated.finish, generated.versions, trained=trained
        )
        self._calls.append(call)
        return call, len(self._calls) - 1

    # -- the answer ----------------------------------------------------------------------------------------

    def _reply(
        self, dialogue: Dialogue, given: Messages, tools: Tools, asked: NextPrompt, call: Call, index: int
    ) -> Reply:
        """Parse an answer, and record it for the prompts of later turns."""
        body, end = text_of(call, self._render.tokenizer)
        reasoning, parsed = self._read_parts(body, asked.opened, tools)
        self.record.malformed += bool(parsed.error)
        self.record.tool_calls += len(parsed.calls)
        calls = tuple(replace(c, id=f"call_{index}_{i}") for i, c in enumerate(parsed.calls))
        reply = Reply(parsed.content, reasoning, calls, call.finish, index, parsed.error)
        if given[-1]["role"] != "assistant":  # else it is the rest of a message that the environment began
            (answer,) = self._render.as_messages(read_messages([_encodable(reply.message())], "reply"))[-1:]
            texts = dict.fromkeys([f"<{asked.opened}>\n{body}" if asked.opened else body, body])
            forms = [answer, *(m for t in texts if (m := {"role": "assistant", "content": t}) != answer)]
            dialogue.exchanges.append(
                Exchange(given, tools, answer, forms, call.prompt, call.sampled, body, end)
            )
        return reply

    def _read_parts(self, text: str, opened: str, tools: Tools) -> tuple[str, Parsed]:
        """Split the text of an answer into its thought and the rest, and parse the rest."""
        reasoning, content = split_thought(text, opened)
        if not tools or self._parser is None:
            return reasoning, Parsed(content)
        return reasoning, parse(self._parser, content, tools)

    def _read(self, text: str, opened: str, tools: Tools) -> Any:
        """Return the meaning of an answer, to compare two ways of writing it."""
        reasoning, parsed = self._read_parts(text, opened, tools)
        calls = [(c.name, c.arguments) for c in parsed.calls]
        return reasoning.strip(), parsed.content.strip(), calls, bool(parsed.error)


def text_of(call: Call, tokenizer: Any) -> tuple[str, str]:
    """Return the text of an answer, and that of the token that ended it."""
    length = len(call.sampled)
    if call.finish == "stop" and length:  # its last token ended the answer, if that is an end token
        length += text_length(call.sampled[-1:], tokenizer, stopped=True) - 1
    body, end = decode([call.sampled[:length], call.sampled[length:]], tokenizer)
    return body, end


def split_thought(text: str, opened: str) -> tuple[str, str]:
    """Split an answer into (thought, rest). opened: the tag of the thought that the prompt opened, if any; a
    thought that is not closed is all of the text."""
    tag, inner = opened, text
    if not tag:
        bare = text.lstrip()
        if not bare.startswith("<think>"):
            return "", text
        tag, inner = "think", bare.removeprefix("<think>")
    thought, closed, rest = inner.partition(f"</{tag}>")
    return thought.strip("\n"), rest.lstrip("\n") if closed else ""


def _encodable(value: Any) -> Any:
    """Replace lone surrogates, which no tokenizer encodes, in all texts."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, Mapping):
        return {k: _encodable(v) for k, v in value.items()}
    return [_encodable(v) for v in value] if isinstance(value, list | tuple) else value
