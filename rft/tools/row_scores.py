"""Scores of rows for `rft select`: of their text, of collected sessions, and of models that read them."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rft.config.data import DataConfig
from rft.config.schema import Config
from rft.data.groups import CONVERSATIONS, GroupMaker
from rft.data.messages import read_text
from rft.data.overlap import plain_text
from rft.data.rows import Row, Rows
from rft.errors import ConfigError
from rft.metrics.log import iterate_jsonl

if TYPE_CHECKING:
    from torch import Tensor

SHINGLE, PERMUTATIONS = 5, 128  # words of a shingle, and hash functions of a MinHash
BATCH, BUFFER, COLUMNS, ROWS = 8, 1024, 128, 8  # of UDS: rows of a batch and of the buffer, and d_1, d_2

Score = float | None  # None: the row has no score, and is not kept


class Scored(NamedTuple):
    """The score of a row, and further values of its line in the file of scores."""

    score: Score
    more: Mapping[str, Any] = {}


Scorer = Callable[[int, Row], Scored]


@dataclass(frozen=True)
class Arguments:
    """The arguments of a selection.

    range: lowest and highest score kept. quantiles: likewise, as shares of the rows by score. fraction: share
    of rows with the highest scores (lowest: with the lowest). threshold: similarity from which a row is a
    duplicate. sessions: file of `rft collect`, for pass_rate. columns: as `data.columns`. tuned: the model
    after training, for learnability and lobass. token_share: for q_tuning, the share of a misconception's
    tokens. diversity: for uds, the weight of the distance from rows kept before.
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
    token_share: float = 0.7
    diversity: float = 10.0


def scorer_of(a: Arguments, config: DataConfig, rows: Rows) -> Scorer:
    """Return the function that scores a row, given with its number in the data."""
    if a.method == "length":
        return lambda number, row: Scored(float(len(" ".join(texts_of(row)).split())))
    if a.method == "exact":
        return _exact()
    if a.method == "minhash":
        return _minhash(a.threshold)
    if a.method == "pass_rate":
        rates = pass_rates(Path(str(a.sessions)))
        return lambda number, row: Scored(rates.get(number))
    reader = ModelReader(a, config, rows)
    return Diverse(reader, a) if a.method == "uds" else _by_tokens(reader, a)


# -- without a model -----------------------------------------------------------------------------------------


def texts_of(row: Row) -> tuple[str, str]:
    """Return the text of a row's prompt (or its whole conversation) and of its responses; "" if missing."""
    prompt = row.get("prompt") or next((row[name] for name in CONVERSATIONS if name in row), "")
    responses = [row[name] for name in ("completion", "chosen", "rejected") if row.get(name)]
    return _plain(prompt), "\n".join(map(_plain, responses))


def _plain(value: Any) -> str:
    return plain_text(read_text(value, "prompt")) if value else ""


def text_key(text: str) -> bytes:
    """Return a digest of a text: what a method remembers of it, whatever its length."""
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _exact() -> Scorer:
    seen: dict[bytes, int] = {}

    def score(number: int, row: Row) -> Scored:
        key = text_key("\0".join(texts_of(row)))
        seen[key] = seen.get(key, -1) + 1
        return Scored(float(seen[key]))

    return score


def _minhash(threshold: float) -> Scorer:
    """Score by the similarity of shingles of five words with the most similar row below the threshold."""
    try:
        from datasketch import MinHash, MinHashLSH
    except ImportError:
        raise ConfigError(["--method minhash: install datasketch (the extra `select`)"]) from None
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    kept: dict[int, Any] = {}

    def score(number: int, row: Row) -> Scored:
        words = " ".join(texts_of(row)).casefold().split()
        shingles = {" ".join(words[i : i + SHINGLE]) for i in range(max(1, len(words) - SHINGLE + 1))}
        sketch = MinHash(num_perm=PERMUTATIONS, seed=1)
        sketch.update_batch([shingle.encode("utf-8", "surrogatepass") for shingle in sorted(shingles)])
        nearest = max((float(sketch.jaccard(kept[key])) for key in index.query(sketch)), default=0.0)
        if nearest < threshold:
            kept[number] = sketch
            index.insert(number, sketch)
        return Scored(nearest)

    return score


REMEDY = "; name a sessions.jsonl of `rft collect`"


def pass_rates(file: Path) -> dict[int, float]:
    """Return the share of successes of each row in a file of `rft collect`, by row number from 0 on.

    Sessions that could not be judged do not count. Raises ConfigError.
    """
    counts: dict[int, list[bool]] = {}
    try:
        for line in iterate_jsonl(file):
            if line["success"] is not None:
                counts.setdefault(line["prompt_id"], []).append(line["success"])
    except KeyError as error:
        raise ConfigError([f"--sessions: {file} has a line without {error}{REMEDY}"]) from None
    if not counts:
        raise ConfigError([f"--sessions: {file} has no judged session{REMEDY}"])
    return {row: sum(results) / len(results) for row, results in counts.items()}


# -- by models -----------------------------------------------------------------------------------------------


class Reading(NamedTuple):
    """A demonstration as models read it.

    whole: by model, the logits at every token of prompt and response, [N, V]. response: by model, the logits
    that predict the tokens that `sft` trains on, [L, V]. targets: these tokens, [L].
    """

    whole: Sequence[Tensor]
    response: Sequence[Tensor]
    targets: Tensor


class ModelReader:
    """Read rows with the models of a selection.

    Raises ConfigError for one that cannot be loaded, DataError if the first row is no demonstration.
    """

    def __init__(self, a: Arguments, config: DataConfig, rows: Rows) -> None:
        import torch

        from rft.learner.load import load_causal_lm, load_tokenizer, resolve_dtype
        from rft.preflight.model import resolve_model

        names = [str(a.model), *([a.tuned] if a.tuned else [])]
        paths = [resolve_model(Config(algorithm="sft", model={"path": name})) for name in names]
        self.maker = GroupMaker(config, load_tokenizer(paths[0]), "sft", rows.source)
        self.maker.make(rows[0], rows.numbers[0])  # before the models are loaded
        self.maker.check()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = resolve_dtype("auto", self.device)
        self.models = [load_causal_lm(path, dtype, self.device).eval() for path in paths]
        sizes = {model.config.get_text_config().vocab_size for model in self.models}
        if len(sizes) > 1:
            raise ConfigError([f"--tuned: its vocabulary differs from that of --model ({sorted(sizes)})"])

    def read(self, number: int, row: Row) -> Reading | None:
        """Run the models on a row; None if it has no response within the length. Raises DataError."""
        import torch

        group = self.maker.make(row, number)
        self.maker.check()  # raises for a row that cannot be read
        if group is None:
            return None
        (c,) = group.completions
        start = len(group.prompt.tokens)
        ids = torch.tensor([[*group.prompt.tokens, *c.tokens]], device=self.device)
        trained = torch.tensor(c.mask or [True] * len(c.tokens), device=self.device)
        with torch.inference_mode():
            whole = [model(input_ids=ids, use_cache=False).logits[0].float() for model in self.models]
        response = [logits[start - 1 : -1][trained] for logits in whole]
        return Reading(whole, response, ids[0, start:][trained])


def _by_tokens(reader: ModelReader, a: Arguments) -> Scorer:
    """Score by the models' distributions at the tokens of the responses."""

    def score(number: int, row: Row) -> Scored:
        read = reader.read(number, row)
        if read is None:
            return Scored(None)
        if a.method == "q_tuning":
            return error_and_uncertainty(read.response[0], read.targets, a.token_share)
        if a.method in ("learnability", "lobass"):
            before, after = (-token_score("grape", logits, read.targets) for logits in read.response)
            return Scored(before - after if a.method == "learnability" else relative_gain(before, after))
        return Scored(token_score(a.method, read.response[0], read.targets))

    return score


def token_score(method: str, logits: Tensor, targets: Tensor) -> float:
    """Return a row's score from its response. logits: [L, V]; targets: [L].

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


def relative_gain(before: float, after: float) -> Score:
    """Return (L - L') / L of the losses before and after training; None for L = 0, with nothing to learn.

    The score of LoBaSS, which the second version of arXiv:2310.13008 calls DavIR: its normalisation by the
    loss before training removes most of the gain's dependence on the length of the response.
    """
    return (before - after) / before if before > 0 else None


def error_and_uncertainty(logits: Tensor, targets: Tensor, share: float) -> Scored:
    """Return the perplexity of a response, with its mean entropy and the tokens that Q-Tuning would keep.

    logits: [L, V]; targets: [L]. tokens: one 0 or 1 for each token, 1 for the fraction `share` with the
    highest scores among their neighbours.
    """
    import torch

    from rft.algorithms.math.sequences import top_share
    from rft.algorithms.supervised.q_tuning import QTuning, token_scores

    logps = logits.log_softmax(-1)
    entropy = float(-(logps.exp() * logps).sum(-1).mean())
    of_targets, real = logps.gather(-1, targets[:, None]).T, torch.ones_like(targets, dtype=torch.bool)
    scores = token_scores(of_targets, real[None], QTuning().neighbours)[0]
    kept = [int(x) for x in top_share(scores, real, share).tolist()]
    return Scored(token_score("perplexity", logits, targets), {"entropy": entropy, "tokens": kept})


# -- utility and diversity -----------------------------------------------------------------------------------


class Diverse:
    """Score rows by UDS: utility and diversity within a row, and its distance from rows kept before.

    Zou et al., "Utility-diversity aware online batch selection" (2025, arXiv:2510.16882). A row with logits L
    [N, V], of prompt and response, scores

        ||L||_* + diversity * mean_j ||z - z_j||,    z = vec(G_2 L G_1^T),

    with the nuclear norm, and the projections z_j of the last BUFFER rows that were kept; without any, the
    distance is 0. Of each BATCH rows of the data in order, the fraction with the highest scores is kept, and
    enters the buffer in place of the oldest. Where the paper trains on each batch, here one model reads all.
    """

    def __init__(self, reader: ModelReader, a: Arguments) -> None:
        import torch

        assert a.fraction is not None  # ensured by `checked`
        self.reader, self.fraction, self.weight = reader, a.fraction, a.diversity
        self.of_positions = projection(a.max_length, ROWS, seed=1).to(reader.device)  # G_2
        self.of_tokens = torch.empty(0, 0)  # G_1, when the width of the logits is known
        self.buffer = torch.empty(0, 0)
        self.entered = 0  # rows that ever entered the buffer
        self.batch: list[tuple[float, Tensor]] = []  # nan, and an empty tensor, for a row without a score

    def __call__(self, number: int, row: Row) -> Scored:
        read = self.reader.read(number, row)
        if read is None:
            self._add(math.nan, self.of_positions[:0])
            return Scored(None)
        z = self._project(read.whole[0])
        score = nuclear_norm(read.whole[0]) + self.weight * self._distance(z)
        self._add(score, z)
        return Scored(score)

    def restore(self, scores: Sequence[float], rows: Rows) -> None:
        """Go on after rows that were scored before, with nan for none: read those in the buffer again.

        rows: all rows; they are read in order.
        """
        whole = len(scores) // BATCH * BATCH
        entered = best_of_batches(scores[:whole], self.fraction)
        self.entered = max(0, len(entered) - BUFFER)
        for index in entered[self.entered :]:
            self._enter(self._read_again(rows.numbers[index], rows[index]))
        for index in range(whole, len(scores)):
            missing = math.isnan(scores[index])
            z = self.of_positions[:0] if missing else self._read_again(rows.numbers[index], rows[index])
            self.batch.append((scores[index], z))

    def _read_again(self, number: int, row: Row) -> Tensor:
        read = self.reader.read(number, row)
        assert read is not None  # it had a score
        return self._project(read.whole[0])

    def _project(self, logits: Tensor) -> Tensor:
        if not len(self.of_tokens):
            self.of_tokens = projection(logits.shape[1], COLUMNS, seed=0).to(logits.device)
        return (self.of_positions[:, : len(logits)] @ (logits @ self.of_tokens.T)).flatten()

    def _distance(self, z: Tensor) -> float:
        held = self.buffer[: min(self.entered, BUFFER)]
        return float((held - z).norm(dim=1).mean()) if len(held) else 0.0

    def _add(self, score: float, z: Tensor) -> None:
        self.batch.append((score, z))
        if len(self.batch) == BATCH:
            for index in best_of_batches([score for score, _ in self.batch], self.fraction):
                self._enter(self.batch[index][1])
            self.batch = []

    def _enter(self, z: Tensor) -> None:
        if not len(self.buffer):
            self.buffer = z.new_zeros(BUFFER, len(z))
        self.buffer[self.entered % BUFFER] = z
        self.entered += 1


def best_of_batches(scores: Sequence[float] | NDArray[np.float64], fraction: float) -> list[int]:
    """Return the indices of the fraction with the highest scores of each BATCH rows, at least one, in order.

    scores: nan for a row without one, which is not counted.
    """
    best: list[int] = []
    for start in range(0, len(scores), BATCH):
        batch = range(start, min(start + BATCH, len(scores)))
        order = sorted((i for i in batch if not math.isnan(scores[i])), key=lambda i: (-scores[i], i))
        best += sorted(order[: max(1, round(fraction * len(order)))])
    return best


def projection(size: int, kept: int, seed: int) -> Tensor:
    """Return a random projection of vectors of `size` numbers, which keeps distances in expectation.

    [min(kept, size), size]: rows of the Hartley transform, the real form of the Fourier transform, with
    random signs of the columns, scaled by sqrt(size / kept). With kept = size it is orthogonal.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    signs = torch.randint(0, 2, (size,), generator=generator) * 2 - 1
    rows = torch.randperm(size, generator=generator)[:kept]
    angle = (rows[:, None] * torch.arange(size) % size).double() * (2 * math.pi / size)
    return ((angle.cos() + angle.sin()) * signs / math.sqrt(len(rows))).float()


def nuclear_norm(logits: Tensor) -> float:
    """Return the sum of the singular values of a row's logits [N, V]."""
    import torch

    return float(torch.linalg.svdvals(logits).sum())
