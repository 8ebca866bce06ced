"""The demonstrated completions of an online run's prompts: column `completion`, one or several."""

from __future__ import annotations

from collections.abc import Iterable

from rft.batch import Prompt
from rft.data.errors import DataError


def demonstrations_of(prompt: Prompt) -> list[str]:
    """The texts in the prompt's column `completion`: a string, or a list of strings; empty ones left out.

    Raises DataError naming the row for anything else.
    """
    value = prompt.columns.get("completion")
    texts = [value] if value is None or isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(t is None or isinstance(t, str) for t in texts):
        raise DataError(
            f"must be a text, or a list of texts (several demonstrations), not {value!r:.80}",
            row=prompt.id + 1,
            column="completion",
        )
    return [text for text in texts if text]


def any_demonstration(prompts: Iterable[Prompt]) -> bool:
    """Whether at least one prompt has a demonstration; every row is read. Raises as `demonstrations_of`."""
    return any([bool(demonstrations_of(prompt)) for prompt in prompts])
