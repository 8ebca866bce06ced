"""Each offline loss against numbers computed by hand, and its gradient against finite differences.

One prompt; a = (10, 11) chosen, b = (12,) rejected. Log-probs: -1, -2; -3. Over the reference: 0.1, 0.2;
-0.3. So s(a) = 0.3, s(b) = -0.3, and the margin is 0.6. L(x) = -log sigmoid(x) = log(1 + e^-x).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from math import exp, log
from typing import Any

import pytest
import torch
from offline_worlds import hand_batch, hand_policy, random_groups, random_tables
from torch import Tensor
from worlds import fill

from rft.algorithms import ALGORITHMS, Algorithm, PolicyOutput
from rft.algorithms.extras import arrange, score_heads
from rft.batch import Batch


def L(x: float) -> float:
    return log(1 + exp(-x))


def S(x: float) -> float:
    return 1 / (1 + exp(-x))


@dataclass(frozen=True)
class Case:
    name: str
    loss: list[float]  # of a0, a1, b0; or of the sequences a, b; or of the pair
    settings: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.settings.items())])


def dpo(loss: float, **settings: Any) -> Case:
    return Case("dpo", [loss], settings)


ODDS_A, ODDS_B = -1.5 - log(1 - exp(-1.5)), -3 - log(1 - exp(-3))
ALPHA_A, ALPHA_B = 2 * (1 - exp(0.75)), 2 * (1 - exp(1.5))  # (1 - p^-1/2) / (1/2), log p = -1.5, -3

CASES = [
    Case("sft", [1, 2, 3]),
    # 3 tokens of 2 sources: factors 3/4 for the two tokens of a, 3/2 for that of b.
    Case("mft", [0.75, 1.5, 4.5]),
    Case("dft", [exp(-1), 2 * exp(-2), 3 * exp(-3)]),
    # Plus a tenth of the divergences 0.4, 0.5, 0.6.
    Case("asft", [exp(-1) + 0.04, 2 * exp(-2) + 0.05, 3 * exp(-3) + 0.06]),
    Case("asft", [exp(-1), 2 * exp(-2), 3 * exp(-3)], {"lam": 0.0}),
    Case("asft", [1.04, 2.05, 3.06], {"weight": "none"}),
    # Weights e^(0.1 + 0.2) and e^-0.25 (-0.3 is clipped); then with the first capped.
    Case("iw_sft", [exp(0.3), 2 * exp(0.3), 3 * exp(-0.25)], {"clip": 0.25}),
    Case("iw_sft", [1.1, 2.2, 3 * exp(-0.25)], {"clip": 0.25, "cap": 1.1}),
    # a: 1 - 1/4 and 1 - 1/2 over their mean 0.625 are 1.2 and 0.8; a single token has weight 1.
    Case("ift", [1.2, 1.6, 3], {"gamma": 0.5}),
    Case("ift", [1, 2, 3], {"gamma": 0.0}),
    # Weights 0.5 and 2.
    Case("c_rlft", [0.5, 1, 6]),
    Case("neft", [1, 2, 3]),
    Case("masked_thought", [1, 2, 3]),
    # log ref - log policy = -0.1, -0.2, 0.3: the second is left out of the mask.
    Case("token_cleaning", [1, 3], {"share": 2 / 3}),
    Case("token_cleaning", [1, 2, 3], {"share": 1.0}),
    # log ref - log start = -1.1 + 1, -2.2 + 3, -2.7 + 2.5: the third is left out.
    Case("token_cleaning", [1, 2], {"share": 2 / 3, "base": "start"}),
    # The policy as the better model: the other way round. At half of the run, after and in a warm-up.
    Case("token_cleaning", [1, 2], {"share": 2 / 3, "better": "policy", "warmup": 0.5}),
    Case("token_cleaning", [1, 2, 3], {"share": 2 / 3, "better": "policy", "warmup": 0.51}),
    # The other way round: the third is left out.
    Case("ss_token", [1, 2], {"share": 2 / 3}),
    # Perplexities e^1.5 < e^3 and entropies 0.45 < 0.6: both rows are as surprising as they are unsure; the
    # one of higher perplexity is kept as a whole, or both.
    Case("q_tuning", [3]),
    Case("q_tuning", [1, 2, 3], {"rows": 1.0}),
    # Positive: tokens 1 and 3, each 3/2; negative: token 2, -(1/2 of lam, at half of the run) * 3, of its
    # loss 2, then of the bound 1.5.
    Case("forgetting", [1.5, -1.5, 4.5], {"share": 2 / 3, "lam": 0.5}),
    Case("forgetting", [1.5, -1.125, 4.5], {"share": 2 / 3, "lam": 0.5, "bound": 1.5}),
    # Half the loss, half the entropy-like 0.4, 0.5, 0.6; a quarter at half of a warm-up.
    Case("weak_to_strong", [0.7, 1.25, 1.8], {"alpha": 0.5, "warmup": 0.5}),
    Case("weak_to_strong", [0.85, 1.625, 2.4], {"alpha": 0.5, "warmup": 1.0}),
    Case("weak_to_strong", [1, 2, 3], {"alpha": 0.0}),
    # A quarter of -log p, and three quarters of the divergences.
    Case("logit_distill", [0.25 + 0.3, 0.5 + 0.375, 0.75 + 0.45], {"alpha": 0.75}),
    Case("logit_distill", [1, 2, 3], {"alpha": 0.0}),
    # Rewards 1 and 1/4 at tau 1/2: weights 1 and e^-1.5.
    Case("rwr", [1, 2, 3 * exp(-1.5)]),
    Case("rwr", [1, 2, 3 * exp(-0.75)], {"tau": 1.0}),
    # Mean log-ratios 0.15 and -0.3; sums 0.3, -0.3; column -1 and -4 against means -1.5 and -3.
    Case("poft", [L(0.15), L(-0.3)]),
    Case("poft", [L(0.3), L(-0.6)], {"beta": 2.0}),
    Case("poft", [L(0.3), L(-0.3)], {"length_normalized": False}),
    Case("poft", [L(-0.5), L(1)], {"from_column": True}),
    # beta * margin = 0.06.
    dpo(L(0.06)),
    dpo(0.9 * L(0.06) + 0.1 * L(-0.06), label_smoothing=0.1),
    dpo(0.94, loss_type="hinge"),
    dpo(0, loss_type="hinge", beta=2.0),
    # Per token 0.15 and -0.3; 1 / (2 beta) = 5.
    dpo((0.45 - 5) ** 2, loss_type="ipo"),
    dpo((0.9 * L(0.06) - 0.1 * L(-0.06)) / 0.8, loss_type="robust", label_smoothing=0.1),
    dpo(
        S(0.06) * (-L(0.06) - log(0.9)) + S(-0.06) * (-L(-0.06) - log(0.1)),
        loss_type="exo",
        label_smoothing=0.1,
    ),
    # beta * s = 0.03, -0.03.
    dpo(L(0.03) + 0.5 * L(-0.03) + 0.5 * L(0.03), loss_type="nca"),
    dpo(2 * L(0.03), loss_type="bco"),
    dpo(2 * 4.7**2, loss_type="sppo_hard"),
    # A single pair is sorted as it is.
    dpo(0.9 * L(0.06) + 0.1 * L(-0.06), loss_type="aot", label_smoothing=0.1),
    dpo(2 * S(-0.03), loss_type="apo_zero"),
    dpo(S(0.03) + S(-0.06), loss_type="apo_down"),
    # Blend sigmoid(0.06 / 0.05).
    dpo(L(0.06) * (1 - S(1.2)) + exp(-0.06) * S(1.2), loss_type="discopop"),
    # f' = 1 - 1/t; log 2t/(t+1); (t^-1/2 - 1) / (-1/2), at t = e^0.3, e^-0.3.
    dpo(L(0.1 * (exp(0.3) - exp(-0.3))), divergence_type="forward_kl"),
    dpo(L(0.03), divergence_type="js"),
    dpo(L(0.2 * (exp(0.15) - exp(-0.15))), divergence_type="alpha", alpha=0.5),
    dpo(L(0.06), divergence_type="alpha", alpha=1.0),
    dpo(L(0.045), length_normalized=True),
    # The second token of a counts half, or nothing.
    dpo(L(0.05), tail=0.5),
    dpo(L(0.04), tail=0.0),
    dpo(L(0.06) + 0.5 * 1.5, nll=0.5),
    # Geometric means e^-1.5 and e^-3; with 0.4, 0.5, 0.6 off each log-prob e^-1.95 and e^-3.6.
    dpo(L(0.06) * exp(-4.5), weighting="plain"),
    dpo(L(0.06) * exp(-5.55), weighting="aligned"),
    # log p = -3 for both.
    dpo(log(2), reference_free=True),
    # 2 * (-1.5 + 3) - 1.
    Case("simpo", [L(2)]),
    Case("simpo", [0.9 * L(2) + 0.1 * L(-2)], {"label_smoothing": 0.1}),
    Case("simpo", [L(2 * (ALPHA_A - ALPHA_B) - 1)], {"alpha": 0.5}),
    Case("cpo", [log(2) + 1.5]),
    # Per token -1.5 + 3, less 1 / (2 beta) = 5.
    Case("cpo", [3.5**2 + 0.75], {"loss_type": "ipo", "nll": 0.5}),
    Case("cpo", [1.0], {"loss_type": "hinge", "nll": 0.0}),
    Case("orpo", [1.5 + 0.1 * L(ODDS_A - ODDS_B)]),
    Case("bco", [L(0.03), L(0.03)]),
    Case("kto", [1 - S(0.03), 0.5 * (1 - S(0.03))], {"baseline": "zero", "undesirable": 0.5}),
    # Rewards at the last tokens: 0.7 and 0.2.
    Case("reward_model", [L(0.5)]),
    Case("reward_model", [L(0.5) + 0.1 * 0.81], {"centre": 0.1}),
    Case("reward_model", [L(0.3)], {"margin": True}),
    # Targets (1, unknown) and (0.5, 0.2) against (0.7, 0.1) and (0.2, 0.4).
    Case("reward_regression", [0.09, (0.09 + 0.04) / 2], {"heads": 2}),
    Case(
        "reward_regression",
        [L(0.7), (0.5 * L(0.2) + 0.5 * L(-0.2) + 0.2 * L(0.4) + 0.8 * L(-0.4)) / 2],
        {"heads": 2, "objective": "bce"},
    ),
    # Targets 1 and 1/2 against 0.7 and 0.2.
    Case("pairwise_reward", [L(0.7), (L(0.2) + L(-0.2)) / 2]),
    # Labels 1, 0 and unknown against 0.9, 0.7: the third is left out.
    Case("process_reward", [L(0.9), L(-0.7)]),
]


def compute(algorithm: Algorithm, batch: Batch, policy: PolicyOutput) -> Tensor:
    loss = algorithm.loss(policy, batch)
    return loss[batch.mask] if algorithm.unit == "token" else loss


@pytest.mark.parametrize("case", CASES, ids=str)
def test_loss_is_what_one_computes_by_hand(case: Case) -> None:
    algorithm = ALGORITHMS[case.name](**case.settings)
    batch = algorithm.prepare(hand_batch())
    loss = compute(algorithm, batch, hand_policy(batch, score_heads(algorithm)))
    torch.testing.assert_close(loss.tolist(), [float(x) for x in case.loss], rtol=2e-6, atol=2e-6)


def test_labels_of_steps_are_no_advantages() -> None:
    """They would be reported as policy/advantage_mean."""
    batch = ALGORITHMS["process_reward"]().prepare(hand_batch())
    assert batch.advantages is None
    assert batch.labels is not None and batch.labels[batch.mask].tolist() == [1.0, 0.0]


def test_every_offline_algorithm_has_a_case() -> None:
    assert {case.name for case in CASES} == {name for name, cls in ALGORITHMS.items() if not cls.online}


# Weights without gradient make these differ, by design, from the derivative of their value.
DETACHED = {"dft", "asft", "iw_sft"}


@pytest.mark.parametrize("case", [c for c in CASES if c.name not in DETACHED], ids=str)
def test_gradient(case: Case) -> None:
    if case.settings.get("weighting", "none") != "none" or case.settings.get("bound") == 1.5:
        return_detached(case)
        return
    algorithm = ALGORITHMS[case.name](**case.settings)
    groups = random_groups(algorithm.data, seed=3, groups=3)
    batch = Batch.build(arrange(algorithm, groups))
    batch = algorithm.prepare(fill(batch, random_tables(4)).with_(state={"progress": 0.5}))
    start = hand_inputs(algorithm, batch)

    def loss(logps: Tensor, kl: Tensor, scores: Tensor) -> Tensor:
        return compute(algorithm, batch, PolicyOutput(logps=logps, kl=kl, scores=scores))

    assert torch.autograd.gradcheck(loss, start)


def hand_inputs(algorithm: Algorithm, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(9)
    t, k = batch.num_tokens, max(score_heads(algorithm), 1)
    logps = torch.where(batch.mask, -torch.rand(t, generator=g, dtype=torch.float64) - 0.2, 0.0)
    kl = torch.rand(t, generator=g, dtype=torch.float64)
    scores = torch.randn(t, k, generator=g, dtype=torch.float64)
    return logps.requires_grad_(), kl.requires_grad_(), scores.requires_grad_()


def return_detached(case: Case) -> None:
    """A weight without gradient: the gradient is the weight times that of the plain loss; past the
    bound of forgetting there is none."""
    algorithm = ALGORITHMS[case.name](**case.settings)
    batch = algorithm.prepare(hand_batch())
    policy = hand_policy(batch)
    logps = policy.logps.requires_grad_()
    compute(algorithm, batch, policy).sum().backward()
    assert logps.grad is not None
    got = logps.grad[batch.mask].tolist()
    if case.name == "forgetting":
        torch.testing.assert_close(got, [-1.5, 0.0, -1.5])
        return
    pull = -0.1 * S(-0.06) * exp(-4.5 if case.settings["weighting"] == "plain" else -5.55)
    torch.testing.assert_close(got, [pull, pull, -pull], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        ("dft", {}, [-exp(-1), -exp(-2), -exp(-3)]),
        ("iw_sft", {"clip": 0.25}, [-exp(0.3), -exp(0.3), -exp(-0.25)]),
        ("asft", {}, [-exp(-1), -exp(-2), -exp(-3)]),
    ],
)
def test_weights_carry_no_gradient(name: str, settings: dict[str, Any], expected: list[float]) -> None:
    algorithm = ALGORITHMS[name](**settings)
    batch = hand_batch()
    policy = hand_policy(batch)
    policy = replace(policy, logps=policy.logps.requires_grad_())
    compute(algorithm, batch, policy).sum().backward()
    assert policy.logps.grad is not None
    torch.testing.assert_close(policy.logps.grad[batch.mask].tolist(), expected, rtol=1e-6, atol=1e-7)


def test_kto_measures_against_mismatched_responses() -> None:
    """Two prompts, s = 0.3 (good) and -0.1 (bad); each is given the other's response, whose log-ratios
    (same tokens, same table) are -0.1 and 0.3: z = 0.1. Losses over four sequences, two of which count
    nothing: 2 * (1 - sigmoid(0.1 * 0.2)) and 2 * (1 - sigmoid(-0.1 * -0.2))."""
    from worlds import completion, group

    algorithm = ALGORITHMS["kto"]()
    groups = [group(0, completion((10,), 1.0)), group(1, completion((11,), 0.0))]
    batch = Batch.build(arrange(algorithm, groups))
    tables = {"old_logps": {10: -1.0, 11: -2.0}, "ref_logps": {10: -1.3, 11: -1.9}}
    batch = algorithm.prepare(fill(batch, tables))
    assert batch.old_logps is not None
    loss = algorithm.loss(PolicyOutput(logps=batch.old_logps), batch)
    expected = 2 * (1 - S(0.02))
    torch.testing.assert_close(loss.tolist(), [expected, 0.0, expected, 0.0], rtol=1e-5, atol=1e-6)
    assert math.isclose(algorithm.report(batch)["kto/z"], 0.1, rel_tol=1e-5)


def test_bco_compares_with_the_mean_of_both_averages() -> None:
    """Rewards 0.03 (good) and -0.03 (bad): averages 0.1 * 0.03 and 0.9 * -0.2 + 0.1 * -0.03, so that the
    shift is half of 0.003 - 0.183."""
    algorithm = ALGORITHMS["bco"]()
    batch = hand_batch()
    values = algorithm.metrics(hand_policy(batch), batch)
    means = {name: float(v[~v.isnan()].mean()) for name, v in values.items()}
    assert means == {"bco/reward_good": pytest.approx(0.03), "bco/reward_bad": pytest.approx(-0.03)}
    assert all(int((~v.isnan()).sum()) == 1 for v in values.values()), "a response is counted by its tokens"
    state = algorithm.next_state({"bco_bad": -0.2}, means)
    batch = batch.with_(state=state)
    assert algorithm.report(batch)["bco/shift"] == pytest.approx(-0.09)
    loss = algorithm.loss(hand_policy(batch), batch)
    torch.testing.assert_close(loss.tolist(), [L(0.12), L(-0.06)], rtol=1e-5, atol=1e-6)
    assert algorithm.next_state(state, {"bco/reward_good": 1.0})["bco_bad"] == state["bco_bad"]


def test_a_balanced_loss_weighs_the_tasks_of_a_mixture_equally() -> None:
    """Two rows of source x with 1 + 2 tokens, one of y with 1: 1/2 * (1 + 2 + 3) / 3 + 1/2 * 4, where the
    mean over tokens is 2.5. One source alone: its mean."""
    from worlds import completion, group

    from rft.learner.objective import reduce_loss, weigh

    algorithm = ALGORITHMS["mft"]()
    rows = [(10,), (11, 12), (13,)]
    groups = [group(i, completion(tokens, 1.0)) for i, tokens in enumerate(rows)]
    groups = [
        replace(g, prompt=replace(g.prompt, columns={"mixture_source": name}))
        for g, name in zip(groups, "xxy", strict=True)
    ]
    for some, expected in ((groups, 3.0), (groups[:2], 2.0)):
        batch = fill(Batch.build(arrange(algorithm, some)), {"old_logps": {10: -1, 11: -2, 12: -3, 13: -4}})
        assert batch.old_logps is not None
        weighed, scale = weigh(algorithm, algorithm.prepare(batch), 8)
        loss = reduce_loss(algorithm, PolicyOutput(logps=batch.old_logps), weighed, scale)
        assert float(loss) == pytest.approx(expected)


def test_confident_predictions_of_half_the_batch_are_hardened() -> None:
    """Four responses predicted 0.2, 0.7, -1, 0.1: the first two are hardened to 1, though 0.1 is above 0 too.
    At half of the warm-up a = 0.25: targets 0.75 w + 0.25 or 0.75 w."""
    from worlds import completion, group

    algorithm = ALGORITHMS["reward_regression"](objective="bce", confidence=0.5, warmup=1.0)
    scores, weak = [0.2, 0.7, -1.0, 0.1], [0.4, 0.0, 1.0, 0.6]
    groups = [group(0, *(completion((10 + i,), 1.0) for i in range(4)))]
    columns = {"targets": torch.tensor(weak)[:, None], "old_scores": torch.tensor(scores)[:, None]}
    batch = Batch.build(groups).with_(columns=columns, state={"progress": 0.5})
    batch = algorithm.prepare(batch)
    assert batch.columns["hardened"][:, 0].tolist() == [1, 1, 0, 0]
    predicted = torch.zeros(batch.num_tokens, 1)
    predicted[batch.mask] = torch.tensor(scores)[:, None]
    loss = algorithm.loss(PolicyOutput(logps=predicted[:, 0], scores=predicted), batch)
    mixed = [0.75 * w + 0.25 * h for w, h in zip(weak, (1, 1, 0, 0), strict=True)]
    expected = [y * L(x) + (1 - y) * L(-x) for x, y in zip(scores, mixed, strict=True)]
    torch.testing.assert_close(loss.tolist(), expected, rtol=1e-5, atol=1e-6)


def test_q_tuning_drops_noise_and_known_rows_and_prunes_misconceptions() -> None:
    """Four rows, by perplexity and entropy: lowest in both, highest in both, (3rd, 2nd) and (2nd, 3rd).
    The third is a misconception, of whose tokens with perplexities 2, 8, 1, 3 three stay: with lambda 1/2 the
    scores are half of 2 + 8, 8 + 2 + 1, 1 + 8 + 3, 3 + 1, without neighbours the perplexities."""
    from worlds import completion, group

    nll = {10: 0.1, 11: 9.0, 12: log(2), 13: log(8), 14: 0.0, 15: log(3), 16: 0.2, 17: 0.3}
    entropy = {10: 0.1, 11: 0.9, 12: 0.2, 13: 0.2, 14: 0.2, 15: 0.2, 16: 0.3, 17: 0.3}
    rows = [(10,), (11,), (12, 13, 14, 15), (16, 17)]
    batch = Batch.build([group(i, completion(tokens, 1.0)) for i, tokens in enumerate(rows)])
    batch = fill(batch, {"old_logps": {t: -x for t, x in nll.items()}, "old_entropy": entropy})
    for settings, expected in (
        ({}, [12, 13, 14, 16, 17]),
        ({"neighbours": 0.0}, [12, 13, 15, 16, 17]),
        ({"share": 0.25}, [14, 16, 17]),
        ({"rows": 1.0}, [10, 11, 12, 13, 14, 16, 17]),
        ({"rows": 0.25, "share": 1.0}, [12, 13, 14, 15]),
    ):
        kept = ALGORITHMS["q_tuning"](**{"share": 0.75, **settings}).prepare(batch)
        assert kept.tokens[kept.mask].tolist() == expected, settings


def test_shared_first_steps_of_a_pair_cancel() -> None:
    """Step-DPO: the loss of a pair with the shared step (14, 15) is that of the different steps alone."""
    from worlds import completion, group

    tables = {
        "old_logps": {10: -1.0, 11: -3.0, 14: -0.5, 15: -0.7},
        "ref_logps": {10: -1.5, 11: -2.0, 14: -0.1, 15: -0.9},
    }
    for shared in ((), (14, 15)):
        pair = group(0, completion((*shared, 10), 1.0), completion((*shared, 11), 0.0))
        batch = fill(Batch.build([pair]), tables)
        assert batch.old_logps is not None
        loss = ALGORITHMS["dpo"]().loss(PolicyOutput(logps=batch.old_logps), batch)
        assert loss.tolist() == pytest.approx([L(0.1 * (0.5 + 1.0))])


def test_aot_compares_sorted_margins() -> None:
    """Margins 2, 0.5 and reference margins -1, 1: sorted, 0.5 meets -1 and 2 meets 1."""
    from worlds import completion, group

    algorithm = ALGORITHMS["dpo"](loss_type="aot", beta=1.0)
    groups = [
        group(0, completion((10,), 1.0), completion((11,), 0.0)),
        group(1, completion((12,), 1.0), completion((13,), 0.0)),
    ]
    old = {10: -1.0, 11: -3.0, 12: -1.0, 13: -1.5}
    reference = {10: -2.0, 11: -1.0, 12: -1.0, 13: -2.0}
    batch = algorithm.prepare(fill(Batch.build(groups), {"old_logps": old, "ref_logps": reference}))
    assert batch.old_logps is not None
    loss = algorithm.loss(PolicyOutput(logps=batch.old_logps), batch)
    torch.testing.assert_close(loss.tolist(), [L(2 - 1), L(0.5 + 1)], rtol=1e-5, atol=1e-6)


HELD_OUT = {  # the pair's implicit rewards, or the scores 0.7 and 0.2
    "dpo": {"preference_accuracy": [1.0], "preference_margin": [0.06], "nll": [1.0, 2.0]},
    "simpo": {"preference_accuracy": [1.0], "preference_margin": [3.0], "nll": [1.0, 2.0]},
    "reward_model": {"preference_accuracy": [1.0], "preference_margin": [0.5], "score": [0.7, 0.2]},
    # Targets 1 and 1/2; the second is taken as "B is better", so that a score above 0 is wrong.
    "pairwise_reward": {"preference_accuracy": [1.0, 0.0], "preference_margin": [0.7, -0.2]},
    "reward_regression": {"score_error": [0.3, 0.3, 0.2]},
    "process_reward": {"step_accuracy": [1.0, 0.0]},
    "sft": {"nll": [1.0, 2.0, 3.0]},
}


@pytest.mark.parametrize("name", HELD_OUT)
def test_held_out_measures(name: str) -> None:
    algorithm = ALGORITHMS[name](**({"heads": 2} if name == "reward_regression" else {}))
    batch = algorithm.prepare(hand_batch())
    found = algorithm.held_out(hand_policy(batch, score_heads(algorithm)), batch)
    assert {n: v.tolist() for n, v in found.items()} == {
        n: pytest.approx(v, rel=1e-5, abs=1e-6) for n, v in HELD_OUT[name].items()
    }


def test_kto_measures_good_and_bad_apart() -> None:
    """s = 0.3 and -0.3 with beta 0.1, of a good and a bad response; z = 0."""
    algorithm = ALGORITHMS["kto"](baseline="zero")
    batch = algorithm.prepare(hand_batch())
    found = algorithm.held_out(hand_policy(batch), batch)
    assert {n: v.tolist() for n, v in found.items()} == {
        "reward_good": pytest.approx([0.03], rel=1e-5),
        "reward_bad": pytest.approx([-0.03], rel=1e-5),
        "label_accuracy": [1.0, 1.0],
        "nll": [1.0, 2.0],
    }
