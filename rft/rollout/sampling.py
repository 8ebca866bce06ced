"""Completions from what an engine sampled."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from rft.batch import Completion, Prompt
from rft.rollout.engine import Generated


def continued(given: tuple[int, ...], g: Generated) -> Generated:
    """A continuation with what it continues put before it; given tokens have no log-prob of a sampler."""
    shift = len(given)
    versions = tuple((v, a + shift, b + shift) for v, a, b in g.versions)
    return Generated(given + g.tokens, (0.0,) * shift + g.logps, g.finish, versions)


def completions_of(generated: Sequence[Generated], tokenizer: Any) -> list[Completion]:
    """Completions with their text: what the policy wrote, without what ended it."""
    rows = [g.tokens[: text_length(g.tokens, tokenizer, stopped=g.finish == "stop")] for g in generated]
    return [
        Completion(tokens=g.tokens, text=text, finish=g.finish, logps=g.logps, versions=g.versions)
        for g, text in zip(generated, decode(rows, tokenizer), strict=True)
    ]


def decode(rows: Sequence[Sequence[int]], tokenizer: Any) -> list[str]:
    """Each row's text, special tokens included: tags such as `<think>` may be some."""
    if not rows:  # of which a tokenizer makes one empty text
        return []
    texts: list[str] = tokenizer.batch_decode(
        [list(row) for row in rows], skip_special_tokens=False, spaces_between_special_tokens=False
    )
    return texts


def text_length(tokens: Sequence[int], tokenizer: Any, *, stopped: bool = False) -> int:
    """How many of the tokens are text: all but the special ones at the end that end a sequence, pad it, or
    mark turns, with the white space between those. (7, `</think>`, 8, `<|im_end|>`, "\\n", `<eos>`) gives 3.

    stopped: the last token is what stopped the engine: if it is special, it ends the sequence, unless it is
    half of a pair of tags.
    """
    ends, special = _turn_tokens(tokenizer)
    if stopped and tokens and tokens[-1] in special and not _paired(special[tokens[-1]], special):
        ends |= {tokens[-1]}
    length = place = len(tokens)
    while place:
        if tokens[place - 1] in ends:
            length = place - 1
        elif length == len(tokens) or not _blank(tokens[place - 1], tokenizer):
            break
        place -= 1
    return length


def _blank(token: int, tokenizer: Any) -> bool:
    return not decode([[token]], tokenizer)[0].strip()


@lru_cache(maxsize=16)
def _turn_tokens(tokenizer: Any) -> tuple[frozenset[int], dict[int, str]]:
    """(the special tokens that end, pad or mark turns, all special tokens with their text)."""
    special = {i: str(t) for i, t in tokenizer.added_tokens_decoder.items() if t.special}
    special |= dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    named = {tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.pad_token_id} - {None}
    marks = {
        i
        for written, around_user in _markup(tokenizer)
        for i, token in special.items()
        if token in written and (around_user or not _paired(token, special))
    }
    return frozenset(named | marks), special


def _markup(tokenizer: Any) -> Iterator[tuple[str, bool]]:
    """(what the chat template puts around messages, whether none of it can be part of an answer).

    What it writes for the assistant may hold a tag of its own, such as an open `<think>`.
    """
    from jinja2 import TemplateError

    mark = "\ue000"
    system, user, assistant = (
        {"role": role, "content": f"{mark}{role}{mark}"} for role in ("system", "user", "assistant")
    )
    for messages in ([user], [user, assistant, user], [system, user]):
        for generate in (False, True):
            try:
                text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate)
            except (TemplateError, ValueError, TypeError):  # no template, or none for such messages
                continue
            first, *inner, last = text.split(mark)[::2]
            yield first, True
            yield "".join(inner), False
            yield last, not generate


def _paired(token: str, special: dict[int, str]) -> bool:
    """Whether a token is a tag whose other half is a special token, too: `</answer>`, beside `<answer>`."""
    found = re.fullmatch(r"([<\[])(/?)(.*[>\]])", token)
    return found is not None and f"{found[1]}{'' if found[2] else '/'}{found[3]}" in special.values()


def as_text(prompt: Prompt, text: str) -> str | list[dict[str, Any]]:
    """A completion the way its prompt is written: a string, or an assistant's message."""
    return text if isinstance(prompt.text, str) else [{"role": "assistant", "content": text}]
