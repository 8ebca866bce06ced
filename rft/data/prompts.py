"""Render rows as text or chat prompts, tokenise them and apply the length limit."""

from __future__ import annotations

import random
import string
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rft.batch import Prompt
from rft.config.data import DataConfig
from rft.data.chat import Renderer
from rft.data.errors import BadRows, DataError, RowProblem, missing_column
from rft.data.messages import Text, read_text, read_tools
from rft.data.rows import Row, Rows, Split, load_rows

RENDERED = "already rendered with the chat template, so the template is not applied again"
RESERVED = ("prompt", "prompts", "completions")  # names of reward arguments provided by the run


@dataclass(frozen=True)
class PromptSet:
    """Prompts of a split.

    skipped: number of skipped rows by reason. rows: their numbers, counted from 1. notes: warnings about rows
    that are used.
    """

    prompts: list[Prompt]
    skipped: Mapping[str, int] = field(default_factory=dict)
    rows: Mapping[str, Sequence[int]] = field(default_factory=dict)
    source: str = ""
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.prompts)

    def __str__(self) -> str:
        left = "".join(f"; {count} skipped: {reason}" for reason, count in self.skipped.items())
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{len(self.prompts)} prompts from {self.source}{left}{notes}"


def load_prompts(
    config: DataConfig, tokenizer: Any, split: Split = "train", max_prompt_length: int | None = None
) -> PromptSet:
    """Convert rows to tokenised prompts; other columns are passed to the rewards by name.

    Prompts longer than `max_prompt_length` tokens (default: from the config) are never truncated:
    `overlong: reject` raises, `overlong: skip` skips and counts them.
    Raises DataError for overlong, missing or empty prompts, and as `load_rows`.
    """
    rows = load_rows(config, split)
    limit = max_prompt_length or config.max_prompt_length
    renderer = Renderer(config, tokenizer)
    too_long, bad, notes = BadRows(rows.source), BadRows(rows.source), BadRows(rows.source)
    read: list[tuple[int, Text, Row]] = []  # number, prompt and row
    rendered: list[str] = []
    for index, row in enumerate(rows):
        number = rows.numbers[index]
        if split == "test" and config.eval_source is not None:
            row = {**row, "source": config.eval_source}
        try:
            text = prompt_of(row, config, rows, number)
            if not text:
                raise RowProblem("the prompt is empty")
            rendered.append(renderer.prompt_text(text, read_tools(row.get("tools"))))
        except RowProblem as problem:
            bad.add(str(problem), number + 1)
            continue
        if renderer.is_rendered(text):
            notes.add(RENDERED, number + 1)
        read.append((number, text, row))
    prompts = []
    for (number, text, row), tokens in zip(read, renderer.encode_all(rendered), strict=True):
        if limit is not None and len(tokens) > limit:
            too_long.add(f"the prompt is longer than max_prompt_length={limit} tokens", number + 1)
            continue
        columns = {name: value for name, value in row.items() if name not in RESERVED}
        prompts.append(Prompt(id=number, tokens=tuple(tokens), text=text, columns=columns))
    if bad:
        raise bad.error("fix these rows, or remove them")
    if too_long and config.overlong != "skip":
        raise too_long.error("raise max_prompt_length, or set `overlong: skip` to leave them out")
    if not prompts:
        raise too_long.error("every row is too long: raise max_prompt_length")
    return PromptSet(prompts, too_long.counts, too_long.rows, rows.source, notes.lines())


def prompt_of(row: Row, config: DataConfig, rows: Rows, number: int) -> Text:
    """Return a row's prompt: its source's prefix, then the `prompt` column or the filled-in `template`.

    Raises DataError for a missing column, RowProblem for an invalid prompt.
    """
    if config.template is None and "prompt" not in row:
        raise missing_column("prompt", row, rows.source, number + 1)
    return fill_template(row, config, rows.source, number, row.get("prompt"))


def fill_template(row: Row, config: DataConfig, source: str, number: int, prompt: Any) -> Text:
    """Return the source's prefix, then `prompt` or, if configured, the `template` filled in from the row."""
    if config.template is None:
        text = read_text(prompt, "prompt")
    else:
        try:
            columns = {**row, "prompt": prompt} if prompt is not None else row
            text = _TextFormatter().vformat(template_of(config.template, config.seed, number), (), columns)
        except KeyError as error:
            raise missing_column(str(error.args[0]), row, source, number + 1) from None
        except RowProblem:
            raise
        except (ValueError, IndexError, AttributeError, TypeError) as error:
            raise DataError(f"`template` is malformed: {error}; write {{{{ for a brace") from None
    return with_source_prefix(text, row, config, source, number)


def template_of(templates: str | Sequence[str], seed: int, number: int) -> str:
    """Return the template of row `number`: of several (PAFT, arXiv:2502.12859), one drawn by the seed."""
    if isinstance(templates, str):
        return templates
    return random.Random(f"template/{seed}/{number}").choice(templates)


class _TextFormatter(string.Formatter):
    """`str.format` that rejects null, lists and objects (e.g. messages)."""

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        value, first = super().get_field(field_name, args, kwargs)
        if value is None or isinstance(value, list | tuple | Mapping):
            kind = "an object" if isinstance(value, Mapping) else "a list"
            shown = "null" if value is None else kind
            raise RowProblem(f"`template` needs text, and `{field_name}` is {shown}")
        return value, first


def with_source_prefix(text: Text, row: Row, config: DataConfig, source: str, number: int) -> Text:
    """Prepend the prefix of the row's source class to the text or the first user message."""
    if not config.sources:
        return text
    if "source" not in row:
        raise missing_column("source", row, source, number + 1)
    if row["source"] not in config.sources:
        known = ", ".join(config.sources)
        raise DataError(
            f"{row['source']!r} is not among `sources` ({known}); add it there",
            source=source,
            row=number + 1,
            column="source",
        )
    prefix = config.sources[row["source"]].prefix
    if isinstance(text, str):
        return prefix + text
    messages = [dict(message) for message in text]
    for message in messages:
        if message["role"] == "user":
            message["content"] = prefix + message["content"]
            break
    return messages


def demonstrations_of(prompt: Prompt) -> list[str]:
    """Return the demonstrations of an online prompt from its column `completion`, without empty ones.

    The column is a string or a list of strings. Raises DataError with the row for any other value.
    """
    value = prompt.columns.get("completion")
    texts = [value] if value is None or isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(t is None or isinstance(t, str) for t in texts):
        raise DataError(
            f"must be a string, or a list of strings (several demonstrations), not {value!r:.80}",
            row=prompt.id + 1,
            column="completion",
        )
    return [text for text in texts if text]


def any_demonstration(prompts: Iterable[Prompt]) -> bool:
    """Return whether any prompt has a demonstration; checks every row. Raises as `demonstrations_of`."""
    return any([bool(demonstrations_of(prompt)) for prompt in prompts])
