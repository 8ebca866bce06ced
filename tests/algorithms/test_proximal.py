"""The proximal policy of decoupled PPO, by hand: recomputed, interpolated, the sampler."""

from __future__ import annotations

import math

import pytest
import torch
from worlds import completion, group

from rft.algorithms.base import PolicyOutput
from rft.algorithms.math.policy_gradient import proximal_logps
from rft.algorithms.policy_gradient.grpo import GRPO
from rft.batch import Batch

# One completion of four tokens: sampled by versions 7 (current), 6, 5 and 3.
SAMPLER = [-1.0, -1.0, -1.0, -1.0]
CURRENT = [-1.2, -1.2, -1.2, -1.2]


def batch(**changes: object) -> Batch:
    versions = ((7, 0, 1), (6, 1, 2), (5, 2, 3), (3, 3, 4))
    right = completion([10, 11, 12, 13], 1.0, logps=tuple(SAMPLER), versions=versions)
    wrong = completion([14], 0.0, logps=(-1.0,), versions=((7, 0, 1),))
    return Batch.build([group(0, right, wrong)]).with_(state={"version": 7.0, "progress": 0.0}, **changes)


def logps(of: Batch) -> torch.Tensor:
    return torch.where(of.mask, torch.tensor(-1.2), 0.0)


def test_interpolation_trusts_an_old_sampler_less() -> None:
    b = batch()
    found = proximal_logps(logps(b), b, interpolate=True)[b.mask]
    # Fresh: the current policy. d versions old: 1/d sampler, the rest current.
    expected = [-1.2, -1.0, -1.1, -1.0 / 4 - 1.2 * 3 / 4, -1.2]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_the_sampler_itself_and_demonstrations() -> None:
    b = batch()
    assert proximal_logps(logps(b), b, interpolate=False)[b.mask].tolist() == [-1.0] * 5
    given = b.with_(demonstrated=b.mask & (b.tokens == 11))
    found = proximal_logps(logps(given), given, interpolate=False)[given.mask]
    torch.testing.assert_close(found, torch.tensor([-1.0, -1.2, -1.0, -1.0, -1.0]))


def test_the_clip_is_around_it_and_the_correction_weighs_it() -> None:
    """sampler: ratio current/sampler, no correction. recomputed on one step: ratio 1, all correction."""
    b = batch()
    policy = PolicyOutput(logps=logps(b).requires_grad_())
    plain, coupled = GRPO(epsilon=0.1), GRPO(epsilon=0.1, proximal="sampler")
    b = plain.prepare(b)
    ratio = math.exp(-0.2)
    near = coupled.around(policy, b)
    torch.testing.assert_close(coupled.ratio(policy, near)[b.mask], torch.full((5,), ratio))
    torch.testing.assert_close(coupled.weights(policy, near)[b.mask], torch.ones(5))
    torch.testing.assert_close(plain.ratio(policy, b)[b.mask], torch.ones(5))
    torch.testing.assert_close(plain.weights(policy, b)[b.mask], torch.full((5,), ratio))
    told = coupled.metrics(policy, b)
    # The right completion lies below the clip range, which its positive advantage may leave upwards only.
    assert told["policy/clip_fraction"][b.mask].tolist() == [0, 0, 0, 0, 1]
    assert told["policy/mismatch_kl"][b.mask].abs().max() < 1e-6
    apart = plain.metrics(policy, b)["policy/mismatch_kl"][b.mask]
    torch.testing.assert_close(apart, torch.full((5,), math.exp(0.2) - 0.2 - 1))


def test_no_forward_is_asked_for_where_none_is_used() -> None:
    assert "old_logps" in GRPO().needs
    assert "old_logps" not in GRPO(proximal="interpolated").needs | GRPO(proximal="sampler").needs


def test_masked_tokens_are_counted() -> None:
    b = batch()
    strict = GRPO(correction="token_mask", correction_floor=0.9)
    told = strict.metrics(PolicyOutput(logps=logps(b)), strict.prepare(b))
    assert told["policy/masked_fraction"][b.mask].tolist() == [1.0] * 5


def test_interpolation_without_versions_says_so() -> None:
    with pytest.raises(ValueError, match="versions that sampled"):
        b = batch(version=None)
        proximal_logps(logps(b), b, interpolate=True)
