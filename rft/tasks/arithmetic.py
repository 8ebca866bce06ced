"""Generate arithmetic problems of a few steps, with worked solutions that may contain slips.

    Mia has 7 coins, finds 9, loses 4. How many now?
    7+9=16
    16-4=12
    #### 12

A problem is a chain: a number, then an operator and a number for each step. Only the chain decides
whether the problem is for training or held out, so that the two splits never share a problem, whatever
the seeds and the story around the numbers.

Demonstrations have two styles. Careful ones write out every step (`lines`) and are nearly always right.
Hasty ones write running totals (`chain`: `=16=12`), and about half of their steps are one or two too
high; the solution continues from the wrong result, as a pupil would. `answer` is always right.
A model that learns to imitate both is right about half of the time; reinforcement learning has to
discover which style is more accurate, and to avoid slips.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from random import Random
from typing import Any, Literal

from rft.config.tasks import ArithmeticConfig, Style
from rft.utils.hashing import hash64

Split = Literal["train", "test"]

TEST_SHARE = 10  # one chain in ten is held out
NAMES = ("Mia", "Tom", "Ana", "Leo", "Zoe", "Sam")
ITEMS = ("coins", "books", "shells", "cards", "eggs", "pens")
VERBS = {"+": ("finds", "buys", "gets"), "-": ("loses", "sells", "uses")}
SPOKEN = {"+": "plus", "-": "minus", "*": "times"}
_APPLY = {"+": operator.add, "-": operator.sub, "*": operator.mul}


@dataclass(frozen=True)
class Chain:
    """`start`, then each (operator, operand) in turn, from left to right."""

    start: int
    steps: tuple[tuple[str, int], ...]

    @property
    def answer(self) -> int:
        value = self.start
        for op, x in self.steps:
            value = _APPLY[op](value, x)
        return value

    @property
    def split(self) -> Split:
        key = f"{self.start}" + "".join(f"{op}{x}" for op, x in self.steps)
        return "test" if hash64(key) % TEST_SHARE == 0 else "train"

    def expression(self) -> str:
        """Format in usual notation, with brackets where * follows a sum: `(3+4)*2-5`."""
        text, is_sum = str(self.start), False
        for op, x in self.steps:
            text = f"({text}){op}{x}" if op == "*" and is_sum else f"{text}{op}{x}"
            is_sum = op != "*"
        return text


class Arithmetic:
    """The task. Options: see `ArithmeticConfig`."""

    name = "arithmetic"

    def __init__(self, **options: Any) -> None:
        """Raise pydantic.ValidationError for an unknown or out-of-range option."""
        self.config = ArithmeticConfig(**options)

    def rows(self, split: Split, n: int, seed: int) -> list[dict[str, Any]]:
        """Return `n` rows, deterministic in the arguments; problems may repeat within a split.

        prompt: the problem, ending in a line break. answer: the right result. completion: a worked
        solution, possibly with slips. style: the format of that solution. mistakes: its number of wrong
        steps. Raises ValueError for an unknown split.
        """
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", not {split!r}')
        rng = Random(f"arithmetic/{split}/{seed}")
        return [self._row(split, rng) for _ in range(n)]

    def _row(self, split: Split, rng: Random) -> dict[str, Any]:
        chain = self._chain(split, rng)
        config = self.config
        form = config.form if config.form != "mixed" else rng.choice(("words", "expression"))
        prompt = story_of(chain, rng) if form == "words" else f"{chain.expression()}=?\n"
        style = rng.choices(list(config.styles), weights=list(config.styles.values()))[0]
        results = self._results(chain, config.wrong(style), rng)
        return {
            "prompt": prompt,
            "answer": str(chain.answer),
            "completion": solve(chain, results, style),
            "style": style,
            "mistakes": _count_mistakes(chain, results),
        }

    def _chain(self, split: Split, rng: Random) -> Chain:
        """Draw a random chain of this split whose intermediate results stay within the limits."""
        for _ in range(10_000):
            length = rng.randint(self.config.min_operands, self.config.max_operands)
            chain = self._walk(length, rng)
            if chain is not None and chain.split == split:
                return chain
        raise ValueError(
            f"no problem for the {split} split in 10,000 tries: raise limit ({self.config.limit}) or "
            f"largest ({self.config.largest}), or lower max_operands ({self.config.max_operands})"
        )

    def _walk(self, length: int, rng: Random) -> Chain | None:
        """Draw a chain step by step; None if a drawn operator has no operand within the limits."""
        largest, limit = self.config.largest, self.config.limit
        value = start = rng.randint(1, largest)
        steps = []
        for _ in range(length - 1):
            op, lowest = rng.choice(self.config.operators), 1
            if op == "+":
                highest = min(largest, limit - value)
            elif op == "-":
                highest = min(largest, value)
            else:
                lowest, highest = 2, min(self.config.largest_factor, limit // max(value, 1))
            if highest < lowest:
                return None
            steps.append((op, rng.randint(lowest, highest)))
            value = _APPLY[op](value, steps[-1][1])
        return Chain(start, tuple(steps))

    def _results(self, chain: Chain, wrong: float, rng: Random) -> list[int]:
        """Return the result after each step of a demonstration with a share of `wrong` steps.

        A slip is chosen such that the rest of the chain still stays within 0 and the limit; if none
        exists, the step is right.
        """
        value, results = chain.start, []
        for done, (op, x) in enumerate(chain.steps, start=1):
            value = _APPLY[op](value, x)
            if rng.random() < wrong:
                slips = [value + d for d in self.config.slips if self._fits(value + d, chain.steps[done:])]
                value = rng.choice(slips) if slips else value
            results.append(value)
        return results

    def _fits(self, value: int, steps: tuple[tuple[str, int], ...]) -> bool:
        """True if all results from `value` on are between 0 and the limit."""
        for op, x in steps:
            if not 0 <= value <= self.config.limit:
                return False
            value = _APPLY[op](value, x)
        return 0 <= value <= self.config.limit


class HardArithmetic(Arithmetic):
    """The `hard` variant, registered as a task."""

    name = "arithmetic_hard"

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"variant": "hard", **options})


def story_of(chain: Chain, rng: Random) -> str:
    """Write the chain as a short story."""
    text = f"{rng.choice(NAMES)} has {chain.start} {rng.choice(ITEMS)}"
    for op, x in chain.steps:
        text += f", then {x} times as many" if op == "*" else f", {rng.choice(VERBS[op])} {x}"
    return text + ". How many now?\n"


def solve(chain: Chain, results: list[int], style: Style) -> str:
    """Write a worked solution with these `results` after the steps, the last of them as the answer."""
    before = [chain.start, *results[:-1]]
    steps = [(a, op, x, b) for a, (op, x), b in zip(before, chain.steps, results, strict=True)]
    final = results[-1]
    if style == "lines":
        return "".join(f"{a}{op}{x}={b}\n" for a, op, x, b in steps) + f"#### {final}"
    if style == "chain":
        return "".join(f"={b}" for b in results) + f"\n#### {final}"
    if style == "prose":
        sentences = "".join(f"{a} {SPOKEN[op]} {x} is {b}. " for a, op, x, b in steps)
        return f"{sentences}The answer is \\boxed{{{final}}}"
    if style == "code":
        body = "".join(f"x{op}={x} # {b}\n" for _, op, x, b in steps)
        return f"x={chain.start}\n{body}#### {final}"
    return f"#### {final}"


def style_of(completion: str) -> Style | None:
    """Return the format of a completion, judged by its beginning; None for anything else."""
    head = completion.lstrip()[:16]
    if head.startswith("####"):
        return "direct"
    if head.startswith("x="):
        return "code"
    if head.startswith("="):
        return "chain"
    if any(f" {word} " in head for word in SPOKEN.values()):
        return "prose"
    return "lines" if head[:1].isdigit() and "=" in head else None


def _count_mistakes(chain: Chain, results: list[int]) -> int:
    before = [chain.start, *results[:-1]]
    return sum(_APPLY[op](a, x) != b for a, (op, x), b in zip(before, chain.steps, results, strict=True))
