"""Expert iteration: train on the groups of past steps again, together with the fresh ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rft.algorithms.policy_gradient.raft import ExpertIteration
from rft.batch import Branch, Completion, Group, Prompt, Turn
from rft.config.schema import Config
from rft.rollout.hooks import LoopHooks


async def start(config: Config, folder: Path, start_policy: object) -> Replay:
    """Create the loop hooks of a run with expert iteration."""
    assert isinstance(config.algorithm, ExpertIteration)
    return Replay(config.algorithm.replay)


class Replay(LoopHooks):
    """Keep the groups of the last `steps` steps (0: none)."""

    def __init__(self, steps: int) -> None:
        self.past: deque[list[Group]] = deque(maxlen=steps)
        self._before = self.past.copy()

    def select(self, groups: Sequence[Group]) -> list[Group]:
        """Return this step's groups, then the kept ones, oldest first; keep this step's groups."""
        mixed = [*groups, *(group for step in self.past for group in step)]
        self._before = self.past.copy()
        self.past.append(list(groups))
        return mixed

    def step_failed(self) -> None:
        self.past = self._before

    def state_dict(self) -> list[Any]:
        """Return the groups as plain JSON, with prompts by id."""
        return [
            [[group.prompt.id, [plain(c) for c in group.completions]] for group in step] for step in self.past
        ]

    def load_state_dict(self, state: Sequence[Any], prompts: Mapping[int, Prompt]) -> None:
        self.past.clear()
        for step in state:
            self.past.append(
                [
                    Group(prompts[key], tuple(completion_of(c) for c in completions))
                    for key, completions in step
                ]
            )


def plain(c: Completion) -> dict[str, Any]:
    """Return a completion without score details and origin, which training does not read."""
    return asdict(replace(c, scores={}, origin=None))


def completion_of(row: Mapping[str, Any]) -> Completion:
    def frozen(value: Any) -> Any:
        return tuple(frozen(v) for v in value) if isinstance(value, list) else value

    known = {name: frozen(value) for name, value in row.items() if name != "values"}
    known["branches"] = tuple(Branch(*branch) for branch in known.get("branches", ()))
    known["turns"] = tuple(Turn(*turn) for turn in known.get("turns", ()))
    return Completion(**known, values={name: frozen(v) for name, v in row["values"].items()})
