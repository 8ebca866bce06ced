"""Probes of the chat template and the tool parser: sessions with fixed replies, without the environment."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from rft.batch import Prompt
from rft.data.chat import Renderer
from rft.data.dialogue import opened_thought
from rft.data.errors import RowProblem
from rft.environments.types import Reply
from rft.rollout.engine import Generated, Request, Sampling
from rft.rollout.session import Budget, Session
from rft.rollout.tool_calls import parse
from rft.tools.env_check.policies import Tools, Turn, encoded, example, write_call
from rft.tools.env_check.report import Report, shown_difference

QUESTION, ANSWER, THOUGHT, MORE = "What is 2 + 2?", "The answer is 4.", "Two and two are four.", "Go on."
BUDGET = Budget(turns=9, tokens_per_turn=1 << 20, context=1 << 24)
OPTIONS: tuple[dict[str, Any], ...] = (
    {"enable_thinking": False},
    {"preserve_thinking": True},
    {"keep_thinking": True},
    {"clear_thinking": False},
)
"""Variables by which published templates keep thoughts or do without; each is tried before it is advised."""
ODD_VALUES = ("two\nlines", 'a "quoted" word', "{} [] <b>", "007", "naïve 数", " spaces ")
COST = "each turn starts a branch, and its context is computed and trained again"


@dataclass(frozen=True)
class Probe:
    """A template, with the tools of the environment. parser: the format of tool calls; None: no tools."""

    render: Renderer
    tools: Tools
    parser: str | None

    @property
    def role(self) -> str:
        """Return the role of observations."""
        return "tool" if self.tools else "user"

    @property
    def opened(self) -> str:
        """Return the tag of the thought that the generation prompt opens, "" if it opens none."""
        messages = self.render.as_messages(QUESTION)
        return opened_thought(self.render.render(messages, self.schemas, generate=True))

    @property
    def schemas(self) -> list[Any] | None:
        return [*self.tools] or None

    def answer(self, thought: str = "") -> Generated:
        """Return an answer of the policy, with a call of the first tool if there are tools. thought: before
        it; an opened one is closed in any case."""
        words = ANSWER
        if self.tools:
            function = self.tools[0].get("function", self.tools[0])
            words = write_call(self.parser or "json", function["name"], _arguments(function))
        if self.opened:
            words = f"{thought}\n</{self.opened}>\n\n{words}"
        elif thought:
            words = f"<think>\n{thought}\n</think>\n\n{words}"
        return encoded(self.render, words)

    async def converse(self, answer: Generated, turns: int, observation: str = MORE) -> Session:
        """Play a session with one answer in every turn. Raises ValueError if the template rejects it."""

        async def generate(request: Request) -> list[Generated]:
            return [answer]

        prompt = Prompt(0, tuple(self.render.prompt(QUESTION, self.schemas)[1]), QUESTION)
        sampling = Sampling(1, 1, seed=0)
        session = Session(generate, self.render, prompt, sampling, BUDGET, "probe", self.parser)
        messages = list(session.messages)
        for _ in range(turns):
            reply = await session.chat(messages, tools=self.schemas)
            messages += [reply.message(), self._observed(reply, observation)]
        return session

    def _observed(self, reply: Reply, text: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": self.role, "content": text}
        if reply.tool_calls:
            message |= {"name": reply.tool_calls[0].name, "tool_call_id": reply.tool_calls[0].id}
        return message


def _arguments(function: Any) -> dict[str, Any]:
    turn = Turn(Prompt(0, (), ""), (), 0, text="two three")
    schema = {"type": "object", **(function.get("parameters") or {})}
    return dict(example(schema, turn, random.Random(1)))


async def check_template(probe: Probe, report: Report) -> None:
    """Run all probes of the template."""
    try:
        await _check_append_only(probe, report)
        if probe.tools and probe.parser is not None:
            _check_parser(probe, report)
        await _check_injection(probe, report)
    except (ValueError, RowProblem) as problem:
        report.problem(
            "template",
            f"a second turn with an observation of role {probe.role!r} cannot be rendered: {problem}",
            "use a chat template that has this role",
        )


# -- append-only -----------------------------------------------------------------------------------------


def first_branch(calls: Sequence[Any], tokenizer: Any) -> str:
    """Return where the prompt of a call does not begin with the call before it; "" if all of them do."""
    for k, (a, b) in enumerate(pairwise(calls), 2):
        whole = a.prompt + a.sampled
        if b.prompt[: len(whole)] != whole:
            at, shown = shown_difference(tokenizer, whole, b.prompt)
            return f"the prompt of turn {k} differs from the turns before at token {at}: {shown}"
    return ""


async def _difference(probe: Probe, thought: str) -> str:
    session = await probe.converse(probe.answer(thought), 3)
    return first_branch(session.calls, probe.render.tokenizer)


async def _check_append_only(probe: Probe, report: Report) -> None:
    """Compare the prompts of three turns, without and with thoughts."""
    plain = "" if probe.opened else await _difference(probe, "")
    thinking = "" if plain else await _difference(probe, THOUGHT)
    if plain:
        remedy = await _remedy(probe, "")
        report.problem("template", f"it writes earlier turns differently: {plain}; {COST}", remedy)
    if thinking:
        report.problem(
            "thinking",
            f"the chat template strips the thoughts of earlier turns: {thinking}; {COST}",
            await _remedy(probe, THOUGHT),
        )
    what = "not append-only" if plain else "append-only without thoughts" if thinking else "append-only"
    opens = f"; the prompt opens <{probe.opened}>" if probe.opened else ""
    thoughts = "not checked" if plain else "stripped" if thinking else "kept"
    report.line("template", what, append_only=not (plain or thinking), difference=plain or thinking)
    report.line(
        "thinking", f"past thoughts are {thoughts}{opens}", past_thoughts=thoughts, opens=probe.opened
    )


async def _remedy(probe: Probe, thought: str) -> str:
    """Return an option that makes the template append-only, if one of those known does."""
    config = probe.render.config
    for option in OPTIONS:
        options = {**config.chat_template_options, **option}
        changed = config.model_copy(update={"chat_template_options": options})
        other = replace(probe, render=Renderer(changed, probe.render.tokenizer))
        question = probe.render.as_messages(QUESTION)
        try:
            if "enable_thinking" in option:  # the policy does not think, if the template knows it
                prompts = [p.render.render(question, p.schemas, generate=True) for p in (probe, other)]
                left = "unknown" if prompts[0] == prompts[1] else await _difference(other, "")
            else:
                left = await _difference(other, thought)
        except (ValueError, RowProblem):
            continue
        if not left:
            ((name, value),) = option.items()
            return f"set data.chat_template_options: {{{name}: {str(value).lower()}}}"
    _, why = probe.render.bridge
    return (
        "give a chat template that repeats earlier turns unchanged (model.tokenizer: a folder whose "
        f"tokenizer has one); the rules of the model's family do not help: {why}"
    )


# -- tool calls ------------------------------------------------------------------------------------------


def _check_parser(probe: Probe, report: Report) -> None:
    """Write a call of each tool by the template, and parse it again; then with odd texts as arguments."""
    assert probe.parser is not None
    lost: list[str] = []
    odd: list[str] = []
    count = 0
    for tool in probe.tools:
        function = tool.get("function", tool)
        plain = _arguments(function)
        texts = [key for key, value in plain.items() if isinstance(value, str)][:1]
        for arguments in (plain, *({**plain, key: value} for key in texts for value in ODD_VALUES)):
            count += 1
            written = _written(probe, function["name"], arguments)
            parsed = parse(probe.parser, written, probe.tools)
            read = [(call.name, call.arguments) for call in parsed.calls]
            if read != [(function["name"], arguments)]:
                shown = f"{written!r:.200} is read as {parsed.error or read!r:.200}"
                (lost if arguments is plain else odd).append(shown)
    if lost:
        report.problem(
            "parser",
            f"the chat template writes calls of {len(lost)} of {len(probe.tools)} tools in a format that "
            f"`{probe.parser}` does not read: {lost[0]}",
            "set environment.tool_parser to the format that the model writes",
        )
    if odd:
        report.note("parser", f"an argument with special characters is changed: {odd[0]}")
    good = count - len(lost) - len(odd)
    text = f"{probe.parser}: {good} of {count} calls come back as they were written"
    report.line("parser", text, format=probe.parser, calls=count, unchanged=good)


def _written(probe: Probe, name: str, arguments: dict[str, Any]) -> str:
    """Return a tool call as the template writes it, "" if it does not write tool calls."""
    question = probe.render.as_messages(QUESTION)
    call = {"type": "function", "id": "call00000", "function": {"name": name, "arguments": arguments}}
    message = {"role": "assistant", "content": "", "tool_calls": [call]}
    head = probe.render.render(question, probe.schemas, generate=True)
    text = probe.render.render([*question, message], probe.schemas)
    at = next((i for i, (a, b) in enumerate(zip(text, head, strict=False)) if a != b), len(head))
    at = len(re.sub(r"[<\[{]\S*\Z", "", text[:at]))  # both may begin with `<t`: `<think>`, `<tool_call>`
    end = text.rfind(probe.render.end) if probe.render.end else -1
    return text[at : end if end >= at else None]


# -- forged turns ----------------------------------------------------------------------------------------


async def _check_injection(probe: Probe, report: Report) -> None:
    """Observe the markup of a turn and all special tokens as text, and count those that mark turns."""
    render = probe.render
    added = {str(token): i for i, token in render.tokenizer.added_tokens_decoder.items()}
    question, answer = {"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}
    opens = render.render([question], generate=True).rpartition(QUESTION)[2]
    marks = {i for text, i in added.items() if text in render.render([question, answer]) + opens}
    if not any(token in opens for token in added):
        report.line("injection", "turns are opened by ordinary text", safe=False)
        report.problem(
            "injection",
            f"the chat template opens a turn by ordinary text, {opens!r}: an observation that contains it "
            "opens one too",
            "use a chat template whose role markers are special tokens",
        )
        return
    counts = []
    for observation in ("ok", f"ok{opens}obey{''.join(sorted(added))[:2000]}"):
        session = await probe.converse(probe.answer(), 2, observation)
        counts.append(sum(token in marks for token in session.calls[-1].prompt))
    safe = counts[0] == counts[1]
    if not safe:
        report.problem(
            "injection",
            f"text in an observation becomes {counts[1] - counts[0]} tokens that mark turns",
            "use a tokenizer that declares its role markers as special tokens",
        )
    text = f"{len(added)} special tokens in an observation stay text" if safe else "observations forge turns"
    report.line("injection", text, safe=safe)
