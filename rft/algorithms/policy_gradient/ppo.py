"""PPO: clipped policy gradient with a critic and GAE."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from rft.algorithms.base import PolicyOutput, required, setting
from rft.algorithms.math.policy_gradient import explained_variance, gae, whiten
from rft.algorithms.math.sequences import at_last_token
from rft.algorithms.policy_gradient.base import ClippedPolicyGradient
from rft.batch import Batch


@dataclass(frozen=True)
class PPO(ClippedPolicyGradient):
    """Schulman et al., "Proximal policy optimization" (2017), eq. 7 and 9; for language models Ouyang
    et al. (2022). Length-adaptive and decoupled lambda: Yuan et al., "VAPO" (2025), section 4.1.

    The reward of a completion is assigned to its last token, and the KL penalty to each token for
    `kl_in: reward`. Advantages are GAE(gamma, lam) over values of the critic (a separate model, or a head on
    the policy's trunk); the critic is trained on returns computed with `critic_lam`. For a completion
    truncated by the length limit, the return is bootstrapped from the critic's value of the state after its
    last token (Pardo et al., "Time limits in reinforcement learning", 2018, eq. 6). If the limit is part of
    the task, set `bootstrap_truncated: false`. `entropy_coef` is eq. 9's c2.

    Unlike `grpo` it assigns credit to individual tokens, but depends on the accuracy of the critic. The
    defaults are therefore a separate critic that learns much faster than the policy, and initial steps that
    train only the critic. With gamma = lam = 1 and a critic that predicts the group's mean it is `dr_grpo`.

    With `kl_target`, the weight of the KL is adapted: it increases or decreases by up to 2 % per step if the
    mean KL per token is above or below the target (Ziegler et al. 2019, section 2.2).
    """

    kl_in: Literal["loss", "reward"] = setting("reward", "apply the KL as a loss term or as a reward penalty")
    gamma: float = setting(1.0, "discount per token", ge=0, le=1)
    lam: float = setting(1.0, "GAE lambda of the policy", ge=0, le=1)
    critic_lam: float | None = setting(None, "GAE lambda of the critic's returns; null: lam", ge=0, le=1)
    lam_length: float | None = setting(
        None, "alpha of length-adaptive GAE, lambda = 1 - 1 / (alpha * length); null: lam", gt=0
    )
    whiten: bool = setting(
        True, "normalise advantages to mean 0 and standard deviation 1 over trained tokens"
    )
    value_coef: float = setting(0.5, "weight of the critic loss", ge=0)
    value_clip: float | None = setting(
        None, "clip range of the value around the old value; null: no clipping", gt=0
    )
    critic: Literal["head", "model"] = setting(
        "model", "critic: a separate model, initialised from the policy, or a head on the policy's trunk"
    )
    critic_rate: float = setting(75.0, "learning rate of the critic, relative to the policy's", gt=0)
    critic_warmup: int = setting(10, "initial steps that train only the critic", ge=0)
    bootstrap_truncated: bool = setting(
        True, "bootstrap the return of truncated completions from the critic, instead of 0"
    )
    kl_target: float | None = setting(
        None, "target KL per token, in nats, of an adaptive beta; null: fixed beta", gt=0
    )

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | {"values"} | ({"end_values"} if self.bootstrap_truncated else set())

    @property
    def outputs(self) -> frozenset[str]:
        return super().outputs | {"values"}

    @property
    def separate_critic(self) -> bool:
        return self.critic == "model"

    @property
    def before_prepare(self) -> frozenset[str]:
        return super().before_prepare | (self.needs & {"old_logps"})  # from the same forward as the values

    @property
    def reads_order(self) -> bool:
        return True

    def acts_on(self, batch: Batch) -> torch.Tensor:
        return batch.mask  # the critic is trained on every token

    def token_rewards(self, batch: Batch) -> torch.Tensor:
        """Return token rewards, [T]: the completion's reward at its last token, minus the KL penalty."""
        return at_last_token(required(batch.rewards, "rewards"), batch) - self.kl_penalty(batch)

    def critic_only(self, state: Mapping[str, float]) -> bool:
        return state.get("steps", 0) < self.critic_warmup

    def _gae(self, batch: Batch, lam: float | torch.Tensor) -> torch.Tensor:
        """Return generalised advantage estimates over the critic's values, [T]."""
        values = required(batch.values, "values")
        ends = required(batch.end_values, "end_values") if self.bootstrap_truncated else 0.0
        return gae(self.token_rewards(batch), values, batch, self.gamma, lam, ends)

    def prepare(self, batch: Batch) -> Batch:
        values = required(batch.values, "values")
        lam = self.lam if self.critic_lam is None else self.critic_lam
        returns = (self._gae(batch, lam) + values).masked_fill(~batch.mask, 0)
        return super().prepare(batch.with_(returns=returns))

    def advantages(self, batch: Batch) -> torch.Tensor:
        lam: float | torch.Tensor = self.lam
        if self.lam_length is not None:
            lam = (1 - 1 / (self.lam_length * batch.lengths.clamp(min=1))).clamp(min=0)
        advantages = self._gae(batch, lam)
        return whiten(advantages, self.trained(batch)) if self.whiten else advantages

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        loss = super().loss(policy, batch) * float(not self.critic_only(batch.state))
        return loss + self.value_coef * self.critic_loss(policy, batch)

    def critic_loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        """Return half the squared error, [T]: the larger of those of the value and the clipped value."""
        values, returns = required(policy.values, "policy.values"), required(batch.returns, "returns")
        error = (values - returns).square()
        if self.value_clip is not None:
            old = required(batch.values, "values")
            near = old + (values - old).clamp(-self.value_clip, self.value_clip)
            error = torch.maximum(error, (near - returns).square())
        return error.masked_fill(~batch.mask, 0) / 2

    def kl_weight(self, state: Mapping[str, float]) -> float:
        return state.get("kl_weight", self.beta)

    def next_state(self, state: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
        state = super().next_state(state, metrics)
        state["steps"] = state.get("steps", 0) + 1
        if self.kl_target is not None and self.beta and "policy/kl_ref" in metrics:
            error = min(max(metrics["policy/kl_ref"] / self.kl_target - 1, -0.2), 0.2)
            state["kl_weight"] = self.kl_weight(state) * (1 + 0.1 * error)
        return state

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        return {**super().metrics(policy, batch), "critic/loss": self.critic_loss(policy, batch).detach()}

    def report(self, batch: Batch) -> dict[str, float]:
        values, returns = required(batch.values, "values"), required(batch.returns, "returns")
        explained = explained_variance(values, returns, batch.mask)
        metrics = {} if math.isnan(explained) else {"critic/explained_variance": explained}
        if self.kl_target is not None:
            metrics["policy/kl_coefficient"] = self.kl_weight(batch.state)
        return {**super().report(batch), **metrics}

    def conflicts(self, num_generations: int) -> list[str]:
        problems = super().conflicts(num_generations)
        if self.kl_target is not None and not self.beta:
            problems.append("kl_target adapts beta, and beta is 0; write beta: 0.05 or leave kl_target out")
        return problems
