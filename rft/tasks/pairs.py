"""The arithmetic task with solutions that are judged: pairs, labels, scores, and steps, each verified."""

from __future__ import annotations

from random import Random
from typing import Any

from rft.tasks.arithmetic import Arithmetic, Chain, Split, solve, tell
from rft.tasks.config import Style

TRIES = 100


class ArithmeticPairs(Arithmetic):
    """Rows for every kind of offline training on judgements. Options: see `ArithmeticConfig`.

    chosen, rejected, margin: a solution that ends in the right result and one that does not, each in a
        format drawn by `styles`; the share of the second one's results that are wrong.
    completion, label, score: either of the two by a coin flip, whether it is the right one, and two scores:
        its right final result (0 or 1) and the share of its results that are right.
    completions, labels: the same results line by line, and for each line whether all is right up to there.
    """

    name = "arithmetic_pairs"

    def _row(self, split: Split, rng: Random) -> dict[str, Any]:
        chain = self._chain(split, rng)
        form = self.config.form if self.config.form != "mixed" else rng.choice(("words", "expression"))
        prompt = tell(chain, rng) if form == "words" else f"{chain.expression()}=?\n"
        styles = rng.choices(list(self.config.styles), weights=list(self.config.styles.values()), k=2)
        right = self._results(chain, 0.0, rng)
        wrong = self._wrong(chain, styles[1], rng)
        label = rng.random() < 0.5
        results = right if label else wrong
        marks = [a == b for a, b in zip(results, right, strict=True)]
        solutions = solve(chain, right, styles[0]), solve(chain, wrong, styles[1])
        return {
            "prompt": prompt,
            "answer": str(chain.answer),
            "chosen": solutions[0],
            "rejected": solutions[1],
            "margin": sum(a != b for a, b in zip(wrong, right, strict=True)) / len(right),
            "completion": solutions[0 if label else 1],
            "label": label,
            "style": styles[0 if label else 1],
            "score": [float(label), sum(marks) / len(marks)],
            "completions": solve(chain, results, "lines").splitlines(keepends=True),
            "labels": [*marks, label],
        }

    def _wrong(self, chain: Chain, style: Style, rng: Random) -> list[int]:
        """Results whose last is wrong: slips as frequent as in the format's demonstrations, at least half."""
        share = max(self.config.wrong(style), 0.5)
        for _ in range(TRIES):
            results = self._results(chain, share, rng)
            if results[-1] != chain.answer:
                return results
        raise ValueError(
            f"no wrong solution in {TRIES} tries: the slips {self.config.slips} do not fit between 0 and the "
            f"limit ({self.config.limit}), or cancel out; change slips, or raise limit"
        )
