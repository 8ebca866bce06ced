"""Expert iteration's memory: the groups of past steps, which are trained on again beside the new ones."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

from rft.batch import Completion, Group, Prompt


class Replay:
    """The groups of the last `steps` steps. `steps` 0: it remembers nothing and adds nothing."""

    def __init__(self, steps: int) -> None:
        self.past: deque[list[Group]] = deque(maxlen=steps)
        self._before = self.past.copy()

    def mix(self, groups: Sequence[Group]) -> list[Group]:
        """This step's groups, then those of the steps before it, the oldest first; remembers this step's."""
        mixed = [*groups, *(group for step in self.past for group in step)]
        self._before = self.past.copy()
        self.past.append(list(groups))
        return mixed

    def take_back(self) -> None:
        """Forget the groups of the last `mix`: no step was taken on them."""
        self.past = self._before

    def state_dict(self) -> list[Any]:
        """What is remembered, as plain JSON; prompts by their id."""
        return [
            [[group.prompt.id, [_plain(c) for c in group.completions]] for group in step]
            for step in self.past
        ]

    def load_state_dict(self, state: Sequence[Any], prompts: Mapping[int, Prompt]) -> None:
        """Remember what `state_dict` wrote. `prompts`: the run's prompts by id."""
        self.past.clear()
        for step in state:
            self.past.append(
                [Group(prompts[key], tuple(_completion(c) for c in completions)) for key, completions in step]
            )


def _plain(c: Completion) -> dict[str, Any]:
    """A completion without its scores' details: its reward is all that training reads."""
    return asdict(replace(c, scores={}))


def _completion(plain: Mapping[str, Any]) -> Completion:
    def frozen(value: Any) -> Any:
        return tuple(frozen(v) for v in value) if isinstance(value, list) else value

    known = {name: frozen(value) for name, value in plain.items() if name != "values"}
    return Completion(**known, values={name: frozen(v) for name, v in plain["values"].items()})
