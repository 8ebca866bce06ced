"""Log-probs of tokens under a language model's head, without materialising the logits.

`token_logps` is the entry point. It picks the code path by which inputs need a gradient (see
`logprob_chunked`) and the implementation by device; `logprob_reference` is the plain baseline.
"""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, TypedDict, Unpack, get_args, overload

import torch
from torch import Tensor

from rft.config.learner import LIGER_REMEDY
from rft.kernels import logprob_chunked as chunked
from rft.kernels import logprob_reference as reference
from rft.kernels.logprob_common import (
    LogitMap,
    RowGradient,
    accumulate_dtype,
    check_head,
    check_targets,
    shape,
    spread,
)
from rft.utils.dotted import load_dotted

LIGER = "rft.contrib.liger.try_token_logps"  # an optional dependency's kernel, imported only if installed

Backend = Literal["auto", "reference", "chunked", "triton", "liger"]


class Options(TypedDict, total=False):
    """The optional keywords of `token_logps`."""

    bias: Tensor | None
    temperature: float
    softcap: float | None
    logit_scale: float
    lora: reference.Lora | None
    support: Tensor | None
    mask: Tensor | None
    expected: Tensor | RowGradient | None
    backend: Backend


@overload
def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    entropy: Literal[False] = ...,
    **options: Unpack[Options],
) -> Tensor: ...


@overload
def token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: Literal[True], **options: Unpack[Options]
) -> tuple[Tensor, Tensor]: ...


@overload
def token_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, entropy: bool, **options: Unpack[Options]
) -> Tensor | tuple[Tensor, Tensor]: ...


def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora: reference.Lora | None = None,
    support: Tensor | None = None,
    mask: Tensor | None = None,
    expected: Tensor | RowGradient | None = None,
    entropy: bool = False,
    backend: Backend = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """Return log-probs [T] float32 of targets, and with `entropy` the entropies [T] float32 in nats.

    The head's logits are softcap * tanh(logit_scale * (h W^T + b) / softcap) / temperature.

    Args:
        hidden: [T, H], float32, bfloat16, float16 or float64 (which makes the results float64).
        weight: [V, H], in hidden's dtype. If no parameter of the head requires a gradient, the forward
            stores d logp / d hidden and the backward is elementwise.
        targets: [T] int64.
        bias: [V].
        lora: (A [r, H], B [V, r], scale) adds scale * B A to the weight, without merging it.
        support: [T, ceil(V/8)] uint8 from `logprob_support`: the tokens among which each row's target was
            sampled (top-k, top-p). Probabilities are normalised over them; the target always counts.
        mask: [T] bool. Rows that are False skip the head; their log-prob and entropy are 0. Rows whose
            log-prob and entropy get no gradient are left out of the backward (on CPU).
        expected: [T], the gradient that the log-probs will get, up to a factor, if known, or as a function of
            each row's log-prob: the forward then also computes the backward (6 T H V instead of 8). If the
            real gradient differs, or entropies get one too, the result is the same, only slower. Used by
            "chunked" only.
        backend: "auto" takes "triton" on CUDA if it supports the call, or "liger" if liger-kernel is
            installed, supports the call and was measured to be faster; "chunked" otherwise. "liger" does
            scoring and frozen heads; other calls take "triton", or "chunked" if that is unsupported.

    Gradients flow to hidden, weight, bias, A and B, from log-probs and entropies alike.
    Raises ValueError for inconsistent shapes, dtypes or targets, naming them.
    """
    hidden, weight = _autocast(hidden, weight)
    check_head(hidden, weight, bias)
    check_targets(targets, hidden.shape[0], weight.shape[0])
    _check_extras(hidden, weight, lora, support, mask)
    if isinstance(expected, Tensor) and (expected.shape != hidden.shape[:1] or expected.requires_grad):
        raise ValueError(f"expected must be [{hidden.shape[0]}] without gradient, got {shape(expected)}")
    f = LogitMap(temperature, softcap, logit_scale)
    options = (f, entropy, backend)
    if mask is None:
        logps, entropies = _dispatch(hidden, weight, targets, bias, lora, support, expected, *options)
    else:
        rows = mask.nonzero()[:, 0]
        chosen = hidden[rows], weight, targets[rows], bias, lora
        support = None if support is None else support[rows]
        expected = None if expected is None else expected[rows]
        logps, entropies = _dispatch(*chosen, support, expected, *options)
        logps = spread(logps, rows, mask.shape[0])
        entropies = None if entropies is None else spread(entropies, rows, mask.shape[0])
    return logps if entropies is None else (logps, entropies)


def _autocast(hidden: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Cast both to autocast's dtype under autocast, as `torch.nn.functional.linear` does."""
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return hidden.to(dtype), weight.to(dtype)
    return hidden, weight


def _check_extras(
    hidden: Tensor, weight: Tensor, lora: reference.Lora | None, support: Tensor | None, mask: Tensor | None
) -> None:
    t, (v, h) = hidden.shape[0], weight.shape
    if lora is not None:
        a, b, _ = lora
        if a.dim() != 2 or b.dim() != 2 or a.shape[1] != h or b.shape != (v, a.shape[0]):
            raise ValueError(
                f"lora must be (A [r, {h}], B [{v}, r], scale), got A {shape(a)} and B {shape(b)}"
            )
    if support is not None and (support.shape != (t, -(-v // 8)) or support.dtype != torch.uint8):
        raise ValueError(
            f"support must be [{t}, {-(-v // 8)}] uint8 (see logprob_support), got {shape(support)}"
        )
    if mask is not None and (mask.shape != (t,) or mask.dtype != torch.bool):
        raise ValueError(f"mask must be [{t}] bool like the rows of hidden, got {shape(mask)}")


def choose_backend(backend: Backend, hidden: Tensor, plain: bool = True) -> Backend:
    """Resolve `backend` for `hidden`; "auto" may return "triton" and still switch to "liger" per call.

    `plain`: without LoRA factors, sampled support or float64, which Triton and Liger do not support.
    Raises ValueError for an unknown name, for "triton" if it is unsupported, and for "liger" if it is
    not installed or there is no GPU.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, got {backend!r}")
    if backend == "auto":
        serves = hidden.is_cuda and plain and importlib.util.find_spec("triton") is not None
        return "triton" if serves else "chunked"
    if backend == "liger" and not _liger_installed():
        raise ValueError(f"backend liger: liger-kernel is not installed: {LIGER_REMEDY}; or use auto")
    if backend == "triton" and not plain:
        raise ValueError("backend triton supports neither lora, support nor float64; use auto or chunked")
    if backend in ("triton", "liger") and not hidden.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend {backend} needs CUDA tensors, hidden is on {hidden.device}; use auto or chunked"
        )
    return "chunked" if backend == "liger" and not plain else backend


def _dispatch(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    lora: reference.Lora | None,
    support: Tensor | None,
    expected: Tensor | RowGradient | None,
    f: LogitMap,
    entropy: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor | None]:
    plain = lora is None and support is None and hidden.dtype != torch.float64
    chosen = choose_backend(backend, hidden, plain)
    if chosen == "reference":
        kept = None if support is None else chunked.unpack_support(support, weight.shape[0])
        logps, entropies = reference.token_logps(
            hidden, weight, targets, bias=bias, lora=lora, support=kept, logit_map=f
        )
        return logps, entropies if entropy else None
    if chosen in ("triton", "liger"):
        return _on_gpu(hidden, weight, targets, bias, f, entropy, backend)
    rows = chunked.Targets(targets, support)
    head = [x for x in (weight, bias) if x is not None]
    frozen = hidden.requires_grad and not any(x.requires_grad for x in head)
    if frozen and torch.is_grad_enabled() and not entropy and lora is None:
        return chunked.FrozenLogps.apply(hidden, weight, bias, rows, f), None
    low, low_rank = low_rank_factors(hidden, lora)
    if not torch.is_grad_enabled() or not any(
        x is not None and x.requires_grad for x in (hidden, weight, bias, low, low_rank)
    ):
        expected = None
    return chunked.ChunkedLogps.apply(hidden, weight, bias, low, low_rank, rows, f, entropy, expected)


def _on_gpu(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    f: LogitMap,
    entropy: bool,
    backend: Backend,
) -> tuple[Tensor, Tensor | None]:
    """Run Triton's kernels, or Liger's if it supports the call and is requested, or faster under "auto"."""
    from rft.kernels import logprob_triton  # imports triton, which exists on Linux only

    def by_triton(x: Tensor) -> Tensor:
        logps: Tensor = logprob_triton.TritonLogps.apply(x, weight, bias, targets, f, False)[0]
        return logps

    if backend != "triton" and _liger_installed():
        measure = by_triton if backend == "auto" else None
        logps = load_dotted(LIGER)(hidden, weight, bias, targets, f, entropy, measure)
        if logps is not None:
            return logps, None
    return logprob_triton.TritonLogps.apply(hidden, weight, bias, targets, f, entropy)


def _liger_installed() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def low_rank_factors(hidden: Tensor, lora: reference.Lora | None) -> tuple[Tensor | None, Tensor | None]:
    """Return LoRA's (scale * h A^T [T, r], B [V, r]); autograd propagates gradients to A and hidden."""
    if lora is None:
        return None, None
    a, b, scale = lora
    dtype = accumulate_dtype(hidden.dtype)
    return scale * (hidden.to(dtype) @ a.to(dtype).t()), b
