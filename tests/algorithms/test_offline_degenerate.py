"""Edges of the offline algorithms: nothing to compare, extreme numbers, settings that cannot be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from offline_worlds import hand_batch, hand_policy, random_groups, random_tables
from torch import Tensor
from worlds import completion, fill, group, spread

from rft.algorithms import ALGORITHMS, PolicyOutput
from rft.algorithms.extras import arrange, score_heads
from rft.algorithms.math.preferences import PAIR_LOSSES, LossParams, f_score, log1mexp
from rft.algorithms.math.sequences import last_tokens, token_index, top_share
from rft.batch import Batch

PAIRWISE = [name for name, cls in ALGORITHMS.items() if not cls.online and cls.unit == "pair"]
OFFLINE = [name for name, cls in ALGORITHMS.items() if not cls.online]


def expected_of(x: Tensor) -> Callable[[], Tensor]:
    return lambda: x


@pytest.mark.parametrize("name", PAIRWISE)
def test_equal_rewards_make_no_pair_and_no_loss(name: str) -> None:
    algorithm = ALGORITHMS[name]()
    batch = hand_batch().with_(rewards=torch.ones(2))
    policy = hand_policy(batch)
    loss = algorithm.loss(policy, algorithm.prepare(batch))
    assert loss.shape == (0,)
    assert isinstance(algorithm.metrics(policy, batch), dict)


@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.parametrize("scale", [0.0, 1e4])
def test_extreme_log_probs_give_finite_losses_and_gradients(name: str, scale: float) -> None:
    algorithm = ALGORITHMS[name](**({"heads": 2} if name == "reward_regression" else {}))
    groups = random_groups(algorithm.data, 5)
    tables = random_tables(5)
    tables["old_logps"] = tables["logps"] * scale
    batch = fill(Batch.build(arrange(algorithm, groups)), tables).with_(state={"progress": 1.0})
    batch = algorithm.prepare(batch)
    logps = spread(batch, tables["logps"] * scale, torch.float32).requires_grad_()
    scores = torch.stack([spread(batch, tables["scores"][:, k] * scale) for k in range(2)], -1)
    policy = PolicyOutput(logps=logps, kl=logps.abs(), scores=scores[:, : max(score_heads(algorithm), 1)])
    loss = algorithm.loss(policy, batch)
    assert loss.isfinite().all()
    if loss.requires_grad:
        loss.sum().backward()
        assert logps.grad is not None and logps.grad.isfinite().all()


@settings(deadline=None, max_examples=100)
@given(
    chosen=st.floats(-1e4, 1e4, allow_nan=False),
    rejected=st.floats(-1e4, 1e4, allow_nan=False),
    name=st.sampled_from(sorted(PAIR_LOSSES)),
    divergence=st.sampled_from(["reverse_kl", "forward_kl", "js", "alpha"]),
)
def test_pair_losses_never_overflow(chosen: float, rejected: float, name: str, divergence: Any) -> None:
    raw = torch.tensor([chosen, rejected], dtype=torch.float32, requires_grad=True)
    scores = f_score(raw, divergence, 0.5)
    loss = PAIR_LOSSES[name](scores[:1], scores[1:], LossParams(0.1, 0.1))
    loss.sum().backward()
    assert loss.isfinite().all() and raw.grad is not None and raw.grad.isfinite().all()


def test_log1mexp_keeps_its_digits() -> None:
    x = torch.tensor([-1e-7, -0.5, -0.7, -5.0, -80.0], dtype=torch.float32)
    exact = (-torch.expm1(x.double())).log()
    torch.testing.assert_close(log1mexp(x).double(), exact, rtol=1e-6, atol=1e-12)


def test_places_in_sequences_whatever_the_layout() -> None:
    batch = Batch.build([group(0, completion((10, 11, 12), 1.0), completion((13, 14), 0.0))])
    assert token_index(batch)[batch.mask].tolist() == [0, 1, 2, 0, 1]
    assert batch.tokens[last_tokens(batch)].tolist() == [12, 14]
    shared = Batch.build([group(0, completion((10, 11), 1.0, mask=(False, True)))], share_prefix=True)
    assert token_index(shared)[shared.mask].tolist() == [0]
    empty = Batch.build([group(0, completion((10,), 1.0, mask=(False,)))])
    assert last_tokens(empty).tolist() == [-1]


def test_top_share_keeps_at_least_one_and_breaks_ties_by_order() -> None:
    mask = torch.tensor([True, True, False, True])
    assert top_share(torch.zeros(4), mask, 0.01).tolist() == [True, False, False, False]
    assert top_share(torch.tensor([1.0, 2, 9, 3]), mask, 2 / 3).tolist() == [False, True, False, True]
    assert not top_share(torch.zeros(4), mask & False, 0.5).any()


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("dpo", {"beta": 0.0}, "beta must be greater than 0"),
        ("dpo", {"label_smoothing": 0.5}, "label_smoothing must be less than 0.5"),
        ("dpo", {"loss_type": "sigmod"}, "loss_type must be one of sigmoid"),
        ("dpo", {"loss_type": "exo"}, "write label_smoothing"),
        ("dpo", {"loss_type": "nca", "divergence_type": "js"}, "reverse_kl only"),
        ("dpo", {"loss_type": "aot", "weighting": "plain"}, "write weighting: none"),
        ("cpo", {"loss_type": "nca"}, "loss_type must be one of sigmoid, hinge, ipo"),
        ("kto", {"baseline": "own"}, "baseline must be one of mismatched, zero"),
        ("masked_thought", {"replace": "mask"}, "replace must be one of shuffle, zero, mean"),
        ("asft", {"direction": "both"}, "direction must be one of reverse, forward"),
        ("token_cleaning", {"share": 0.0}, "share must be greater than 0"),
        ("ift", {"lam": 1.0}, "lam must be less than 1"),
    ],
)
def test_settings_that_cannot_be(name: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ALGORITHMS[name](**settings)


@pytest.mark.parametrize(
    ("name", "missing"),
    [("dpo", "ref_logps"), ("kto", "ref_logps"), ("iw_sft", "ref_logps"), ("poft", "ref_logps")],
)
def test_a_missing_reference_is_named(name: str, missing: str) -> None:
    algorithm = ALGORITHMS[name](**({"baseline": "zero"} if name == "kto" else {}))
    batch = hand_batch().with_(ref_logps=None)
    with pytest.raises(ValueError, match=missing + " is missing; declare it in the `needs` of the algorithm"):
        algorithm.loss(hand_policy(batch), algorithm.prepare(batch))


def test_other_missing_inputs_are_named() -> None:
    batch = hand_batch()
    with pytest.raises(ValueError, match="kl"):
        ALGORITHMS["asft"]().loss(PolicyOutput(logps=hand_policy(batch).logps), batch)
    with pytest.raises(ValueError, match="scores"):
        ALGORITHMS["reward_model"]().loss(PolicyOutput(logps=hand_policy(batch).logps), batch)
    with pytest.raises(ValueError, match="weight"):
        ALGORITHMS["c_rlft"]().loss(hand_policy(batch), batch.with_(columns={}))
    with pytest.raises(ValueError, match="aligned_logps"):
        ALGORITHMS["poft"](from_column=True).loss(hand_policy(batch), batch.with_(columns={}))
    with pytest.raises(ValueError, match="2 targets, but the model has 1 heads"):
        ALGORITHMS["reward_regression"]().loss(hand_policy(batch), batch)
    with pytest.raises(ValueError, match="at least two examples"):
        ALGORITHMS["kto"]().arrange([group(0, completion((10,), 1.0))])


def test_dpo_metrics_tell_who_leads() -> None:
    batch = hand_batch()
    metrics = ALGORITHMS["dpo"]().metrics(hand_policy(batch), batch)
    for name, expected in {"accuracy": 1.0, "margin": 0.06, "chosen": -1.5, "rejected": -3.0}.items():
        values = metrics[f"preference/{name}"][batch.mask]
        torch.testing.assert_close(values.tolist(), [expected] * 3, rtol=1e-5, atol=1e-6)
    tie = replace(hand_policy(batch), logps=batch.ref_logps)
    assert ALGORITHMS["dpo"]().metrics(tie, batch)["preference/accuracy"][batch.mask].tolist() == [0.5] * 3


# -- what the model reads ----------------------------------------------------------------------------


def test_neft_noise_is_bounded_by_length_and_size() -> None:
    batch = hand_batch()
    torch.manual_seed(0)
    zeros = torch.zeros(batch.num_tokens, 64)
    noise = ALGORITHMS["neft"](alpha=5.0).embed(zeros, batch, expected_of(zeros))
    bound = 5.0 / (4 * 64) ** 0.5  # the first tree: two prompt and two response tokens
    assert bound * 0.9 < noise[:4].abs().max() <= bound
    assert noise[4:].abs().max() > bound  # the second tree has three tokens: more noise
    assert ALGORITHMS["neft"](alpha=0.0).embed(zeros, batch, expected_of(zeros)).eq(0).all()


def test_ift_reads_a_mixture_in_the_response_only() -> None:
    batch = hand_batch()
    ones = torch.ones(batch.num_tokens, 2)
    read = ALGORITHMS["ift"](lam=0.25).embed(ones, batch, expected_of(5 * ones))
    assert read[batch.mask].eq(2.0).all() and read[~batch.mask].eq(1.0).all()

    def never() -> Tensor:
        raise AssertionError("no second forward is needed")

    assert ALGORITHMS["ift"](lam=0.0).embed(ones, batch, never).eq(1.0).all()


@pytest.mark.parametrize("replace_by", ["shuffle", "zero", "mean"])
def test_masked_thought_hides_its_share_of_the_response(replace_by: str) -> None:
    groups = [group(i, completion(tuple(range(10, 110)), 1.0)) for i in range(20)]
    batch = Batch.build(groups).with_(state={"progress": 0.335})
    embeddings = torch.randn(batch.num_tokens, 8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    algorithm = ALGORITHMS["masked_thought"](share=0.4, warmup=0.67, replace=replace_by)
    read = algorithm.embed(embeddings, batch, expected_of(embeddings))
    changed = (read != embeddings).any(-1)
    assert not changed[~batch.mask].any()
    assert 0.17 < changed[batch.mask].float().mean() < 0.23  # half of the warm-up: a share of 0.2
    if replace_by == "zero":
        assert read[changed].eq(0).all()
