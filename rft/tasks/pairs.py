"""The arithmetic task with judged solutions: pairs, labels, scores, and steps, each verified."""

from __future__ import annotations

from random import Random
from typing import Any

from rft.config.tasks import Style
from rft.tasks.arithmetic import Arithmetic, Chain, Split, solve, story_of

TRIES = 1000


class ArithmeticPairs(Arithmetic):
    """Rows for every kind of offline training on judgements. Options: see `ArithmeticConfig`.

    chosen, rejected, margin: of solutions drawn like the demonstrations of `arithmetic`, the first that
        ends in the right result and the first that does not; the share of the latter's results that are
        wrong.
    completion, label, score: either of the two by a coin flip, whether it is the right one, and two scores:
        whether its final result is right (0 or 1) and the share of its results that are right.
    completions, labels: the same results line by line, and for each line whether all is right up to there.
    """

    name = "arithmetic_pairs"

    def _row(self, split: Split, rng: Random) -> dict[str, Any]:
        chain = self._chain(split, rng)
        form = self.config.form if self.config.form != "mixed" else rng.choice(("words", "expression"))
        prompt = story_of(chain, rng) if form == "words" else f"{chain.expression()}=?\n"
        right = self._results(chain, 0.0, rng)
        drawn = [self._draw(chain, rng, correct) for correct in (True, False)]
        wrong = drawn[1][1]
        label = rng.random() < 0.5
        style, results = drawn[0 if label else 1]
        marks = [a == b for a, b in zip(results, right, strict=True)]
        solutions = [solve(chain, results, style) for style, results in drawn]
        return {
            "prompt": prompt,
            "answer": str(chain.answer),
            "chosen": solutions[0],
            "rejected": solutions[1],
            "margin": sum(a != b for a, b in zip(wrong, right, strict=True)) / len(right),
            "completion": solutions[0 if label else 1],
            "label": label,
            "style": style,
            "score": [float(label), sum(marks) / len(marks)],
            "completions": solve(chain, results, "lines").splitlines(keepends=True),
            "labels": [*marks, label],
        }

    def _draw(self, chain: Chain, rng: Random, correct: bool) -> tuple[Style, list[int]]:
        """Return format and results of the first demonstration with a right, or wrong, final result."""
        styles, weights = list(self.config.styles), list(self.config.styles.values())
        for _ in range(TRIES):
            style = rng.choices(styles, weights=weights)[0]
            results = self._results(chain, self.config.wrong(style), rng)
            if (results[-1] == chain.answer) is correct:
                return style, results
        raise ValueError(
            f"no {'right' if correct else 'wrong'} solution among {TRIES} demonstrations: set wrong_fraction "
            f"between 0 and 1, and slips that fit within the limit ({self.config.slips}, {self.config.limit})"
        )
