"""Metrics of a sampled evaluation, from the outcomes of each problem's samples: accuracy, pass@k, votes,
diversity, calibration, intervals, and flips against an earlier evaluation."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rft.errors import ConfigError
from rft.utils.files import write_text_atomic

RESAMPLES = 1000  # of the bootstrap
BINS = 10  # of the calibration error
NGRAMS = (1, 2, 3)  # lengths of the n-grams whose diversity is measured


@dataclass(frozen=True)
class Sampled:
    """One completion of a held-out problem, as far as the metrics read it.

    correct: the primary reward's judgement; None: it could not judge, or abstained. reward: the combined
    reward. rank: the reward by which the best of a problem's completions is chosen; None: none is. answer:
    the answer that a reward extracted ("" for none); equal answers have equal text. confidence: the
    probability of being correct that the completion states, 0 to 1. declined: whether it declines to answer;
    None: not measured.
    """

    correct: bool | None
    reward: float | None = None
    rank: float | None = None
    answer: str = ""
    confidence: float | None = None
    declined: bool | None = None
    tokens: tuple[int, ...] = ()
    length: int = 0
    truncated: bool = False


@dataclass(frozen=True)
class Problem:
    """A held-out problem with its samples and its greedy completion (None: not decoded).

    id: the row. prompt, text: the prompt, and the completion that flips are counted by, for people.
    """

    id: int
    samples: Sequence[Sampled]
    greedy: Sampled | None = None
    prompt: str = ""
    text: str = ""

    @property
    def decisive(self) -> bool | None:
        """Whether the greedy completion is correct; without one, the first sample, whose seed is always the
        same."""
        if self.greedy is not None:
            return self.greedy.correct
        return self.samples[0].correct if self.samples else None

    @property
    def accuracy(self) -> float | None:
        """Share of correct samples among those that could be judged; None if none could."""
        judged = [s.correct for s in self.samples if s.correct is not None]
        return sum(judged) / len(judged) if judged else None


def evaluation_metrics(problems: Sequence[Problem], seed: int = 0) -> dict[str, float]:
    """Return the metrics of a set, without the prefix `eval/`.

    Means over samples weigh all samples equally, the others all problems. Samples that could not be judged
    are left out of accuracies. seed: of the bootstrap.
    """
    samples = [s for p in problems for s in p.samples]
    metrics = accuracy_metrics(problems, seed)
    greedy = [p.greedy.correct for p in problems if p.greedy is not None and p.greedy.correct is not None]
    if any(p.greedy is not None for p in problems):
        metrics["greedy_accuracy"] = sum(greedy) / len(greedy) if greedy else math.nan
    metrics |= vote_metrics(problems) | rank_metrics(problems) | diversity_metrics(problems)
    metrics |= calibration_metrics(samples) | abstention_metrics(samples)
    count = max(len(samples), 1)  # none if an environment failed in every episode
    metrics["length_mean"] = sum(s.length for s in samples) / count
    metrics["truncated"] = sum(s.truncated for s in samples) / count
    metrics["problems"] = float(len(problems))
    return metrics


# -- accuracy --------------------------------------------------------------------------------------------


def accuracy_metrics(problems: Sequence[Problem], seed: int = 0) -> dict[str, float]:
    """Return accuracy with its standard error and 95 % bootstrap interval over problems, and pass@2, 4, 8,
    ..."""
    table = [[s.correct for s in p.samples] for p in problems]
    rows = [[x for x in row if x is not None] for row in table]
    judged = [row for row in rows if row]
    if not judged:
        return {"accuracy": math.nan}
    means = np.array([sum(row) / len(row) for row in judged])
    metrics = {"accuracy": float(means.mean())}
    if len(judged) > 1:
        metrics["accuracy_stderr"] = float(means.std(ddof=1) / math.sqrt(len(judged)))
        metrics["accuracy_low"], metrics["accuracy_high"] = bootstrap_interval(means, seed)
    k, n = 2, max(len(row) for row in judged)
    while k <= n:
        whole = [row for row in judged if len(row) >= k]
        metrics[f"pass@{k}"] = sum(pass_at_k(len(row), sum(row), k) for row in whole) / len(whole)
        k *= 2
    metrics["unjudged"] = float(sum(len(a) - len(b) for a, b in zip(table, rows, strict=True)))
    return metrics


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Return the unbiased chance that one of k of n samples is correct (Chen et al. 2021, eq. 1)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def bootstrap_interval(
    values: NDArray[np.float64], seed: int = 0, level: float = 0.95, resamples: int = RESAMPLES
) -> tuple[float, float]:
    """Return the percentile bootstrap interval of the mean of `values`, one per problem (Efron 1979)."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (resamples, len(values)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


# -- choosing one of several samples ---------------------------------------------------------------------


def vote_metrics(problems: Sequence[Problem]) -> dict[str, float]:
    """Return maj@k: accuracy of the most frequent answer of the first k samples, for k = 4, 8, ... and all.

    Samples without an answer do not vote. Of several equally frequent answers each counts with an equal
    share, which is the expectation of a random choice. A problem without an answer counts as wrong. {} if no
    sample has an answer, or none has three samples.
    """
    n = max((len(p.samples) for p in problems), default=0)
    if n < 3 or not any(s.answer for p in problems for s in p.samples):
        return {}
    judged = [p for p in problems if p.accuracy is not None]
    powers = [2**i for i in range(2, n.bit_length()) if 2**i < n]
    return {
        f"maj@{k}": sum(majority(p.samples[:k]) for p in judged) / len(judged) for k in [*powers, n] if judged
    }


def majority(samples: Sequence[Sampled]) -> float:
    """Return the chance that the most frequent answer is correct; ties are broken at random."""
    votes = Counter(s.answer for s in samples if s.answer)
    if not votes:
        return 0.0
    top = max(votes.values())
    leaders = [answer for answer, count in votes.items() if count == top]
    return sum(_share_correct(s for s in samples if s.answer == answer) for answer in leaders) / len(leaders)


def _share_correct(samples: Iterable[Sampled]) -> float:
    judged = [s.correct for s in samples if s.correct is not None]
    return sum(judged) / len(judged) if judged else 0.0


def rank_metrics(problems: Sequence[Problem]) -> dict[str, float]:
    """Return best@n: accuracy of the sample with the highest rank; ties are broken at random."""
    ranked = [[s for s in p.samples if s.rank is not None and s.correct is not None] for p in problems]
    ranked = [samples for samples in ranked if samples]
    if not ranked:
        return {}
    n = max(len(p.samples) for p in problems)
    return {f"best@{n}": sum(best_of(samples) for samples in ranked) / len(ranked)}


def best_of(samples: Sequence[Sampled]) -> float:
    """Return the chance that the sample with the highest rank is correct. Every sample needs a rank."""
    top = max(s.rank for s in samples if s.rank is not None)
    return _share_correct(s for s in samples if s.rank == top)


# -- diversity and calibration ---------------------------------------------------------------------------


def diversity_metrics(problems: Sequence[Problem]) -> dict[str, float]:
    """Return the diversity of a problem's samples, mean over problems with two samples or more.

    `distinct_N`: distinct n-grams of their tokens as a share of all (Li et al. 2016, section 5); `distinct`:
    distinct completions as a share; `distinct_answers`: number of different answers.
    """
    several = [p.samples for p in problems if len(p.samples) > 1]
    metrics = {}
    for n in NGRAMS:
        shares = [share for samples in several if (share := _distinct(samples, n)) is not None]
        if shares:
            metrics[f"distinct_{n}"] = sum(shares) / len(shares)
    if several:
        metrics["distinct"] = sum(len({s.tokens for s in p}) / len(p) for p in several) / len(several)
    answers = [{s.answer for s in samples if s.answer} for samples in several]
    if any(answers):
        metrics["distinct_answers"] = sum(len(a) for a in answers) / len(answers)
    return metrics


def _distinct(samples: Sequence[Sampled], n: int) -> float | None:
    grams = [s.tokens[i : i + n] for s in samples for i in range(len(s.tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def calibration_metrics(samples: Sequence[Sampled]) -> dict[str, float]:
    """Return `confidence` (mean stated confidence), `ece` and `stated` (share of samples that state one); {}
    if none.

    ece: expected calibration error over ten equal bins (Guo et al. 2017, eq. 3).
    """
    pairs = [(s.confidence, s.correct) for s in samples if s.confidence is not None and s.correct is not None]
    if not pairs:
        return {}
    stated = sum(s.confidence is not None for s in samples) / len(samples)
    mean = sum(confidence for confidence, _ in pairs) / len(pairs)
    return {"confidence": mean, "ece": calibration_error(pairs), "stated": stated}


def calibration_error(pairs: Sequence[tuple[float, bool]], bins: int = BINS) -> float:
    """Return the expected calibration error of (confidence, correct) pairs."""
    parts: dict[int, list[tuple[float, bool]]] = {}
    for confidence, correct in pairs:
        parts.setdefault(min(int(confidence * bins), bins - 1), []).append((confidence, correct))
    gaps = (abs(sum(c for c, _ in part) - sum(ok for _, ok in part)) for part in parts.values())
    return sum(gaps) / len(pairs)


def abstention_metrics(samples: Sequence[Sampled]) -> dict[str, float]:
    """Return `declined`, the share of samples that decline to answer, and `accuracy_answered`, the accuracy
    of the judged ones among the others (nan without one); {} where it is not measured."""
    measured = [s for s in samples if s.declined is not None]
    if not measured:
        return {}
    answered = [s.correct for s in measured if not s.declined and s.correct is not None]
    return {
        "declined": sum(bool(s.declined) for s in measured) / len(measured),
        "accuracy_answered": sum(answered) / len(answered) if answered else math.nan,
    }


# -- changes against an earlier evaluation ---------------------------------------------------------------


@dataclass(frozen=True)
class Flips:
    """Problems whose decisive completion was judged both times, and changed. Ids of rows."""

    compared: int
    negative: tuple[int, ...]  # correct before, wrong now
    positive: tuple[int, ...]  # wrong before, correct now


def flips(before: Sequence[Problem], now: Sequence[Problem]) -> Flips:
    """Return the problems that an update broke and those that it solved (negative flips: Yan et al. 2021)."""
    earlier = {p.id: p.decisive for p in before}
    pairs = [(p.id, earlier.get(p.id), p.decisive) for p in now]
    both = [(row, a, b) for row, a, b in pairs if a is not None and b is not None]
    negative = tuple(row for row, a, b in both if a and not b)
    positive = tuple(row for row, a, b in both if b and not a)
    return Flips(len(both), negative, positive)


def change_metrics(before: Sequence[Problem], now: Sequence[Problem]) -> dict[str, float]:
    """Return `negative_flips` and `positive_flips` (shares of the problems judged both times) and
    `forgetting`: the accuracy before minus that of now, over the problems judged both times. {} if there are
    none."""
    changed = flips(before, now)
    metrics = {}
    if changed.compared:
        metrics["negative_flips"] = len(changed.negative) / changed.compared
        metrics["positive_flips"] = len(changed.positive) / changed.compared
    pairs = paired_accuracies(before, now)
    if len(pairs):
        metrics["forgetting"] = float((pairs[:, 0] - pairs[:, 1]).mean())
    return metrics


def paired_accuracies(a: Sequence[Problem], b: Sequence[Problem]) -> NDArray[np.float64]:
    """Return the accuracies of the problems that both evaluations judged, [N, 2]."""
    other = {p.id: p.accuracy for p in b}
    pairs = [(p.accuracy, other.get(p.id)) for p in a]
    return np.array([(x, y) for x, y in pairs if x is not None and y is not None], dtype=float).reshape(-1, 2)


@dataclass(frozen=True)
class PairedTest:
    """Comparison of two evaluations of the same problems.

    difference: mean accuracy of B minus that of A, with its 95 % bootstrap interval over problems. p:
    two-sided exact McNemar test on the decisive completions: the chance of flips this unequal if either
    direction were equally likely; 1 without a flip.
    """

    problems: int
    difference: float
    low: float
    high: float
    only_a: int
    only_b: int
    p: float


def paired_test(a: Sequence[Problem], b: Sequence[Problem], seed: int = 0) -> PairedTest:
    """Test whether B's accuracy differs from A's. Raises ValueError if no problem was judged by both."""
    pairs = paired_accuracies(a, b)
    if not len(pairs):
        raise ValueError("the two evaluations have no judged problem in common")
    gains = pairs[:, 1] - pairs[:, 0]
    low, high = bootstrap_interval(gains, seed)
    changed = flips(a, b)
    only_a, only_b = len(changed.negative), len(changed.positive)
    return PairedTest(len(pairs), float(gains.mean()), low, high, only_a, only_b, mcnemar(only_a, only_b))


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the two-sided exact McNemar p-value: a binomial test of `only_a` in `only_a + only_b` at 1/2."""
    n, k = only_a + only_b, min(only_a, only_b)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(k + 1)) / 2**n)


# -- as JSON -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Evaluation:
    """The problems of one evaluation, by the name of their set ("" for the unnamed one).

    keys: for each set, a digest of its prompts: problems are compared only where these are equal.
    """

    step: int
    sets: Mapping[str, Sequence[Problem]]
    keys: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON. The samples' tokens are left out."""
        sets = {name: [_plain(p) for p in problems] for name, problems in self.sets.items()}
        return {"step": self.step, "keys": dict(self.keys), "sets": sets}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Evaluation:
        """Invert `to_dict`. Raises KeyError, TypeError or ValueError for other data."""
        sets = {name: [_problem(p) for p in problems] for name, problems in raw["sets"].items()}
        return cls(int(raw["step"]), sets, dict(raw["keys"]))

    def with_texts(self, kept: Mapping[str, Collection[int]]) -> Evaluation:
        """Return the evaluation with prompts and texts of the problems `kept` only, by set and id."""
        sets = {
            name: [p if p.id in kept.get(name, ()) else replace(p, prompt="", text="") for p in problems]
            for name, problems in self.sets.items()
        }
        return replace(self, sets=sets)

    def same(self, other: Evaluation) -> list[str]:
        """Return the names of the sets that both evaluations have with the same prompts."""
        return [name for name in self.sets if name in other.sets and self.keys[name] == other.keys[name]]


def _plain(problem: Problem) -> dict[str, Any]:
    out: dict[str, Any] = {"id": problem.id, "samples": [_plain_sample(s) for s in problem.samples]}
    if problem.greedy is not None:
        out["greedy"] = _plain_sample(problem.greedy)
    return out | {key: value for key in ("prompt", "text") if (value := getattr(problem, key))}


def _plain_sample(sample: Sampled) -> dict[str, Any]:
    values = asdict(sample)
    del values["tokens"]
    return {key: value for key, value in values.items() if value is not None and value != ""}


def _problem(raw: Mapping[str, Any]) -> Problem:
    def sample(value: Mapping[str, Any]) -> Sampled:
        return Sampled(**{"correct": None, **value})

    greedy = sample(raw["greedy"]) if "greedy" in raw else None
    samples = [sample(s) for s in raw["samples"]]
    return Problem(int(raw["id"]), samples, greedy, raw.get("prompt", ""), raw.get("text", ""))


# -- problems of an evaluation, in the run folder ----------------------------------------------------------

EVALUATIONS = "evaluations"  # folder of files STEP.json


def write_evaluation(run: Path, evaluation: Evaluation) -> None:
    """Write the problems of an evaluation to a run folder. A repeated evaluation replaces its file."""
    folder = run / EVALUATIONS
    folder.mkdir(parents=True, exist_ok=True)
    write_text_atomic(folder / f"{evaluation.step}.json", json.dumps(evaluation.to_dict()) + "\n")


def read_evaluation(run: Path, step: int | None = None) -> Evaluation | None:
    """Read an evaluation of a run (None: the last one); None if there is none. Raises ConfigError if
    damaged."""
    steps = sorted(int(f.stem) for f in (run / EVALUATIONS).glob("*.json") if f.stem.isdecimal())
    if not steps or (step is not None and step not in steps):
        return None
    file = run / EVALUATIONS / f"{steps[-1] if step is None else step}.json"
    try:
        return Evaluation.from_dict(json.loads(file.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError([f"{file} is damaged ({error}); delete it"]) from None
