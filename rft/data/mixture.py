"""Mixtures: load named sources as one dataset, and draw their rows at given rates, exactly resumable."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import chain, zip_longest
from typing import Any, TypeVar

from rft.algorithms.base import DataKind
from rft.batch import Group, Prompt
from rft.config.data import DataConfig
from rft.config.mixture import COLUMN, rate_at
from rft.data import groups, prompts, rows, stream
from rft.data.aioli import Aioli
from rft.data.errors import DataError, JoinedSource
from rft.data.groups import GroupSet
from rft.data.prompts import PromptSet
from rft.data.rows import Row, Split
from rft.data.sampler import Sampler
from rft.utils.seeds import derive_seed

T = TypeVar("T")

# -- loading ---------------------------------------------------------------------------------------------


def load_prompts(
    config: DataConfig, tokenizer: Any, split: Split = "train", max_prompt_length: int | None = None
) -> PromptSet:
    """Load the prompts of a split as `rft.data.prompts.load_prompts`, or those of all sources of a mixture.

    Held-out prompts of several sources alternate, so that the first n are of all of them.
    """
    if not config.mixture:
        return prompts.load_prompts(config, tokenizer, split, max_prompt_length)
    parts = _parts(config, split, lambda c: prompts.load_prompts(c, tokenizer, split, max_prompt_length))
    joined: list[list[Prompt]] = []
    skipped: dict[str, int] = {}
    numbers: dict[str, list[int]] = {}
    notes: list[str] = []
    starts, source = _joined_source(
        parts, {name: [p.id for p in part.prompts] for name, part in parts.items()}
    )
    for name, part in parts.items():
        joined.append([_of_source(prompt, name, starts[name], part.source) for prompt in part.prompts])
        skipped |= {f"{name}: {reason}": count for reason, count in part.skipped.items()}
        numbers |= {f"{name}: {k}": [starts[name] + n for n in rows] for k, rows in part.rows.items()}
        notes += [f"{name}: {note}" for note in part.notes]
    return PromptSet(_in_order(joined, split), skipped, numbers, source, notes)


def load_groups(
    config: DataConfig,
    tokenizer: Any,
    kind: DataKind = "sft",
    split: Split = "train",
    max_length: int | None = None,
) -> GroupSet:
    """Load the groups of a split as `rft.data.groups.load_groups`, or those of all sources of a mixture."""
    if not config.mixture:
        return groups.load_groups(config, tokenizer, kind, split, max_length)
    parts = _parts(config, split, lambda c: groups.load_groups(c, tokenizer, kind, split, max_length))
    joined: list[list[Group]] = []
    skipped: dict[str, int] = {}
    notes: list[str] = []
    starts, source = _joined_source(
        parts, {name: [g.prompt.id for g in part] for name, part in parts.items()}
    )
    for name, part in parts.items():
        prompts_of = [_of_source(group.prompt, name, starts[name], part.source) for group in part]
        joined.append([replace(group, prompt=p) for group, p in zip(part, prompts_of, strict=True)])
        skipped |= {f"{name}: {reason}": count for reason, count in part.skipped.items()}
        notes += [f"{name}: {note}" for note in part.notes]
    truncated = sum(part.truncated for part in parts.values())
    return GroupSet(_in_order(joined, split), skipped, truncated, source, notes)


def first_row(config: DataConfig) -> Row:
    """Return the first training row, of a mixture that of its first source. Raises DataError."""
    return stream.first_row(next(iter(config.parts().values())))


def has_held_out(config: DataConfig) -> bool:
    """Return whether a dataset has evaluation rows; a mixture, if any source has."""
    return any(rows.has_held_out(part) for part in config.parts().values())


def _parts(config: DataConfig, split: Split, load: Callable[[DataConfig], T]) -> dict[str, T]:
    """Load the sources that have a split, by name. Raises DataError that names the source."""
    chosen = {n: c for n, c in config.parts().items() if split == "train" or rows.has_held_out(c)}
    if not chosen:
        raise DataError("no source of `mixture` has evaluation rows: set its `eval_path` or `holdout`")
    loaded = {}
    for name, part in chosen.items():
        try:
            loaded[name] = load(part)
        except DataError as error:
            raise DataError(f"mixture.{name}: {error}") from None
    return loaded


def _joined_source(
    parts: Mapping[str, PromptSet | GroupSet], ids: Mapping[str, Sequence[int]]
) -> tuple[dict[str, int], JoinedSource]:
    """Return the number that is added to the row numbers of each source, and the joined name."""
    starts: dict[str, int] = {}
    end = 0
    for name, numbers in ids.items():
        starts[name], end = end, end + max(numbers) + 1
    named = ", ".join(f"{len(parts[name])} of {name} ({parts[name].source})" for name in parts)
    return starts, JoinedSource(named, [part.source for part in parts.values()], list(starts.values()))


def _of_source(prompt: Prompt, name: str, start: int, source: str) -> Prompt:
    if COLUMN in prompt.columns:
        raise DataError(
            f"rows of a mixture get a column of this name; rename yours: `columns: {{NAME: {COLUMN}}}`",
            source=source,
            row=prompt.id + 1,
            column=COLUMN,
        )
    return replace(prompt, id=prompt.id + start, columns={**prompt.columns, COLUMN: name})


def _in_order(parts: Sequence[Sequence[T]], split: Split) -> list[T]:
    if split == "train":
        return list(chain.from_iterable(parts))
    return [item for items in zip_longest(*parts) for item in items if item is not None]


# -- drawing -----------------------------------------------------------------------------------------------


class MixtureSampler:
    """Rows of several sources, drawn at their rates; a `PromptSampler`.

    Each draw adds its rate (normalised over the sources that are left) to the credit of every source, and
    takes the next row of the one with the highest credit, whose credit then falls by one. So the counts never
    differ from the rates by more than the number of sources, in every part of the run. Within a source the
    order is that of `Sampler`. Progress of a schedule is the share of `draws` that were made.
    """

    def __init__(
        self,
        config: DataConfig,
        rows: Mapping[str, Sequence[int]],
        seed: int = 0,
        *,
        draws: int,
    ) -> None:
        """rows: indices of the rows of each source. draws: rows of the run, its steps times batch size."""
        self.config, self.rows, self.draws = config, rows, draws
        self.samplers = {
            name: Sampler(len(indices), derive_seed(seed, "mixture", name), shuffle=config.shuffle)
            for name, indices in rows.items()
        }
        self.learned = Aioli(config.aioli, list(rows), seed) if config.mixing == "aioli" else None
        self.credit = dict.fromkeys(rows, 0.0)
        self.size = sum(map(len, rows.values()))
        self.epoch, self.seen = 0, 0
        self._source_of = {index: name for name, indices in rows.items() for index in indices}

    def rates(self, progress: float) -> dict[str, float]:
        """Return the rate of each source at `progress`, normalised to the sum 1; sources used up have 0.

        Online, more than `draws` rows are drawn where groups are dropped. Once all sources are used up, those
        rows are drawn as without `epochs`.
        """
        drawn = {name: sampler.seen for name, sampler in self.samplers.items()}
        rates = self._rates(progress, drawn)
        if not any(rates.values()) and self.seen >= self.draws:
            rates = self._rates(progress, None)
        return rates

    def _rates(self, progress: float, drawn: Mapping[str, int] | None) -> dict[str, float]:
        """Return the normalised rates; all 0 where the sources are used up. drawn: rows of each so far (None:
        none is used up)."""
        c = self.config
        exponent = 1 / c.mixing_temperature if c.mixing == "temperature" else 1.0
        weights = {} if self.learned is None else self.learned.rates()
        if weights:
            return weights
        for name, indices in self.rows.items():
            source = c.mixture[name]
            given = len(indices) ** exponent if source.rate is None else rate_at(source.rate, progress)
            left = drawn is None or source.epochs is None or drawn[name] < self.most(name)
            weights[name] = given if left else 0.0
        total = sum(weights.values())
        return {name: weight / total if total else 0.0 for name, weight in weights.items()}

    def most(self, name: str) -> float:
        """Return the most rows that are drawn from a source."""
        epochs = self.config.mixture[name].epochs
        return math.inf if epochs is None else math.ceil(epochs * len(self.rows[name]))

    def check(self, what: str = "train.steps x train.batch_size") -> None:
        """Raise DataError if the sources are used up before the run's rows are drawn. what: names `draws`."""
        if all(source.epochs is None for source in self.config.mixture.values()):
            return
        credit, drawn = dict.fromkeys(self.rows, 0.0), dict.fromkeys(self.rows, 0)
        for number in range(self.draws):
            rates = self._rates(number / self.draws, drawn)
            if not any(rates.values()):
                raise DataError(
                    f"all sources with a rate are used up after {number} of the {self.draws} rows of {what}; "
                    "raise `mixture.NAME.epochs`, leave it out for one source, or lower the steps"
                )
            drawn[_draw(credit, rates)] += 1

    def next(self, k: int) -> list[int]:
        """Return the indices of the next k rows."""
        out = []
        for _ in range(k):
            chosen = _draw(self.credit, self.rates(min(self.seen / self.draws, 1.0)))
            sampler = self.samplers[chosen]
            out.append(self.rows[chosen][sampler.next(1)[0]])
            self.epoch = sampler.epoch
            self.seen += 1
        return out

    def observe(self, row: int, group: Group, primary: str) -> None:
        """No-op: the order depends only on the seed and the rates."""

    def generations(self, row: int, usual: int) -> int:
        return usual

    def metrics(self) -> dict[str, float]:
        """Return rows, share and passes of each source so far."""
        learned = {} if self.learned is None else self.learned.metrics()
        return learned | {
            f"data/{name}/{key}": float(value)
            for name, s in self.samplers.items()
            for key, value in (
                ("rows", s.seen),
                ("share", s.seen / max(self.seen, 1)),
                ("epoch", s.seen / s.size),
            )
        }

    def state_dict(self) -> dict[str, Any]:
        sources = {
            name: {"credit": self.credit[name], **sampler.state_dict()}
            for name, sampler in self.samplers.items()
        }
        learned = {} if self.learned is None else {"aioli": self.learned.state_dict()}
        return {"seen": self.seen, "epoch": self.epoch, "sources": sources, **learned}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state. Raises DataError if the sources or the data settings differ."""
        saved = state.get("sources", {})
        if set(saved) != set(self.samplers):
            raise DataError(
                "cannot resume the sample order: the checkpoint was made with the sources "
                f"{', '.join(sorted(saved)) or '(no mixture)'}, this run has "
                f"{', '.join(sorted(self.samplers))}; restore `data.mixture`, or start a new run"
            )
        for name, sampler in self.samplers.items():
            try:
                sampler.load_state_dict(saved[name])
            except DataError as error:
                raise DataError(f"mixture.{name}: {error}") from None
            self.credit[name] = saved[name]["credit"]
        if self.learned is not None:
            if "aioli" not in state:
                raise DataError(
                    "cannot resume the rates of a mixture: the checkpoint was made without `mixing: aioli`; "
                    "restore `data.mixing`, or start a new run"
                )
            self.learned.load_state_dict(state["aioli"])
        self.seen, self.epoch = state["seen"], state["epoch"]


def _draw(credit: dict[str, float], rates: Mapping[str, float]) -> str:
    """Return the source that the next row is drawn from, and settle the credits."""
    for name, rate in rates.items():
        credit[name] += rate
    chosen = max((name for name, rate in rates.items() if rate), key=credit.__getitem__)
    credit[chosen] -= 1
    return chosen


def mixture_sampler(
    config: DataConfig, rows: Sequence[Prompt], seed: int, draws: int
) -> MixtureSampler | None:
    """Return the sampler of a mixture's rows; None if the data are not a mixture. draws: rows of the run."""
    if not config.mixture:
        return None
    by_source: dict[str, list[int]] = {}
    for index, prompt in enumerate(rows):
        by_source.setdefault(prompt.columns[COLUMN], []).append(index)
    return MixtureSampler(config, by_source, seed, draws=draws)


def mixture_lines(config: DataConfig, sampler: MixtureSampler) -> list[str]:
    """Describe the rates of a mixture at the start, the middle and the end of the run."""
    points = [sampler.rates(progress) for progress in (0.0, 0.5, 1.0)]
    lines = []
    for name, indices in sampler.rows.items():
        shares = list(dict.fromkeys(f"{rates[name]:.1%}" for rates in points))
        shown = shares[0] if len(shares) == 1 else " -> ".join(f"{rates[name]:.1%}" for rates in points)
        source = config.mixture[name]
        scored = "" if source.rewards is None else f"; rewards {', '.join(source.rewards)}"
        shown = f"learned, at first {shown}" if sampler.learned is not None else shown
        most = "" if source.epochs is None else f"; at most {source.epochs:g} epochs"
        lines.append(f"{name}: {shown} of the rows drawn, from {len(indices)} rows{most}{scored}")
    return lines
