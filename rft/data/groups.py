"""Build groups for offline training from demonstrations, preference pairs, labelled and ranked responses."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rft.algorithms.base import DataKind
from rft.batch import Completion, Group, Prompt
from rft.config.data import DataConfig
from rft.data.chat import Piece, Renderer, continuation, pieces
from rft.data.errors import BadRows, RowProblem, missing_column
from rft.data.messages import Messages, Text, read_messages, read_text, read_tools
from rft.data.prompts import RENDERED, fill_template, with_source_prefix
from rft.data.rows import Row, Split, load_rows
from rft.data.sessions import SessionReader

PAIR_TEMPLATE = "{prompt}\n\nCandidate A: {a}\n\nCandidate B: {b}"  # input of a pairwise reward model
CONVERSATIONS = ("messages", "conversations", "conversation")  # columns with a whole conversation
MAX_STEPS = 64  # maximum steps of a process-supervised solution


@dataclass(frozen=True)
class GroupSet(Sequence[Group]):
    """Groups of a split.

    skipped: number of skipped rows by reason. truncated: number of truncated completions. notes: warnings
    about rows that are used.
    """

    groups: list[Group]
    skipped: Mapping[str, int] = field(default_factory=dict)
    truncated: int = 0
    source: str = ""
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: Any) -> Any:
        return self.groups[index]

    def __iter__(self) -> Iterator[Group]:
        return iter(self.groups)

    def __str__(self) -> str:
        left = "".join(f"; {count} skipped: {reason}" for reason, count in self.skipped.items())
        cut = f"; {self.truncated} completions cut" if self.truncated else ""
        notes = "".join(f"; {note}" for note in self.notes)
        return f"{len(self.groups)} groups from {self.source}{left}{cut}{notes}"


def load_groups(
    config: DataConfig,
    tokenizer: Any,
    kind: DataKind = "sft",
    split: Split = "train",
    max_length: int | None = None,
) -> GroupSet:
    """Convert rows to groups of tokenised completions with rewards.

    sft         `prompt`, `completion`, or `messages`                reward 1
    preference  `chosen`, `rejected`, `prompt` (may be implicit)     1 and 0
    pairwise    same columns; one text with both candidates, in both orders; `columns["targets"]` 1 and 0
    unpaired    `prompt`, `completion`, `label`                      1 or 0
    ranked      `prompt`, `completions` best first, or `scores`      the scores, or K-1, ..., 0
    scored      `prompt`, `completion`, `score` (one or a list)      the first; `columns["targets"]`
    steps       `prompt`, `completions` (steps), `labels`            mean; `columns["step_labels"]`

    With `data.sessions`, rows are sessions of `rft collect`, for sft, preference and unpaired.
    max_length: maximum tokens of prompt and completion together (default: from the config).
    Raises DataError with the numbers of all invalid and overlong rows, unless the config skips them.
    """
    if config.sessions is not None:
        return _session_groups(config, tokenizer, kind, split, max_length)
    rows = load_rows(config, split)
    maker = GroupMaker(config, tokenizer, kind, rows.source, max_length)
    groups = [group for i, row in enumerate(rows) if (group := maker.make(row, rows.numbers[i]))]
    maker.check()
    if not groups:
        if maker.bad:
            raise maker.bad.error("no row is left; fix the rows above")
        raise maker.long.error("no row is left; raise max_length or max_prompt_length")
    skipped = {**maker.bad.counts, **maker.long.counts}
    return GroupSet(groups, skipped, maker.truncated, rows.source, maker.notes.lines())


def _session_groups(
    config: DataConfig, tokenizer: Any, kind: DataKind, split: Split, max_length: int | None
) -> GroupSet:
    """Return the groups of collected sessions. Raises DataError as `load_groups`."""
    reader = SessionReader(config, tokenizer, kind, max_length)
    groups = reader.groups(split)
    reader.check(groups)
    return GroupSet(groups, reader.skipped, source=reader.source)


class GroupMaker:
    """Build groups row by row, and record skipped rows and truncated completions."""

    def __init__(
        self, config: DataConfig, tokenizer: Any, kind: DataKind, source: str, max_length: int | None = None
    ) -> None:
        self.config, self.kind, self.source = config, kind, source
        self.max_length = max_length or config.max_length
        self.render = Renderer(config, tokenizer)
        self.eos: str = tokenizer.eos_token
        self.bad, self.long, self.notes = BadRows(source), BadRows(source), BadRows(source)
        self.truncated = 0

    def make(self, row: Row, number: int) -> Group | None:
        """Return the group of a row; None if it is invalid or overlong (recorded in `bad` or `long`)."""
        try:
            return self._make(row, number)
        except RowProblem as problem:
            self.bad.add(str(problem), number + 1)
        return None

    def check(self) -> None:
        """Raise DataError for all recorded rows, unless the config skips them."""
        if self.bad and self.config.bad_rows != "skip":
            raise self.bad.error("fix or remove them, or set `bad_rows: skip` to leave them out")
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
        used = ("prompt", "chosen", "rejected", *CONVERSATIONS)
        columns = {k: v for k, v in row.items() if k not in used}
        return Group(Prompt(number, tuple(prompt[1]), seen, columns), tuple(fitted))

    def _pieces(self, example: Example, response: Any, row: Row, number: int) -> list[Piece]:
        """Return the prompt piece, followed by the pieces of the response."""
        tools = read_tools(row.get("tools"))
        if example.prompt is None:
            messages = with_source_prefix(response, row, self.config, self.source, number)
            return self._conversation(messages, tools)
        prompt = fill_template(row, self.config, self.source, number, example.prompt)
        if not prompt:
            raise RowProblem("the prompt is empty")
        if self.render.is_rendered(prompt):
            self.notes.add(RENDERED, number + 1)
        if self.kind == "steps":
            steps = [step if step.endswith("\n") else step + "\n" for step in response]
            return [(self.render.prompt(prompt, tools)[0], False), *[(step, True) for step in steps]]
        if self.kind == "pairwise":
            return [(str(prompt), False), (response + self.eos, True)]
        return self._answered(prompt, read_text(response, "response"), tools)

    def _answered(self, prompt: Text, response: Text, tools: list[Any] | None) -> list[Piece]:
        """Render a prompt and a response; a list of messages must start with the assistant."""
        plain = not self.render.chat or self.render.is_rendered(prompt)
        if plain and isinstance(response, list):
            if not self.render.chat or len(response) > 1:
                why = "no chat template is used" if not self.render.chat else "the prompt is rendered text"
                raise RowProblem(f"a response is a list of messages, but {why}")
            response = str(response[0]["content"])
        if isinstance(response, str):
            response = self.render.without_end(response)
            if not response.strip():
                raise RowProblem("a response is empty")
            if plain:
                return [(self.render.prompt(prompt, tools)[0], False), (response + self.render.end, True)]
            response = [{"role": "assistant", "content": response}]
        before = self.render.as_messages(prompt)
        if before[-1]["role"] == "assistant" and len(response) == 1:
            return continuation(self.render, before, self.render.without_end(response[0]["content"]), tools)
        return self._trained_pieces([*before, *response], len(before), tools)

    def _conversation(self, messages: Text, tools: list[Any] | None) -> list[Piece]:
        assert isinstance(messages, list)  # ensured by `read_example`
        if not self.render.chat:
            raise RowProblem("`messages` need a tokenizer with a chat template")
        return self._trained_pieces(self.render.as_messages(messages), 0, tools)

    def _trained_pieces(self, messages: Messages, first: int, tools: list[Any] | None) -> list[Piece]:
        """Return the pieces of a conversation, with a loss on assistant turns from message `first` on."""
        written = [i for i, m in enumerate(messages) if i >= first and m["role"] == "assistant"]
        turns = [i for i in written if _weight(messages[i], i) > 0]
        messages = [{k: v for k, v in m.items() if k != "weight"} for m in messages]
        messages = [{**m, "content": self.render.without_end(m["content"])} for m in messages]
        if not turns:
            why = "; each has weight 0" if written else ""
            raise RowProblem(f"no assistant message to learn from{why}")
        if turns[0] == 0:
            raise RowProblem("the conversation begins with the assistant: put a user message first")
        if any(not messages[i].get("tool_calls") and not messages[i]["content"].strip() for i in turns):
            raise RowProblem("a response is empty")
        self.render.check_tools(messages, tools)
        return pieces(self.render, messages, turns if self.config.train_on == "all" else turns[-1:], tools)

    def _step_ends(self, prompt: tuple[str, list[int]], steps: Sequence[Piece]) -> list[bool]:
        """Return a mask that is True at the last token of each step."""
        mask: list[bool] = []
        for n in range(1, len(steps) + 1):
            length = len(self.render.pieces(*prompt, steps[:n])[0])
            mask += [False] * (length - len(mask) - 1) + [True]
        return mask

    def _values(self, row: Row, number: int) -> dict[str, float | tuple[float, ...]]:
        """Return the numeric columns of a row, shared by its sequences."""
        out: dict[str, float | tuple[float, ...]] = {}
        for name in self.config.numbers:
            if name not in row:
                raise missing_column(name, row, self.source, number + 1)
            if not is_finite(row[name]):
                raise RowProblem(f"`{name}` must be a finite number, not {row[name]!r:.40}")
            out[name] = float(row[name])
        if self.config.sources:
            with_source_prefix("", row, self.config, self.source, number)  # raises for an unknown source
            out["weight"] = self.config.sources[row["source"]].weight
        return out

    def _fit(self, prompt: list[int], completions: list[Completion], number: int) -> list[Completion] | None:
        """Apply the length limits to completions; None if the row is skipped, which is recorded."""
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
            self.long.add("the completion has no trained token after it was cut to max_length", number + 1)
            return None
        if len(out) > 1 and len({c.tokens for c in out}) < len({c.tokens for c in completions}):
            self.long.add("two responses are equal after they were cut to max_length", number + 1)
            return None
        self.truncated += sum(len(c.tokens) > room for c in completions)
        return out


def _weight(message: Mapping[str, Any], index: int) -> float:
    """Return the loss weight of a message, 0 or 1. Raises RowProblem."""
    weight = message.get("weight", 1)
    if weight not in (0, 1):
        raise RowProblem(f"message {index + 1} has weight {weight!r:.20}; it must be 0 or 1")
    return float(weight)


def cut(c: Completion, room: int) -> Completion:
    """Truncate a completion to `room` tokens and mark it as ended by the length limit."""
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


# -- parsing rows of demonstrations and preferences ----------------------------------------------------


@dataclass(frozen=True)
class Example:
    """Parsed row.

    prompt: None if the responses are whole conversations. responses: strings, message lists, or lists of
    strings (kind `steps`). rewards: one per response.
    """

    prompt: Text | None
    responses: list[Any]
    rewards: list[float]
    values: list[Mapping[str, float | tuple[float, ...]]] = field(default_factory=list)


def read_example(row: Row, kind: DataKind, source: str, number: int) -> Example:
    """Parse a row. Raises DataError for a missing column, RowProblem for invalid values."""

    def column(name: str) -> Any:
        if name not in row:
            raise missing_column(name, row, source, number + 1)
        if row[name] is None:
            raise RowProblem(f"`{name}` is null")
        return row[name]

    if kind == "sft":
        conversation = next((name for name in CONVERSATIONS if name in row), None)
        if conversation and "completion" not in row:
            return Example(None, [read_messages(row[conversation], conversation)], [1.0])
        return Example(column("prompt"), [column("completion")], [1.0])
    if kind == "preference":
        chosen, rejected = read_text(column("chosen"), "chosen"), read_text(column("rejected"), "rejected")
        if chosen == rejected:
            raise RowProblem("`chosen` and `rejected` are equal")
        return _split_pair(row.get("prompt", row.get("conversations")), chosen, rejected)
    if kind == "pairwise":
        return _both_orders(read_example(row, "preference", source, number))
    if kind == "unpaired":
        return Example(column("prompt"), [column("completion")], [_label(column("label"))])
    if kind == "ranked":
        return _ranked(column("prompt"), column("completions"), row.get("scores"))
    if kind == "scored":
        targets = _numbers(column("score"), "score")
        return Example(column("prompt"), [column("completion")], [targets[0]], [{"targets": tuple(targets)}])
    return _steps(column("prompt"), column("completions"), column("labels"))


def _split_pair(prompt: Any, chosen: Text, rejected: Text) -> Example:
    """Return the pair with its prompt; a missing prompt is the common prefix of both responses."""
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowProblem("`chosen` and `rejected` must both be strings, or both be message lists")
    if isinstance(chosen, list) and isinstance(rejected, list):
        if chosen[0]["role"] != "assistant":  # conversations that include the prompt
            same = 0
            while same < min(len(chosen), len(rejected)) - 1 and chosen[same] == rejected[same]:
                same += 1
            if not same:
                raise RowProblem("`chosen` and `rejected` have no common beginning, and there is no `prompt`")
            return Example(chosen[:same], [chosen[same:], rejected[same:]], [1.0, 0.0])
        if prompt is None:
            raise RowProblem("`chosen` and `rejected` begin with the assistant, and there is no `prompt`")
    if prompt is not None:
        return Example(prompt, [chosen, rejected], [1.0, 0.0])
    common = common_text(str(chosen), str(rejected))
    if not common:
        raise RowProblem("`chosen` and `rejected` have no common beginning, and there is no `prompt`")
    return Example(common, [chosen[len(common) :], rejected[len(common) :]], [1.0, 0.0])


def _both_orders(pair: Example) -> Example:
    """Return both candidates after the prompt, in both orders; reward 1 if the first one is better."""
    if not all(isinstance(text, str) for text in (pair.prompt, *pair.responses)):
        raise RowProblem("a pairwise model reads plain text: prompt and responses must be strings")
    a, b = pair.responses
    rest = PAIR_TEMPLATE.removeprefix("{prompt}")
    texts = [rest.format(a=a, b=b), rest.format(a=b, b=a)]
    return Example(pair.prompt, texts, [1.0, 0.0], [{"targets": (1.0,)}, {"targets": (0.0,)}])


def common_text(a: str, b: str) -> str:
    """Return the common prefix of two texts, cut between words so that neither remainder is empty.

    The space before the first differing word is excluded; a line break is included.
    """
    n = 0
    while n < min(len(a), len(b)) and a[n] == b[n]:
        n += 1
    while n and not (a[n:].strip() and b[n:].strip() and _between_words(a, n) and _between_words(b, n)):
        n -= 1
    while n and a[n - 1] == " ":
        n -= 1
    return a[:n]


def _between_words(text: str, n: int) -> bool:
    """Return whether a text may be cut before character `n`.

    That is at a space, or next to a character of a script written without spaces, but never before a
    combining mark.
    """
    before, after = text[n - 1], text[n]
    if unicodedata.category(after)[0] == "M" or "\u200d" in (before, after):
        return False
    return before.isspace() or after.isspace() or _wide(before) or _wide(after)


def _wide(character: str) -> bool:
    return unicodedata.east_asian_width(character) in "WF" and unicodedata.category(character) != "Sk"


def _label(value: Any) -> float:
    if isinstance(value, bool) or value in (0, 1):
        return float(value)
    raise RowProblem(f"`label` must be true or false, not {value!r:.40}")


def _numbers(value: Any, name: str) -> list[float]:
    """Parse a number or a list of finite numbers; None in a list means unknown (nan). Raises RowProblem."""
    values = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    out = []
    for v in values:
        if v is None and listed:
            out.append(math.nan)
        elif is_finite(v):
            out.append(float(v))
        else:
            raise RowProblem(f"`{name}` must be a finite number or a list of them, not {value!r:.40}")
    if not out or all(math.isnan(v) for v in out):
        raise RowProblem(f"`{name}` is empty or has only NaN")
    return out


def is_finite(value: Any) -> bool:
    """Return whether a value is a number representable as a finite float."""
    try:
        return isinstance(value, (int, float)) and math.isfinite(value)
    except OverflowError:  # integer outside the range of floats
        return False


def _ranked(prompt: Any, responses: Any, scores: Any) -> Example:
    if not isinstance(responses, list) or len(responses) < 2:
        raise RowProblem("`completions` must be a list of at least two responses, best first")
    if scores is None:
        return Example(prompt, responses, [float(r) for r in range(len(responses) - 1, -1, -1)])
    values = _numbers(scores, "scores")
    if len(values) != len(responses) or any(math.isnan(v) for v in values):
        raise RowProblem(f"{len(responses)} `completions`, but {len(values)} `scores`")
    if len(set(values)) == 1:
        raise RowProblem("all `scores` are equal: nothing is preferred")
    return Example(prompt, responses, values)


def _steps(prompt: Any, steps: Any, labels: Any) -> Example:
    if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s for s in steps):
        raise RowProblem("`completions` must be a list of steps, each a non-empty string")
    if not isinstance(labels, list) or len(labels) != len(steps):
        raise RowProblem(
            f"`completions` has {len(steps)} steps, so `labels` must be a list of the same length"
        )
    if len(steps) > MAX_STEPS:
        raise RowProblem(f"more than {MAX_STEPS} steps; split the row")
    marks = [_label(label) for label in labels]
    padded = (*marks, *[math.nan] * (MAX_STEPS - len(marks)))
    return Example(prompt, [steps], [sum(marks) / len(marks)], [{"step_labels": padded}])
