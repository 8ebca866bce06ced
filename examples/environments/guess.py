"""Guess a number: the policy guesses, and learns whether the number is higher or lower and which are left.

An environment of kind `text` for the rows of `data: {kind: guess}`.
"""

from __future__ import annotations

from math import log
from typing import Any

from rft.tasks.guess import Game


class Guess:
    """Pay 1 in total for finding the number within `tries` guesses.

    A part of it, `progress`, is paid on the way: for each guess the share of the way from all numbers to one
    that it narrowed the range by, in bits. The prompt already says from where to where the number may lie.
    """

    def __init__(self, tries: int = 8, progress: float = 0.4) -> None:
        self.tries, self.progress, self.tried = tries, progress, 0
        self.game = Game(0, 0, 0)

    def reset(self, *, number: int, largest: int, **row: Any) -> None:
        """Begin a game with the row's number."""
        self.game, self.tried, self.bits = Game(number, 1, largest), 0, log(largest)

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Return (message to the policy, reward, found, out of tries, {})."""
        self.tried += 1
        before = self.game.high - self.game.low + 1
        answer, found = self.game.guess(text)
        after = 1 if found else self.game.high - self.game.low + 1
        reward = self.progress * log(before / after) / self.bits + (1 - self.progress) * found
        return answer, reward, found, self.tried >= self.tries, {}
