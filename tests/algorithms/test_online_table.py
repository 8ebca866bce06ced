"""Every online algorithm against numbers computed by hand, and its gradient by finite differences.

The case (worlds.py): one prompt, completion a = two tokens with reward 1, b = one token with reward 0.

    token   log-prob   ratio to old   log-ratio to reference   critic: old, new
    a0        -1          1.5                0.1                  0.5   0.7
    a1        -2          1.0                0.2                  0.6   0.6
    b0        -3          0.5               -0.3                  0.4   0.2

With PPO's clip at 0.2 and an advantage A > 0 for a and -A for b, the objective is
a0: min(1.5 A, 1.2 A) = 1.2 A;  a1: A;  b0: min(-0.5 A, -0.8 A) = -0.8 A.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from worlds import LOGPS, chosen, completion, fill, group, hand_batch, hand_policy, spread

from rft.algorithms import ALGORITHMS, PolicyOutput
from rft.batch import Batch

SCALED = 0.5 / (
    math.sqrt(0.5) + 1e-4
)  # (1 - mean) / (std + 1e-4): mean 1/2, std sqrt(((1/2)^2 + (1/2)^2) / 1)


@dataclass
class Case:
    """loss: expected unreduced loss of the masked-in tokens (or sequences, or pairs); advantages too."""

    name: str
    loss: list[float]
    advantages: list[float] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    demonstrated: int = 0
    gradcheck: bool = True

    def __str__(self) -> str:
        return "-".join([self.name, *(f"{k}={v}" for k, v in self.settings.items())])


A, S = SCALED, math.sqrt(1 / 3)
PHI_A, PHI_B = 1.5**2 * math.exp(3 * -0.5), 0.5**3 * math.exp(2 * 0.5)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


CASES = [
    Case("grpo", [-1.2 * A, -A, 0.8 * A], [A, A, -A]),
    # With k3 at log-ratio d = log(ref / policy): e^d - 1 - d, for d = -0.1, -0.2, 0.3.
    Case(
        "grpo",
        [
            -1.2 * A + 0.1 * (math.exp(-0.1) - 1 + 0.1),
            -A + 0.1 * (math.exp(-0.2) - 1 + 0.2),
            0.8 * A + 0.1 * (math.exp(0.3) - 1 - 0.3),
        ],
        [A, A, -A],
        {"beta": 0.1},
    ),
    Case("grpo", [-1.2 * A + 0.04, -A + 0.05, 0.8 * A + 0.06], None, {"beta": 0.1, "kl_estimator": "full"}),
    # k1 = policy - reference = 0.1, 0.2, -0.3; k2 = half their squares.
    Case("grpo", [-1.2 * A + 0.01, -A + 0.02, 0.8 * A - 0.03], None, {"beta": 0.1, "kl_estimator": "k1"}),
    Case(
        "grpo", [-1.2 * A + 0.0005, -A + 0.002, 0.8 * A + 0.0045], None, {"beta": 0.1, "kl_estimator": "k2"}
    ),
    # Clip-higher at 0.6 leaves a0 its ratio of 1.5.
    Case("grpo", [-1.5 * A, -A, 0.8 * A], None, {"epsilon_high": 0.6}),
    # Over the batch: std of (1, 0) is the same sqrt(1/2).
    Case("grpo", [-1.2 * A, -A, 0.8 * A], [A, A, -A], {"scale_rewards": "batch"}),
    # KL in the reward, k1 at the old policy: old - ref = (policy - ref) - log ratio. Sequence a:
    # 0.3 - log 1.5, b: -0.3 - log 0.5. Rewards 1 - that of a, 0 - that of b; centred: half the difference.
    Case(
        "dr_grpo",
        [-1.2 * (D := (1 - 0.3 + math.log(1.5) - 0.3 - math.log(0.5)) / 2), -D, 0.8 * D],
        [D, D, -D],
        {"beta": 1.0, "kl_in": "reward"},
    ),
    # A = 1 - 1/2.
    Case("dr_grpo", [-0.6, -0.5, 0.4], [0.5, 0.5, -0.5]),
    Case("dapo", [-1.28 * A, -A, 0.8 * A], [A, A, -A]),
    # Length limit 2, buffer 1: a has 2 tokens, 1 over 2 - 1, penalty 1: rewards (0, 0), so no advantage.
    Case("dapo", [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], {"overlong_buffer": 1}),
    # Ratio of a: sqrt(1.5 * 1) = 1.2247, clipped at 1.2; of b: 0.5, clipped at 0.8.
    Case("gspo", [-1.2 * A, -1.2 * A, 0.8 * A], None, {"epsilon": 0.2, "epsilon_high": 0.2}),
    Case("gspo", [-math.sqrt(1.5) * A] * 2 + [0.8 * A], None, {"epsilon": 0.2, "epsilon_high": 0.5}),
    # -weight * A * log p, weights min(1.5, 1.2), 1, 0.5 (bounded above only).
    Case("cispo", [1.2 * A, 2 * A, -1.5 * A], None, {"epsilon_high": 0.2}, gradcheck=False),
    # A = 1 - 0 and 0 - 1; ratio of a 1.5 * 1, of b 0.5.
    Case("rloo", [-1.2, -1.2, 0.8], [1.0, 1.0, -1.0]),
    # Returns 1, 1, 0 by token: mean 2/3, variance ((1/9) + (1/9) + (4/9)) / 2 = 1/3.
    Case("reinforce_pp", [-1.2 * S, -S, 0.8 * 2 * S], [S, S, -2 * S]),
    # Rewards +-1/2 after the group's mean: returns 1/2, 1/2, -1/2; whitened to the same numbers.
    Case("reinforce_pp", [-1.2 * S, -S, 0.8 * 2 * S], [S, S, -2 * S], {"baseline": "group"}),
    # -A log p with A = +-1/2, alpha = 1 group / 1 that differs.
    Case("gpg", [0.5, 1.0, -1.5], [0.5, 0.5, -0.5]),
    # Baseline (2 * 1 + 1 * 0) / 3 = 2/3.
    Case("opo", [1 / 3, 2 / 3, -2.0], [1 / 3, 1 / 3, -2 / 3]),
    # Greedy answer's reward 1/4.
    Case("remax", [0.75, 1.5, -0.75], [0.75, 0.75, -0.25]),
    # (1 - 1/2) / (1/2) = 1.
    Case("max_rl", [-1.2, -1.0, 0.8], [1.0, 1.0, -1.0]),
    # b is left out of the mask: two entries remain.
    Case("raft", [1.0, 2.0], [1.0, 1.0]),
    Case("raft", [1.0, 2.0, 3.0], [1.0, 1.0, 1.0], {"top_share": 1.0}),
    Case("raft", [1.0, 2.0], [1.0, 1.0], {"top_share": 1.0, "threshold": 0.0}),
    # Half of the batch's two completions.
    Case("raft", [1.0, 2.0], [1.0, 1.0], {"top_share": 0.5, "rank": "batch"}),
    # Only a is right: its weight is 1.
    Case("mml", [1.0, 2.0], [1.0, 1.0]),
    # Both count as right. Log-likelihoods before the step: -3 - log 1.5 and -3 - log 0.5, so that the weights
    # are 1/1.5 : 1/0.5 = 1 : 3; at beta 1/2 1 : sqrt(3); at beta 0 equal.
    Case("mml", [0.25, 0.5, 2.25], [0.25, 0.25, 0.75], {"threshold": -1.0}),
    Case("mml", [(w := 1 / (1 + math.sqrt(3))), 2 * w, 3 - 3 * w], None, {"threshold": -1.0, "beta": 0.5}),
    Case("mml", [0.5, 1.0, 1.5], [0.5, 0.5, 0.5], {"threshold": -1.0, "beta": 0.0}),
    Case("mml_partial", [1.0, 2.0], [1.0, 1.0]),
    Case("raft_pp", [-1.2, -1.0], [1.0, 1.0]),
    Case("reinforce_rej", [-1.2, -1.0, 0.8], [1.0, 1.0, -1.0]),
    Case("expert_iteration", [1.0, 2.0], [1.0, 1.0]),
    # Its only prefix token is the top 20 % (rounded up) of one: plain Dr.GRPO. Of a prefix of two, a0 has
    # the higher entropy (0.3 against 0.2), and a1 has no advantage.
    Case("prefix_rft", [-0.6, -0.5, 0.4], [0.5, 0.5, -0.5], demonstrated=1),
    Case("prefix_rft", [-0.6, 0.0, 0.4], [0.5, 0.0, -0.5], demonstrated=2),
    # a0 is a prefix token, with its ratio of 1.5 unclipped, and in a range of its own; b keeps its range.
    Case("prefix_rft", [-0.75, -0.5, 0.4], None, {"prefix_clip": False}, demonstrated=1),
    Case("prefix_rft", [-0.65, -0.5, 0.4], None, {"prefix_epsilon": 0.3}, demonstrated=1),
    Case("prefix_rft", [-0.7, -0.5, 0.4], None, {"prefix_epsilon_high": 0.4}, demonstrated=1),
    # p / (p + 0.1) at p = e^-1 and e^-2; b as in Dr.GRPO.
    Case(
        "luffy",
        [-0.5 * math.exp(-1) / (math.exp(-1) + 0.1), -0.5 * math.exp(-2) / (math.exp(-2) + 0.1), 0.4],
        [0.5, 0.5, -0.5],
        demonstrated=2,
    ),
    # Log-ratios 0.1 + 0.2 and -0.3; targets 2 (1 - 1/2) and 2 (0 - 1/2).
    Case("sppo", [(0.3 - 1) ** 2, (-0.3 + 1) ** 2], None, {"eta": 2.0}),
    # Margin 0.3 + 0.3 = 0.6; -log sigmoid(0.5 * 0.6) = log(1 + e^-0.3).
    Case("online_dpo", [math.log1p(math.exp(-0.3))], None, {"beta": 0.5}),
    Case("online_dpo", [(0.6 - 1) ** 2], None, {"beta": 0.5, "loss_type": "ipo"}),
    # ... and a's mean log-prob is -1.5.
    Case("iterative_dpo", [math.log1p(math.exp(-0.3)) + 1.5], None, {"beta": 0.5}),
    Case("prefix_dpo", [math.log1p(math.exp(-0.3)) + 1.5], None, {"beta": 0.5}),
    # The opponent's reward is 1/4: a wins, b loses. -A log p + 0.1 k2, k2 = 0.005, 0.02, 0.045.
    Case("nash_md", [0.5005, 1.002, -1.4955], [0.5, 0.5, -0.5], {"beta": 0.1}),
    # (0.5 * 0.6 - 1)^2. Clipped: a moved log 1.5 = 0.405 -> 0.1, b moved log 0.5 = -0.693 -> -0.1, so the
    # log-ratios are 0.3 - 0.405 + 0.1 and -0.3 + 0.693 - 0.1, and the larger error counts.
    Case("reward_difference", [0.49], None, {"beta": 0.5}),
    Case(
        "reward_difference",
        [(0.5 * ((0.4 - math.log(1.5)) - (-0.4 - math.log(0.5))) - 1) ** 2],
        None,
        {"beta": 0.5, "clip": 0.1},
    ),
    # V after - V before: 0.8 - 0.5, 1 - 0.8 (the end's value is the reward), 0 - 0.4.
    Case("per_step", [-1.2 * 0.3, -0.2, 0.8 * 0.4], [0.3, 0.2, -0.4]),
    # Scores 1, 2, 0: mean 1, std 1. Scaled 0, 1, -1 (over 1 + 1e-4); from the back: 0 + 1, 1, -1.
    Case(
        "per_step",
        [-1.2 / 1.0001, -1 / 1.0001, 0.8 / 1.0001],
        [1 / 1.0001, 1 / 1.0001, -1 / 1.0001],
        {"source": "process"},
    ),
    Case("distill", [0.4, 0.5, 0.6]),
    # -ratio (log teacher - log p) log p: -(1.5 * -0.1 * -1), -(-0.2 * -2), -(0.5 * 0.3 * -3).
    Case("distill", [-0.15, -0.4, 0.45], None, {"estimator": "sampled"}, gradcheck=False),
    # Half the divergence - 2 ratio A log p, A = +-1/2: 0.2 + 2 * 1.5 / 2, 0.25 + 2 / 2 * 2, 0.3 - 2 * 0.5 / 2
    # * 3.
    Case(
        "distill",
        [1.7, 2.25, -1.2],
        [0.5, 0.5, -0.5],
        {"divergence_weight": 0.5, "reward_weight": 2.0},
        gradcheck=False,
    ),
    # The entropy (0.3, 0.2, 0.1) times 0.1, also where the target is above it.
    Case("grpo", [-1.2 * A - 0.03, -A - 0.02, 0.8 * A - 0.01], None, {"entropy_coef": 0.1}),
    Case(
        "grpo", [-1.2 * A - 0.03, -A - 0.02, 0.8 * A - 0.01], None, {"entropy_coef": 0.1, "entropy_target": 1}
    ),
    # 0.4 * H, at most |A| / 2: a gains 0.12 and 0.08, b's -A becomes -A + 0.04.
    Case(
        "grpo",
        [-1.2 * (A + 0.12), -(A + 0.08), 0.8 * (A - 0.04)],
        [A + 0.12, A + 0.08, -A + 0.04],
        {"entropy_advantage": 0.4},
    ),
    # ... and with kappa = 10 at most |A| / 10, which is below 0.08.
    Case(
        "grpo",
        [-1.2 * 1.1 * A, -1.1 * A, 0.8 * (A - 0.04)],
        [1.1 * A, 1.1 * A, -A + 0.04],
        {"entropy_advantage": 0.4, "entropy_advantage_cap": 10.0},
    ),
    # One of three tokens keeps its advantage: a0 has the highest entropy.
    Case("grpo", [-1.2 * A, 0.0, 0.0], [A, 0.0, 0.0], {"top_entropy": 0.33}),
    Case("grpo", [-1.2 * A, -A, 0.0], [A, A, 0.0], {"top_entropy": 0.5}),
    # 4 / tau * sigmoid(tau * (ratio - 1)), tau = 1 above and 1.05 below: sigmoid(0) = 1/2.
    Case("sapo", [-4 * sigmoid(0.5) * A, -2 * A, 4 / 1.05 * sigmoid(-0.525) * A], [A, A, -A]),
    # w = 1.5 * 1 and 0.5; phi = w^2 e^(3 (1 - w)) and w^3 e^(2 (1 - w)); -phi * A * log p.
    Case("vespo", [PHI_A * A, 2 * PHI_A * A, -3 * PHI_B * A], [A, A, -A], gradcheck=False),
    # A = +-1/2; a counts in full, b by its ratio 0.5: -0.5 * -0.5 * -3.
    Case("topr", [0.5, 1.0, -0.75], [0.5, 0.5, -0.5], gradcheck=False),
    # Without a baseline b's reward of 0 is not negative, and has no effect.
    Case("topr", [1.0, 2.0, 0.0], [1.0, 1.0, 0.0], {"baseline": 0.0}, gradcheck=False),
    # As gspo, times the length of 2 or 1.
    Case("luspo", [-2.4 * A, -2.4 * A, 0.8 * A], None, {"epsilon": 0.2, "epsilon_high": 0.2}),
    # Log-ratios log 1.5 -> 0.4, and 0: mean 0.2. b: log 0.5 -> -0.4.
    Case("gmpo", [-math.exp(0.2) * A, -math.exp(0.2) * A, math.exp(-0.4) * A], [A, A, -A]),
    Case("gmpo", [-math.sqrt(1.5) * A] * 2 + [0.5 * A], None, {"epsilon": 1.0}),
    # p = e^-1, q = p / 1.5: 0.123 apart; b: 0.0498 against 0.0996. All within 0.2; a0 not within 0.1.
    Case("dppo", [-1.5 * A, -A, 0.5 * A], [A, A, -A]),
    Case("dppo", [0.0, -A, 0.5 * A], None, {"delta": 0.1}),
    Case("dppo", [0.0, -A, 0.0], None, {"delta": 0.04}),
    # Binary KL: a0 0.2453 log(1 / 1.5) + 0.7547 log(0.7547 / 0.6321) = 0.034; b 0.0205.
    Case("dppo", [0.0, -A, 0.5 * A], None, {"divergence_kind": "kl", "delta": 0.03}),
    Case("dppo", [-1.5 * A, -A, 0.5 * A], None, {"divergence_kind": "kl", "delta": 0.035}),
    Case("dppo", [-1.2 * A, -A, 0.5 * A], None, {"ratio_cap": 1.2}, gradcheck=False),
    Case("m2po", [-1.5 * A, -A, 0.5 * A], [A, A, -A]),  # no sampler's log-probs: nothing to mask
    # Old log-probs -1.405, -2, -2.307 (mean -1.904), A's mean A/3: covariances 0.235, -0.045, 0.380.
    Case("clip_cov", [-1.2 * A, -A, 0.0], [A, A, 0.0], {"covariance_low": 0.3}),
    Case("clip_cov", [-1.2 * A, -A, 0.8 * A], [A, A, -A]),  # none lies between 1 and 5
    Case("clip_cov", [0.0, -A, 0.0], [0.0, A, 0.0], {"covariance_low": 0.2, "share": 0.7}),
    # b has the highest covariance, then a0; |log-ratio| log 2 and log 1.5.
    Case("kl_cov", [-1.5 * A, -A, 0.5 * A + math.log(2)], [A, A, -A]),
    Case(
        "kl_cov",
        [-1.5 * A + 0.5 * math.log(1.5), -A, 0.5 * A + 0.5 * math.log(2)],
        None,
        {"share": 0.7, "kl_coef": 0.5},
    ),
    # r / beta = 2, 0; old - reference 0.3 - log 1.5 and -0.3 + log 2; log Z is the mean of the differences.
    Case(
        "trajectory_balance",
        [
            ((Z := (2 - 0.3 + math.log(1.5) + 0.3 - math.log(2)) / 2) + 0.3 - 2) ** 2,
            (Z - 0.3) ** 2,
        ],
        None,
        {"beta": 0.5},
    ),
    # lam = 1: A = return - V = 1 - 0.5, 1 - 0.6, 0 - 0.4. Objective 1.2 * 0.5, 0.4, -0.8 * 0.4. Critic:
    # 0.5 * half of (0.7 - 1)^2, (0.6 - 1)^2, (0.2 - 0)^2.
    Case(
        "ppo",
        [-0.6 + 0.0225, -0.4 + 0.04, 0.32 + 0.01],
        [0.5, 0.4, -0.4],
        {"whiten": False},
    ),
    # lam = 0.5: deltas 0 + 0.6 - 0.5 = 0.1, 1 - 0.6 = 0.4, -0.4. A(a0) = 0.1 + 0.5 * 0.4 = 0.3. The critic's
    # lam = 1 keeps its returns at 1, 1, 0. Value clip 0.1: a0 may reach 0.6 only: error 0.16, b0 0.3: 0.09.
    Case(
        "ppo",
        [-0.36 + 0.25 * 0.16, -0.4 + 0.25 * 0.16, 0.32 + 0.25 * 0.09],
        [0.3, 0.4, -0.4],
        {"lam": 0.5, "critic_lam": 1.0, "whiten": False, "value_clip": 0.1},
    ),
    # Length-adaptive, alpha = 1: lam = 1 - 1/2 for a (two tokens), 0 for b.
    Case(
        "ppo",
        [-0.36, -0.4, 0.32],
        [0.3, 0.4, -0.4],
        {"lam_length": 1.0, "critic_lam": 1.0, "whiten": False, "value_coef": 0.0},
    ),
    # Whitened 0.5, 0.4, -0.4: mean 1/6, variance ((1/3)^2 + (7/30)^2 + (17/30)^2) / 2.
    Case(
        "ppo",
        [
            -1.2 * (1 / 3) / (W := math.sqrt(((1 / 3) ** 2 + (7 / 30) ** 2 + (17 / 30) ** 2) / 2)),
            -(7 / 30) / W,
            0.8 * (17 / 30) / W,
        ],
        None,
        {"value_coef": 0.0},
    ),
    # Warming up, only the critic learns.
    Case(
        "ppo",
        [0.25 * 0.09, 0.25 * 0.16, 0.25 * 0.04],
        None,
        {"critic_warmup": 101},
    ),
]


def prepared(case: Case) -> tuple[Any, Batch]:
    algorithm = ALGORITHMS[case.name](**case.settings)
    batch = hand_batch(case.demonstrated).with_(
        state={"progress": 0.5, "max_completion_length": 2.0, "steps": 100.0}
    )
    return algorithm, algorithm.prepare(batch)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_numbers_computed_by_hand(case: Case) -> None:
    algorithm, batch = prepared(case)
    if case.advantages is not None:
        got = chosen(batch.advantages, batch)
        torch.testing.assert_close(got, torch.tensor(case.advantages), rtol=1e-5, atol=1e-6)
    loss = algorithm.loss(hand_policy(batch), batch)
    if algorithm.unit == "token":
        assert loss.shape == batch.tokens.shape and not loss[~batch.mask].any()
        loss = chosen(loss, batch)
    expected = torch.tensor(case.loss, dtype=torch.float64)
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("case", [c for c in CASES if c.gradcheck], ids=str)
def test_gradient_by_finite_differences(case: Case) -> None:
    algorithm, batch = prepared(case)
    doubled = {
        name: value.double()
        for name in ("advantages", "returns", "values", "old_logps", "ref_logps")
        if (value := getattr(batch, name)) is not None
    }
    batch = batch.with_(**doubled)
    policy = hand_policy(batch)

    def loss(logps: torch.Tensor, values: torch.Tensor, kl: torch.Tensor) -> torch.Tensor:
        return algorithm.loss(PolicyOutput(logps, policy.entropy, values, kl), batch).sum()

    inputs = tuple(x.detach().clone().requires_grad_() for x in (policy.logps, policy.values, policy.kl))
    assert torch.autograd.gradcheck(loss, inputs)


def test_every_online_algorithm_is_in_the_table() -> None:
    online = {name for name, cls in ALGORITHMS.items() if cls.online}
    assert online - {case.name for case in CASES} == {"cory"}  # it has a test of its own: it needs four


def test_cory_shares_rewards_within_pairs() -> None:
    # Pioneers 1 and 0, observers 0 and 0. Shared: the first pair 1, the second 0. Among pioneers, and
    # among observers, that is 1 against 0: +-A.
    roles = [(0.0, 0.0, 1.0), (0.0, 1.0, 0.0), (1.0, 0.0, 0.0), (1.0, 1.0, 0.0)]
    sides = [
        completion((10 + i,), reward, values={"pair": pair, "observer": observer})
        for i, (pair, observer, reward) in enumerate(roles)
    ]
    algorithm = ALGORITHMS["cory"]()
    batch = algorithm.prepare(Batch.build([group(0, *sides)]))
    torch.testing.assert_close(chosen(batch.advantages, batch), torch.tensor([A, A, -A, -A]))
    logps = spread(batch, {t: -1.0 for t in range(10, 14)}, torch.float64).requires_grad_()
    loss = algorithm.loss(PolicyOutput(logps), batch)
    loss.sum().backward()
    # Stepped on once, the ratio is 1: the loss is -A, and so is its gradient.
    torch.testing.assert_close(
        chosen(loss.detach(), batch), torch.tensor([-A, -A, A, A]).double(), rtol=1e-5, atol=0
    )
    torch.testing.assert_close(logps.grad, loss.detach())
    assert [algorithm.copy_of(step, observer=False) for step in (0, 49, 50, 100)] == [0, 0, 1, 0]
    assert [algorithm.copy_of(step, observer=True) for step in (0, 49, 50, 100)] == [1, 1, 0, 1]


@pytest.mark.parametrize(
    ("name", "settings", "expected"),
    [
        # The weight counts as a constant: -weight * A.
        ("cispo", {"epsilon_high": 0.2}, [-1.2 * A, -A, 0.5 * A]),
        # -ratio * (log teacher - log p): -1.5 * -0.1, 0.2, -0.5 * 0.3.
        ("distill", {"estimator": "sampled"}, [0.15, 0.2, -0.15]),
        # ... times 1/2, and -ratio * A with A = +-1/2.
        (
            "distill",
            {"estimator": "sampled", "divergence_weight": 0.5, "reward_weight": 1.0},
            [0.075 - 0.75, 0.1 - 0.5, -0.075 + 0.25],
        ),
        ("vespo", {}, [-PHI_A * A, -PHI_A * A, PHI_B * A]),
        ("topr", {}, [-0.5, -0.5, 0.25]),
        ("dppo", {"ratio_cap": 1.2}, [-1.2 * A, -A, 0.5 * A]),
    ],
)
def test_gradient_where_a_factor_counts_as_constant(name: str, settings: Any, expected: list[float]) -> None:
    algorithm, batch = prepared(Case(name, [], settings=settings))
    policy = hand_policy(batch)
    algorithm.loss(policy, batch).sum().backward()
    got = chosen(policy.logps.grad, batch)
    torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mode", "weights"),
    [
        # old / sampler = 3, 0.5 for a, 1 for b: the product is 1.5, its square root 1.2247.
        ("none", [1, 1, 1]),
        ("token_truncate", [2, 0.5, 1]),
        ("token_mask", [0, 0.5, 1]),
        ("sequence_truncate", [1.5, 1.5, 1]),
        ("sequence_mask", [1.5, 1.5, 1]),
        ("geometric_mask", [1, 1, 1]),
    ],
)
def test_correction_for_the_sampler(mode: str, weights: list[float]) -> None:
    algorithm = ALGORITHMS["grpo"](correction=mode, correction_cap=2.0, correction_floor=0.1)
    batch = hand_batch()
    shift = {10: math.log(3), 11: math.log(0.5), 12: 0.0}
    batch = batch.with_(sampler_logps=batch.old_logps - spread(batch, shift))
    batch = algorithm.prepare(batch)
    policy = hand_policy(batch)
    got = chosen(algorithm.weights(policy, batch), batch)
    torch.testing.assert_close(got.float(), torch.tensor(weights, dtype=torch.float32))
    plain = torch.tensor([-1.2 * A, -A, 0.8 * A]) * torch.tensor(weights)
    torch.testing.assert_close(chosen(algorithm.loss(policy, batch), batch).detach().float(), plain)


def test_the_masking_corrections_drop_what_lies_outside() -> None:
    batch = hand_batch()
    batch = batch.with_(sampler_logps=batch.old_logps - spread(batch, {10: 1.0, 11: 1.0, 12: 0.0}))
    policy = hand_policy(batch)
    for mode, weights in (
        ("sequence_mask", [0, 0, 1]),
        ("geometric_mask", [0, 0, 1]),
        ("token_mask", [0, 0, 1]),
    ):
        algorithm = ALGORITHMS["grpo"](correction=mode, correction_cap=2.0)
        assert chosen(algorithm.weights(policy, batch), batch).tolist() == weights, mode


def test_weights_of_whole_sequences_are_to_the_policy_that_sampled() -> None:
    """Not to the policy before the step: a's ratio to the sampler is 1.5 * 2 there, b's 0.5 * 4."""
    batch = hand_batch()
    batch = batch.with_(sampler_logps=batch.old_logps - spread(batch, {10: math.log(2), 12: math.log(4)}))
    for name, weights in (
        ("vespo", [3.0**2 * math.exp(3 * -2)] * 2 + [2.0**3 * math.exp(2 * -1)]),
        ("topr", [1.0, 1.0, 1.0]),
    ):
        algorithm = ALGORITHMS[name]()
        prepared = algorithm.prepare(batch)
        policy = hand_policy(batch)
        algorithm.loss(policy, prepared).sum().backward()
        got = chosen(policy.logps.grad, batch) / -chosen(prepared.advantages, batch)
        torch.testing.assert_close(got.float(), torch.tensor(weights))
        assert "correction: none" in " ".join(ALGORITHMS[name](correction="token_truncate").conflicts(4))


def test_m2po_masks_the_largest_moves_until_their_mean_square_is_small() -> None:
    # Squares of log old - log sampler: 0.01, 0.16 and 0.04; means of the smallest 0.01, 0.025 and 0.07.
    batch = hand_batch()
    batch = batch.with_(sampler_logps=batch.old_logps - spread(batch, {10: 0.1, 11: -0.4, 12: 0.2}))
    for bound, kept in ((0.001, [0, 0, 0]), (0.02, [1, 0, 0]), (0.04, [1, 0, 1]), (0.1, [1, 1, 1])):
        advantages = ALGORITHMS["m2po"](second_moment=bound).prepare(batch).advantages
        expected = torch.tensor([A, A, -A]) * torch.tensor(kept)
        torch.testing.assert_close(chosen(advantages, batch), expected)
    algorithm = ALGORITHMS["m2po"]()
    loss = algorithm.loss(hand_policy(batch), algorithm.prepare(batch))
    # Ratios to the sampler: 1.5 e^0.1 and 0.5 e^0.2; a1 is masked.
    expected = torch.tensor([-1.5 * math.exp(0.1) * A, 0.0, 0.5 * math.exp(0.2) * A])
    torch.testing.assert_close(chosen(loss, batch).detach().float(), expected)


def test_clip_cov_draws_by_the_version_and_at_least_one() -> None:
    drawn = set()
    for version in range(8):
        algorithm = ALGORITHMS["clip_cov"](covariance_low=0.2)  # a0 and b lie between
        batch = hand_batch().with_(state={"version": float(version)})
        once, twice = (chosen(algorithm.prepare(batch).advantages, batch).tolist() for _ in range(2))
        assert once == twice and once.count(0.0) == 1
        drawn.add(once.index(0.0))
    assert drawn == {0, 2}


def test_the_entropy_bonus_follows_its_target() -> None:
    algorithm = ALGORITHMS["grpo"](entropy_target=0.5, entropy_coef_step=0.01)
    state: dict[str, float] = {}
    weights = []
    for entropy in (0.4, 0.4, 0.6, 0.45, 0.7, 0.7, 0.7):
        state = algorithm.next_state(state, {"policy/entropy": entropy})
        weights.append(round(algorithm.entropy_weight(state), 6))
    # Up by 0.01 below the target, down above, where the bonus does not apply; never negative.
    assert weights == [0.01, 0.02, 0.0, 0.02, 0.0, 0.0, 0.0] and state["entropy_coef"] == 0.0
    assert algorithm.outputs == {"entropy"} and algorithm.report(hand_batch())["policy/entropy_coef"] == 0.0
    ppo = ALGORITHMS["ppo"](entropy_target=0.5)
    assert ppo.next_state({}, {"policy/entropy": 0.1}) == {"entropy": 0.1, "entropy_coef": 0.005, "steps": 1}


def test_demonstrated_tokens_have_no_sampler_to_correct_for() -> None:
    batch = hand_batch(demonstrated=1)
    batch = fill(batch, {"sampler_logps": {t: x - 5.0 for t, x in LOGPS.items()}})
    for mode in ("token_truncate", "sequence_truncate", "geometric_mask"):
        weights = ALGORITHMS["prefix_rft"](correction=mode).weights(hand_policy(batch), batch)
        assert chosen(weights, batch)[0] == 1.0


def test_dual_clip_bounds_the_loss_of_a_bad_token() -> None:
    # b0 with ratio 5 and A = -1: min(-5, -1.2) = -5, raised to -3 by the dual clip.
    algorithm = ALGORITHMS["max_rl"](dual_clip=3.0)
    batch = algorithm.prepare(hand_batch())
    batch = batch.with_(old_logps=batch.old_logps - spread(batch, {12: math.log(10)}))
    assert chosen(algorithm.loss(hand_policy(batch), batch), batch)[2].item() == pytest.approx(3.0)


def test_diagnostics_count_what_is_clipped() -> None:
    algorithm = ALGORITHMS["grpo"]()
    batch = algorithm.prepare(hand_batch())
    found = algorithm.metrics(hand_policy(batch), batch)
    assert chosen(found["policy/clip_fraction"], batch).tolist() == [1.0, 0.0, 1.0]
    torch.testing.assert_close(chosen(found["policy/ratio"], batch).float(), torch.tensor([1.5, 1.0, 0.5]))
    # k3 to the old policy: 1 / ratio - 1 + log ratio.
    expected = [1 / r - 1 + math.log(r) for r in (1.5, 1.0, 0.5)]
    torch.testing.assert_close(
        chosen(found["policy/kl"], batch).float(), torch.tensor(expected), rtol=1e-4, atol=1e-6
    )
    assert not any(x.requires_grad for x in found.values())
    assert algorithm.report(batch) == {"group/degenerate": 0.0, "group/degenerate_share": 0.0}
