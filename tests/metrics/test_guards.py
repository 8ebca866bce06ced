"""Guards: each speaks for its illness, with the number, and is silent for a healthy run."""

from __future__ import annotations

import math

import pytest
from fake_run import numbers

from rft.config.metrics import GuardsConfig
from rft.metrics.diversity import diversity
from rft.metrics.guards import Finding, Guards, GuardStop, check

CONFIG = GuardsConfig(window=10, warmup=5)


def healthy(count: int = 40) -> list[dict[str, float | None]]:
    return [{"step": step, **numbers(step, 100)} for step in range(count)]


def after(**changes: float | None) -> list[dict[str, float | None]]:
    """A healthy history, and a last row with some values changed; `a__b` stands for `a/b`."""
    rows = healthy()
    last = {**rows[-1], **{name.replace("__", "/"): value for name, value in changes.items()}}
    return [*rows[:-1], last]


def only(
    history: list[dict[str, float | None]], config: GuardsConfig = CONFIG, staleness: int = 1
) -> Finding:
    (finding,) = check(history, config, staleness)
    return finding


def test_a_healthy_run_is_left_alone() -> None:
    rows = [{"step": step, **numbers(step)} for step in range(121)]
    guards = Guards(GuardsConfig(), staleness=1)
    assert [f for row in rows for f in guards.observe(int(row["step"]), row)] == []


@pytest.mark.parametrize("name", ["train/loss", "train/grad_norm"])
@pytest.mark.parametrize("value", [math.nan, math.inf, None])
def test_non_finite_stops(name: str, value: float | None) -> None:
    finding = only(after(**{name.replace("/", "__"): value}))
    assert (finding.guard, finding.action, finding.step) == ("non_finite", "stop", 39)
    assert name in finding.message


def test_a_loss_spike_has_its_number() -> None:
    finding = only(after(train__loss=5.0))
    assert (finding.guard, finding.value, finding.action) == ("loss_spike", 5.0, "warn")
    assert finding.limit < 1.0 and "train/loss jumped to 5" in finding.message


def test_a_spike_is_measured_from_the_recent_values() -> None:
    rows: list[dict[str, float | None]] = [{"step": i, "train/loss": 10.0 + 0.1 * (i % 2)} for i in range(20)]
    assert check([*rows, {"step": 20, "train/loss": 10.3}], CONFIG) == []
    # median 10.05, median deviation 0.05: spread is 5 % of the median, the larger, so 8 spreads are 4.02
    assert only([*rows, {"step": 20, "train/loss": 14.2}]).limit == pytest.approx(10.05 * 1.4)


def test_entropy_collapse_by_share_and_by_floor() -> None:
    assert only(after(policy__entropy=0.03)).guard == "entropy_collapse"
    assert check(after(policy__entropy=0.06), CONFIG, 1) == []
    floor = GuardsConfig(window=10, warmup=5, entropy_floor=0.1)
    assert only(after(policy__entropy=0.06), floor).limit == 0.1


def test_length_explosion_looks_at_three_steps() -> None:
    rows = healthy()
    assert check(after(completion__length_mean=150.0), CONFIG, 1) == []
    long: list[dict[str, float | None]] = [{**row, "completion/length_mean": 150.0} for row in rows[-3:]]
    finding = only([*rows[:-3], *long])
    assert finding.guard == "length_explosion" and finding.value == 150.0


def test_duplicates_across_prompts_or_in_failing_groups() -> None:
    rows = healthy()

    def with_(**values: float) -> list[dict[str, float | None]]:
        changed = {k.replace("__", "/"): v for k, v in values.items()}
        return [*rows[:-3], *({**row, **changed} for row in rows[-3:])]

    assert only(with_(completion__shared=0.8)).guard == "duplicates"
    assert check(with_(completion__duplicates=0.9, reward__outcome__correct=0.95), CONFIG, 1) == []
    assert only(with_(completion__duplicates=0.9, reward__outcome__correct=0.1)).value == pytest.approx(0.9)


def evals(accuracies: list[float], rewards: list[float]) -> list[dict[str, float | None]]:
    """An evaluation every fifth step; rewards given for the same points."""
    rows: list[dict[str, float | None]] = []
    for block, (accuracy, reward) in enumerate(zip(accuracies, rewards, strict=True)):
        rows += [{"step": 5 * block + i, "reward/mean": reward} for i in range(1, 5)]
        rows.append({"step": 5 * block + 5, "reward/mean": reward, "eval/accuracy": accuracy})
    return rows


def test_reward_up_and_accuracy_down_is_a_hint() -> None:
    finding = only(evals([0.5, 0.7, 0.6, 0.5], [0.5, 0.6, 0.8, 0.9]))
    assert finding.guard == "reward_hacking" and finding.value == pytest.approx(0.7 - 0.55)


@pytest.mark.parametrize(
    ("accuracies", "rewards"),
    [
        ([0.5, 0.6, 0.7, 0.8], [0.5, 0.6, 0.8, 0.9]),  # both rise
        ([0.5, 0.7, 0.6, 0.5], [0.9, 0.8, 0.6, 0.5]),  # both fall: not hacking, but a run that breaks
        ([0.5, 0.7, 0.69, 0.68], [0.5, 0.6, 0.8, 0.9]),  # within `accuracy_drop`
    ],
)
def test_no_hint_without_both(accuracies: list[float], rewards: list[float]) -> None:
    assert check(evals(accuracies, rewards), CONFIG) == []


def test_a_fall_within_two_standard_errors_is_noise() -> None:
    history = evals([0.5, 0.7, 0.6, 0.5], [0.5, 0.6, 0.8, 0.9])
    history[-1]["eval/accuracy_stderr"] = 0.1
    assert check(history, CONFIG) == []


def test_stale_engines_by_silence_and_by_age() -> None:
    rows = healthy()
    silent = [*rows[:-1], {**rows[-1], "engine/0/silence": 2.0, "engine/3/silence": 400.0}]
    assert "engine 3 passed no health check for 400 s" in only(silent).message
    old = only(after(rollout__age_max=2.0), staleness=1)
    assert (old.guard, old.value, old.limit) == ("stale_engines", 2.0, 1.0)
    assert check(after(rollout__age_max=2.0), GuardsConfig(age_limit=4)) == []


def test_a_guard_can_be_off_or_stop() -> None:
    history = after(train__loss=5.0)
    assert check(history, GuardsConfig(window=10, warmup=5, loss_spike="off"), 1) == []
    assert only(history, GuardsConfig(window=10, warmup=5, loss_spike="stop")).action == "stop"


def test_warm_up_silences_all_but_what_is_broken() -> None:
    early = healthy(3)
    early[-1] |= {"policy/entropy": 0.0, "train/loss": math.nan}
    assert [f.guard for f in check(early, CONFIG, 1)] == ["non_finite"]
    assert check([], CONFIG) == []


def test_a_warning_is_not_repeated_at_every_step() -> None:
    guards = Guards(GuardsConfig(window=10, warmup=5, repeat_every=10), 1, history=healthy(20))
    spoke = [step for step in range(20, 45) if guards.observe(step, {"policy/entropy": 0.0})]
    assert spoke == [20, 30, 40]


def test_an_error_names_guard_and_number() -> None:
    error = GuardStop(only(after(train__loss=5.0)))
    assert str(error).startswith("stopped by the guard 'loss_spike': train/loss jumped to 5")
    assert error.finding.fields()["value"] == 5.0 and "guard" not in error.finding.fields()


def test_diversity_by_hand() -> None:
    found = diversity([[1, 2, 3], [1, 2, 3], [1, 2, 3], [4]], groups=[0, 0, 1, 1])
    # the first three answer groups 0 and 1; the second repeats the first; pairs (1,2), (2,3) of six
    assert found == {"completion/shared": 0.75, "completion/duplicates": 0.25,
                     "completion/distinct_2": pytest.approx(2 / 6)}  # fmt: skip
    assert diversity([], []) == {}


def test_the_loss_is_not_watched_online_unless_asked_for() -> None:
    """A policy gradient's loss is around zero by construction; the user's word wins over that."""
    rows = after(train__loss=50.0)
    assert [f.guard for f in check(rows, CONFIG, 1)] == ["loss_spike"]
    assert check(rows, CONFIG, 1, online=True) == []
    asked = CONFIG.model_copy(update={"loss_spike": "stop"})
    for online in (False, True):
        assert [f.action for f in check(rows, asked, 1, online=online)] == ["stop"]


def test_memory_does_not_grow_with_the_run_and_the_beginning_is_not_forgotten() -> None:
    """After 10,000 steps entropy and length are held against the first ones, accuracy against its best."""
    guards = Guards(CONFIG, staleness=1)
    for step in range(10_000):
        row = {**numbers(0), "policy/entropy": 2.0, "completion/length_mean": 10.0, "eval/accuracy": None}
        row |= {"reward/mean": 0.2 + step / 1e5}
        if step % 250 == 0:
            row["eval/accuracy"] = 0.9 if step == 500 else 0.5 if step > 9_700 else 0.85
        guards.observe(step, row)
    assert len(guards._history) < 8192
    last = {**row, "policy/entropy": 0.1, "completion/length_mean": 100.0, "eval/accuracy": 0.5}
    for step in range(10_000, 10_003):
        found = {f.guard for f in guards.observe(step, last)}
    assert {"entropy_collapse"} <= set(guards._spoke) and {"length_explosion"} <= set(guards._spoke)
    assert "reward_hacking" in set(guards._spoke) | found
