"""Run the rewards of a training run: worker pools, combination, error policy, metrics."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rft.config.mixture import COLUMN
from rft.config.rewards import DIRECTION, SLOW, ErrorPolicy, MaxFraction, RewardConfig, RewardsConfig
from rft.rewards.actors import ActorPool
from rft.rewards.combine import combine, direction_of
from rft.rewards.load import CallError, require_columns
from rft.rewards.pool import Logged, WorkerPool, spec_of
from rft.rewards.types import Outcome, RewardError, SampleReward, Score, Text, TrainerState, text_of

Columns = Mapping[str, Sequence[Any]]


class RewardRunner:
    """Score completions in worker processes, from one asyncio loop; calls may overlap.

    Use `await start()` to warm up the workers (otherwise the first `score` does), and `await close()`, or
    `async with`. If this process dies, its workers and their children are killed.
    """

    def __init__(
        self,
        config: RewardsConfig,
        base_dir: Path | str = ".",
        steps: int = 0,
        *,
        optional: bool = False,
        by_source: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        """Configure the pools. steps: length of the run, for rewards that take `trainer_state`. optional: the
        config may name no function, since an environment gives the reward. by_source: names of the rewards
        that score rows of a source of a mixture (`data.mixture.NAME.rewards`); of other rows, all."""
        if not (config.functions or optional):
            raise ValueError("rewards.functions is empty: name at least one reward, for example `math`")
        self.config = config
        self._of_source = {name: rewards_of(config, labels) for name, labels in (by_source or {}).items()}
        self.base_dir = Path(base_dir)
        self.steps = steps
        local = [c for c in config.functions if c.actor is None]
        shared = [c for c in local if c.own_workers is None]
        plan = [(shared, config.workers)] if shared else []
        plan += [([c], c.own_workers) for c in local if c.own_workers is not None]
        self._pools: list[WorkerPool | ActorPool] = []
        self._place: dict[str, tuple[WorkerPool | ActorPool, int]] = {}
        for configs, workers in plan:
            specs = [spec_of(c, self.base_dir) for c in configs]
            gib = None if configs[0].function in SLOW else config.worker_memory_gib
            memory = None if gib is None else int(gib * 2**30)
            pool = WorkerPool(specs, workers, config.recycle_after, config.start_timeout_s, memory)
            self._pools.append(pool)
            self._place.update({c.label: (pool, i) for i, c in enumerate(configs)})
        for c in config.functions:
            if c.actor is not None:
                spec, a = spec_of(c, self.base_dir), c.actor
                actor = ActorPool(spec, a.num_cpus, a.num_gpus, config.start_timeout_s)
                self._pools.append(actor)
                self._place[c.label] = (actor, 0)
        self._starting: asyncio.Task[None] | None = None
        self._others: dict[str, RewardRunner] = {}
        self._tally = _Tally(config)
        self._logged: dict[str, Logged] = {c.label: {} for c in config.functions}

    async def __aenter__(self) -> RewardRunner:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Start all workers and load the rewards. Raises RewardError if one does not load."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        results = await asyncio.gather(*(pool.start() for pool in self._pools), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                await self.close()
                raise result

    def other(self, name: str, config: RewardsConfig) -> RewardRunner:
        """Return the runner of other rewards, such as those of a named held-out set; this one closes it."""
        if name not in self._others:
            self._others[name] = RewardRunner(config, self.base_dir, self.steps)
        return self._others[name]

    async def close(self) -> None:
        """Stop all workers with their children."""
        await asyncio.gather(*(part.close() for part in (*self._pools, *self._others.values())))

    @property
    def pids(self) -> list[int]:
        """Return the process ids of the running workers."""
        return [pid for pool in self._pools for pid in pool.pids]

    @property
    def in_environment(self) -> list[RewardConfig]:
        """Return the rewards that read `environments`, and are called where these are. After `start`."""
        loaded = {label: pool.loaded[index] for label, (pool, index) in self._place.items()}
        return [c for c in self.config.functions if loaded[c.label].reads_environments]

    async def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        columns: Columns | None = None,
        info: Columns | None = None,
        *,
        given: Mapping[str, Sequence[Score]] | None = None,
        groups: Sequence[int] | None = None,
        progress: float = 0.0,
        training: bool = True,
    ) -> list[SampleReward]:
        """Return one SampleReward per completion, in order.

        columns: dataset columns, N values each. info: sampling data, under the reserved names
        `num_tokens`, `truncated`, `completion_ids`, which rewards receive as further columns.
        given: scores of rewards that were called elsewhere (`in_environment`), by label.
        groups: the group of each completion, for `gdpo`. progress: 0 to 1, for schedules.
        training: False for held-out completions: they count for the error policy, but not in `take_metrics`.
        Raises RewardError once failures exceed the limits of `on_error` and `on_timeout`.
        """
        merged = {**(columns or {}), **(info or {})}
        n = len(completions)
        for name, values in (("prompts", prompts), *merged.items()):
            if len(values) != n:
                raise ValueError(f"{name!r} has {len(values)} values for {n} completions")
        await self.start()
        config = self.config
        if self._of_source and COLUMN in merged:  # the completions are of one prompt
            config = self._of_source.get(merged[COLUMN][0], config)
        state = TrainerState(round(progress * self.steps), self.steps)
        logged = self._logged if training else {c.label: {} for c in self.config.functions}
        called = [c for c in config.functions if c.label not in (given or {})]
        parts = await asyncio.gather(
            *(self._score_one(c, prompts, completions, merged, state, logged[c.label]) for c in called)
        )
        made = {c.label: part for c, part in zip(called, parts, strict=True)} | dict(given or {})
        scores = {c.label: made[c.label] for c in config.functions}
        rewards = combine(
            config, scores, groups=groups, progress=progress, directions=_directions(config, merged, n)
        )
        self._tally.add(scores, rewards, training=training)
        self._tally.enforce(scores, prompts, completions)
        return rewards

    async def _score_one(
        self,
        c: RewardConfig,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        columns: Mapping[str, Any],
        state: TrainerState,
        logged: Logged,
    ) -> list[Score]:
        pool, index = self._place[c.label]
        renamed = dict(columns)
        try:
            for parameter, column in c.columns.items():
                if column not in columns:
                    raise CallError(
                        f"reward {c.label!r}: `columns` names {column!r}, which the data does not have"
                    )
                renamed[parameter] = columns[column]
            require_columns(pool.loaded[index], c.label, renamed)
        except CallError as error:
            raise RewardError(str(error)) from None
        return await pool.score(index, prompts, completions, renamed, state, logged)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of the error policy, as plain JSON."""
        failures = {kind.value: count for kind, count in self._tally.failures.items()}
        return {"scored": self._tally.scored, "failures": failures}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore the counts of the error policy."""
        self._tally.scored = state["scored"]
        self._tally.failures = {kind: state["failures"][kind.value] for kind in self._tally.failures}

    def take_metrics(self) -> dict[str, float]:
        """Return and reset the metrics of training completions.

        Mean, outcomes and seconds per component; worker counts.
        """
        metrics = self._tally.take()
        for key in ("killed", "crashed", "recycled"):
            metrics[f"reward/workers/{key}"] = float(sum(pool.counts[key] for pool in self._pools))
        for label, logged in self._logged.items():
            for name, values in logged.items():
                metrics[f"reward/{label}/logged/{name}"] = statistics.fmean(values)
            logged.clear()
        return metrics


def _directions(
    config: RewardsConfig, columns: Mapping[str, Sequence[Any]], count: int
) -> list[Sequence[float]] | None:
    """Return the preference direction of each completion, for `direction: row`; else None."""
    if config.direction != "row":
        return None
    try:
        given = columns.get(DIRECTION) or [None] * count
        return [direction_of(column, len(config.functions)) for column in given]
    except ValueError as error:
        raise RewardError(str(error)) from None


def rewards_of(config: RewardsConfig, labels: Sequence[str]) -> RewardsConfig:
    """Return the config with the functions of these names only, in its order."""
    return config.model_copy(update={"functions": [c for c in config.functions if c.label in labels]})


class _Tally:
    """Counts of outcomes: since the last `take` for the metrics, over the run for the error policy."""

    def __init__(self, config: RewardsConfig) -> None:
        self.config = config
        self.scored = 0
        self.failures = {Outcome.error: 0, Outcome.timeout: 0}
        self.since = time.monotonic()
        self._clear()

    def _clear(self) -> None:
        self.outcomes: dict[str, Counter[Outcome]] = {c.label: Counter() for c in self.config.functions}
        # Keep all values: their exact sum (fsum) does not depend on the order in which groups were scored.
        self.values: dict[str, list[float]] = {c.label: [] for c in self.config.functions}
        self.rewards: list[float] = []
        self.seconds = {c.label: 0.0 for c in self.config.functions}
        self.dropped = 0

    def add(
        self, scores: Mapping[str, Sequence[Score]], rewards: Sequence[SampleReward], *, training: bool
    ) -> None:
        self.scored += len(rewards)
        for kind in self.failures:
            self.failures[kind] += sum(
                any(s.failed and s.outcome is kind for s in r.scores.values()) for r in rewards
            )
        if not training:
            return
        for name, column in scores.items():
            self.outcomes[name].update(score.outcome for score in column)
            self.seconds[name] += sum(score.seconds for score in column)
            self.values[name] += [score.value for score in column if score.value is not None]
        kept = [reward.value for reward in rewards if reward.value is not None]
        self.rewards += kept
        self.dropped += len(rewards) - len(kept)

    def take(self) -> dict[str, float]:
        metrics: dict[str, float] = {}
        if self.rewards:
            metrics["reward/mean"] = statistics.fmean(self.rewards)
        metrics["reward/dropped"] = float(self.dropped)
        for name, values in self.values.items():
            count = sum(self.outcomes[name].values())
            if values:
                metrics[f"reward/{name}/mean"] = statistics.fmean(values)
                metrics[f"reward/{name}/std"] = statistics.pstdev(values)
            if count:
                metrics[f"reward/{name}/seconds_per_call"] = self.seconds[name] / count
            for outcome in Outcome:
                metrics[f"reward/{name}/{outcome.value}"] = float(self.outcomes[name][outcome])
        self._clear()
        return metrics

    def enforce(
        self, scores: Mapping[str, Sequence[Score]], prompts: Sequence[Text], completions: Sequence[Text]
    ) -> None:
        """Raise RewardError if this call's failures exceed the limits of the config."""
        rules = (
            (Outcome.error, "on_error", self.config.on_error, "max_errors", self.config.max_errors),
            (Outcome.timeout, "on_timeout", self.config.on_timeout, "max_timeouts", self.config.max_timeouts),
        )
        for kind, key, policy, floor_key, floor in rules:
            failures = self.failures[kind]
            if failures <= _allowed(policy, floor, self.scored):
                continue
            example = _first(kind, scores)
            if example is None:
                continue
            name, i = example
            raise RewardError(
                f"{failures} of {self.scored} samples ended in {kind.value}: more than "
                f"{key}: {_shown(policy)} with {floor_key}: {floor} allows.\n"
                f"reward {name!r}, last failure: {scores[name][i].detail}\n"
                f"prompt: {_short(prompts[i])}\ncompletion: {_short(completions[i])}"
            )


def _allowed(policy: ErrorPolicy, floor: int, scored: int) -> float:
    if policy == "drop":
        return float("inf")
    return max(floor, policy.max_fraction * scored) if isinstance(policy, MaxFraction) else floor


def _shown(policy: ErrorPolicy) -> str:
    return f"{{max_fraction: {policy.max_fraction:g}}}" if isinstance(policy, MaxFraction) else str(policy)


def _first(kind: Outcome, scores: Mapping[str, Sequence[Score]]) -> tuple[str, int] | None:
    for name, column in scores.items():
        for i, score in enumerate(column):
            if score.failed and score.outcome is kind:
                return name, i
    return None


def _short(text: Text) -> str:
    shown = repr(text_of(text))
    return shown if len(shown) <= 2000 else shown[:2000] + f"... ({len(shown)} characters)"
