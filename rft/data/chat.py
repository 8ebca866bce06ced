"""Tokenise conversations by chat templates, with turn boundaries and loss masks of assistant turns."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from importlib.util import find_spec
from typing import Any, Protocol

from rft.config.data import DataConfig
from rft.data.errors import DataError, RowProblem
from rft.data.messages import Messages, Text
from rft.utils.dotted import load_dotted

Piece = tuple[str, bool]  # (text, written by the assistant)
Span = tuple[int, int]
_OPENED = re.compile(r"<(\w+)>\s*$")  # tag opened at the end of a generation prompt, e.g. `<think>`
TEXTS_PER_CALL = 512
_ASKED, _ANSWERED = "rft-asks", "rft-answers"  # message contents used to probe a template
BRIDGE = "rft.contrib.bridge.find"  # the package `renderers`, imported only if installed


class Bridge(Protocol):
    """The rules of a model family for the next prompt of a conversation."""

    def extension(
        self,
        prompt: Sequence[int],
        sampled: Sequence[int],
        new: Messages,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> tuple[int, ...] | None:
        """Return the ids that follow a prompt and its sampled answer: the rest of the turn, the new
        messages, the start of the next answer. None: the family's rules do not keep the ids."""


class Renderer:
    """Render prompts and responses with a tokenizer, exactly as at generation time.

    Raises DataError if a chat template is required and the tokenizer does not have one.
    """

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if config.chat_template == "always" and not has_template:
            raise DataError(
                "`chat_template: always`, but the tokenizer has none; give the model's chat tokenizer, or "
                "`chat_template: never` to train on plain text"
            )
        self.chat = has_template and config.chat_template != "never"
        # Special tokens, as text: each may end an assistant turn.
        special = set(tokenizer.all_special_tokens) | set(_added_tokens(tokenizer))
        self.closers = tuple(sorted(special))

    def fewest_tokens(self, characters: int) -> int:
        """Return a lower bound of the tokens of a text: all of them the longest one of the vocabulary."""
        return characters // self._longest_token

    @cached_property
    def _longest_token(self) -> int:
        return max(len(token) for token in self.tokenizer.get_vocab())

    # -- prompts -----------------------------------------------------------------------------------

    def prompt(self, text: Text, tools: list[Any] | None = None) -> tuple[str, list[int]]:
        """Render a prompt up to the start of the response: (text, token ids). Raises RowProblem."""
        rendered = self.prompt_text(text, tools)
        return rendered, self.encode(rendered)

    def prompt_text(self, text: Text, tools: list[Any] | None = None) -> str:
        """Render a prompt up to the start of the response. Raises RowProblem."""
        if self.chat:
            if isinstance(text, str) and self.is_rendered(text):
                return self._as_rendered(text)
            return self._rendered_prompt(self.as_messages(text), tools)
        if isinstance(text, list) or tools:
            what = "the prompt is a list of messages" if isinstance(text, list) else "`tools` are given"
            has = bool(getattr(self.tokenizer, "chat_template", None))
            why = "`chat_template` is `never`" if has else "the tokenizer has no chat template"
            raise RowProblem(f"{what}, but {why}")
        return f"{self.config.system}\n\n{text}" if self.config.system else text

    def as_messages(self, prompt: Text) -> Messages:
        """Return a prompt as messages, after the config's system message, without end-of-turn tokens."""
        messages = prompt if isinstance(prompt, list) else [_message("user", prompt)]
        if self.config.system is not None and messages[0]["role"] != "system":
            messages = [_message("system", self.config.system), *messages]
        return [{**m, "content": self.without_end(m["content"])} for m in messages]

    def _rendered_prompt(self, messages: Messages, tools: list[Any] | None) -> str:
        self.check_tools(messages, tools)
        is_open = messages[-1]["role"] == "assistant"
        text = self.render(messages, tools, generate=not is_open, unfinished=is_open)
        self.check_written(messages, text)
        return text

    def _as_rendered(self, text: str) -> str:
        if self.config.system is not None:
            raise RowProblem("the prompt is already rendered, so `system` cannot be added; leave it out")
        bos = self.tokenizer.bos_token
        lacks = bos and self._empty_prompt[0].startswith(bos) and not text.startswith(bos)
        return f"{bos}{text}" if lacks else text

    def is_rendered(self, text: Text) -> bool:
        """Return whether a prompt is already rendered: it contains markup of the chat template."""
        if not self.chat or not isinstance(text, str):
            return False
        text = self.without_end(text)  # a trailing end token does not make a text rendered
        if any(mark in text for mark in self._marks):
            return True
        opening, ending = (part.strip() for part in self._empty_prompt)
        return bool(opening and ending) and opening in text and text.rstrip().endswith(ending)

    @cached_property
    def _empty_prompt(self) -> tuple[str, str]:
        """Return the text that the template writes before and after a prompt."""
        try:
            before, _, after = self.render([_message("user", _ASKED)], generate=True).partition(_ASKED)
        except RowProblem:
            return "", ""
        return before, after

    @cached_property
    def _marks(self) -> tuple[str, ...]:
        """Return the special tokens that the template writes around a prompt, without BOS."""
        before, after = self._empty_prompt
        bos = self.tokenizer.bos_token
        return tuple(c for c in self.closers if (c in before or c in after) and c != bos)

    @cached_property
    def bridge(self) -> tuple[Bridge | None, str]:
        """Return the rules of the model's family, if there are any, and which ones, or why not."""
        if not self.chat:
            return None, "there is no chat template"
        if find_spec("renderers") is None:
            return None, "the package renderers is not installed"
        found: tuple[Bridge | None, str] = load_dotted(BRIDGE)(self)
        return found

    @cached_property
    def turn_end(self) -> str | None:
        """Return the template's text after assistant content, up to and including the end-of-turn token.

        That is the token that closes the turn, or else the one that opens the next turn. None: no special
        token follows.
        """
        if not self.chat:
            return None
        turn = [_message("user", _ASKED), _message("assistant", _ANSWERED)]
        for messages in (turn, [*turn, _message("user", _ASKED)]):
            try:
                rest = self.render(messages).rpartition(_ANSWERED)[2]
            except RowProblem:
                return None
            if end := self.closing(rest):
                return rest[:end]
        return None

    def closing(self, rest: str) -> int:
        """Return the length of the prefix of `rest` that ends a turn (spaces, then a special token), or 0."""
        bare = rest.lstrip()
        matches = [closer for closer in self.closers if bare.startswith(closer)]
        return len(rest) - len(bare) + len(max(matches, key=len)) if matches else 0

    def only_closers(self, rest: str) -> bool:
        """Return whether a text consists of spaces and at least one special token."""
        closed = False
        while length := self.closing(rest):
            rest, closed = rest[length:], True
        return closed and not rest.strip()

    @property
    def end(self) -> str:
        """Return the text that ends an assistant turn after its content."""
        return self.turn_end or self.tokenizer.eos_token or ""

    def without_end(self, text: str) -> str:
        """Strip trailing end-of-turn tokens, which rendering appends again."""
        while (bare := text.rstrip()).endswith(self._ends):
            text = bare.removesuffix(next(end for end in self._ends if bare.endswith(end)))
        return text

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        """Return the texts that end a turn: the template's, and the tokenizer's end token."""
        return tuple(end for end in (self.end.strip(), self.tokenizer.eos_token) if end)

    # -- the template ------------------------------------------------------------------------------

    def render(
        self,
        messages: Messages,
        tools: list[Any] | None = None,
        *,
        generate: bool = False,
        unfinished: bool = False,
    ) -> str:
        """Render messages by the chat template.

        generate: append the generation prompt. unfinished: leave the last turn open. Raises RowProblem with
        the template's error.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    tokenize=False,
                    add_generation_prompt=generate,
                    continue_final_message=unfinished,
                    **self.config.chat_template_options,
                )
            )
        except Exception as error:  # a template may raise errors of any kind
            roles = ", ".join(m["role"] for m in messages)
            raise RowProblem(f"the chat template rejects these messages (roles: {roles}): {error}") from None

    @cached_property
    def template(self) -> str:
        """Return the source of the chat template; of several, the one for conversations without tools."""
        return str(self.tokenizer.get_chat_template()) if self.chat else ""

    def check_written(self, messages: Messages, rendered: str) -> None:
        """Raise RowProblem if the template omits the content of a system or user message."""
        for number, message in enumerate(messages, 1):
            given = message["role"] in ("system", "developer", "user") and message["content"] not in rendered
            if given and "".join(message["content"].split()) not in "".join(rendered.split()):
                raise RowProblem(
                    f"the chat template leaves out message {number} ({message['role']}); move its text into "
                    "a message of another role"
                )

    def check_tools(self, messages: Messages, tools: list[Any] | None) -> None:
        """Raise RowProblem if the template omits the tools or a message's tool calls."""
        if tools and self.render(messages, tools) == self.render(messages):
            raise RowProblem("the chat template leaves out `tools`; use a model whose template supports them")
        if any("tool_calls" in m for m in messages):
            bare = [{k: v for k, v in m.items() if k != "tool_calls"} for m in messages]
            if self.render(messages, tools) == self.render(bare, tools):
                raise RowProblem(
                    "the chat template leaves out `tool_calls`; use a model whose template supports them"
                )

    def generation_spans(self, messages: Messages, tools: list[Any] | None) -> list[tuple[int, int]]:
        """Return the character spans (start, end) of the template's `generation` blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        options: dict[str, Any] = {**self.tokenizer.special_tokens_map, **self.config.chat_template_options}
        spans: Any = render_jinja_template(
            conversations=[messages],
            tools=tools,
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **options,
        )[1][0]
        return [(int(start), int(end)) for start, end in spans]

    # -- tokens ------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text that starts a sequence.

        A rendered chat contains its special tokens. Plain text gets the tokenizer's (a BOS, unless present),
        but no end token, since more text follows.
        """
        return self._opened(text, list(self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"]))

    def encode_all(self, texts: Sequence[str]) -> Iterator[list[int]]:
        """Yield the token ids of each text, as `encode` does: one call of the tokenizer is made for many."""
        for first in range(0, len(texts), TEXTS_PER_CALL):
            part = list(texts[first : first + TEXTS_PER_CALL])
            encoded = self.tokenizer(part, add_special_tokens=not self.chat)["input_ids"]
            for text, ids in zip(part, encoded, strict=True):
                yield self._opened(text, list(ids))

    def _opened(self, text: str, ids: list[int]) -> list[int]:
        """Remove a second BOS and an end token from the ids of a plain text that starts a sequence."""
        if self.chat:
            return ids
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        if bos is not None and ids[:2] == [bos, bos] and text.startswith(self.tokenizer.bos_token):
            del ids[0]
        if ids and ids[-1] == eos and not text.endswith(self.tokenizer.eos_token):
            ids.pop()
        return ids

    def follow(self, text: str, ids: Sequence[int], piece: str) -> list[int]:
        """Return the token ids of `piece` after `text`, whose token ids are `ids`.

        Both are encoded together if that leaves `ids` unchanged, as required by tokenizers that mark word
        starts; otherwise separately, since a generating model cannot merge its first token into the prompt.
        """
        joint = self.encode(text + piece)
        if joint[: len(ids)] == list(ids):
            return joint[len(ids) :]
        return list(self.tokenizer(piece, add_special_tokens=False)["input_ids"])

    def answer(self, prompt: Text, response: str, tools: list[Any] | None = None) -> list[int]:
        """Return the token ids of a response as a model samples it, with its end token. Raises RowProblem."""
        rendered, ids = self.prompt(prompt, tools)
        return self.follow(rendered, ids, self.without_end(response) + self.end)

    @cached_property
    def end_ids(self) -> tuple[int, ...]:
        """Return the token ids that end an assistant turn."""
        return tuple(self.tokenizer(self.end, add_special_tokens=False)["input_ids"]) if self.end else ()

    def pieces(self, prompt: str, ids: Sequence[int], rest: Sequence[Piece]) -> tuple[list[int], list[bool]]:
        """Return the token ids of the pieces after a prompt, and their loss mask."""
        text, so_far, mask = prompt, list(ids), []
        for piece, trained in rest:
            new = self.follow(text, so_far, piece)
            text, so_far = text + piece, so_far + new
            mask += [trained] * len(new)
        return so_far[len(ids) :], mask


def _message(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _added_tokens(tokenizer: Any) -> Mapping[str, int]:
    return getattr(tokenizer, "get_added_vocab", dict)()


# -- the turns with a loss -----------------------------------------------------------------------------
#
# If a template marks assistant content (`{% generation %}`), the marks define the loss. Otherwise each
# assistant turn is located by rendering the conversation up to it and past it, and checked against the
# rendering of the whole conversation. A template that renders a turn differently depending on later turns is
# accepted if the turn can still be located unambiguously; otherwise it is an error.


class CannotTell(RowProblem):
    """The assistant's content cannot be located in the rendered conversation."""


def pieces(
    render: Renderer, messages: Messages, trained: Sequence[int], tools: list[Any] | None = None
) -> list[Piece]:
    """Split the rendered conversation into pieces (text, has a loss).

    trained: ascending indices of the assistant turns with a loss. The first piece is the prompt, all text
    before the first of them; text after the last is omitted. A trained piece ends with the end-of-turn token,
    without the line break that templates write after it, which a generating model never sees.
    Raises CannotTell.
    """
    last = trained[-1]
    text = render.render(messages[: last + 1], tools)
    render.check_written(messages[:last], text)
    marks = _marked(render, messages[: last + 1], tools)
    out: list[Piece] = []
    end = 0
    for turn in trained:
        try:
            start, stop = _locate(render, messages, turn, text, tools) if marks is None else marks[turn]
            if not out and not text[:start].strip():
                raise CannotTell("the chat template produces no text before the first assistant turn")
            words = messages[turn]["content"].rstrip()
            written, stop = _with_end(render, text, start, stop, words, final=turn == last)
            if start < end or start >= stop:
                raise CannotTell("the chat template leaves an assistant turn empty")
            _check_complete(messages[turn], turn, written)
        except CannotTell as problem:
            if turn != last:
                raise CannotTell(
                    f"{problem}; write `train_on: last` to learn from the last turn only"
                ) from None
            return out + _last_turn_as_sampled(render, messages[: last + 1], text[:end], tools, problem)
        before = text[end:start] if out else _generation_prompt(render, messages, turn, tools, text[:start])
        out += [(before, False), (written, True)]
        end = stop
    return out


def continuation(render: Renderer, before: Messages, response: str, tools: list[Any] | None) -> list[Piece]:
    """Return the pieces of a response that continues the last assistant turn of the prompt `before`."""
    return [(render.render(before, tools, unfinished=True), False), (response + render.end, True)]


def _marked(render: Renderer, messages: Messages, tools: list[Any] | None) -> dict[int, Span] | None:
    """Return the spans of assistant content marked by the template, by turn; None without marks."""
    if not re.search(r"\{%-?\s*generation\b", render.template):
        return None
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    spans = render.generation_spans(messages, tools)
    if len(spans) != len(turns):
        raise CannotTell(
            f"the chat template marks {len(spans)} of {len(turns)} assistant turns with {{% generation %}}"
        )
    return dict(zip(turns, spans, strict=True))


def _locate(render: Renderer, messages: Messages, turn: int, text: str, tools: list[Any] | None) -> Span:
    """Return the span of assistant turn `turn` in `text`, the rendered conversation. Raises CannotTell."""
    start = _length_of(render.render(messages[:turn], tools, generate=True), text)
    if start is None:
        raise CannotTell(
            f"the text before assistant turn {turn + 1} differs from the generation prompt that the chat "
            "template writes for it"
        )
    alone = render.render(messages[: turn + 1], tools)
    if text.startswith(alone):
        return start, len(alone)
    # As the last turn it is rendered differently (e.g. with an added thought). Its end is still unambiguous
    # if its content and its closing text follow the head directly.
    content = messages[turn]["content"]
    if content:
        at = alone.rfind(content)
        closing = alone[at + len(content) :]
        closing = closing[: render.closing(closing) or None]  # some templates append one more token
        if at >= 0 and closing and text.startswith(content + closing, start):
            return start, start + len(content + closing)
    raise CannotTell(
        f"the chat template writes assistant turn {turn + 1} differently when later messages follow"
    )


def _length_of(head: str, text: str) -> int | None:
    """Return the length of the prefix of `text` that equals `head` up to whitespace; None: no such prefix.

    Some templates write different whitespace before an existing turn than before one to be generated.
    """
    if text.startswith(head):
        return len(head)
    words, bare = _without_whitespace(head), head.rstrip()
    at = 0
    for character in words:
        while text[at : at + 1].isspace():
            at += 1
        if text[at : at + 1] != character:
            return None
        at += 1
    spaces = head[len(bare) :]
    return at + len(spaces) if text.startswith(spaces, at) else None


def _generation_prompt(
    render: Renderer, messages: Messages, turn: int, tools: list[Any] | None, before: str
) -> str:
    """Return the text before the first turn with a loss, with the whitespace of a generation prompt."""
    head = render.render(messages[:turn], tools, generate=True)
    return head if _without_whitespace(head) == _without_whitespace(before) else before


def _with_end(
    render: Renderer, text: str, start: int, stop: int, words: str, *, final: bool
) -> tuple[str, int]:
    """Return the turn with content `words` and its end-of-turn token, and its end position in `text`."""
    after = text.rfind(words, start, stop) + len(words) if words and words in text[start:stop] else stop
    if render.only_closers(text[after:stop]):  # sampling stops at the first one
        stop = after + render.closing(text[after:stop])
        return text[start:stop], stop
    bare = text[start:stop].rstrip()
    if bare.endswith(render.closers) and not (words and bare.endswith(words)):
        return bare, start + len(bare)
    if length := render.closing(text[stop:]):
        return text[start : stop + length], stop + length
    if not final:
        raise CannotTell(
            "the chat template does not end a turn with a special token, so sampling could not stop there"
        )
    return text[start:stop] + render.end, stop


def _check_complete(message: dict[str, Any], turn: int, written: str) -> None:
    """Raise CannotTell if the template omits part of a turn (often a thought)."""
    for part in (message["content"], message.get("reasoning_content")):
        if isinstance(part, str) and _without_whitespace(part) not in _without_whitespace(written):
            raise CannotTell(
                f"the chat template omits a part of assistant turn {turn + 1}, such as its reasoning"
            )


def _without_whitespace(text: str) -> str:
    return "".join(text.split())


def _last_turn_as_sampled(
    render: Renderer, messages: Messages, before: str, tools: list[Any] | None, problem: CannotTell
) -> list[Piece]:
    """Return the last turn as a model samples it after the generation prompt, including its thought.

    Used for templates that drop thoughts from rendered turns. Raises `problem` if the generation prompt does
    not continue `before`, or if the turn lacks a thought.
    """
    *history, message = messages
    head = render.render(history, tools, generate=True)
    words, opened = message["content"], _OPENED.search(head)
    closed = re.search(r"</(\w+)>", words)
    if not head.startswith(before) or closed is None or message.get("tool_calls"):
        if opened is not None and head.startswith(before) and not message.get("tool_calls"):
            raise CannotTell(
                f"the generation prompt opens <{opened[1]}>, and the response never closes it; begin the "
                f"response with the thought and </{opened[1]}>"
            )
        raise problem
    if opened is not None:
        words = re.sub(rf"^\s*<{opened[1]}>\n?", "", words)  # already in the prompt
    return [(head[len(before) :], False), (words + render.end, True)]
