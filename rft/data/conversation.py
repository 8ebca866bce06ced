"""Who wrote what: a rendered conversation cut into pieces that the assistant wrote, and the rest.

Where a template marks the assistant's words (`{% generation %}`), the marks decide. Where it does not,
each assistant turn is located by rendering the conversation up to it and past it, and what is found
is checked against the rendering of the whole. A template that writes a turn differently depending on
what follows is accepted where the turn can still be found for certain; otherwise it is an error.
"""

from __future__ import annotations

from collections.abc import Sequence

from rft.data.chat import Messages, Piece, Renderer

Span = tuple[int, int]


class CannotTell(ValueError):
    """The template does not let one know which words the assistant wrote."""


def pieces(render: Renderer, messages: Messages, trained: Sequence[int]) -> list[Piece]:
    """The rendered conversation as (text, has a loss) pieces. The first is the prompt: all before the
    first of `trained`, the ascending indices of the assistant turns that have a loss. What follows
    the last of them is left out.

    A trained piece ends with the token that ends the turn, without the line break that templates put
    behind it: a model that generates never sees that. Raises CannotTell.
    """
    text = render.render(messages[: trained[-1] + 1])
    if "{% generation" in render.template or "{%- generation" in render.template:
        turns = [i for i, m in enumerate(messages[: trained[-1] + 1]) if m["role"] == "assistant"]
        spans = render.generation_spans(messages[: trained[-1] + 1])
        if len(spans) != len(turns):
            raise CannotTell(f"the chat template marks {len(spans)} assistant turns of {len(turns)}")
        wanted = [span for span, turn in zip(spans, turns, strict=True) if turn in trained]
    else:
        wanted = [_locate(render, messages, turn, text) for turn in trained]
    out: list[Piece] = []
    end = 0
    for start, stop in wanted:
        written = text[start:stop]
        stop -= len(written) - len(written.rstrip()) if written.rstrip().endswith(render.closers) else 0
        if start < end or start >= stop:
            raise CannotTell("the chat template gives an assistant turn no text of its own")
        out += [(text[end:start], False), (text[start:stop], True)]
        end = stop
    last, _ = out[-1]
    content = messages[trained[-1]].get("content")
    if isinstance(content, str) and content and last.rstrip().endswith(content.rstrip()):
        # Nothing closes the turn: the end token has to be learned all the same.
        out[-1] = (last + render.tokenizer.eos_token, True)
    return out


def _locate(render: Renderer, messages: Messages, turn: int, text: str) -> Span:
    """Where assistant turn `turn` stands in `text`, the rendering of the whole conversation."""
    head = render.render(messages[:turn], generate=True)
    if not text.startswith(head):
        raise CannotTell(f"the chat template rewrites what stands before assistant turn {turn + 1}")
    alone = render.render(messages[: turn + 1])
    if text.startswith(alone):
        return len(head), len(alone)
    # Written differently as the last turn (a thought put before it, say). It is still certain where it
    # ends if its own words, and what closed it, follow the head directly.
    content = messages[turn].get("content")
    if isinstance(content, str) and content:
        at = alone.rfind(content)
        closing = alone[at + len(content) :]
        if at >= 0 and closing and text.startswith(content + closing, len(head)):
            return len(head), len(head) + len(content + closing)
    raise CannotTell(f"the chat template writes assistant turn {turn + 1} differently once others follow")
