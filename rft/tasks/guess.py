"""The game of guessing a number, with demonstrations of players who guess at random.

    Guess my number.        57
    1 to 200
    higher                  171
    58 to 200
    lower                   ...
    58 to 170

Halving the range finds every number up to 255 within 8 tries. The players of the demonstrations guess any
number that is still possible, and careless ones at times any number at all: about four in ten of the careful
ones find a number up to 200. Reinforcement learning has to discover the middle.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from random import Random
from typing import Any

from rft.config.tasks import GuessConfig
from rft.tasks.arithmetic import Split

PROMPT = "Guess my number."


@dataclass
class Game:
    """One game: the secret `number`, and the range that it is known to be in, `low` to `high`."""

    number: int
    low: int
    high: int

    def situation(self) -> str:
        """Write the range that is left."""
        return f"{self.low} to {self.high}"

    def guess(self, text: str) -> tuple[str, bool]:
        """Return (the answer to a guess, whether it is right). A guess outside the range does not change it,
        and the answer to a text without a number says so."""
        number = re.search(r"\d+", text)
        if number is None or len(number[0]) > len(str(self.high)) + 1:
            return f"no number\n{self.situation()}", False
        guess = int(number[0])
        if guess == self.number:
            return "right", True
        if guess < self.number:
            self.low, word = max(self.low, guess + 1), "higher"
        else:
            self.high, word = min(self.high, guess - 1), "lower"
        return f"{word}\n{self.situation()}", False


class Guess:
    """The task. Options: see `GuessConfig`."""

    name = "guess"

    def __init__(self, **options: Any) -> None:
        """Raise pydantic.ValidationError for an unknown or out-of-range option."""
        self.config = GuessConfig(**options)

    def rows(self, split: Split, n: int, seed: int) -> list[dict[str, Any]]:
        """Return `n` rows, deterministic in the arguments.

        prompt: the invitation. number: the secret. largest: the range is 1 to this. answer: the secret as
        text. completion: the messages of a game of at most `tries` guesses, found or not. Held-out games are
        others with the same numbers: no prompt shows its number, and a policy learns which ones are never
        right. Raises ValueError for an unknown split.
        """
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", not {split!r}')
        rng = Random(f"guess/{split}/{seed}")
        return [self._row(rng.randint(1, self.config.largest), rng) for _ in range(n)]

    def _row(self, number: int, rng: Random) -> dict[str, Any]:
        game = Game(number, 1, self.config.largest)
        prompt, messages = f"{PROMPT}\n{game.situation()}", []
        for turn in range(self.config.tries):
            careless = self.config.careless > 0 and rng.random() < self.config.careless
            low, high = (1, self.config.largest) if careless else (game.low, game.high)
            guess = str(rng.randint(low, high))
            messages.append({"role": "assistant", "content": guess})
            answer, right = game.guess(guess)
            if right or turn == self.config.tries - 1:
                break
            messages.append({"role": "user", "content": answer})
        return {
            "prompt": prompt,
            "answer": str(number),
            "number": number,
            "largest": self.config.largest,
            "completion": messages,
        }
