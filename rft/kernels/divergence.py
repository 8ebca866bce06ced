"""Per-token divergences between two heads' full distributions, without materialising [T, V] logits.

For distillation (GKD) and full-vocabulary KL penalties (ASFT). p is the policy, q the reference.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rft.kernels import logprob_chunked as chunked
from rft.kernels import logprob_reference as reference
from rft.kernels.logprob_common import LogitMap, check_head, shape, spread
from rft.kernels.logprob_linear import HeadProducts

Direction = Literal["reverse", "forward", "js"]


@dataclass(frozen=True)
class Divergence:
    """reverse: KL(p || q). forward: KL(q || p). js: beta KL(q || m) + (1 - beta) KL(p || m) with
    m = beta q + (1 - beta) p (GKD, Agarwal et al. 2023, the generalised Jensen-Shannon divergence)."""

    direction: Direction = "reverse"
    beta: float = 0.5

    def __post_init__(self) -> None:
        if self.direction not in get_args(Direction):
            raise ValueError(
                f"direction must be one of {', '.join(get_args(Direction))}, got {self.direction!r}"
            )
        if not 0 < self.beta < 1:
            raise ValueError(
                f"beta must lie between 0 and 1, got {self.beta}; its limits 0 and 1 are forward and reverse"
            )

    def value(self, logp: Tensor, logq: Tensor) -> Tensor:
        """The divergence [n] of log-probs [n, V]; differentiable."""
        if self.direction == "reverse":
            return _kl(logp, logq)
        if self.direction == "forward":
            return _kl(logq, logp)
        mixed = self._mixture(logp, logq)
        return self.beta * _kl(logq, mixed) + (1 - self.beta) * _kl(logp, mixed)

    def _mixture(self, logp: Tensor, logq: Tensor) -> Tensor:
        log_beta, log_rest = (torch.tensor(x, dtype=logp.dtype).log() for x in (self.beta, 1 - self.beta))
        return torch.logaddexp(logq + log_beta, logp + log_rest)

    def gradient_(self, logp: Tensor, logq: Tensor) -> Tensor:
        """Overwrite logp [r, V] with the divergence's gradient to the policy's logits; logq is scratch space.

        d KL(q || p) / dz = p - q. The others are p (c - sum p c), with c = log p - log q for the reverse
        KL and c = (1 - beta) (log p - log m) for js.
        """
        if self.direction == "forward":
            return logp.exp_().sub_(logq.exp_())
        p = logp.exp()
        if self.direction == "js":
            c = logp.sub_(self._mixture(logp, logq)).mul_(1 - self.beta)
        else:
            c = logp.sub_(logq)
        c.masked_fill_(p == 0, 0.0)
        mean = (p * c).sum(1, keepdim=True)
        return c.sub_(mean).mul_(p)


def _kl(logp: Tensor, logq: Tensor) -> Tensor:
    """KL(p || q) [n]; tokens with p = 0 contribute 0."""
    p = logp.exp()
    return (p * torch.where(p > 0, logp - logq, 0.0)).sum(1)


def head_divergence(
    hidden: Tensor,
    weight: Tensor,
    ref_hidden: Tensor,
    ref_weight: Tensor,
    direction: Direction = "reverse",
    *,
    beta: float = 0.5,
    bias: Tensor | None = None,
    ref_bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: Tensor | None = None,
    backend: Literal["auto", "reference", "chunked"] = "auto",
) -> Tensor:
    """Return the divergence [T] float32, in nats, of the policy's distributions from the reference's.

    Args:
        hidden, weight, bias: the policy's, [T, H], [V, H], [V]; gradients flow to these.
        ref_hidden, ref_weight, ref_bias: the reference's, [T, H'], [V, H'], [V]; constants.
        direction: "reverse" KL(policy || reference), "forward" KL(reference || policy), or "js".
        beta: the reference's share in the mixture of "js".
        temperature, softcap, logit_scale: of both heads (see `token_logps`).
        mask: [T] bool; rows that are False skip the heads and get 0.

    Raises ValueError for inconsistent shapes or dtypes, naming them.
    """
    check_head(hidden, weight, bias)
    check_head(ref_hidden, ref_weight, ref_bias, names=("ref_hidden", "ref_weight"))
    if hidden.shape[0] != ref_hidden.shape[0] or weight.shape[0] != ref_weight.shape[0]:
        raise ValueError(
            f"policy and reference differ in rows or vocabulary: hidden {shape(hidden)}, "
            f"weight {shape(weight)}; ref_hidden {shape(ref_hidden)}, ref_weight {shape(ref_weight)}"
        )
    if backend not in ("auto", "reference", "chunked"):
        raise ValueError(f"backend must be one of auto, reference, chunked, got {backend!r}")
    measure, f = Divergence(direction, beta), LogitMap(temperature, softcap, logit_scale)
    if mask is not None:
        if mask.shape != hidden.shape[:1] or mask.dtype != torch.bool:
            raise ValueError(
                f"mask must be [{hidden.shape[0]}] bool like the rows of hidden, got {shape(mask)}"
            )
        rows = mask.nonzero()[:, 0]
        few = _divergence(
            (hidden[rows], weight, bias), (ref_hidden[rows], ref_weight, ref_bias), f, measure, backend
        )
        return spread(few, rows, mask.shape[0])
    return _divergence((hidden, weight, bias), (ref_hidden, ref_weight, ref_bias), f, measure, backend)


Part = tuple[Tensor, Tensor, Tensor | None]


def _divergence(policy: Part, ref: Part, f: LogitMap, measure: Divergence, backend: str) -> Tensor:
    if backend == "reference":
        z = reference.logits(policy[0], policy[1], bias=policy[2], logit_map=f)
        zq = reference.logits(ref[0].detach(), ref[1].detach(), bias=ref[2], logit_map=f).detach()
        return measure.value(z.log_softmax(1), zq.log_softmax(1))
    parameters = [x for x in policy[1:] if x is not None]
    frozen = not any(x.requires_grad for x in parameters)
    keep = frozen and policy[0].requires_grad and torch.is_grad_enabled()
    return HeadDivergence.apply(*policy, ref, f, measure, keep)


def _passes(policy: Part, ref: Part, f: LogitMap) -> tuple[chunked.Chunks, chunked.Chunks]:
    none = chunked.Targets(policy[0].new_empty(0, dtype=torch.int64))
    ours, theirs = (HeadProducts(x[1], None) for x in (policy, ref))
    p = chunked.Chunks(ours, policy[0], None, policy[2], none, f)
    return p, chunked.Chunks(theirs, ref[0], None, ref[2], none, f, like=p)


def _tiles(p: chunked.Chunks, q: chunked.Chunks, chunk: slice, ours: Tensor, theirs: Tensor) -> Any:
    """Yield (rows, inner rows, log p [r, V], log q [r, V], cap slope); overwrites the logits."""
    pairs = zip(p.tiles(chunk, ours, cap_slope=True), q.tiles(chunk, theirs), strict=True)
    for (rows, inner, z, cap_slope), (_, _, zq, _) in pairs:
        for x in (z, zq):
            x.sub_(x.logsumexp(1, keepdim=True))
        yield rows, inner, z, zq.to(z.dtype), cap_slope


class HeadDivergence(torch.autograd.Function):
    """(hidden, weight, bias, (ref_hidden, ref_weight, ref_bias), map, measure, keep) -> [T].

    `keep`: the head is frozen; the forward stores d divergence / d hidden instead of recomputing it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ref: Part,
        f: LogitMap,
        measure: Divergence,
        keep: bool,
    ) -> Tensor:
        p, q = _passes((hidden, weight, bias), ref, f)
        out = hidden.new_empty(hidden.shape[0], dtype=p.acc)
        grads = chunked.Gradients(p, {"hidden": keep})
        for (chunk, h, _, ours), (_, _, _, theirs) in zip(p, q, strict=True):
            for rows, inner, logp, logq, cap_slope in _tiles(p, q, chunk, ours, theirs):
                out[rows] = measure.value(logp, logq)
                if keep:
                    grad = measure.gradient_(logp, logq).mul_(f.slope)
                    chunked.finish_tile(grad, cap_slope, ours[inner])
            grads.add(chunk, h, None, ours)
        ctx.f, ctx.measure, ctx.keep = f, measure, keep
        if keep:
            ctx.save_for_backward(grads.hidden)
        else:
            ctx.save_for_backward(hidden, weight, bias, *ref)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> Any:
        if ctx.keep:
            (slopes,) = ctx.saved_tensors
            return slopes * upstream[:, None].to(slopes.dtype), *[None] * 6
        hidden, weight, bias, *ref = ctx.saved_tensors
        p, q = _passes((hidden, weight, bias), tuple(ref), ctx.f)
        grads = chunked.Gradients(p, dict(zip(chunked.NAMES, ctx.needs_input_grad[:3], strict=False)))
        for (chunk, h, _, ours), (_, _, _, theirs) in zip(p, q, strict=True):
            for rows, inner, logp, logq, cap_slope in _tiles(p, q, chunk, ours, theirs):
                grad = ctx.measure.gradient_(logp, logq).mul_(upstream[rows, None] * ctx.f.slope)
                chunked.finish_tile(grad, cap_slope, ours[inner])
            grads.add(chunk, h, None, ours)
        return *grads.for_inputs(bias)[:3], *[None] * 4
