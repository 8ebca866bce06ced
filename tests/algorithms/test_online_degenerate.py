"""Batches with nothing to learn from, and ratios at the edge."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from worlds import (
    completion,
    fill,
    group,
    hand_batch,
    hand_policy,
    objective,
    random_groups,
    random_tables,
    spread,
)

from rft.algorithms import ALGORITHMS, PolicyOutput
from rft.batch import Batch, Group
from tests.specs import problems_of

ONLINE = [name for name, cls in ALGORITHMS.items() if cls.online]
# Where all rewards of a group are equal these have nothing to say. (The others do: PPO asks its critic,
# RAFT trains on what is above its threshold, ReMax and Nash-MD compare with another completion,
# distillation with its teacher, SPPO and reward difference hold on to the reference, per_step asks its
# continuations.)
RELATIVE = [
    "grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "gpg", "opo", "max_rl", "reinforce_rej",
    "prefix_rft", "luffy", "online_dpo", "iterative_dpo", "cory",
]  # fmt: skip


def with_rewards(groups: list[Group], reward: float) -> list[Group]:
    return [Group(g.prompt, tuple(replace(c, reward=reward) for c in g.completions)) for g in groups]


@pytest.mark.parametrize("name", ONLINE)
def test_one_sequence(name: str) -> None:
    batch = Batch.build(
        random_groups(4, groups=1, size=1, demonstrated=ALGORITHMS[name].needs_demonstrations)
    )
    loss, gradient = objective(ALGORITHMS[name](), batch, random_tables(4))
    assert loss.isfinite() and gradient.isfinite().all()
    if name in RELATIVE:
        assert not gradient.any()


@pytest.mark.parametrize("name", ONLINE)
@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0])
def test_equal_rewards(name: str, reward: float) -> None:
    """Exactly zero: 0.1 three times has a mean that is not 0.1, and a division would show it."""
    groups = with_rewards(random_groups(5, size=6), reward)
    loss, gradient = objective(ALGORITHMS[name](), Batch.build(groups), random_tables(5))
    assert loss.isfinite() and gradient.isfinite().all()
    if name in RELATIVE:
        assert not gradient.any() and not loss.any()


@pytest.mark.parametrize("name", ONLINE)
def test_nothing_in_the_mask(name: str) -> None:
    batch = Batch.build(random_groups(6))
    batch = batch.with_(mask=torch.zeros_like(batch.mask))
    loss, gradient = objective(ALGORITHMS[name](), batch, random_tables(6))
    assert loss.isfinite() and not gradient.any()
    if ALGORITHMS[name].unit == "token":
        assert not loss.any()


@pytest.mark.parametrize("name", ONLINE)
def test_one_sequence_without_tokens_leaves_the_rest_alone(name: str) -> None:
    """A sequence that is masked out altogether (it ran too long, say) brings no nan."""
    batch = Batch.build(random_groups(7))
    batch = batch.with_(mask=batch.mask & (batch.sequence != 2))
    loss, gradient = objective(ALGORITHMS[name](), batch, random_tables(7))
    assert loss.isfinite() and gradient.isfinite().all() and gradient.any()


@pytest.mark.parametrize("name", ["grpo", "gspo", "cispo", "rloo", "dapo", "ppo", "max_rl", "per_step"])
@pytest.mark.parametrize("far", [60.0, -60.0, 500.0])
def test_a_policy_far_from_the_old_one_stays_finite(name: str, far: float) -> None:
    tables = random_tables(8)
    tables["old_logps"] = tables["logps"] - far
    loss, gradient = objective(ALGORITHMS[name](beta=0.1), Batch.build(random_groups(8)), tables)
    assert loss.isfinite() and gradient.isfinite().all()


@pytest.mark.parametrize(
    ("ratio", "reward", "passes"),
    [
        (1.2, 1.0, True),  # at the edge itself the gradient passes
        (1.2001, 1.0, False),  # above it, what is good already is good enough
        (1.2001, -1.0, True),  # what is bad is pushed down still
        (0.8, -1.0, True),
        (0.7999, -1.0, False),
        (0.7999, 1.0, True),
    ],
)
def test_the_edge_of_the_clip(ratio: float, reward: float, passes: bool) -> None:
    batch = Batch.build([group(0, completion((10,), reward), completion((11,), 0.0))])
    old = torch.tensor(ratio, dtype=torch.float64).log().item()
    batch = batch.with_(old_logps=spread(batch, {10: -old, 11: 0.0}, torch.float64))
    batch = ALGORITHMS["dr_grpo"]().prepare(batch)
    logps = torch.zeros(batch.num_tokens, dtype=torch.float64, requires_grad=True)
    # epsilon a hair above 0.2: 1 - 0.2 and 1 + 0.2 are not exact in binary
    algorithm = ALGORITHMS["dr_grpo"](epsilon=0.2 + 1e-12)
    algorithm.loss(PolicyOutput(logps), batch).sum().backward()
    assert logps.grad is not None
    assert bool(logps.grad[batch.tokens == 10].any()) is passes
    clipped = algorithm.metrics(PolicyOutput(logps), batch)["policy/clip_fraction"]
    assert bool(clipped[batch.tokens == 10].any()) is not passes


def test_a_batch_stepped_on_once_has_ratio_one() -> None:
    """Without old_logps the old policy is the current one: value -A, gradient -A."""
    algorithm = ALGORITHMS["dr_grpo"]()
    batch = algorithm.prepare(hand_batch().with_(old_logps=None))
    policy = hand_policy(batch)
    loss = algorithm.loss(policy, batch)
    loss.sum().backward()
    torch.testing.assert_close(loss[batch.mask].detach(), torch.tensor([-0.5, -0.5, 0.5]).double())
    torch.testing.assert_close(policy.logps.grad, loss.detach())


def test_truncated_completions_can_be_left_out() -> None:
    a = completion((10, 11), 1.0, finish="length")
    batch = Batch.build([group(0, a, completion((12,), 0.0))])
    prepared = ALGORITHMS["grpo"](mask_truncated=True).prepare(batch)
    assert prepared.tokens[prepared.mask].tolist() == [12]
    assert prepared.advantages[prepared.mask].item() < 0, "its reward still counts in the group's mean"


def test_only_unsure_prefix_tokens_take_part() -> None:
    """20 % of ten prefix tokens: the two with the highest entropy, of either. The others have no
    advantage, and stay in the mask; continuations are untouched."""
    hybrids = [completion(range(10, 18), 1.0, demonstrated=6), completion(range(20, 26), 1.0, demonstrated=4)]
    batch = Batch.build([group(0, *hybrids, completion((30,), 0.0))])
    entropy = {t: float((t * 7) % 23) for t in (*range(10, 18), *range(20, 26))}
    batch = fill(batch, {"old_entropy": {**entropy, 30: 0.0}})
    prepared = ALGORITHMS["prefix_rft"]().prepare(batch)
    assert torch.equal(prepared.mask, batch.mask)
    prefix = [*range(10, 16), *range(20, 24)]
    best = sorted(prefix, key=lambda t: -entropy[t])[:2]
    acting = prepared.tokens[prepared.advantages != 0].tolist()
    assert acting == sorted([*best, 16, 17, 24, 25, 30])


def test_degenerate_groups_are_counted() -> None:
    groups = [
        group(i, *(completion((10 * i + j + 1,), r) for j, r in enumerate(rewards)))
        for i, rewards in enumerate([(0.1, 0.1, 0.1), (0.0, 1.0, 0.0), (1.0, 1.0, 1.0), (0.5,)])
    ]
    algorithm = ALGORITHMS["grpo"]()
    report = algorithm.report(algorithm.prepare(Batch.build(groups)))
    assert report == {"group/degenerate": 3.0, "group/degenerate_share": 0.75}


def test_ppo_reports_how_much_its_critic_explains() -> None:
    # Returns 1, 1, 0 (lam 1); errors 0.5, 0.4, -0.4: variance (0.57 - 0.25 / 3) / 3 against (2 - 4 / 3) / 3.
    algorithm = ALGORITHMS["ppo"](critic_lam=1.0)
    found = algorithm.report(algorithm.prepare(hand_batch()))["critic/explained_variance"]
    assert found == pytest.approx(1 - (0.57 - 0.25 / 3) / (2 - 4 / 3), abs=1e-5)


def test_ppo_adapts_its_kl() -> None:
    algorithm = ALGORITHMS["ppo"](beta=0.1, kl_target=0.02)
    state = algorithm.next_state({}, {"policy/kl_ref": 0.021})  # 5 % above: +0.5 %
    assert state == {"steps": 1, "kl_weight": pytest.approx(0.1 * 1.005)}
    state = algorithm.next_state(state, {"policy/kl_ref": 1.0})  # far above: the error is held at 0.2
    assert state == {"steps": 2, "kl_weight": pytest.approx(0.1 * 1.005 * 1.02)}
    batch = hand_batch().with_(state=state)
    penalty = algorithm.kl_penalty(batch)[batch.mask]
    k1 = torch.tensor([0.1 - math.log(1.5), 0.2, -0.3 - math.log(0.5)])
    torch.testing.assert_close(penalty, state["kl_weight"] * k1)


# -- what the controller and the preflight ask --------------------------------------------------------


def test_rollout_plans() -> None:
    def plan(name: str, progress: float = 0.0, demonstration: bool = True, **settings: Any) -> list[Any]:
        return list(ALGORITHMS[name](**settings).rollouts(4, progress=progress, demonstration=demonstration))

    assert plan("grpo") == [type(plan("grpo")[0])()] * 4
    assert [r.greedy for r in plan("remax")] == [False] * 4 + [True] and not plan("remax")[-1].train
    for progress, least in ((0.0, 0.95), (0.5, 0.5), (1.0, 0.05)):  # the upper end stays
        hybrid, *others = plan("prefix_rft", progress)
        assert (hybrid.prefix_share, hybrid.prefix_least) == (0.95, pytest.approx(least))
        assert [r.prefix_share for r in others] == [0, 0, 0]
    assert [r.prefix_share for r in plan("prefix_rft", hybrids=2)] == [0.95, 0.95, 0, 0]
    assert [r.prefix_share for r in plan("prefix_rft", demonstration=False)] == [0, 0, 0, 0]
    assert [r.prefix_share for r in plan("luffy")] == [1.0, 0, 0, 0]
    assert [r.prefix_share for r in plan("distill", demonstration_share=0.5)] == [1.0, 1.0, 0, 0]
    assert [r.role for r in plan("cory")] == ["pioneer", "observer"] * 2
    assert [r.mixture for r in plan("nash_md")] == [0, 0, 0, 0, 0.125] and not plan("nash_md")[-1].train


def test_dynamic_sampling() -> None:
    for rewards, dapo, rej, some in (
        ([0.0, 0.0], False, False, False),
        ([1.0, 1.0], False, False, True),
        ([0.0, 1.0], True, True, True),
        ([0.5, 1.0], True, False, True),
    ):
        assert ALGORITHMS["dapo"]().keep_group(rewards) is dapo
        assert ALGORITHMS["reinforce_rej"]().keep_group(rewards) is rej
        for name in ("raft_pp", "expert_iteration"):
            assert ALGORITHMS[name]().keep_group(rewards) is some
        assert ALGORITHMS["raft"](threshold=0.0).keep_group(rewards) is some
        assert ALGORITHMS["raft"]().keep_group(rewards)  # the best of K, whatever it is worth
        assert ALGORITHMS["grpo"]().keep_group(rewards)
    assert ALGORITHMS["dapo"](dynamic_sampling=False).keep_group([0.0, 0.0])


@pytest.mark.parametrize("name", ONLINE)
def test_no_problems_where_nothing_is_missing(name: str) -> None:
    assert problems_of(ALGORITHMS[name]()) == []


@pytest.mark.parametrize(
    ("name", "settings", "lack", "words"),
    [
        ("grpo", {}, {"num_generations": 1}, "num_generations: 2"),
        ("prefix_rft", {}, {"demonstrations": False}, "needs demonstrations"),
        ("luffy", {}, {"demonstrations": False}, "needs demonstrations"),
        ("distill", {"demonstration_share": 0.5}, {"demonstrations": False}, "needs demonstrations"),
        ("prefix_rft", {"hybrids": 4}, {}, "at most 3"),
        ("prefix_rft", {"share_from": 0.5, "share_to": 0.6}, {}, "at most 0.5"),
        ("prefix_rft", {"prefix_clip": False, "prefix_epsilon": 0.1}, {}, "leave one of them out"),
        ("grpo", {"refresh_reference": 10}, {}, "beta: 0.01"),
        ("grpo", {"beta": 0.1, "reset_optimizer": True}, {}, "refresh_reference"),
        ("topr", {}, {"num_generations": 1}, "baseline: 0.5"),
        ("clip_cov", {"covariance_low": 5.0}, {}, "no token can be chosen"),
        ("kl_cov", {"proximal": "sampler"}, {}, "proximal: recomputed"),
        ("luffy", {"demonstrations": 4}, {}, "at most 3"),
        ("cory", {}, {"num_generations": 5}, "num_generations: 6"),
        ("reinforce_pp", {"baseline": "group"}, {"num_generations": 1}, "baseline: none"),
        ("ppo", {"kl_target": 0.1}, {}, "beta is 0"),
        ("grpo", {"dual_clip": 1.1}, {}, "more than 1.2"),
        ("opo", {}, {"minibatches": 2}, "num_iterations: 1"),
        ("nash_md", {}, {"engine": "vllm"}, "mixture: 0"),
        ("grpo", {}, {"rewards": False}, "needs a reward"),
    ],
)
def test_what_is_missing_is_said(name: str, settings: Any, lack: dict[str, Any], words: str) -> None:
    found = problems_of(ALGORITHMS[name](**settings), **lack)
    assert len(found) == 1 and words in found[0]


@pytest.mark.parametrize(
    ("name", "missing"), [("ppo", "values"), ("remax", "baseline"), ("prefix_rft", "old_entropy")]
)
def test_a_field_that_was_not_filled_in_is_named(name: str, missing: str) -> None:
    batch = Batch.build([group(0, completion((10, 11), 1.0, demonstrated=1), completion((12,), 0.0))])
    with pytest.raises(ValueError, match=missing):
        ALGORITHMS[name]().prepare(batch)


def test_a_setting_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="epsilon must be at most 1"):
        ALGORITHMS["grpo"](epsilon=1.5)
