"""Groups for offline training: demonstrations, preference pairs, labelled and ranked responses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rft.batch import Completion, Group, Prompt
from rft.data.chat import Piece, Renderer, Text, is_messages
from rft.data.config import DataConfig
from rft.data.conversation import CannotTell, pieces
from rft.data.errors import BadRows, missing_column
from rft.data.examples import Example, GroupKind, RowProblem, read_example
from rft.data.prompts import fill_template, with_source_prefix
from rft.data.rows import Row, Split, load_rows


@dataclass(frozen=True)
class GroupSet(Sequence[Group]):
    """The groups of a split. `skipped` counts the rows left out, by reason; `truncated` counts the
    completions that were cut to fit."""

    groups: list[Group]
    skipped: Mapping[str, int] = field(default_factory=dict)
    truncated: int = 0
    source: str = ""

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: Any) -> Any:
        return self.groups[index]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __str__(self) -> str:
        left = "".join(f"; {count} skipped: {reason}" for reason, count in self.skipped.items())
        cut = f"; {self.truncated} completions cut" if self.truncated else ""
        return f"{len(self.groups)} groups from {self.source}{left}{cut}"


def load_groups(
    config: DataConfig,
    tokenizer: Any,
    kind: GroupKind = "sft",
    split: Split = "train",
    max_length: int | None = None,
) -> GroupSet:
    """Rows -> groups of tokenised completions with rewards.

    sft         `prompt`, `completion`, or `messages`                reward 1
    preference  `chosen`, `rejected`, `prompt` (may be implicit)     1 and 0
    pairwise    the same, as one text with both candidates, in both orders; `columns["targets"]` 1 and 0
    unpaired    `prompt`, `completion`, `label`                      1 or 0
    ranked      `prompt`, `completions` best first, or with `scores` the scores, or K-1, ..., 0
    scored      `prompt`, `completion`, `score` (one or a list)      the first; `columns["targets"]`
    steps       `prompt`, `completions` (steps), `labels`            mean; `columns["step_labels"]`

    `max_length` counts prompt and completion (default: the config's).
    Raises DataError with all bad and all too long rows by number, unless the config says to skip.
    """
    rows = load_rows(config, split)
    maker = GroupMaker(config, tokenizer, kind, rows.source, max_length)
    groups = [group for i, row in enumerate(rows) if (group := maker.make(row, rows.numbers[i]))]
    maker.check()
    if not groups:
        raise maker.bad.error("no row is left") if maker.bad else maker.long.error("no row is left")
    skipped = {**maker.bad.counts, **maker.long.counts}
    return GroupSet(groups, skipped, maker.truncated, rows.source)


class GroupMaker:
    """Makes groups one row at a time, and keeps account of what was left out or cut."""

    def __init__(
        self, config: DataConfig, tokenizer: Any, kind: GroupKind, source: str, max_length: int | None = None
    ) -> None:
        self.config, self.kind, self.source = config, kind, source
        self.max_length = max_length or config.max_length
        self.render = Renderer(config, tokenizer)
        self.eos: str = tokenizer.eos_token
        self.bad, self.long = BadRows(source), BadRows(source)
        self.truncated = 0

    def make(self, row: Row, number: int) -> Group | None:
        """The group of a row, or None where the row is bad or too long (noted in `bad`, `long`)."""
        try:
            return self._make(row, number)
        except (RowProblem, CannotTell) as problem:
            self.bad.add(str(problem), number + 1)
        return None

    def check(self) -> None:
        """Raise DataError for what was noted, unless the config says to skip it."""
        if self.bad and self.config.bad_rows != "skip":
            raise self.bad.error("mend or remove them, or set `bad_rows: skip` to leave them out")
        if self.long and self.config.overlong == "reject":
            raise self.long.error(
                "raise the limit, or set `overlong: skip` to leave them out, `truncate` to cut completions"
            )

    def _make(self, row: Row, number: int) -> Group | None:
        example = read_example(row, self.kind, self.source, number)
        shared = self._values(row, number)
        prompt: tuple[str, list[int]] | None = None
        completions = []
        for index, response in enumerate(example.responses):
            text, *rest = self._pieces(example, response, row, number)
            if prompt is None:
                prompt = text[0], self.render.encode(text[0])
            elif text[0] != prompt[0]:
                raise RowProblem("the chat template writes the prompt differently for the two responses")
            ids, mask = self.render.pieces(*prompt, rest)
            if self.kind == "steps":
                mask = self._step_ends(prompt, rest)
            elif self.kind == "pairwise":
                mask = [False] * (len(ids) - 1) + [True]
            values = {**shared, **(example.values[index] if example.values else {})}
            completions.append(
                Completion(
                    tokens=tuple(ids),
                    text="".join(piece for piece, trained in rest if trained),
                    finish="demonstration",
                    mask=None if all(mask) else tuple(mask),
                    demonstrated=len(ids),
                    reward=example.rewards[index],
                    values=values,
                )
            )
        assert prompt is not None
        fitted = self._fit(prompt[1], completions, number)
        if fitted is None:
            return None
        seen = example.prompt if example.prompt is not None else prompt[0]
        columns = {k: v for k, v in row.items() if k not in ("prompt", "messages", "chosen", "rejected")}
        return Group(Prompt(number, tuple(prompt[1]), seen, columns), tuple(fitted))

    def _pieces(self, example: Example, response: Any, row: Row, number: int) -> list[Piece]:
        """[prompt piece, then the response's pieces]."""
        if example.prompt is None:
            return self._conversation(with_source_prefix(response, row, self.config, self.source, number))
        prompt = fill_template(row, self.config, self.source, number, example.prompt)
        if not prompt:
            raise RowProblem("the prompt is empty")
        if not isinstance(prompt, str) and not is_messages(prompt):
            raise RowProblem(f"`prompt` must be a string or a list of messages, not {prompt!r:.40}")
        if self.kind == "steps":
            steps = [step if step.endswith("\n") else step + "\n" for step in response]
            return [(self.render.prompt(prompt, number)[0], False), *[(step, True) for step in steps]]
        if self.kind == "pairwise":
            return [(str(prompt), False), (response + self.eos, True)]
        return self._answered(prompt, response, number)

    def _answered(self, prompt: Text, response: Any, number: int) -> list[Piece]:
        """A prompt and its response, which is a string or messages that begin with the assistant."""
        if isinstance(response, str):
            if not response.strip():
                raise RowProblem("a response is empty")
            if not self.render.chat:
                end = "" if response.endswith(self.eos) else self.eos
                return [(self.render.prompt(prompt, number)[0], False), (response + end, True)]
            response = [{"role": "assistant", "content": response}]
        if not is_messages(response):
            raise RowProblem(f"a response must be a string or a list of messages, not {response!r:.40}")
        if not self.render.chat:
            raise RowProblem("a response is a list of messages, but no chat template is used")
        before = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        before = self.render.with_system(before)
        return self._trained_pieces([*before, *response], len(before))

    def _conversation(self, messages: Any) -> list[Piece]:
        if not is_messages(messages):
            raise RowProblem("`messages` must be a list of {role, content} messages")
        if not self.render.chat:
            raise RowProblem("`messages` need a tokenizer with a chat template")
        return self._trained_pieces(self.render.with_system(messages), 0)

    def _trained_pieces(self, messages: list[dict[str, Any]], first: int) -> list[Piece]:
        turns = [i for i, m in enumerate(messages) if i >= first and m["role"] == "assistant"]
        if not turns:
            raise RowProblem("there is no assistant message to learn from")
        if turns[0] == 0:
            raise RowProblem("the conversation begins with the assistant: there is no prompt")
        for i in turns:
            content = messages[i].get("content")
            if not messages[i].get("tool_calls") and (not isinstance(content, str) or not content.strip()):
                raise RowProblem("a response is empty")
        return pieces(self.render, messages, turns if self.config.train_on == "all" else turns[-1:])

    def _step_ends(self, prompt: tuple[str, list[int]], steps: Sequence[Piece]) -> list[bool]:
        """True at the last token of each step."""
        mask: list[bool] = []
        for n in range(1, len(steps) + 1):
            length = len(self.render.pieces(*prompt, steps[:n])[0])
            mask += [False] * (length - len(mask) - 1) + [True]
        return mask

    def _values(self, row: Row, number: int) -> dict[str, float | tuple[float, ...]]:
        """The numeric columns that go with each of the row's sequences."""
        out: dict[str, float | tuple[float, ...]] = {}
        for name in self.config.numbers:
            if name not in row:
                raise missing_column(name, row, self.source, number + 1)
            if not isinstance(row[name], (int, float)) or not math.isfinite(row[name]):
                raise RowProblem(f"`{name}` must be a finite number, not {row[name]!r:.40}")
            out[name] = float(row[name])
        if self.config.sources:
            with_source_prefix("", row, self.config, self.source, number)  # an unknown source is an error
            out["weight"] = self.config.sources[row["source"]].weight
        return out

    def _fit(self, prompt: list[int], completions: list[Completion], number: int) -> list[Completion] | None:
        """The completions within the length limits; None (and a note) where the row is left out."""
        longest, limit = self.config.max_prompt_length, self.max_length
        if longest is not None and len(prompt) > longest:
            self.long.add(f"the prompt is longer than max_prompt_length={longest} tokens", number + 1)
            return None
        if limit is None or all(len(prompt) + len(c.tokens) <= limit for c in completions):
            return completions
        room = limit - len(prompt)
        if self.config.overlong != "truncate":
            self.long.add(f"prompt and completion are longer than max_length={limit} tokens", number + 1)
            return None
        if self.kind == "steps":
            self.long.add(f"longer than max_length={limit} tokens, and steps cannot be cut", number + 1)
            return None
        if room < 1:
            self.long.add(f"the prompt leaves no room within max_length={limit} tokens", number + 1)
            return None
        return self._cut(completions, room, number)

    def _cut(self, completions: list[Completion], room: int, number: int) -> list[Completion] | None:
        out = [c if len(c.tokens) <= room else cut(c, room) for c in completions]
        if any(c.mask is not None and not any(c.mask) for c in out):
            self.long.add("cut to max_length, nothing that has a loss is left", number + 1)
            return None
        if len(out) > 1 and len({c.tokens for c in out}) < len({c.tokens for c in completions}):
            self.long.add("cut to max_length, two responses are equal", number + 1)
            return None
        self.truncated += sum(len(c.tokens) > room for c in completions)
        return out


def cut(c: Completion, room: int) -> Completion:
    """The first `room` tokens of a completion, marked as ended by the length limit."""
    mask = c.mask[:room] if c.mask is not None else None
    return Completion(
        tokens=c.tokens[:room],
        text=c.text,
        finish="length",
        mask=None if mask is None or all(mask) else mask,
        demonstrated=min(c.demonstrated, room),
        reward=c.reward,
        values=c.values,
    )
