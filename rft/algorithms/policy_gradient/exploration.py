"""Settings of all policy gradients that keep the policy exploring; all are off by default."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from rft.algorithms.base import Algorithm, PolicyOutput, required, setting
from rft.algorithms.math.policy_gradient import certain_tokens
from rft.batch import Batch


@dataclass(frozen=True)
class Exploration(Algorithm):
    """Base of policy gradients: entropy in the loss and in the advantages, and a reference that follows.

    - `entropy_coef`: an entropy bonus, except on demonstrated tokens.
    - `entropy_target`: its weight changes by `entropy_coef_step` per step, up while the entropy is below the
      target and else down, and the bonus applies only below it (He et al., "Skywork open reasoner 1", 2025,
      section 4.5; there with the entropy of the step itself, here with that of the step before).
    - `entropy_advantage`: A + min(alpha * H, |A| / kappa), with the entropy H before the step as a constant
      (Cheng et al., "Reasoning with exploration", 2025, eq. 5 and 6).
    - `top_entropy`: the advantage of all but the most uncertain tokens of a step is 0; they still count in
      averages (Wang et al., "Beyond the 80/20 rule", 2025, eq. 5).
    - `refresh_reference`: the KL is to a recent policy (DeepSeekMath's iterations), and with
      `reset_optimizer` the optimizer starts anew each time (Liu et al., "ProRL", 2025, section 3.2.2).
    """

    entropy_coef: float = setting(0.0, "weight of the entropy bonus, or its initial weight", ge=0)
    entropy_target: float | None = setting(
        None, "entropy, in nats per token, that an adaptive weight of the bonus aims at; null: fixed", gt=0
    )
    entropy_coef_step: float = setting(0.005, "change of the adaptive weight per step", gt=0)
    entropy_advantage: float = setting(
        0.0, "added to the advantage: this factor times the token's entropy, see entropy_advantage_cap", ge=0
    )
    entropy_advantage_cap: float = setting(
        2.0, "bound of the added advantage: the size of the advantage divided by this", gt=1
    )
    top_entropy: float = setting(
        1.0, "fraction of tokens, by highest entropy, that have an advantage", gt=0, le=1
    )
    refresh_reference: int = setting(
        0, "interval, in steps, of copying the policy to the reference; 0: never", ge=0
    )
    reset_optimizer: bool = setting(False, "reset the optimizer at each refresh of the reference")

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"old_entropy"} if self.entropy_advantage or self.top_entropy < 1 else ())

    @property
    def outputs(self) -> frozenset[str]:
        return frozenset({"entropy"} if self.has_bonus else ())

    @property
    def has_bonus(self) -> bool:
        """Return whether the loss contains an entropy bonus."""
        return self.entropy_coef > 0 or self.entropy_target is not None

    def explore(self, batch: Batch) -> Batch:
        """Return a batch with advantages changed by `entropy_advantage` and `top_entropy`."""
        if not self.entropy_advantage and self.top_entropy == 1:
            return batch
        advantages = required(batch.advantages, "advantages")
        entropy = required(batch.old_entropy, "old_entropy")
        if self.entropy_advantage:
            bound = advantages.abs() / self.entropy_advantage_cap
            advantages = advantages + torch.minimum(self.entropy_advantage * entropy, bound)
        if self.top_entropy < 1:
            advantages = advantages.index_fill(0, certain_tokens(entropy, batch.mask, self.top_entropy), 0.0)
        return batch.with_(advantages=advantages)

    def entropy_bonus(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        """Return the weighted entropy of each token, [T]; 0 on demonstrated tokens."""
        entropy = required(policy.entropy, "policy.entropy")
        if batch.demonstrated is not None:
            entropy = entropy.masked_fill(batch.demonstrated, 0)
        return self.entropy_weight(batch.state) * entropy

    def entropy_weight(self, state: Mapping[str, float]) -> float:
        """Return the weight of the entropy bonus: 0 while the entropy is above `entropy_target`."""
        if self.entropy_target is None:
            return self.entropy_coef
        above = state.get("entropy", 0.0) > self.entropy_target
        return 0.0 if above else state.get("entropy_coef", self.entropy_coef)

    def next_state(self, state: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
        if self.entropy_target is None or "policy/entropy" not in metrics:
            return dict(state)
        entropy = metrics["policy/entropy"]
        change = self.entropy_coef_step if entropy < self.entropy_target else -self.entropy_coef_step
        coefficient = max(state.get("entropy_coef", self.entropy_coef) + change, 0.0)
        return {**state, "entropy": entropy, "entropy_coef": coefficient}

    def report(self, batch: Batch) -> dict[str, float]:
        """Return policy/entropy_coef, if it is adaptive."""
        weight = self.entropy_weight(batch.state)
        return {} if self.entropy_target is None else {"policy/entropy_coef": weight}

    def conflicts(self, num_generations: int) -> list[str]:
        problems = super().conflicts(num_generations)
        if self.refresh_reference and not self.needs_reference:
            problems.append(
                "refresh_reference needs a reference, and none is loaded; write beta: 0.01 to load one, or "
                "refresh_reference: 0"
            )
        if self.reset_optimizer and not self.refresh_reference:
            problems.append(
                "reset_optimizer acts when the reference is refreshed, and it never is; "
                "set refresh_reference, or remove reset_optimizer"
            )
        return problems
