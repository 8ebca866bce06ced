"""GaLore: Adam whose moments are kept in a low-rank subspace of each gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rft.config.learner import GaloreConfig
from rft.learner.spec import LearnerSpec
from rft.learner.strategy import Strategy, decay_groups, outside_layers


class Galore(Strategy):
    """Train all parameters with the optimizer memory of low-rank factors."""

    def __init__(self, spec: LearnerSpec, config: GaloreConfig) -> None:
        super().__init__(spec)
        self.config = config

    def optimizer(self, model: nn.Module, extra: list[dict[str, Any]]) -> torch.optim.Optimizer:
        strategy, config = self.config, self.spec.config
        # Only the layers' matrices are projected, as in the paper: other gradients are not low-rank.
        spared = outside_layers(model)
        groups = []
        for group in decay_groups(model, config.weight_decay):
            low = [
                p
                for p in group["params"]
                if p.ndim == 2 and id(p) not in spared and min(p.shape) > strategy.rank
            ]
            inside = {id(p) for p in low}
            rest = [p for p in group["params"] if id(p) not in inside]
            groups += [
                {**group, "params": low, "rank": strategy.rank},
                {**group, "params": rest, "rank": None},
            ]
        return GaloreAdamW(
            groups + extra,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            every=strategy.every,
            scale=strategy.scale,
        )


class GaloreAdamW(torch.optim.Optimizer):
    """AdamW; in groups with a `rank`, on P^T G instead of the gradient G (Zhao et al. 2024, algorithm 2).

    P holds the leading singular vectors of G on its shorter side, recomputed every `every` steps. The state
    per matrix [m, n] is P [min(m, n), rank] and two moments [rank, max(m, n)].
    """

    def __init__(
        self,
        params: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        every: int,
        scale: float,
    ) -> None:
        super().__init__(
            params,
            {
                "lr": lr,
                "betas": betas,
                "eps": eps,
                "every": every,
                "factor": scale,
                "rank": None,
                "weight_decay": 0.0,
            },
        )

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; `closure` is not supported."""
        if closure is not None:
            raise ValueError("GaLore takes no closure")
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._one(parameter, parameter.grad.float(), group)

    def _one(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        state.setdefault("step", 0)
        wide = gradient.ndim == 2 and gradient.shape[0] <= gradient.shape[1]
        if group["rank"] is not None:
            if state["step"] % group["every"] == 0:
                state["projection"] = _subspace(gradient if wide else gradient.t(), group["rank"])
            basis: Tensor = state["projection"]
            gradient = basis.t() @ (gradient if wide else gradient.t())
        if "first" not in state:
            state["first"], state["second"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
        state["step"] += 1
        (beta1, beta2), step = group["betas"], state["step"]
        state["first"].lerp_(gradient, 1 - beta1)
        state["second"].mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = (state["second"] / (1 - beta2**step)).sqrt_().add_(group["eps"])
        update = state["first"] / (1 - beta1**step) / size
        if group["rank"] is not None:
            update = group["factor"] * (state["projection"] @ update)
            update = update if wide else update.t()
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.to(parameter.dtype), alpha=-group["lr"])


def _subspace(gradient: Tensor, rank: int) -> Tensor:
    """Return the leading left singular vectors [m, rank] of a gradient [m, n], m <= n."""
    vectors, _, _ = torch.linalg.svd(gradient, full_matrices=False)
    return vectors[:, :rank].contiguous()
