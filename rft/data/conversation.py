"""Who wrote what: a rendered conversation cut into pieces that the assistant wrote, and the rest.

Where a template marks the assistant's words (`{% generation %}`), the marks decide. Where it does not,
each assistant turn is located by rendering the conversation up to it and past it, and the result
is checked against the rendering of the whole. A template that writes a turn differently depending on
what follows is accepted where the turn can still be found for certain; otherwise it is an error.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rft.data.chat import Piece, Renderer
from rft.data.errors import RowProblem
from rft.data.messages import Messages

Span = tuple[int, int]
_OPENED = re.compile(r"<(\w+)>\s*$")  # what a generation prompt opens for the model, `<think>` for one


class CannotTell(RowProblem):
    """The template does not let one know which words the assistant wrote."""


def pieces(
    render: Renderer, messages: Messages, trained: Sequence[int], tools: list[Any] | None = None
) -> list[Piece]:
    """The rendered conversation as (text, has a loss) pieces. The first is the prompt: all before the
    first of `trained`, the ascending indices of the assistant turns that have a loss. What follows
    the last of them is left out.

    A trained piece ends with the token that ends the turn, without the line break that templates put
    behind it: a model that generates never sees that. Raises CannotTell.
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
                raise CannotTell("the chat template writes nothing before the first assistant turn")
            words = messages[turn]["content"].rstrip()
            written, stop = _with_end(render, text, start, stop, words, final=turn == last)
            if start < end or start >= stop:
                raise CannotTell("the chat template gives an assistant turn no text of its own")
            _check_complete(messages[turn], turn, written)
        except CannotTell as problem:
            if turn != last:
                raise CannotTell(
                    f"{problem}; write `train_on: last` to learn from the last turn alone"
                ) from None
            return out + _as_sampled(render, messages[: last + 1], text[:end], tools, problem)
        before = text[end:start] if out else _generation_prompt(render, messages, turn, tools, text[:start])
        out += [(before, False), (written, True)]
        end = stop
    return out


def continuation(render: Renderer, before: Messages, response: str, tools: list[Any] | None) -> list[Piece]:
    """The pieces of a response that goes on with the assistant's turn that ends the prompt `before`."""
    return [(render.render(before, tools, unfinished=True), False), (response + render.end, True)]


def _marked(render: Renderer, messages: Messages, tools: list[Any] | None) -> dict[int, Span] | None:
    """The spans that the template marks as the assistant's, by turn; None where it has no marks."""
    if not re.search(r"\{%-?\s*generation\b", render.template):
        return None
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    spans = render.generation_spans(messages, tools)
    if len(spans) != len(turns):
        raise CannotTell(f"the chat template marks {len(spans)} assistant turns of {len(turns)}")
    return dict(zip(turns, spans, strict=True))


def _locate(render: Renderer, messages: Messages, turn: int, text: str, tools: list[Any] | None) -> Span:
    """Where assistant turn `turn` stands in `text`, the rendering of the whole conversation."""
    start = _length_of(render.render(messages[:turn], tools, generate=True), text)
    if start is None:
        raise CannotTell(f"the chat template rewrites what stands before assistant turn {turn + 1}")
    alone = render.render(messages[: turn + 1], tools)
    if text.startswith(alone):
        return start, len(alone)
    # Written differently as the last turn (a thought put before it, say). It is still certain where it
    # ends if its own words, and what closed it, follow the head directly.
    content = messages[turn]["content"]
    if content:
        at = alone.rfind(content)
        closing = alone[at + len(content) :]
        closing = closing[: render.closing(closing) or None]  # some put one more token at the very end
        if at >= 0 and closing and text.startswith(content + closing, start):
            return start, start + len(content + closing)
    raise CannotTell(f"the chat template writes assistant turn {turn + 1} differently once others follow")


def _length_of(head: str, text: str) -> int | None:
    """How much of `text` renders what `head` does: some templates put other spaces before a turn that is
    there than before one that is to come. None: it begins with other words."""
    if text.startswith(head):
        return len(head)
    words, bare = _squeezed(head), head.rstrip()
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
    """What stands before the first turn with a loss, spaced as it is when the model generates that turn."""
    head = render.render(messages[:turn], tools, generate=True)
    return head if _squeezed(head) == _squeezed(before) else before


def _with_end(
    render: Renderer, text: str, start: int, stop: int, words: str, *, final: bool
) -> tuple[str, int]:
    """(a turn whose content is `words` with the token that ends it, where they end in `text`)."""
    after = text.rfind(words, start, stop) + len(words) if words and words in text[start:stop] else stop
    if render.only_closers(text[after:stop]):  # the first one is where sampling stops
        stop = after + render.closing(text[after:stop])
        return text[start:stop], stop
    bare = text[start:stop].rstrip()
    if bare.endswith(render.closers) and not (words and bare.endswith(words)):
        return bare, start + len(bare)
    if length := render.closing(text[stop:]):
        return text[start : stop + length], stop + length
    if not final:
        raise CannotTell("the chat template ends a turn with no special token, at which sampling could stop")
    return text[start:stop] + render.end, stop


def _check_complete(message: dict[str, Any], turn: int, written: str) -> None:
    """Raise CannotTell where the template leaves out words of a turn (a thought, often)."""
    for part in (message["content"], message.get("reasoning_content")):
        if isinstance(part, str) and _squeezed(part) not in _squeezed(written):
            raise CannotTell(f"the chat template leaves out words of assistant turn {turn + 1}")


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _as_sampled(
    render: Renderer, messages: Messages, before: str, tools: list[Any] | None, problem: CannotTell
) -> list[Piece]:
    """The last turn as a model samples it: its words, thought and all, behind the generation prompt.

    Templates that drop thoughts from what they render cannot show it otherwise. Raises `problem` where
    the generation prompt does not go on from `before`, or the turn has no thought.
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
        words = re.sub(rf"^\s*<{opened[1]}>\n?", "", words)  # the prompt has it already
    return [(head[len(before) :], False), (words + render.end, True)]
