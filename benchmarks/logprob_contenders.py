"""Ways to the log-probs of tokens under a head, and to their gradients: rft's paths and others'.

A contender takes hidden [T, H], weight [V, H], targets [T] and coefficients [T] (constant within runs of
`SEQUENCE` rows, summing to the usual mean) and returns (loss [], logps [T] or None), the loss being
sum(coefficients * logps).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rft.kernels.logprob import token_logps

SEQUENCE = 64
Answer = tuple[Tensor, Tensor | None]
Run = Callable[[Tensor, Tensor, Tensor, Tensor], Answer]


@dataclass(frozen=True)
class Contender:
    """name; its function; products: matrix products of size T H V that its task needs (2 operations per
    multiplication each), the measure of its baseline, which also says whether only the forward is run (1)
    and whether the weight is frozen (2)."""

    name: str
    run: Run
    products: Literal[1, 2, 3]

    @property
    def differentiates(self) -> bool:
        return self.products > 1

    @property
    def frozen(self) -> bool:
        return self.products == 2


def recompute(h: Tensor, w: Tensor, y: Tensor, c: Tensor) -> Answer:
    logps = token_logps(h, w, y)
    return (logps * c).sum(), logps


def with_entropy(h: Tensor, w: Tensor, y: Tensor, c: Tensor) -> Answer:
    logps, _ = token_logps(h, w, y, entropy=True)
    return (logps * c).sum(), logps


def known(h: Tensor, w: Tensor, y: Tensor, c: Tensor) -> Answer:
    """The gradient is predicted, as the learner does where the loss is linear in the log-probs."""
    logps = token_logps(h, w, y, expected=c)
    return (logps * c).sum(), logps


def plain(h: Tensor, w: Tensor, y: Tensor, c: Tensor) -> Answer:
    logps = (h @ w.t()).float().log_softmax(-1).gather(1, y[:, None])[:, 0]
    return (logps * c).sum(), logps


def checkpointed(h: Tensor, w: Tensor, y: Tensor, c: Tensor) -> Answer:
    """Chunks of 256 rows, recomputed in the backward by checkpointing, as in several trainers."""

    def chunk(h: Tensor, y: Tensor) -> Tensor:
        z = (h @ w.t()).float()
        return z.gather(1, y[:, None])[:, 0] - z.logsumexp(-1)

    parts = zip(h.split(256), y.split(256), strict=True)
    logps = torch.cat([checkpoint(chunk, a, b, use_reentrant=False) for a, b in parts])
    return (logps * c).sum(), logps


def torch_fused(h: Tensor, w: Tensor, y: Tensor, c: Tensor) -> Answer:
    logps = -torch.nn.functional.linear_cross_entropy(h, w, y, reduction="none").float()
    return (logps * c).sum(), logps


def trl(h: Tensor, w: Tensor, y: Tensor, c: Tensor) -> Answer:
    from trl.trainer.utils import selective_log_softmax

    logps = selective_log_softmax(h @ w.t(), y).float()
    return (logps * c).sum(), logps


def cut_cross_entropy(h: Tensor, w: Tensor, y: Tensor, c: Tensor) -> Answer:
    from cut_cross_entropy import linear_cross_entropy

    logps = -linear_cross_entropy(h, w, y, impl="torch_compile", reduction="none").float()
    return (logps * c).sum(), logps


def liger(h: Tensor, w: Tensor, y: Tensor, c: Tensor) -> Answer:
    """Liger's chunked GRPO loss, on policy and without KL: its gradient is that of mean(-A logp)."""
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    n = h.shape[0] // SEQUENCE
    advantages = -c[::SEQUENCE] * h.shape[0]
    loss = LigerFusedLinearGRPOLoss(
        beta=0.0, compiled=False, use_ref_model=False, chunk_size=1, loss_type="grpo"
    )
    y2 = y.view(n, SEQUENCE)
    return loss(h.view(n, SEQUENCE, -1), w, y2, torch.ones_like(y2), advantages)[0], None


OURS = (
    Contender("recompute", recompute, 3),
    Contender("loss-known", known, 3),
    Contender("frozen head", recompute, 2),
    Contender("forward", recompute, 1),
    Contender("forward, entropy", with_entropy, 1),
)
WRITTEN_HERE = (
    Contender("plain", plain, 3),
    Contender("plain forward", plain, 1),
    Contender("checkpointed chunks", checkpointed, 3),
    Contender("torch linear_cross_entropy", torch_fused, 3),
)
PEERS = (
    Contender("TRL selective_log_softmax", trl, 3),
    Contender("cut-cross-entropy compiled", cut_cross_entropy, 3),
    Contender("Liger chunked GRPO", liger, 3),
)
ALL = {c.name: c for c in (*OURS, *WRITTEN_HERE, *PEERS)}
