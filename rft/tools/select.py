"""`rft select`: score the rows of a dataset by a method, and keep a part of them.

OUT/select.yaml      the data and the arguments
    scores.jsonl     one line for each row, in order; the same command goes on after its last line
    selected.jsonl   the rows that are kept, with rft column names; it appears when all were scored
    report.html      one page: how many were kept, and a histogram of the scores
"""

from __future__ import annotations

import hashlib
import html
import io
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from rft.config.data import DataConfig
from rft.config.schema import Config
from rft.data import DataError
from rft.data.groups import CONVERSATIONS, GroupMaker
from rft.data.messages import read_text
from rft.data.overlap import plain_text
from rft.data.rows import Row, Rows, load_rows
from rft.errors import ConfigError
from rft.metrics.log import read_jsonl
from rft.tools.out_folder import claimed
from rft.utils.files import write_atomic, write_text_atomic

SCORES, SELECTED, REPORT, SETTINGS = "scores.jsonl", "selected.jsonl", "report.html", "select.yaml"
SHINGLE, PERMUTATIONS = 5, 128  # words of a shingle, and hash functions of a MinHash
SAY_EVERY = 10  # times in a selection that its progress is printed

Say = Callable[[str], None]
Score = float | None  # None: the row has no score, and is not kept
Scorer = Callable[[int, Row], Score]


class Method(NamedTuple):
    """A method of selection: the meaning of its score, and which options choose the rows by it.

    by: the options that choose rows; without any, the method itself does. model: whether it reads the rows
    with a model. state: whether a score depends on the rows before.
    """

    score: str
    by: tuple[str, ...]
    model: bool = False
    state: bool = False


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
    ),
    "uds": Method("nuclear norm of the row's logits", ("fraction", "quantiles"), model=True),
    "pass_rate": Method("share of the row's sessions that succeeded", ("range",)),
}


@dataclass(frozen=True)
class Arguments:
    """The arguments of a selection.

    range: lowest and highest score kept. quantiles: likewise, as shares of the rows by score. fraction: share
    of rows with the highest scores (lowest: with the lowest). threshold: similarity from which a row is a
    duplicate. sessions: file of `rft collect`, for pass_rate. columns: as `data.columns`. tuned: the model
    after training, for learnability.
    """

    data: str
    method: str
    model: str | None = None
    range: tuple[float, float] | None = None
    quantiles: tuple[float, float] | None = None
    fraction: float | None = None
    lowest: bool = False
    threshold: float = 0.8
    sessions: str | None = None
    columns: Mapping[str, str] | None = None
    split: str = "train"
    limit: int | None = None
    max_length: int = 2048
    tuned: str | None = None


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
    rows = load_rows(config)
    score = _scorer(arguments, config, rows.source)
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True, default=str).encode("utf-8", "surrogatepass"))
    settings = {
        **{name: list(v) if isinstance(v, tuple) else v for name, v in vars(arguments).items()},
        "rows": len(rows),
        "sha256": digest.hexdigest(),
    }
    files = (SCORES, SELECTED, REPORT)
    with claimed(out, "rft select", SETTINGS, files, settings, "scores of other arguments"):
        scores = _score(rows, score, out / SCORES, method, say)
        kept = chosen(arguments, scores, rows)
        with write_atomic(out / SELECTED) as temporary, temporary.open("w", encoding="utf-8") as file:
            for index in kept:
                file.write(json.dumps(rows[index], ensure_ascii=False, default=str) + "\n")
        write_text_atomic(out / REPORT, report(arguments, scores, kept))
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
    if a.method == "learnability" and a.tuned is None:
        problems.append("--method learnability: name the model after training by --tuned")
    if a.tuned is not None and a.method != "learnability":
        problems.append(f"--tuned: {a.method} reads one model; leave it out")
    if a.method == "pass_rate" and a.sessions is None:
        problems.append("--method pass_rate: name the sessions.jsonl of `rft collect` by --sessions")
    if a.quantiles is not None and not 0 <= a.quantiles[0] < a.quantiles[1] <= 1:
        problems.append("--quantiles: write two numbers, 0 <= LOW < HIGH <= 1")
    if a.range is not None and not a.range[0] <= a.range[1]:
        problems.append("--range: the lowest score must not be above the highest")
    if a.fraction is not None and not 0 < a.fraction <= 1:
        problems.append("--fraction: write a number above 0 and up to 1")
    if not 0 < a.threshold <= 1:
        problems.append("--threshold: write a number above 0 and up to 1")
    if problems:
        raise ConfigError(problems)
    return method


def _score(rows: Rows, score: Scorer, file: Path, method: Method, say: Say) -> list[Score]:
    """Return the score of every row; those in the file are not computed again."""
    done = [] if method.state else [line["score"] for line in read_jsonl(file)]
    if done and len(done) < len(rows):
        say(f"going on: {len(done)} of {len(rows)} rows were scored before")
    lines = [_line(rows.numbers[index], value) for index, value in enumerate(done)]
    write_text_atomic(file, "".join(lines))  # without the line that a killed process was writing
    every = max(1, len(rows) // SAY_EVERY)
    with file.open("a", encoding="utf-8") as out:
        for index in range(len(done), len(rows)):
            done.append(score(rows.numbers[index], rows[index]))
            out.write(_line(rows.numbers[index], done[-1]))
            out.flush()
            if method.model and (index + 1) % every == 0:
                say(f"{index + 1} of {len(rows)} rows")
    return done


def _line(number: int, score: Score) -> str:
    return json.dumps({"row": number + 1, "score": score}) + "\n"


# -- scores ------------------------------------------------------------------------------------------------


def _scorer(a: Arguments, config: DataConfig, source: str) -> Scorer:
    if a.method == "length":
        return lambda number, row: float(len(" ".join(texts_of(row)).split()))
    if a.method == "exact":
        return _exact()
    if a.method == "minhash":
        return _minhash(a.threshold)
    if a.method == "pass_rate":
        rates = pass_rates(Path(str(a.sessions)))
        return lambda number, row: rates.get(number)
    return _by_model(a, config, source)


def texts_of(row: Row) -> tuple[str, str]:
    """Return the text of a row's prompt (or its whole conversation) and of its responses; "" if missing."""
    prompt = row.get("prompt") or next((row[name] for name in CONVERSATIONS if name in row), "")
    responses = [row[name] for name in ("completion", "chosen", "rejected") if row.get(name)]
    return _plain(prompt), "\n".join(map(_plain, responses))


def _plain(value: Any) -> str:
    return plain_text(read_text(value, "prompt")) if value else ""


def _exact() -> Scorer:
    seen: dict[bytes, int] = {}

    def score(number: int, row: Row) -> float:
        key = hashlib.sha256("\0".join(texts_of(row)).encode("utf-8", "surrogatepass")).digest()
        seen[key] = seen.get(key, -1) + 1
        return float(seen[key])

    return score


def _minhash(threshold: float) -> Scorer:
    """Score by the similarity of shingles of five words with the most similar row below the threshold."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise ConfigError(["--method minhash: install datasketch (the extra `select`)"]) from None
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    kept: dict[int, Any] = {}

    def score(number: int, row: Row) -> float:
        words = " ".join(texts_of(row)).casefold().split()
        shingles = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
        sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in sorted(shingles)])
        nearest = max((float(sketch.jaccard(kept[key])) for key in index.query(sketch)), default=0.0)
        if nearest < threshold:
            kept[number] = sketch
            index.insert(number, sketch)
        return nearest

    return score


REMEDY = "; name a sessions.jsonl of `rft collect`"


def pass_rates(file: Path) -> dict[int, float]:
    """Return the share of successes of each row in a file of `rft collect`, by row number from 0 on.

    Sessions that could not be judged do not count. Raises ConfigError.
    """
    counts: dict[int, list[bool]] = {}
    try:
        for line in read_jsonl(file):
            if line["success"] is not None:
                counts.setdefault(line["prompt_id"], []).append(line["success"])
    except KeyError as error:
        raise ConfigError([f"--sessions: {file} has a line without {error}{REMEDY}"]) from None
    if not counts:
        raise ConfigError([f"--sessions: {file} has no judged session{REMEDY}"])
    return {row: sum(results) / len(results) for row, results in counts.items()}


def _by_model(a: Arguments, config: DataConfig, source: str) -> Scorer:
    """Score demonstrations by a model's distributions at the tokens of their responses."""
    import torch

    from rft.learner.load import load_causal_lm, load_tokenizer, resolve_dtype
    from rft.preflight.model import resolve_model

    names = [str(a.model), *([a.tuned] if a.tuned else [])]
    paths = [resolve_model(Config(algorithm="sft", model={"path": name})) for name in names]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    models = [load_causal_lm(path, resolve_dtype("auto", device), device).eval() for path in paths]
    maker = GroupMaker(config, load_tokenizer(paths[0]), "sft", source)
    if len(models) > 1 and (sizes := {model.config.get_text_config().vocab_size for model in models}) != {
        models[0].config.get_text_config().vocab_size
    }:
        raise ConfigError([f"--tuned: its vocabulary differs from that of --model ({sorted(sizes)})"])

    @torch.inference_mode()
    def score(number: int, row: Row) -> Score:
        group = maker.make(row, number)
        maker.check()  # raises for a row that cannot be read
        if group is None:
            return None
        (c,) = group.completions
        start = len(group.prompt.tokens)
        ids = torch.tensor([[*group.prompt.tokens, *c.tokens]], device=device)
        rows = [model(input_ids=ids, use_cache=False).logits[0].float() for model in models]
        if a.method == "uds":
            return nuclear_norm(rows[0])
        trained = torch.tensor(c.mask or [True] * len(c.tokens), device=device)
        kind = "grape" if a.method == "learnability" else a.method
        targets = ids[0, start:][trained]
        of_model, *of_tuned = [token_score(kind, r[start - 1 : -1][trained], targets) for r in rows]
        return of_tuned[0] - of_model if of_tuned else of_model

    return score


def token_score(method: str, logits: Any, targets: Any) -> float:
    """Return a row's score from its response. logits: [tokens, vocabulary]; targets: [tokens].

    perplexity: exp(-mean log p). grape: mean log p, the likelihood by which GRAPE (arXiv:2502.04194) chooses
    among responses to one prompt, per token so that short ones are not preferred. el2n: the mean norm of
    softmax(logits) - onehot(target), the error vector of arXiv:2107.07075 at each token.
    """
    logps = logits.log_softmax(-1)
    chosen_logps = logps.gather(-1, targets[:, None])[:, 0]
    if method == "el2n":
        p = logps.exp()
        # ||p - y||^2 = ||p||^2 - 2 p_y + 1, without a second matrix
        squares = (p * p).sum(-1) - 2 * chosen_logps.exp() + 1
        return float(squares.clamp(min=0).sqrt().mean())
    mean = float(chosen_logps.mean())
    return mean if method == "grape" else math.exp(min(-mean, 700.0))  # float64 ends at exp(709)


def nuclear_norm(logits: Any) -> float:
    """Return the sum of the singular values of a row's logits [tokens, vocabulary].

    UDS (arXiv:2510.16882) takes it as utility and diversity within a row, of the whole row with its prompt.
    Its second term, the distance from rows that were trained on before, belongs to batches of a run.
    """
    import torch

    return float(torch.linalg.svdvals(logits).sum())


# -- the choice --------------------------------------------------------------------------------------------


def chosen(a: Arguments, scores: Sequence[Score], rows: Sequence[Row]) -> list[int]:
    """Return the indices of the rows that are kept, in order. Raises DataError if none is."""
    given = {i: s for i, s in enumerate(scores) if s is not None}
    if a.method == "exact":
        kept = [i for i, s in given.items() if s == 0]
    elif a.method == "minhash":
        kept = [i for i, s in given.items() if s < a.threshold]
    elif a.method == "grape":
        kept = _best_of_prompt(given, rows)
    elif a.fraction is not None:
        order = sorted(given, key=lambda i: (given[i] if a.lowest else -given[i], i))
        kept = sorted(order[: max(1, round(a.fraction * len(order)))])
    else:
        low, high = bounds(a, sorted(given.values()))
        kept = [i for i, s in given.items() if low <= s <= high]
    if not kept:
        raise DataError("no row is left: change --range, or the data", source=a.data)
    return kept


def bounds(a: Arguments, ordered: Sequence[float]) -> tuple[float, float]:
    """Return the lowest and highest score that are kept. ordered: all scores, ascending."""
    if a.range is not None:
        return a.range
    assert a.quantiles is not None  # ensured by `checked`
    last = len(ordered) - 1
    low, high = (q * last for q in a.quantiles)
    return ordered[math.ceil(low)], ordered[math.floor(high)]


def _best_of_prompt(scores: Mapping[int, float], rows: Sequence[Row]) -> list[int]:
    best: dict[str, int] = {}
    for i, value in scores.items():
        prompt = texts_of(rows[i])[0]
        if prompt not in best or value > scores[best[prompt]]:
            best[prompt] = i
    return sorted(best.values())


# -- the page ------------------------------------------------------------------------------------------


def report(a: Arguments, scores: Sequence[Score], kept: Sequence[int]) -> str:
    """Return the page of a selection: counts, quantiles and a histogram, without external parts."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    from rft.report.plots import BLUE, GREY, STYLE

    values = [s for s in scores if s is not None]
    chosen_values = [s for i in kept if (s := scores[i]) is not None]
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


def _spread(values: Sequence[float]) -> str:
    return f"lowest {min(values):.4g}, median {statistics.median(values):.4g}, highest {max(values):.4g}"
