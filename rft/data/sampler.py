"""Sampling order of rows: shuffled without replacement, exactly resumable."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from rft.batch import Group
from rft.config.mixture import COLUMN
from rft.data.errors import DataError


class Sampler:
    """Indices 0..size-1, reshuffled at each epoch by (seed, epoch).

    The state is (epoch, position), so a resumed run visits exactly the remaining rows.
    """

    def __init__(self, size: int, seed: int = 0, *, shuffle: bool = True) -> None:
        if size < 1:
            raise DataError("cannot sample from an empty dataset")
        self.size, self.seed, self.shuffle = size, seed, shuffle
        self.epoch = 0
        self.position = 0
        self._order = self._shuffled()

    def _shuffled(self) -> list[int]:
        order = list(range(self.size))
        if self.shuffle:
            random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return order

    @property
    def seen(self) -> int:
        """Return the number of indices returned so far."""
        return self.epoch * self.size + self.position

    def next(self, k: int) -> list[int]:
        """Return the next k indices, continuing into the next epoch."""
        out: list[int] = []
        while len(out) < k:
            if self.position == self.size:
                self.epoch, self.position = self.epoch + 1, 0
                self._order = self._shuffled()
            took = self._order[self.position : self.position + k - len(out)]
            self.position += len(took)
            out += took
        return out

    def observe(self, row: int, group: Group, primary: str) -> None:
        """No-op: the order depends only on the seed."""

    def generations(self, row: int, usual: int) -> int:
        return usual

    def metrics(self) -> dict[str, float]:
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {
            "size": self.size,
            "seed": self.seed,
            "shuffle": self.shuffle,
            "epoch": self.epoch,
            "position": self.position,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state. Raises DataError if the data settings differ."""
        for name in ("size", "seed", "shuffle"):
            if state[name] != getattr(self, name):
                raise DataError(
                    f"cannot resume the sample order: the checkpoint was made with {name}={state[name]}, "
                    f"this run has {name}={getattr(self, name)}; restore this setting, or start a new run"
                )
        self.epoch, self.position = int(state["epoch"]), int(state["position"])
        self._order = self._shuffled()


class PromptSampler(Protocol):
    """Order of an online run's prompts: `Sampler`, or a curriculum that adapts to the rewards."""

    size: int
    epoch: int  # of the last row returned

    @property
    def seen(self) -> int:
        """Return the number of rows returned so far, including repeats."""

    def next(self, k: int) -> list[int]:
        """Return the next k rows."""

    def observe(self, row: int, group: Group, primary: str) -> None:
        """Record a row's scored group. primary: name of the reward that measures correctness."""

    def generations(self, row: int, usual: int) -> int:
        """Return how many completions to sample of a row; `usual` is the config's number."""

    def metrics(self) -> dict[str, float]:
        """Return `data/...` metrics of the order."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""


class GroupSource(Protocol):
    """Infinite source of groups, epoch after epoch, exactly resumable."""

    @property
    def epochs(self) -> float:
        """Return the passes over the data so far."""

    def next(self, k: int) -> list[Group]:
        """Return the next k groups."""

    def metrics(self) -> dict[str, float]:
        """Return `data/...` metrics of the rows so far."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state as plain data."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state."""


class GroupSampler:
    """`GroupSource` of in-memory groups, in the order of a `Sampler`."""

    def __init__(
        self,
        groups: Sequence[Group],
        seed: int = 0,
        *,
        shuffle: bool = True,
        sampler: PromptSampler | None = None,
    ) -> None:
        """sampler: the order (None: that of `Sampler`, by seed and shuffle)."""
        self.groups = groups
        self.sampler = sampler or Sampler(len(groups), seed, shuffle=shuffle)
        self.tokens: dict[str, int] = {}  # of the last groups, by source of a mixture

    @property
    def epochs(self) -> float:
        return self.sampler.seen / self.sampler.size

    def next(self, k: int) -> list[Group]:
        groups = [self.groups[i] for i in self.sampler.next(k)]
        self.tokens = tokens_by_source(groups)
        return groups

    def metrics(self) -> dict[str, float]:
        tokens = {f"data/{name}/tokens": float(count) for name, count in self.tokens.items()}
        return {"data/epoch": self.epochs, **self.sampler.metrics(), **tokens}

    def state_dict(self) -> dict[str, Any]:
        return {**self.sampler.state_dict(), **({"tokens": self.tokens} if self.tokens else {})}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.sampler.load_state_dict(state)
        self.tokens = dict(state.get("tokens", {}))


def tokens_by_source(groups: Sequence[Group]) -> dict[str, int]:
    """Return the number of trained tokens of each source of a mixture; {} for other data."""
    counts: dict[str, int] = {}
    for group in groups:
        name = group.prompt.columns.get(COLUMN)
        if name is not None:
            counts[name] = counts.get(name, 0) + sum(c.num_sampled for c in group.completions)
    return counts
