"""Keep the correct solutions that a run samples, and train on them again with the next group of their
prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rft.algorithms.policy_gradient.mml import MML
from rft.batch import Completion, Group, Prompt
from rft.config.schema import Config
from rft.contrib.replay import completion_of, plain
from rft.rollout.hooks import LoopHooks


async def start(config: Config, folder: Path, start_policy: object) -> SavedSolutions:
    """Create the loop hooks of a run with MML."""
    assert isinstance(config.algorithm, MML)
    return SavedSolutions(config.algorithm.saved, config.algorithm.threshold)


class SavedSolutions(LoopHooks):
    """Keep up to `most` distinct completions of each prompt with a reward above `threshold`, the newest."""

    def __init__(self, most: int, threshold: float) -> None:
        self.most, self.threshold = most, threshold
        self.solutions: dict[int, list[Completion]] = {}
        self._before: dict[int, list[Completion]] = {}

    def select(self, groups: list[Group]) -> list[Group]:
        """Return the groups with the saved solutions of their prompts, and save new ones."""
        self._before = {g.prompt.id: self.solutions.get(g.prompt.id, []) for g in groups}
        result = []
        for group in groups:
            fresh = {c.tokens for c in group.completions}
            saved = self.solutions.get(group.prompt.id, [])
            old = [c for c in saved if c.tokens not in fresh]
            result.append(replace(group, completions=(*group.completions, *old)))
            right = {c.tokens: _without_steps(c) for c in group.completions if self._right(c)}
            kept = [c for c in saved if c.tokens not in right]
            self.solutions[group.prompt.id] = [*kept, *right.values()][-self.most :]
        return result

    def _right(self, c: Completion) -> bool:
        return c.reward is not None and c.reward > self.threshold

    def step_failed(self) -> None:
        self.solutions |= self._before

    def state_dict(self) -> list[Any]:
        return [[key, [plain(c) for c in kept]] for key, kept in self.solutions.items() if kept]

    def load_state_dict(self, state: Sequence[Any], prompts: Mapping[int, Prompt]) -> None:
        self.solutions = {key: [completion_of(c) for c in kept] for key, kept in state}


def _without_steps(c: Completion) -> Completion:
    """Return a completion without the values of its steps: its whole text is correct."""
    return replace(c, values={k: v for k, v in c.values.items() if not k.startswith("step_")})
