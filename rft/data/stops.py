"""Stop tokens of completions, shared by the engines, the training data and the exported model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rft.batch import Completion, Group
from rft.errors import ModelError


def stop_ids(
    model: str, tokenizer: Any, turn_end: str | None = None, *, of_config: Sequence[int], vocabulary: int
) -> tuple[int, ...]:
    """Return the stop token ids of `model`, a folder or hub name.

    They are those of its generation config and its config, the tokenizer's end token, and the end-of-turn
    token of the chat template. turn_end: text of the template after assistant content, up to and including
    that token; None: no chat template. of_config: `end_tokens` of its config. vocabulary: size of the model's
    vocabulary. Raises ModelError for a damaged generation config.
    """
    ids = {*_listed(tokenizer.eos_token_id), *_generation_eos(model, vocabulary)}
    # Without an end token in config.json, transformers uses the class default, which may be any token here,
    # or none: it is 50256 for StarCoder2, whose class has 49,152 tokens.
    special = {*tokenizer.all_special_ids, *tokenizer.get_added_vocab().values()}
    ids |= special & set(of_config)
    if turn_end is not None:
        ids.add(tokenizer(turn_end, add_special_tokens=False)["input_ids"][-1])
    return tuple(sorted(ids))


def end_tokens(config: Any) -> tuple[int, ...]:
    """Return the end token ids of a config of transformers, and of the config of its text model."""
    return tuple(sorted({*_listed(config.eos_token_id), *_listed(config.get_text_config().eos_token_id)}))


def _generation_eos(model: str, vocabulary: int) -> list[int]:
    """Return the end token ids of the model's generation config. Raises ModelError naming the file."""
    from transformers.utils import cached_file

    file = cached_file(
        model,
        "generation_config.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    if file is None:
        return []
    try:
        ids = _listed(json.loads(Path(file).read_text(encoding="utf-8")).get("eos_token_id"))
    except (ValueError, AttributeError, TypeError) as error:
        raise ModelError(f"{file} is damaged: {error}") from None
    outside = [i for i in ids if not 0 <= i < vocabulary]
    if outside:
        raise ModelError(
            f"{file}: eos_token_id {outside[0]} is not in the model's vocabulary, whose ids are 0 to "
            f"{vocabulary - 1}; write the id of the model's end token, or a list of ids"
        )
    return ids


def _listed(ids: int | Sequence[int] | None) -> list[int]:
    if ids is None:
        return []
    listed = [ids] if isinstance(ids, int) else ids
    if not isinstance(listed, Sequence) or not all(type(i) is int for i in listed):  # a bool is not an id
        raise ValueError(
            f"eos_token_id is {ids!r}, not a token id or a list of them; write the id of the model's end "
            "token"
        )
    return list(listed)


def unstopped_turns(
    groups: Sequence[Group], stops: Sequence[int], tokenizer: Any, key: str = "data"
) -> list[str]:
    """Return a message for every token that ends a trained turn of some group and is not a stop token.

    A model trained on it would not stop there. key: config key of the data.
    """
    ends = {token for g in groups for c in g.completions for token in _turn_ends(c)}
    return [
        f"{key}: a trained turn ends with {tokenizer.decode([token])!r} (token {token}), which is not a stop "
        f"token ({', '.join(map(str, stops)) or 'there is none'}); add it to "
        "rollout.sampling.stop_token_ids, or end turns with a stop token"
        for token in sorted(ends - set(stops))
    ]


def _turn_ends(c: Completion) -> list[int]:
    """Return the last token of each span with a loss; none for a truncated completion."""
    if c.finish == "length":
        return []
    mask = (*(c.mask or [True] * len(c.tokens)), False)
    return [token for i, token in enumerate(c.tokens) if mask[i] and not mask[i + 1]]
