"""The shared math against definitions written out in plain Python."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import completion, group

from rft.algorithms.divergence import jensen_shannon
from rft.algorithms.math.policy_gradient import (
    count_degenerate,
    degenerate,
    discounted,
    explained_variance,
    full_kl,
    gae,
    group_mean,
    group_std,
    leave_one_out,
    rank_in_group,
    safe_exp,
    sampled_kl,
    whiten,
)
from rft.algorithms.math.preferences import all_pairs, best_and_worst, win_probability, win_rate
from rft.algorithms.math.sequences import at_last_token
from rft.batch import Batch

GROUPED = st.lists(
    st.lists(st.sampled_from([0.0, 0.1, 0.3, 1.0]), min_size=1, max_size=5), min_size=1, max_size=4
)


def flat(groups: list[list[float]]) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.tensor([x for g in groups for x in g])
    return values, torch.tensor([i for i, g in enumerate(groups) for _ in g])


@settings(deadline=None, max_examples=50)
@given(GROUPED)
def test_group_statistics(groups: list[list[float]]) -> None:
    x, ids = flat(groups)

    def expect(of: list[list[float]]) -> torch.Tensor:
        return torch.tensor([v for g in of for v in g])

    def std(g: list[float]) -> float:
        return float(torch.tensor(g).std()) if len(g) > 1 else 0.0

    means = [[sum(g) / len(g)] * len(g) for g in groups]
    torch.testing.assert_close(group_mean(x, ids), expect(means))
    torch.testing.assert_close(group_std(x, ids), expect([[std(g)] * len(g) for g in groups]))
    others = [[(sum(g) - v) / (len(g) - 1) if len(g) > 1 else v for v in g] for g in groups]
    torch.testing.assert_close(leave_one_out(x, ids), expect(others))
    assert degenerate(x, ids).tolist() == [len(set(g)) == 1 for g in groups for _ in g]
    assert count_degenerate(x, ids) == sum(len(set(g)) == 1 for g in groups)
    ranks = [
        [sum(w > v or (w == v and j < i) for j, w in enumerate(g)) for i, v in enumerate(g)] for g in groups
    ]
    assert rank_in_group(x, ids).tolist() == [r for g in ranks for r in g]


@settings(deadline=None, max_examples=50)
@given(GROUPED)
def test_preferences_within_groups(groups: list[list[float]]) -> None:
    x, ids = flat(groups)
    rates = [
        sum(0.5 if v == w else float(v > w) for j, w in enumerate(g) if j != i) / (len(g) - 1)
        if len(g) > 1
        else 0.5
        for g in groups
        for i, v in enumerate(g)
    ]
    torch.testing.assert_close(win_rate(x, ids, "compare"), torch.tensor(rates))
    best, worst = best_and_worst(x, ids)
    wanted = [g for g in groups if len(set(g)) > 1]
    assert x[best].tolist() == torch.tensor([max(g) for g in wanted]).tolist()
    assert x[worst].tolist() == torch.tensor([min(g) for g in wanted]).tolist()
    assert ids[best].tolist() == ids[worst].tolist()
    assert len(all_pairs(ids)[0]) == sum(len(g) * (len(g) - 1) // 2 for g in groups)


def test_a_bradley_terry_preference() -> None:
    got = win_probability(torch.tensor([1.0]), torch.tensor([0.0]), "bradley_terry")
    assert got.item() == pytest.approx(1 / (1 + math.exp(-1)))


@pytest.mark.parametrize("interleaved", [False, True])
def test_gae_is_its_recursion(interleaved: bool) -> None:
    """Also where an environment's tokens (outside the mask) stand between the policy's."""
    mask = (True, False, True, True, False) if interleaved else (True,) * 5
    lengths = [5, 5, 1]
    sides = [
        completion(range(10, 15), 1.0, mask=mask),
        completion(range(15, 20), 0.5),
        completion((20,), -1.0),
    ]
    batch = Batch.build([group(0, *sides)])
    g = torch.Generator().manual_seed(0)
    rewards, values = torch.rand(2, batch.num_tokens, generator=g)
    lam = torch.tensor([0.5, 0.9, 0.3])
    got = gae(rewards, values, batch, 0.9, lam)
    assert not got[~batch.mask].any()
    for n in range(len(lengths)):
        places = [int(i) for i in (batch.mask & (batch.sequence == n)).nonzero().squeeze(1)]
        running, following = 0.0, 0.0
        for i in reversed(places):
            delta = float(rewards[i]) + 0.9 * following - float(values[i])
            running = delta + 0.9 * float(lam[n]) * running
            following = float(values[i])
            assert float(got[i]) == pytest.approx(running, abs=1e-5)


def test_the_reward_stands_at_the_last_token() -> None:
    batch = Batch.build([group(0, completion((10, 11), mask=(True, False)), completion((12, 13)))])
    rewards = at_last_token(torch.tensor([1.0, 2.0]), batch)
    assert {int(t): float(r) for t, r in zip(batch.tokens, rewards, strict=True) if r} == {10: 1.0, 13: 2.0}
    returns = discounted(rewards, batch, 0.5)
    assert returns[batch.mask].tolist() == [1.0, 1.0, 2.0]


def test_whitening_and_explained_variance() -> None:
    x, mask = torch.tensor([1.0, 2.0, 3.0, 100.0]), torch.tensor([True, True, True, False])
    torch.testing.assert_close(whiten(x, mask), torch.tensor([-1.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(whiten(x, mask, shift_mean=False), torch.tensor([1.0, 2.0, 3.0, 0.0]))
    assert whiten(torch.tensor([5.0]), torch.tensor([True])).item() == 5.0
    assert explained_variance(x, x, mask) == 1.0
    assert explained_variance(torch.zeros(4), x, mask) == 0.0
    assert math.isnan(explained_variance(x, torch.ones(4), mask))


def random_logps(seed: int, *shape: int) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    return torch.log_softmax(torch.randn(*shape, generator=g, dtype=torch.float64), dim=-1)


def test_kl_estimators_by_summing_over_the_vocabulary() -> None:
    p, q = random_logps(1, 7), random_logps(2, 7)
    exact = full_kl(p, q)
    for estimator, unbiased in (("k1", True), ("k2", False), ("k3", True)):
        mean = (p.exp() * sampled_kl(p, q, estimator)).sum()
        assert bool(abs(mean - exact) < 1e-12) is unbiased, estimator
    with pytest.raises(ValueError, match="vocabulary"):
        sampled_kl(p, q, "full")


def test_the_gradients_that_the_estimators_have_as_losses() -> None:
    """E[grad k1] = 0, E[grad k2] = grad KL(p, q), E[grad k3] = grad KL(q, p): what the docstring says."""
    logits = torch.randn(7, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    q = random_logps(2, 7)
    p = torch.log_softmax(logits, dim=-1)

    def gradient(x: torch.Tensor) -> torch.Tensor:
        return torch.autograd.grad(x, logits, retain_graph=True)[0]

    weight = p.exp().detach()
    found = {e: gradient((weight * sampled_kl(p, q, e)).sum()) for e in ("k1", "k2", "k3")}
    torch.testing.assert_close(found["k1"], torch.zeros_like(logits), rtol=0, atol=1e-12)
    torch.testing.assert_close(found["k2"], gradient(full_kl(p, q)))
    torch.testing.assert_close(found["k3"], gradient(full_kl(q, p)))


def test_generalised_jensen_shannon() -> None:
    student, teacher = random_logps(3, 2, 5), random_logps(4, 2, 5)
    p, q = student.exp(), teacher.exp()
    for beta in (0.1, 0.5, 0.9):
        m = beta * q + (1 - beta) * p
        wanted = beta * (q * (q / m).log()).sum(-1) + (1 - beta) * (p * (p / m).log()).sum(-1)
        torch.testing.assert_close(jensen_shannon(student, teacher, beta), wanted)
    torch.testing.assert_close(jensen_shannon(student, teacher, 0.0), full_kl(teacher, student))
    torch.testing.assert_close(jensen_shannon(student, teacher, 1.0), full_kl(student, teacher))
    half = jensen_shannon(student, teacher, 0.5)
    torch.testing.assert_close(half, jensen_shannon(teacher, student, 0.5))
    assert (jensen_shannon(student, student, 0.3).abs() < 1e-12).all()


def test_a_ratio_never_overflows() -> None:
    x = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    safe_exp(x).sum().backward()
    assert safe_exp(x).isfinite().all() and x.grad.tolist() == [0.0, 0.0, 1.0]
