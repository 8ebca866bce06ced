"""Shared by all log-prob kernels: the map from a head's products to logits, and input validation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

CHUNK_BYTES = 1 << 25  # logits of one chunk
MIN_CHUNK_ROWS = 64  # fewer rows make matrix products slow


@dataclass(frozen=True)
class LogitMap:
    """Elementwise map from a head's products x = h W^T + b to the logits z that softmax sees.

    z = cap(logit_scale * x) / temperature, with cap(u) = softcap * tanh(u / softcap) (Gemma 2), the
    identity where `softcap` is None. `logit_scale` is Cohere's factor, or one over Granite's divisor.
    """

    temperature: float = 1.0
    softcap: float | None = None
    logit_scale: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be greater than 0, got {self.temperature}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be greater than 0, or None for no cap, got {self.softcap}")

    @property
    def slope(self) -> float:
        """dz/dx without the cap's factor 1 - tanh^2."""
        return self.logit_scale / self.temperature

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Compute the logits of products, out of place and differentiable."""
        if self.softcap is None:
            return x * self.slope
        return torch.tanh(x * (self.logit_scale / self.softcap)) * (self.softcap / self.temperature)

    def apply_(self, x: torch.Tensor, cap_slope: torch.Tensor | None = None) -> torch.Tensor:
        """Compute the logits of products in place; with a cap, write 1 - tanh^2 to `cap_slope` if given."""
        if self.softcap is None:
            return x if self.slope == 1 else x.mul_(self.slope)
        x.mul_(self.logit_scale / self.softcap).tanh_()
        if cap_slope is not None:
            torch.mul(x, x, out=cap_slope)
            cap_slope.neg_().add_(1)
        return x.mul_(self.softcap / self.temperature)


@dataclass(frozen=True)
class RowGradient:
    """A gradient of log-probs in which each element depends only on the log-prob of the same token.

    function: log-probs [T] -> gradients [T], on CPU. used: [T] bool, False where it is 0 for any log-prob.
    rows: [n] int64, the elements that are meant, in order; None: all.
    """

    function: Callable[[torch.Tensor], torch.Tensor]
    used: torch.Tensor
    rows: torch.Tensor | None = None

    def __getitem__(self, index: torch.Tensor) -> RowGradient:
        return replace(self, rows=index if self.rows is None else self.rows[index])

    def to(self, device: torch.device) -> RowGradient:
        return replace(
            self, used=self.used.to(device), rows=None if self.rows is None else self.rows.to(device)
        )

    @property
    def pulled(self) -> torch.Tensor:
        """[n] bool: the rows whose gradient can differ from 0."""
        return self.used if self.rows is None else self.used[self.rows]

    def __call__(self, part: slice, logps: torch.Tensor) -> torch.Tensor:
        """Return the gradients of the rows `part`, given their log-probs: [len(part)] each."""
        rows = torch.arange(len(self.used), device=logps.device) if self.rows is None else self.rows
        full = logps.new_zeros(len(self.used))
        full[rows[part]] = logps
        return self.function(full.cpu()).to(logps)[rows[part]]


_messages: list[str] = []


def add_message(line: str) -> None:
    """Store a line for the user: the kernel chosen in this process, and why."""
    _messages.append(line)


def pop_messages() -> list[str]:
    """Return and clear the lines since the last call."""
    messages = _messages.copy()
    _messages.clear()
    return messages


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which softmax is computed: float64 for float64, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def chunk_rows(count: int, vocab: int, itemsize: int) -> int:
    """Return how many of `count` rows, of `vocab` logits with `itemsize` bytes, are computed at a time."""
    return max(1, min(count, max(MIN_CHUNK_ROWS, CHUNK_BYTES // (vocab * itemsize))))


def spread(x: torch.Tensor, rows: torch.Tensor, size: int) -> torch.Tensor:
    """Scatter x [n, ...] to the indices `rows` of a zero tensor [size, ...]."""
    return x.new_zeros((size, *x.shape[1:])).index_copy(0, rows, x)


def shape(x: torch.Tensor) -> str:
    return f"{list(x.shape)} {str(x.dtype).removeprefix('torch.')}"


def check_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    names: Sequence[str] = ("hidden", "weight"),
) -> None:
    """Raise ValueError unless hidden is [T, H], weight [V, H], bias [V], all of one dtype and device."""
    h, w = names
    if hidden.dim() != 2:
        raise ValueError(f"{h} must be [T, H], got {shape(hidden)}; flatten batch and time first")
    if weight.dim() != 2:
        raise ValueError(f"{w} must be [V, H], got {shape(weight)}")
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{h} and {w} differ in width: {h} is {shape(hidden)}, {w} is {shape(weight)}; "
            f"{w} must be [V, {hidden.shape[1]}]"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"{w} has no rows: {shape(weight)}")
    if not hidden.is_floating_point() or hidden.dtype != weight.dtype:
        raise ValueError(f"{h} ({shape(hidden)}) and {w} ({shape(weight)}) must share one float dtype")
    if hidden.device != weight.device:
        raise ValueError(f"{h} is on {hidden.device}, {w} on {weight.device}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{weight.shape[0]}] like the rows of {w}, got {shape(bias)}")


def check_targets(targets: torch.Tensor, rows: int, vocab: int) -> None:
    """Raise ValueError unless targets is [T] int64 with values in 0..V-1.

    On CUDA the range is asserted on the device, to avoid a synchronisation.
    """
    if targets.dim() != 1 or targets.dtype != torch.int64 or targets.shape[0] != rows:
        raise ValueError(f"targets must be [{rows}] int64 like the rows of hidden, got {shape(targets)}")
    if not targets.numel():
        return
    if targets.is_cuda:
        torch._assert_async(((targets >= 0) & (targets < vocab)).all())
        return
    low, high = (int(x) for x in torch.aminmax(targets))
    if low < 0 or high >= vocab:
        raise ValueError(f"targets must lie in 0..{vocab - 1} (weight has {vocab} rows), found {low}..{high}")
