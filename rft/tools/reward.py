"""`rft reward SPEC FILE`: score a file with a reward as a training run would."""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft.config.rewards import RewardConfig, RewardsConfig
from rft.preflight.rewards import check_reward, check_values
from rft.rewards.runner import RewardRunner
from rft.rewards.types import Outcome, RewardError, SampleReward, Score, text_of
from rft.utils.terminal import say

OUTCOMES = [outcome.value for outcome in Outcome]


class InputError(ValueError):
    """The file cannot be scored; the message gives the line and the reason."""


@dataclass(frozen=True)
class Rows:
    """The file's rows by column; `label` is stored separately."""

    prompts: list[Any]
    completions: list[Any]
    columns: dict[str, list[Any]]
    labels: list[Any] | None

    def by_row(self) -> Iterator[dict[str, Any]]:
        """Yield the columns of each row."""
        return ({name: values[i] for name, values in self.columns.items()} for i in range(len(self.prompts)))


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser("rft reward", description=__doc__)
    p.add_argument("spec", metavar="SPEC", help="math, file.py:function, package.module:function, ...")
    p.add_argument(
        "file",
        metavar="FILE",
        help="rows with prompt, completion, columns: JSON lines, a JSON array, either gzipped, Parquet, "
        "Arrow, or a folder of them",
    )
    p.add_argument("options", nargs="*", metavar="key=value", help="options of the reward (values as JSON)")
    p.add_argument(
        "--explain", action="store_true", help="show the extracted answer and the reason for the judgement"
    )
    p.add_argument("--completion", default="completion", metavar="COLUMN", help="column with the completions")
    p.add_argument("--prompt", default="prompt", metavar="COLUMN", help="column with the prompts")
    p.add_argument("--label", default="label", metavar="COLUMN", help="column with the right verdict")
    p.add_argument("--column", action="append", default=[], metavar="NAME=COLUMN", help="rename a column")
    p.add_argument("--timeout", type=float, metavar="S", help="seconds for one call")
    p.add_argument("--workers", type=int, default=2, metavar="N", help="worker processes")
    p.add_argument("--slowest", type=int, default=3, metavar="N", help="how many slow cases to show")
    p.add_argument("--limit", type=int, metavar="N", help="score the first N rows only")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command. Return 0, 1 if a call failed, or 2 for invalid input.

    2 also if only some rows are invalid, such as those whose gold answer is null: the others are scored.
    """
    args = parser().parse_intermixed_args(argv)
    try:
        config = _config(args)
        rows = read_rows(args.file, args.prompt, args.completion, args.label, args.limit)
    except ValueError as error:  # InputError, DataError and pydantic's ValidationError
        say(f"rft reward: {error}")
        return 2
    problems = check_reward(config, Path.cwd(), rows.columns)
    if problems:
        say("\n".join(f"rft reward: {p}" for p in problems))
        return 2
    try:
        rewards, seconds = asyncio.run(_score(config, rows))
    except RewardError as error:
        say(f"rft reward: {error}")
        return 1
    scores = [r.scores["reward"] for r in rewards]
    say("\n".join(report(scores, rows, seconds, slowest=args.slowest, explain=args.explain)), sys.stdout)
    bad = check_values(config, args.file, enumerate(rows.by_row(), 1))
    if bad:
        say("\n".join(f"rft reward: {problem}" for problem in bad))
        return 2
    return 1 if any(s.failed for s in scores) else 0


def _config(args: argparse.Namespace) -> RewardsConfig:
    options = dict(_option(text) for text in args.options)
    columns = {name: str(column) for name, column in (_option(text) for text in args.column)}
    return RewardsConfig(
        functions=[
            RewardConfig(
                function=args.spec, name="reward", options=options, columns=columns, timeout_s=args.timeout
            )
        ],
        workers=args.workers,
        on_error="drop",
        on_timeout="drop",
    )


def _option(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise InputError(f"{text!r} must have the form key=value")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def read_rows(path: str | Path, prompt: str, completion: str, label: str, limit: int | None = None) -> Rows:
    """Read the rows of a file or folder as a run does. Raises InputError and DataError for invalid rows."""
    from rft.config.data import DataConfig
    from rft.data.errors import locate
    from rft.data.messages import is_messages
    from rft.data.rows import load_rows

    source = load_rows(DataConfig(kind="file", path=str(path), limit=limit))
    rows = list(source)
    for number, row in zip(source.numbers, rows, strict=True):
        if completion not in row:
            have = ", ".join(map(str, row))
            file, at = locate(source.source, number + 1)
            raise InputError(f"{file}, row {at}: no {completion!r} (found: {have}); name it by --completion")
        for column, value in ((completion, row[completion]), (prompt, row.get(prompt) or "")):
            if not isinstance(value, str) and not is_messages(value):
                file, at = locate(source.source, number + 1)
                raise InputError(
                    f"{file}, row {at}, column {column!r}: must be a string or a list of messages, not "
                    f"{value!r:.80}"
                )
    names = {name for row in rows for name in row} - {prompt, completion, label}
    return Rows(
        prompts=[row.get(prompt) or "" for row in rows],
        completions=[row[completion] for row in rows],
        columns={name: [row.get(name) for row in rows] for name in sorted(names)},
        labels=[row.get(label) for row in rows] if any(label in row for row in rows) else None,
    )


async def _score(config: RewardsConfig, rows: Rows) -> tuple[list[SampleReward], float]:
    async with RewardRunner(config, Path.cwd()) as runner:
        loop = asyncio.get_running_loop()
        start = loop.time()
        rewards = await runner.score(rows.prompts, rows.completions, rows.columns)
        return rewards, loop.time() - start


# -- the report --------------------------------------------------------------------------------------


def report(
    scores: Sequence[Score], rows: Rows, seconds: float, *, slowest: int = 3, explain: bool = False
) -> list[str]:
    """Return the lines that the command prints."""
    lines = _explained(scores, rows) if explain else []
    counts = Counter(s.outcome.value for s in scores)
    lines += [f"{'outcome':12s} {'count':>7s} {'share':>7s} {'mean value':>11s}"]
    for outcome in OUTCOMES:
        values = [s.value for s in scores if s.outcome == outcome and s.value is not None]
        mean = f"{sum(values) / len(values):11.3f}" if values else f"{'-':>11s}"
        lines.append(f"{outcome:12s} {counts[outcome]:7d} {counts[outcome] / len(scores):7.1%} {mean}")
    times = sorted(s.seconds for s in scores)
    p50, p95 = times[len(times) // 2], times[min(len(times) - 1, int(len(times) * 0.95))]
    lines.append(
        f"{len(scores)} calls in {seconds:.2f} s ({len(scores) / max(seconds, 1e-9):.0f}/s); "
        f"per call: median {_time(p50)}, 95 % {_time(p95)}, most {_time(times[-1])}"
    )
    for i in sorted(range(len(scores)), key=lambda i: -scores[i].seconds)[:slowest]:
        lines.append(
            f"slow: row {i + 1} took {_time(scores[i].seconds)} ({scores[i].outcome}): {_excerpt(rows, i)}"
        )
    lines += _failures(scores, rows)
    if rows.labels is not None:
        lines += _disagreement(scores, rows)
    return lines


def _explained(scores: Sequence[Score], rows: Rows) -> list[str]:
    return [f"row {i}: {s.outcome} {_shown(s.value)}  {s.detail}" for i, s in enumerate(scores, 1)] + [""]


def _failures(scores: Sequence[Score], rows: Rows, most: int = 3) -> list[str]:
    failed = [i for i, s in enumerate(scores) if s.failed]
    lines = [
        f"failed: row {i + 1} ({scores[i].outcome}): {_excerpt(rows, i)}\n{scores[i].detail}"
        for i in failed[:most]
    ]
    return lines + ([f"... and {len(failed) - most} more failures"] if len(failed) > most else [])


def _disagreement(scores: Sequence[Score], rows: Rows, most: int = 10) -> list[str]:
    labels = rows.labels or []
    judged = [i for i, s in enumerate(scores) if s.value is not None and labels[i] is not None]
    high = [i for i in judged if _positive(scores[i]) and not _labelled_right(labels[i])]
    low = [i for i in judged if not _positive(scores[i]) and _labelled_right(labels[i])]
    if not judged:
        return ["labels: none to compare with"]
    share = (len(high) + len(low)) / len(judged)
    lines = [
        f"labels: {len(judged)} compared, {share:.2%} disagree: "
        f"{len(high)} rewarded although labelled wrong, {len(low)} not rewarded although labelled right"
    ]
    for i in (high + low)[:most]:
        verdict = f"{scores[i].outcome} {_shown(scores[i].value)}: {scores[i].detail}"
        lines.append(f"  row {i + 1}: label {labels[i]!r}, {verdict}")
    return lines


def _positive(score: Score) -> bool:
    return score.outcome is Outcome.correct


def _labelled_right(label: Any) -> bool:
    if isinstance(label, str):
        return label.strip().casefold() in ("1", "true", "yes", "correct", "right", "good")
    return bool(label) and (isinstance(label, bool) or label > 0)


def _shown(value: float | None) -> str:
    return "None" if value is None else f"{value:g}"


def _time(seconds: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= 1:
            return f"{seconds * factor:.1f} {unit}"
    return f"{seconds * 1e6:.0f} us"


def _excerpt(rows: Rows, i: int) -> str:
    text = " ".join(text_of(rows.completions[i]).split())
    return text if len(text) <= 100 else text[:100] + "..."
