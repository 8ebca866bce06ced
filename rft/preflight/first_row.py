"""Show the first row of the data as the run sees it: columns, rendered prompt, verdict on its gold answer."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft.batch import Group, Prompt
from rft.config.data import SUFFIXES, DataConfig
from rft.config.mixture import COLUMN
from rft.config.rewards import SLOW, RewardConfig, RewardsConfig
from rft.data.formats import SUMMARIES, row_format
from rft.data.prompts import demonstrations_of
from rft.data.rows import data_source, find_files
from rft.data.stream import first_raw_row
from rft.preflight.rewards import PROGRAMS
from rft.rewards.load import load_reward
from rft.rewards.runner import RewardRunner
from rft.rewards.types import Outcome, RewardError, Score

SHOWN_CHARACTERS = 600  # of a text; the middle of a longer one is left out


@dataclass(frozen=True)
class GoldVerdict:
    """A reward's judgement of the gold answer of a row. completion: the text that it was given."""

    label: str
    completion: str
    score: Score


def describe_columns(columns: Iterable[str], renamed: Mapping[str, str]) -> str:
    """List the columns of a row by their names in rft, each with its name in the data if that differs."""
    return ", ".join(f"{name} (from {renamed[name]})" if name in renamed else name for name in columns)


def describe_format(config: DataConfig) -> str:
    """Describe the files of the training data, and the format of its rows if it is a known one."""
    if config.resolved_kind == "file":
        names = [file.name for file in find_files(*data_source(config, "train"))]
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        suffix = next(s for s in sorted(SUFFIXES, key=len, reverse=True) if names[0].endswith(s))
        what = f"{_FILES[suffix]} ({names[0]}{more})"
    else:
        what = "a dataset of the hub" if config.resolved_kind == "hub" else f"the task {config.resolved_kind}"
    raw = first_raw_row(config)[0]
    kind = row_format(raw) if isinstance(raw, Mapping) else None
    return what if kind is None else f"{what}, rows of {SUMMARIES[kind]}"


_FILES = {
    ".jsonl": "JSON lines",
    ".json": "JSON",
    ".jsonl.gz": "JSON lines in gzip",
    ".json.gz": "JSON in gzip",
    ".jsonl.zst": "JSON lines in zstd",
    ".json.zst": "JSON in zstd",
    ".csv": "CSV",
    ".parquet": "Parquet",
    ".arrow": "Arrow",
}


def shortened(text: str, most: int = SHOWN_CHARACTERS) -> str:
    """Leave out the middle of a text of more than `most` characters."""
    if len(text) <= most:
        return text
    head = most * 2 // 3
    tail = most - head
    return f"{text[:head]} [... {len(text) - most} characters ...] {text[-tail:]}"


def first_prompt_lines(prompt: Prompt, tokenizer: Any) -> list[str]:
    """Describe a prompt as the policy gets it: number of tokens and text, special tokens included."""
    text = tokenizer.decode(list(prompt.tokens))
    return [f"{len(prompt.tokens)} tokens", *_quoted(text)]


def first_group_lines(group: Group, tokenizer: Any) -> list[str]:
    """Describe an offline row as the policy gets it: numbers of tokens, prompt, and first response."""
    counts = ", ".join(str(len(c.tokens)) for c in group.completions)
    many = "responses" if len(group.completions) > 1 else "response"
    prompt, response = list(group.prompt.tokens), list(group.completions[0].tokens)
    return [
        f"{len(prompt)} tokens, {many} of {counts}",
        *_quoted(tokenizer.decode(prompt)),
        "and its first response" if len(group.completions) > 1 else "and its response",
        *_quoted(tokenizer.decode(response)),
    ]


def _quoted(text: str) -> list[str]:
    return [f"| {line}" for line in shortened(text).split("\n")]


def gold_verdicts(
    config: RewardsConfig, prompt: Prompt, tokenizer: Any, by_source: Mapping[str, Sequence[str]]
) -> list[GoldVerdict]:
    """Score the gold answer of a row as if it were a completion: its demonstration, or else its `answer`.

    A reward that finds no answer in a bare text gets it in a box as well. Judges and models are not called.
    by_source: names of the rewards that score rows of a source of a mixture; of other rows, all.
    Returns [] for a row without a gold answer.
    """
    texts = _demonstrated(prompt)[:1]
    answer = prompt.columns.get("answer")
    if not texts and isinstance(answer, str | int | float) and not isinstance(answer, bool):
        texts = [str(answer), f"\\boxed{{{answer}}}"]
    labels = by_source.get(str(prompt.columns.get(COLUMN)), [c.label for c in config.functions])
    functions = [
        c for c in config.functions if c.function not in SLOW and c.actor is None and c.label in labels
    ]
    if not texts or not functions:
        return []
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    columns: dict[str, list[Any]] = {name: [value] * len(texts) for name, value in prompt.columns.items()}
    columns |= {"completion_ids": ids, "num_tokens": [len(i) for i in ids], "truncated": [False] * len(ids)}
    scores = [_score(c, prompt, texts, columns) for c in functions]
    verdicts = []
    for c, tried in zip(functions, scores, strict=True):
        read = [i for i, score in enumerate(tried) if score.outcome is not Outcome.unparseable]
        chosen = read[0] if read else 0
        verdicts.append(GoldVerdict(c.label, texts[chosen], tried[chosen]))
    return verdicts


def _demonstrated(prompt: Prompt) -> list[str]:
    """Return the demonstrations of a prompt; of messages of several turns, the last one's text."""
    value = prompt.columns.get("completion")
    if isinstance(value, list | tuple) and value and isinstance(value[-1], Mapping):
        text = value[-1].get("content")
        return [text] if isinstance(text, str) and text else []
    return demonstrations_of(prompt)


def _score(
    c: RewardConfig, prompt: Prompt, texts: list[str], columns: Mapping[str, list[Any]]
) -> list[Score]:
    """Return the scores of all texts: of a built-in in this process, of other code in a worker process."""
    if ":" not in c.function and c.function not in PROGRAMS:
        renamed = {name: columns[column] for name, column in c.columns.items()}
        reward: Any = load_reward(c.function, **c.options)
        scores: list[Score] = reward.score([prompt.text] * len(texts), texts, **{**columns, **renamed})
        return scores
    with ThreadPoolExecutor(1) as thread:  # an event loop may already run in this one
        return thread.submit(lambda: asyncio.run(_score_in_worker(c, prompt, texts, columns))).result()


async def _score_in_worker(
    c: RewardConfig, prompt: Prompt, texts: list[str], columns: Mapping[str, list[Any]]
) -> list[Score]:
    one = c.model_copy(update={"gate": False, "weight": 1.0, "workers": None})
    config = RewardsConfig(functions=[one], workers=1, on_error="drop", on_timeout="drop")
    try:
        async with RewardRunner(config, Path.cwd()) as runner:
            rewards = await runner.score([prompt.text] * len(texts), texts, columns)
    except RewardError as error:
        return [Score(None, Outcome.error, str(error))] * len(texts)
    return [reward.scores[c.label] for reward in rewards]


def verdict_line(verdict: GoldVerdict) -> str:
    """Format a verdict; of an error, the last line of its traceback."""
    score = verdict.score
    value = "" if score.value is None else f" {score.value:g}"
    lines = score.detail.strip().splitlines()
    detail = lines[-1] if lines and score.outcome is Outcome.error else " ".join(lines)
    given = shortened(" ".join(verdict.completion.split()), 80)
    reason = f" ({shortened(detail, 160)})" if detail else ""
    return f"{verdict.label} judges {given!r}: {score.outcome}{value}{reason}"
