"""`rft select`: score the rows of a dataset by a method, and keep a part of them.

OUT/select.yaml      the data and the arguments
    scores.jsonl     one line for each row, in order; the same command goes on after its last line
    tokens.jsonl     q_tuning: one line for each row of selected.jsonl, with the tokens to train on
    selected.jsonl   the rows that are kept, with rft column names; it appears when all were scored
    report.html      one page: how many were kept, and a histogram of the scores
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rft.config.data import DataConfig
from rft.data import DataError
from rft.data.rows import Rows, load_rows
from rft.errors import ConfigError
from rft.metrics.log import iterate_jsonl
from rft.tools.out_folder import claimed
from rft.tools.row_scores import (
    Arguments,
    Diverse,
    Scored,
    Scorer,
    best_of_batches,
    scorer_of,
    text_key,
    texts_of,
)
from rft.utils.files import write_atomic, write_text_atomic

SCORES, SELECTED, REPORT, SETTINGS = "scores.jsonl", "selected.jsonl", "report.html", "select.yaml"
TOKENS = "tokens.jsonl"
SAY_EVERY = 10  # times in a selection that its progress is printed

Say = Callable[[str], None]
Floats = NDArray[np.float64]


class Method(NamedTuple):
    """A method of selection: the meaning of its score, and which options choose the rows by it.

    by: the options that choose rows; without any, the method itself does. model, tuned: whether it reads the
    rows with a model, and with a second one. state: whether all scores are computed again after a stop, since
    they depend on the rows before. highest: whether it can only keep the highest scores.
    """

    score: str
    by: tuple[str, ...]
    model: bool = False
    tuned: bool = False
    state: bool = False
    highest: bool = False


METHODS: dict[str, Method] = {
    "length": Method("words of prompt and response", ("range", "quantiles", "fraction")),
    "exact": Method("earlier rows with the same prompt and response", (), state=True),
    "minhash": Method("estimated Jaccard similarity with the most similar row kept before", (), state=True),
    "perplexity": Method(
        "exp of the mean -log p of the response's tokens", ("quantiles", "range", "fraction"), model=True
    ),
    "grape": Method("mean log p of the response's tokens", (), model=True),
    "el2n": Method("mean over the response's tokens of ||p - y||", ("fraction", "quantiles"), model=True),
    "learnability": Method(
        "mean log p of the response's tokens by --tuned, minus that by --model",
        ("fraction", "quantiles", "range"),
        model=True,
        tuned=True,
    ),
    "lobass": Method(
        "relative fall of the loss from --model to --tuned",
        ("fraction", "quantiles", "range"),
        model=True,
        tuned=True,
    ),
    "uds": Method(
        "nuclear norm of the row's logits, plus the distance from rows kept before",
        ("fraction",),
        model=True,
        highest=True,
    ),
    "q_tuning": Method("perplexity of the response", ("fraction",), model=True, highest=True),
    "pass_rate": Method("share of the row's sessions that succeeded", ("range",)),
}


@dataclass(frozen=True)
class Selected:
    """A finished selection."""

    file: Path
    rows: int
    kept: int

    def __str__(self) -> str:
        return f"{self.file}: {self.kept} of {self.rows} rows kept"


def select(arguments: Arguments, out: Path, say: Say) -> Selected:
    """Select into a folder, from where an earlier call of the same selection stopped.

    Raises ConfigError before anything is scored if the arguments are wrong or the folder has something else,
    DataError for data that cannot be read.
    """
    method = checked(arguments)
    config = DataConfig(
        path=arguments.data,
        split=arguments.split,
        columns=dict(arguments.columns or {}),
        limit=arguments.limit,
        max_length=arguments.max_length,
        overlong="truncate",
    )
    rows = load_rows(config, in_order=True)
    score = scorer_of(arguments, config, rows)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    settings = {
        **{name: list(v) if isinstance(v, tuple) else v for name, v in vars(arguments).items()},
        "rows": len(rows),
        "sha256": digest.hexdigest(),
    }
    files = (SCORES, SELECTED, REPORT, TOKENS)
    with claimed(out, "rft select", SETTINGS, files, settings, "scores of other arguments"):
        scores = _score(rows, score, out / SCORES, method, say)
        kept = chosen(arguments, scores, rows)
        with write_atomic(out / SELECTED) as temporary, temporary.open("w", encoding="utf-8") as file:
            for index in kept:
                file.write(json.dumps(rows[index], ensure_ascii=False, default=str) + "\n")
        if arguments.method == "q_tuning":
            _write_tokens(out, scores, kept)
        write_text_atomic(out / REPORT, report(arguments, scores.score, kept))
    return Selected(out / SELECTED, len(rows), len(kept))


def checked(a: Arguments) -> Method:
    """Return the method. Raises ConfigError with all problems of the arguments."""
    method = METHODS.get(a.method)
    if method is None:
        raise ConfigError([f"--method: {a.method!r} is unknown; choose one of {', '.join(METHODS)}"])
    given = [name for name in ("range", "quantiles", "fraction") if getattr(a, name) is not None]
    options, instead = method.by, f"; use --{' or --'.join(method.by)}" if method.by else ""
    problems = [
        f"--{name}: {a.method} does not choose rows by it{instead}" for name in given if name not in options
    ]
    if options and not given:
        problems.append(f"--method {a.method}: say which rows to keep by --{' or --'.join(options)}")
    if len(given) > 1:
        problems.append(f"--{' and --'.join(given)}: give one of them")
    if method.model and a.model is None:
        problems.append(f"--method {a.method}: it reads the rows with a model; name one by --model")
    if method.tuned and a.tuned is None:
        problems.append(f"--method {a.method}: name the model after training by --tuned")
    if a.tuned is not None and not method.tuned:
        problems.append(f"--tuned: {a.method} does not read a second model; leave it out")
    if a.lowest and (method.highest or a.fraction is None):
        why = f"{a.method} keeps no lowest scores" if method.highest else "it goes with --fraction"
        problems.append(f"--lowest: {why}; leave it out")
    if a.method == "pass_rate" and a.sessions is None:
        problems.append("--method pass_rate: name the sessions.jsonl of `rft collect` by --sessions")
    if a.quantiles is not None and not 0 <= a.quantiles[0] < a.quantiles[1] <= 1:
        problems.append("--quantiles: write two numbers, 0 <= LOW < HIGH <= 1")
    if a.range is not None and not a.range[0] <= a.range[1]:
        problems.append("--range: the lowest score must not be above the highest")
    if a.fraction is not None and not 0 < a.fraction <= 1:
        problems.append("--fraction: write a number above 0 and up to 1")
    for name in ("threshold", "token_share"):
        if not 0 < getattr(a, name) <= 1:
            problems.append(f"--{name.replace('_', '-')}: write a number above 0 and up to 1")
    if not 0 <= a.diversity < math.inf:
        problems.append("--diversity: write a number from 0 on")
    if problems:
        raise ConfigError(problems)
    return method


@dataclass(frozen=True)
class Scores:
    """The scores of all rows, nan for none, and for q_tuning the entropies; the rest of a line is on disk."""

    score: Floats
    entropy: Floats


def _score(rows: Rows, score: Scorer, file: Path, method: Method, say: Say) -> Scores:
    """Return the score of every row; those in the file are not computed again."""
    done, entropies = array("d"), array("d")

    def add(line: dict[str, Any]) -> str:
        done.append(math.nan if line["score"] is None else line["score"])
        entropies.append(line.get("entropy", math.nan))
        return json.dumps(line) + "\n"

    before = iter(()) if method.state else iterate_jsonl(file)
    # written again without the line that a killed process was writing
    with write_atomic(file) as temporary, temporary.open("w", encoding="utf-8") as out:
        out.writelines(map(add, before))
    if done and len(done) < len(rows):
        say(f"going on: {len(done)} of {len(rows)} rows were scored before")
        if isinstance(score, Diverse):
            score.restore(done, rows)
    every = max(1, len(rows) // SAY_EVERY)
    with file.open("a", encoding="utf-8") as out:
        for index in range(len(done), len(rows)):
            number = rows.numbers[index]
            out.write(add(_line(number, score(number, rows[index]))))
            out.flush()
            if method.model and (index + 1) % every == 0:
                say(f"{index + 1} of {len(rows)} rows")
    return Scores(np.frombuffer(done, dtype=np.float64), np.frombuffer(entropies, dtype=np.float64))


def _line(number: int, scored: Scored) -> dict[str, Any]:
    score = None if scored.score is None or math.isnan(scored.score) else scored.score
    return {"row": number + 1, "score": score, **scored.more}


# -- the choice ----------------------------------------------------------------------------------------------


def chosen(a: Arguments, scores: Scores, rows: Rows) -> Sequence[int]:
    """Return the indices of the rows that are kept, in order. Raises DataError if none is."""
    score = scores.score
    given = np.flatnonzero(~np.isnan(score))
    if a.method == "exact":
        kept = given[score[given] == 0]
    elif a.method == "minhash":
        kept = given[score[given] < a.threshold]
    elif a.method == "grape":
        kept = _best_of_prompt(given, score, rows)
    elif a.method == "uds":
        kept = np.array(best_of_batches(score, float(a.fraction or 0)), dtype=int)
    elif a.method == "q_tuning":
        kept = given[_quadrants(scores, given, float(a.fraction or 0))[0]] if len(given) else given
    elif a.fraction is not None:
        order = given[np.argsort(score[given] if a.lowest else -score[given], kind="stable")]
        kept = np.sort(order[: max(1, round(a.fraction * len(order)))])
    else:
        low, high = bounds(a, np.sort(score[given]))
        kept = given[(low <= score[given]) & (score[given] <= high)]
    if not len(kept):
        raise DataError("no row is left: change --range, or the data", source=a.data)
    indices: list[int] = kept.tolist()
    return indices


def bounds(a: Arguments, ordered: Sequence[float] | Floats) -> tuple[float, float]:
    """Return the lowest and highest score that are kept. ordered: all scores, ascending."""
    if a.range is not None or not len(ordered):
        return a.range or (0.0, 0.0)
    assert a.quantiles is not None  # ensured by `checked`
    last = len(ordered) - 1
    low, high = (q * last for q in a.quantiles)
    return float(ordered[math.ceil(low)]), float(ordered[math.floor(high)])


def _best_of_prompt(given: NDArray[np.intp], score: Floats, rows: Rows) -> NDArray[np.intp]:
    best: dict[bytes, int] = {}
    for i in given.tolist():
        prompt = text_key(texts_of(rows[i])[0])
        if prompt not in best or score[i] > score[best[prompt]]:
            best[prompt] = i
    return np.array(sorted(best.values()), dtype=np.intp)


def _quadrants(
    scores: Scores, given: NDArray[np.intp], fraction: float
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Return which of the rows with a score Q-Tuning keeps, and which are misconceptions."""
    import torch

    from rft.algorithms.supervised.q_tuning import quadrants

    error, uncertainty = (torch.from_numpy(values[given]) for values in (scores.score, scores.entropy))
    kept, misconception = quadrants(error, uncertainty, fraction)
    return kept.numpy(), misconception.numpy()


def _write_tokens(out: Path, scores: Scores, kept: Sequence[int]) -> None:
    """Write for each kept row of q_tuning its quadrant, and 1 for each response token to train on, else 0."""
    given = np.flatnonzero(~np.isnan(scores.score))
    misconceptions = set(given[_quadrants(scores, given, 1.0)[1]].tolist())
    left = iter(kept)
    following = next(left, None)

    def lines() -> Iterator[str]:
        nonlocal following
        for index, line in enumerate(iterate_jsonl(out / SCORES)):
            if index != following:
                continue
            following, wrong = next(left, None), index in misconceptions
            tokens = line["tokens"] if wrong else [1] * len(line["tokens"])
            quadrant = "misconception" if wrong else "calibration"
            yield json.dumps({"row": line["row"], "quadrant": quadrant, "tokens": tokens}) + "\n"

    with write_atomic(out / TOKENS) as temporary, temporary.open("w", encoding="utf-8") as file:
        file.writelines(lines())


# -- the page ------------------------------------------------------------------------------------------


def report(a: Arguments, scores: Floats, kept: Sequence[int]) -> str:
    """Return the page of a selection: counts, quantiles and a histogram, without external parts."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from rft.report.plots import BLUE, GREY, STYLE

    values, chosen_values = scores[~np.isnan(scores)], scores[kept]
    with rc_context(STYLE):
        figure = Figure(figsize=(7.0, 3.2), layout="constrained")
        axes = figure.add_subplot(1, 1, 1)
        edges = axes.hist(values, bins=40, color=GREY, label="all rows")[1]
        axes.hist(chosen_values, bins=list(edges), color=BLUE, label="kept")
        axes.set_xlabel(METHODS[a.method].score)
        axes.set_ylabel("rows")
        axes.legend(frameon=False)
        picture = io.StringIO()
        figure.savefig(picture, format="svg")
    svg = picture.getvalue()
    svg = svg[svg.index("<svg") :]
    facts = {
        "data": a.data,
        "method": f"{a.method}: {METHODS[a.method].score}",
        "model": a.model or "none",
        "rows": f"{len(kept)} kept of {len(scores)}; {len(scores) - len(values)} without a score",
        "scores": _spread(values),
        "scores kept": _spread(chosen_values),
    }
    lines = "".join(f"<tr><th>{k}</th><td>{html.escape(v)}</td></tr>" for k, v in facts.items())
    style = "body{font:15px sans-serif;margin:2em;max-width:52em}th{text-align:left;padding-right:1em}"
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8"><title>rft select</title>'
        f"<style>{style}</style><h1>Selection by {a.method}</h1><table>{lines}</table>{svg}</html>\n"
    )


def _spread(values: Floats) -> str:
    return f"lowest {values.min():.4g}, median {np.median(values):.4g}, highest {values.max():.4g}"
