"""Several tries at a reasoning-gym task, with the verdict of its verifier as feedback."""

from __future__ import annotations

from typing import Any

from rft.tasks.reasoning_gym import final_answer, score

COLUMNS = ("task", "options", "answer", "metadata")


class ReasoningGym:
    """A text environment over rows of the task `reasoning_gym`.

    tries: answers that the policy may give. solved: the verifier's score from which on an answer is right and
    ends the episode. discount: factor of the reward for each further try. show_score: whether the feedback
    names the verifier's score of a wrong answer, which may be partial.
    """

    def __init__(
        self, tries: int = 3, solved: float = 1.0, discount: float = 1.0, show_score: bool = False
    ) -> None:
        if tries < 1 or not 0 < discount <= 1:
            raise ValueError(f"tries must be at least 1 and discount in (0, 1], not {tries} and {discount}")
        self.tries, self.solved, self.discount, self.show_score = tries, solved, discount, show_score

    def reset(self, **row: Any) -> None:
        missing = [name for name in COLUMNS if name not in row]
        if missing:
            raise ValueError(f"the row has no column {missing[0]!r}; write data.kind: reasoning_gym")
        self.columns = {name: [row[name]] for name in COLUMNS}
        self.used = 0

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        """Judge an answer. The reward is that of the last try; earlier ones give 0."""
        (value,) = score([""], [text], **self.columns)
        assert value is not None
        self.used += 1
        over = value >= self.solved or self.used == self.tries
        reward = value * self.discount ** (self.used - 1) if over else 0.0
        return self._feedback(text, value), reward, over, False, {}

    def _feedback(self, text: str, value: float) -> str:
        left = self.tries - self.used
        again = f"Try again; you have {left} {'try' if left == 1 else 'tries'} left."
        answer = final_answer(text)
        if answer is None:
            return f"There is no answer in your message: write it as <answer>...</answer>. {again}"
        grade = f" Its score is {value:.2f} of 1." if self.show_score else ""
        return f"The answer {answer} is wrong.{grade} {again}"
