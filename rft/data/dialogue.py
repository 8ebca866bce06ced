"""Exact prompts for the turns of a conversation: extend the ids of the turns before, where that is proved.

The template renders the whole conversation at every turn. If that text begins with the text of the turns
before, their stored ids are kept, and the encoding of the rest is appended; otherwise the rules of the
model's family may keep them (`Renderer.bridge`). Else the conversation is encoded afresh. Sampled ids are
never replaced in the context in which they were sampled.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from tokenizers import Tokenizer

from rft.data.chat import Renderer
from rft.data.errors import RowProblem
from rft.data.messages import Messages

Tools = list[dict[str, Any]] | None
_OPENED = re.compile(r"<(think|thinking|thought|reasoning)>\s*\Z")
_HIDDEN = 0xF0000  # private characters: _HIDDEN + i stands for the i-th added token


@dataclass(frozen=True)
class Exchange:
    """One answer in a conversation.

    messages, tools: as `Dialogue.prompt` got them. answer: the answer as a message, as the messages of the
    next turns contain it. forms: ways to write it for the template, the preferred one first. prompt, sampled:
    the ids. body: the text of the sampled ids up to their end tokens. end: the text of those.
    """

    messages: Messages
    tools: Tools
    answer: dict[str, Any]
    forms: Sequence[dict[str, Any]]
    prompt: tuple[int, ...]
    sampled: tuple[int, ...]
    body: str
    end: str


@dataclass(frozen=True)
class NextPrompt:
    """The prompt of a turn.

    opened: the tag of a thought that the template opens for the answer, "" if it opens none. follows: an
    earlier turn is part of the conversation. extends: the ids begin with those of that turn. rewritten: the
    template would write its answer differently; the ids have it as it was sampled. bridged: the rules of the
    model's family keep the ids, where the template does not prove it.
    """

    ids: tuple[int, ...]
    opened: str = ""
    follows: bool = False
    extends: bool = False
    rewritten: bool = False
    bridged: bool = False


def opened_thought(text: str) -> str:
    """Return the tag of the thought that a generation prompt opens, "" if it opens none."""
    opened = _OPENED.search(text)
    return opened[1] if opened else ""


class Dialogue:
    """The turns of one session; they may belong to several conversations.

    first: the row's messages. They may contain special tokens, as single-turn prompts may; in later messages
    such text is not encoded as a special token, so that the answer of a tool cannot open a turn.
    read: parses an answer's text, after a thought was opened or not, into an object to compare.
    """

    def __init__(self, render: Renderer, first: Messages, read: Callable[[str, str, Tools], Any]) -> None:
        self.render, self.first, self.read = render, render.as_messages(first), read
        self.exchanges: list[Exchange] = []
        self._forms: dict[int, dict[str, Any]] = {}  # of an exchange: the one that the template gets

    def prompt(self, messages: Messages, tools: Tools) -> NextPrompt:
        """Return the prompt that follows the messages. Raises RowProblem if the template rejects them."""
        known = self._known(messages)
        guard = _Guard(self.render, [messages, tools, [e.forms for e in self.exchanges]])
        plain = len(self.first) if messages[: len(self.first)] == self.first else 0
        is_open = messages[-1]["role"] == "assistant"

        def rendered() -> tuple[Messages, str]:
            shown = self._shown(guard, messages, known)
            hidden = [m if i < plain else guard.hide(m) for i, m in enumerate(shown)]
            return hidden, self.render.render(hidden, tools, generate=not is_open, unfinished=is_open)

        try:
            shown, full = rendered()
        except RowProblem:  # some templates want a tool's answer to follow a structured tool call
            self._forms |= {index: self.exchanges[index].forms[0] for index in known.values()}
            shown, full = rendered()
        tag = "" if is_open else opened_thought(full)
        last = max(known, default=None)
        if last is not None and self.exchanges[known[last]].tools == tools:
            exchange = self.exchanges[known[last]]
            extended = self._extend(guard, exchange, shown[: last + 1], full)
            if extended is not None:
                return NextPrompt(extended[0], tag, True, True, extended[1])
            bridged = self._bridge(guard, exchange, messages[last + 1 :], full)
            if bridged is not None:
                return NextPrompt(bridged, tag, True, True, bridged=True)
        return NextPrompt(tuple(guard.encode(full)[0]), tag, follows=last is not None)

    def _known(self, messages: Messages) -> dict[int, int]:
        """Return which messages answer, as earlier turns do, the messages before them: place -> exchange."""
        known = {}
        for index, exchange in enumerate(self.exchanges):
            n = len(exchange.messages)
            if messages[n : n + 1] == [exchange.answer] and messages[:n] == exchange.messages:
                known[n] = index
        return known

    def _shown(self, guard: _Guard, messages: Messages, known: dict[int, int]) -> Messages:
        """Return the messages with known answers in the form that the template gets."""
        return [self._form(guard, known[i]) if i in known else m for i, m in enumerate(messages)]

    def _form(self, guard: _Guard, index: int) -> dict[str, Any]:
        """Return the first form of an answer that the template writes exactly as it was sampled, or else the
        preferred form."""
        if index not in self._forms:
            exchange = self.exchanges[index]
            self._forms[index] = exchange.forms[0]
            if len(exchange.forms) > 1:
                before = self._shown(guard, exchange.messages, self._known(exchange.messages))
                asked = self.render.render(before, exchange.tools, generate=True)
                start = asked + guard.hide_text(exchange.body) + exchange.end
                for form in exchange.forms:
                    try:
                        written = self.render.render([*before, guard.hide(form)], exchange.tools)
                    except RowProblem:
                        continue
                    if written.startswith(start):
                        self._forms[index] = form
                        break
        return self._forms[index]

    def _extend(
        self, guard: _Guard, last: Exchange, history: Messages, full: str
    ) -> tuple[tuple[int, ...], bool] | None:
        """Return the ids of the last exchange with those of the rest of `full`, and whether the template
        writes its answer differently than it was sampled. history: up to this answer. None: not proved."""
        render = self.render
        try:
            before = render.render(history[:-1], last.tools, generate=True)
            body = guard.hide_text(last.body)
            at = len(before) + len(body)
            rewritten = not full.startswith(before + body)
            if rewritten:  # equal but for white space and the spelling of tool calls, and append-only
                written = render.render(history, last.tools)
                if not (full.startswith(written) and written.startswith(before)):
                    return None
                end = written.rfind(render.end) if render.end else -1
                at = end if end >= len(before) else len(written)
                tag, text = opened_thought(before), guard.show(written[len(before) : at])
                if self.read(text, tag, last.tools) != self.read(last.body, tag, last.tools):
                    return None
        except RowProblem:
            return None
        if not full.startswith(last.end, at):
            return None  # stopped by another token than the one with which the template ends a turn
        rest = guard.after(full, at + len(last.end), last.sampled[-1] if last.end else None)
        return None if rest is None else ((*last.prompt, *last.sampled, *rest), rewritten)

    def _bridge(self, guard: _Guard, last: Exchange, new: Messages, full: str) -> tuple[int, ...] | None:
        """Return the ids of the last exchange and of new messages after it, as the rules of the model's
        family extend them. None: they do not, or not by the text and the ids with which `full` ends.

        A special token in the text of a message is hidden in `full`, so that rules which would encode it as
        such do not agree with its text.
        """
        rules, _ = self.render.bridge
        rest = rules.extension(last.prompt, last.sampled, new, last.tools) if rules and new else None
        if rest is None:
            return None
        text = self.render.tokenizer.decode(list(rest), skip_special_tokens=False)
        whole = full.endswith(text) and all(m["content"].strip() in text for m in new)
        return (*last.prompt, *last.sampled, *rest) if whole and guard.encode(text)[0] == [*rest] else None


class _Guard:
    """Keep special tokens in messages from being encoded as such: while the template is rendered, two private
    characters take the place of each. texts: all that is going to be rendered."""

    def __init__(self, render: Renderer, texts: Any) -> None:
        self.tokenizer = render.tokenizer
        self.tokens, self.special, self.any = _added_tokens(self.tokenizer)
        used = set(re.findall("[\ue000-\uf8ff]", str(texts)))
        self.mark = next(c for c in map(chr, range(0xE000, 0xF900)) if c not in used)

    def hide(self, message: dict[str, Any]) -> dict[str, Any]:
        """Return a message whose texts contain no special token; of a tool, no added token at all: many of
        these, such as `<tool_call>`, are tags that the policy writes."""
        pattern = self.any if message.get("role") == "tool" else self.special
        return {k: v if k == "role" else self._hide(v, pattern) for k, v in message.items()}

    def hide_text(self, answer: str) -> str:
        """Return the text of an answer as `hide` returns it in a message."""
        return str(self._hide(answer, self.special))

    def _hide(self, value: Any, pattern: re.Pattern[str]) -> Any:
        if isinstance(value, str):
            return pattern.sub(lambda m: self.mark + chr(_HIDDEN + self.tokens.index(m[0])), value)
        if isinstance(value, dict):
            return {self._hide(k, pattern): self._hide(v, pattern) for k, v in value.items()}
        return [self._hide(v, pattern) for v in value] if isinstance(value, list) else value

    def show(self, text: str) -> str:
        """Undo `hide`."""
        return re.sub(f"{self.mark}(.)", lambda m: self.tokens[ord(m[1]) - _HIDDEN], text)

    def encode(self, text: str) -> tuple[list[int], list[int]]:
        """Return the ids of a rendered text, and where in it each one starts; -1 where that is not known."""
        if self.mark not in text:
            return self._with_starts(text)
        ids: list[int] = []
        starts: list[int] = []
        at = 0
        for part in re.split(f"({self.any.pattern})", text):
            if self.mark in part:
                new = _encode_as_text(self.tokenizer, self.show(part))
                places = [0, *[-1] * (len(new) - 1)]
            else:
                new, places = self._with_starts(part) if part else ([], [])
            ids += new
            starts += [at + place if place >= 0 else -1 for place in places]
            at += len(part)
        return ids, starts

    def _with_starts(self, text: str) -> tuple[list[int], list[int]]:
        if not self.tokenizer.is_fast:
            ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
            return ids, [0, *[-1] * (len(ids) - 1)]
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        return list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]

    def after(self, full: str, at: int, end: int | None) -> list[int] | None:
        """Return the ids of full[at:] in the encoding of `full`; None if no token starts there.

        end: the end token before it. Added tokens are separated first, so that the text after one
        does not depend on the text before it. (The end token is encoded too: some take the white space
        after them.)
        """
        if end is not None:
            text = self.tokenizer.decode([end], skip_special_tokens=False)
            ids, starts = self.encode(full[at - len(text) :])
            return (
                ids[1:] if full.startswith(text, at - len(text)) and (ids[0], starts[0]) == (end, 0) else None
            )
        if self.any.match(full, at):
            return self.encode(full[at:])[0]
        ids, starts = self.encode(full)
        if at == len(full):
            return []
        return ids[starts.index(at) :] if at in starts else None


@lru_cache(maxsize=16)
def _added_tokens(tokenizer: Any) -> tuple[list[str], re.Pattern[str], re.Pattern[str]]:
    """Return (the texts of all added tokens, a pattern of the special ones, a pattern of all)."""
    special = {str(t): bool(t.special) for t in tokenizer.added_tokens_decoder.values()}
    special |= dict.fromkeys(map(str, tokenizer.all_special_tokens), True)
    texts = sorted((text for text in special if text), key=len, reverse=True)

    def pattern(chosen: list[str]) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, chosen)) or r"(?!)")

    return texts, pattern([text for text in texts if special[text]]), pattern(texts)


@lru_cache(maxsize=16)
def _without_added_tokens(tokenizer: Any) -> Tokenizer:
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    return Tokenizer.from_str(json.dumps({**state, "added_tokens": [], "post_processor": None}))


def _encode_as_text(tokenizer: Any, text: str) -> list[int]:
    """Return the ids of a text, with added tokens as ordinary text. Raises RowProblem where that fails."""
    ids: list[int] = []
    if tokenizer.is_fast:
        ids = _without_added_tokens(tokenizer).encode(text, add_special_tokens=False).ids
    if not ids or set(ids) & set(tokenizer.added_tokens_decoder):
        raise RowProblem(
            f"the tokenizer cannot encode the special tokens in {text!r:.200} as ordinary text; remove them"
        )
    return ids
