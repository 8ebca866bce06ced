"""Guards: checks of a run's health over its metrics so far, and `Guards`, which runs them after each step.

A history is the list of rows of `metrics.jsonl`, oldest first; each function checks the newest row and
returns a `Finding` or None. They cost a few slices per step, independent of the run's length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from rft.config.metrics import Action, GuardsConfig
from rft.metrics.log import METRICS_FILE, RunLog, read_jsonl
from rft.metrics.progress import Progress

Row = Mapping[str, float | None]
History = Sequence[Row]


@dataclass(frozen=True)
class Finding:
    """A triggered guard: its name, the measured value, and the limit that the value exceeds."""

    guard: str
    step: int
    value: float
    limit: float
    message: str
    action: Action = "warn"

    def fields(self) -> dict[str, Any]:
        """Return the fields of the event `guard/NAME`."""
        return {name: value for name, value in asdict(self).items() if name != "guard"}


class GuardStop(RuntimeError):
    """A guard whose action is `stop` triggered."""

    def __init__(self, finding: Finding) -> None:
        super().__init__(f"stopped by the guard {finding.guard!r}: {finding.message}")
        self.finding = finding


def _values(rows: History, name: str) -> list[float]:
    """Return the finite values of a metric."""
    values = (row.get(name) for row in rows)
    return [v for v in values if v is not None and math.isfinite(v)]


def _step(history: History) -> int:
    return int(history[-1].get("step") or 0)


def non_finite(history: History, config: GuardsConfig) -> Finding | None:
    """Loss or gradient norm is present, but NaN or infinite (null in a written row)."""
    row = history[-1]
    for name in ("train/loss", "train/grad_norm"):
        if name in row:
            value = row[name]
            if value is None or not math.isfinite(value):
                shown = math.nan if value is None else value
                return Finding("non_finite", _step(history), shown, 0.0, f"{name} is {shown}")
    return None


def loss_spike(history: History, config: GuardsConfig) -> Finding | None:
    """Loss or gradient norm is far above the median of the last `window` steps, measured in robust
    standard deviations (1.4826 times the median absolute deviation, at least 5 % of the median)."""
    for name in ("train/loss", "train/grad_norm"):
        value = history[-1].get(name)
        before = _values(history[-1 - config.window : -1], name)
        if value is None or not math.isfinite(value) or len(before) < max(2, config.window // 2):
            continue
        middle = median(before)
        spread = max(1.4826 * median(abs(v - middle) for v in before), 0.05 * abs(middle), 1e-6)
        limit = middle + config.loss_spike_sigmas * spread
        if value > limit:
            text = f"{name} jumped to {value:.4g}; its median over {len(before)} steps was {middle:.4g}"
            return Finding("loss_spike", _step(history), value, limit, text)
    return None


def entropy_collapse(history: History, config: GuardsConfig) -> Finding | None:
    """Entropy fell below the floor, or lost more than `entropy_drop` of its first values' mean."""
    value = history[-1].get("policy/entropy")
    first = _values(history[: config.window], "policy/entropy")
    if value is None or not math.isfinite(value) or not first:
        return None
    limit = max(config.entropy_floor, (1 - config.entropy_drop) * fmean(first))
    if value >= limit:
        return None
    text = f"entropy is {value:.4g} nats a token; it began at {fmean(first):.4g}: the policy hardly varies"
    return Finding("entropy_collapse", _step(history), value, limit, text)


def length_explosion(history: History, config: GuardsConfig) -> Finding | None:
    """The mean length of the last three steps exceeds `length_factor` times that of the first `window`."""
    first = _values(history[: config.window], "completion/length_mean")
    recent = _values(history[-3:], "completion/length_mean")
    if len(history) <= config.window or not first or not recent:
        return None
    value, limit = fmean(recent), config.length_factor * median(first)
    if value <= limit:
        return None
    text = f"completions are {value:.0f} tokens long; they were {median(first):.0f} at first"
    return Finding("length_explosion", _step(history), value, limit, text)


def duplicates(history: History, config: GuardsConfig) -> Finding | None:
    """The same text answers different prompts (`completion/shared`); or the completions of a group are
    the same (`completion/duplicates`) although most are not correct. Means of three steps.

    A policy that knows the answer may well repeat itself, so correct duplicates are not reported."""
    limit = config.duplicate_share
    shared = _values(history[-3:], "completion/shared")
    if shared and fmean(shared) > limit:
        text = f"{100 * fmean(shared):.0f} % of the completions answer several prompts with the same text"
        return Finding("duplicates", _step(history), fmean(shared), limit, text)
    same = _values(history[-3:], "completion/duplicates")
    correct = _values(history[-3:], "reward/outcome/correct")
    if same and fmean(same) > limit and (fmean(correct) if correct else 0.0) < 0.5:
        text = f"{100 * fmean(same):.0f} % of the completions repeat another one of their group"
        return Finding("duplicates", _step(history), fmean(same), limit, text)
    return None


def reward_hacking(history: History, config: GuardsConfig) -> Finding | None:
    """Held-out accuracy fell below its best by more than `accuracy_drop` and two standard errors,
    while the reward of the last `window` steps is above that of the `window` steps up to the best."""
    if history[-1].get("eval/accuracy") is None:
        return None
    evals = [(i, v) for i, row in enumerate(history) if (v := row.get("eval/accuracy")) is not None]
    at, best = max(evals, key=lambda pair: pair[1])
    later = [v for i, v in evals if i > at]
    if not later:
        return None
    recent = fmean(later[-2:])
    error = history[-1].get("eval/accuracy_stderr") or 0.0
    fall, limit = best - recent, max(config.accuracy_drop, 2 * error)
    then = _values(history[max(0, at + 1 - config.window) : at + 1], "reward/mean")
    now = _values(history[max(at + 1, len(history) - config.window) :], "reward/mean")
    if fall <= limit or not then or not now or fmean(now) <= fmean(then):
        return None
    text = (
        f"held-out accuracy fell from {best:.3f} to {recent:.3f} while the reward rose from "
        f"{fmean(then):.3f} to {fmean(now):.3f}: the reward may measure something other than the task"
    )
    return Finding("reward_hacking", _step(history), fall, limit, text)


def stale_engines(history: History, config: GuardsConfig, staleness: int = 0) -> Finding | None:
    """An engine's last successful health check is `engine_silence` seconds ago (`engine/NAME/silence`), or a
    trained completion is older than `age_limit` versions (`rollout/age_max`; default limit: `staleness`)."""
    row = history[-1]
    silent = {
        name.split("/")[1]: value
        for name, value in row.items()
        if value is not None and name.startswith("engine/") and name.endswith("/silence")
    }
    if silent and max(silent.values()) > config.engine_silence:
        engine, value = max(silent.items(), key=lambda pair: pair[1])
        text = f"engine {engine} passed no health check for {value:.0f} s"
        return Finding("stale_engines", _step(history), value, config.engine_silence, text)
    limit = staleness if config.age_limit is None else config.age_limit
    age = row.get("rollout/age_max")
    if age is None or age <= limit:
        return None
    text = f"trained on a completion {age:.0f} policy versions old; the limit is {limit}"
    return Finding("stale_engines", _step(history), age, float(limit), text)


# Only checked after `warmup` steps, unlike `non_finite` and `stale_engines`.
SLOW = (loss_spike, entropy_collapse, length_explosion, duplicates, reward_hacking)


def check(
    history: History, config: GuardsConfig, staleness: int = 0, *, online: bool = False
) -> list[Finding]:
    """Run all guards that are not `off` on the newest row; return findings with the configured actions."""
    if not history:
        return []
    findings = [non_finite(history, config), stale_engines(history, config, staleness)]
    if len(history) > config.warmup:
        findings += [guard(history, config) for guard in SLOW]
    named = [finding for finding in findings if finding is not None]
    actions = {f.guard: config.action(f.guard, online=online) for f in named}
    return [Finding(**{**asdict(f), "action": actions[f.guard]}) for f in named if actions[f.guard] != "off"]


MOST_ROWS = 8192  # of history kept in memory
WATCHED = frozenset(
    (
        "step", "train/loss", "train/grad_norm", "policy/entropy", "completion/length_mean",
        "completion/shared", "completion/duplicates", "reward/outcome/correct", "reward/mean",
        "eval/accuracy", "eval/accuracy_stderr", "rollout/age_max",
    )
)  # fmt: skip


class Guards:
    """Run the guards after every step, without repeated reports.

    online: the algorithm trains on completions sampled from the policy, which decides some default actions.
    """

    def __init__(
        self, config: GuardsConfig, staleness: int = 0, history: History = (), *, online: bool = False
    ) -> None:
        self.config, self.staleness, self.online = config, staleness, online
        self._history: list[Row] = [_watched(row) for row in history]
        self._spoke: dict[str, int] = {}

    def observe(self, step: int, metrics: Row) -> list[Finding]:
        """Return the findings for a step's metrics, worst (`stop`) first; `enforce` acts on them."""
        self._history.append(_watched({**metrics, "step": step}))
        self._thin()
        fresh = []
        for finding in check(self._history, self.config, self.staleness, online=self.online):
            last = self._spoke.get(finding.guard)
            if finding.action == "stop" or last is None or step - last >= self.config.repeat_every:
                self._spoke[finding.guard] = step
                fresh.append(finding)
        return sorted(fresh, key=lambda finding: finding.action != "stop")

    def enforce(self, step: int, metrics: Row, log: RunLog, progress: Progress) -> None:
        """Log the findings for a step's metrics. Raises GuardStop for the first whose action is `stop`."""
        for finding in self.observe(step, metrics):
            log.event(f"guard/{finding.guard}", **finding.fields())
            progress.note(finding.message)
            if finding.action == "stop":
                raise GuardStop(finding)

    def resume(self, run_dir: Path, step: int) -> None:
        """Read the history of a run that is resumed at `step`, so that baselines include the run's
        beginning."""
        rows = read_jsonl(run_dir / METRICS_FILE)
        self._history = [_watched(row) for row in rows if row["step"] <= step]

    def _thin(self) -> None:
        """Drop rows that no guard reads any more, so that memory does not grow with the run: keep the first
        and the last ones, the evaluations, and the steps up to the best one."""
        size, window = len(self._history), self.config.window
        if size < MOST_ROWS:
            return
        evals = [i for i, row in enumerate(self._history) if row.get("eval/accuracy") is not None]
        best = max(evals, key=lambda i: self._history[i]["eval/accuracy"] or 0.0, default=0)
        kept = {*range(window + self.config.warmup), *range(size - MOST_ROWS // 2, size)}
        kept |= {*evals[-MOST_ROWS // 4 :], *range(max(0, best - window), best + 1)}
        self._history = [row for i, row in enumerate(self._history) if i in kept]


def _watched(row: Row) -> Row:
    """Return the part of a row that guards read."""
    return {name: value for name, value in row.items() if name in WATCHED or name.endswith("/silence")}
