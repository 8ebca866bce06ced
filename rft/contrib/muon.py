"""Muon for the matrices of the layers, AdamW for everything else."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from rft.config.learner import LearnerConfig
from rft.learner.strategy import outside_layers


class MuonAdamW(torch.optim.Optimizer):
    """torch's Muon and AdamW as one optimizer, with one list of groups and one state.

    Jordan et al., "Muon" (2024): the momentum of a matrix is orthogonalised, so that all its directions move
    equally far. Embeddings, the LM head and vectors are left to AdamW. Updates are scaled to the size of
    AdamW's (Liu et al., "Muon is scalable for LLM training", 2025, eq. 4), so both use the same learning rate
    and weight decay.
    """

    def __init__(self, matrices: list[dict[str, Any]], others: list[dict[str, Any]], **adamw: Any) -> None:
        lr = adamw["lr"]
        self.muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
        self.adamw = torch.optim.AdamW(others, fused=True, **adamw)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Let both optimizers work on this one's groups and state."""
        for inner, key in ((self.muon, "ns_steps"), (self.adamw, "betas")):
            inner.param_groups = [group for group in self.param_groups if key in group]
            inner.state = self.state

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have a gradient; `closure` is not supported."""
        if closure is not None:
            raise ValueError("MuonAdamW takes no closure")
        self.muon.step()
        self.adamw.step()

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self._share()


def make(model: nn.Module, config: LearnerConfig, extra: list[dict[str, Any]]) -> MuonAdamW:
    """Make the optimizer of a model's trained parameters and of the groups `extra` (a critic's)."""
    outside = outside_layers(model)
    trained = [p for p in model.parameters() if p.requires_grad]
    hidden = [p for p in trained if p.ndim == 2 and id(p) not in outside]
    rest = [p for p in trained if p.ndim != 2 or id(p) in outside]
    decay = config.weight_decay
    others = [
        {"params": [p for p in rest if p.ndim >= 2], "weight_decay": decay},
        {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        *extra,
    ]
    return MuonAdamW(
        [{"params": hidden, "weight_decay": decay}],
        others,
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
    )
