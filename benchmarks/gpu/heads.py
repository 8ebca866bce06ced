"""The fused log-prob kernels: correctness on fresh random data, then time and memory against plain, compiled,
Liger's and cut-cross-entropy's, at M = 16384 rows, H = 4096, V = 131072 in bfloat16.

Rates count 2 M H V operations for a forward, 8 M H V for forward and backward with a gradient of the
weight, 4 M H V with a frozen head, whatever a contender really computes. Targets: 650 and 500 TFLOP/s on an
H200, at most 1 GiB beyond the gradients, and a frozen head at 1.7 times the best peer.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from harness import Settings, guarded, settings, timed
from torch import Tensor

from rft.kernels.logprob import token_logps
from rft.kernels.logprob_common import pop_messages
from rft.kernels.logprob_reference import token_logps as reference_logps

COUNTED = {"forward": 2, "train": 8, "frozen": 4}
TARGETS = {"forward": 650.0, "train": 500.0}
Logps = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    return (h @ w.t()).float().log_softmax(-1).gather(1, y[:, None])[:, 0]


def liger(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    """Liger's fused linear cross entropy gives the summed loss, which the timed sum of log-probs is."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    out = LigerFusedLinearCrossEntropyFunction.apply(h, w, y, None, None, -100, 0.0, 0.0, "sum")
    return -(out[0] if isinstance(out, tuple) else out)


def cut_cross_entropy(h: Tensor, w: Tensor, y: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy

    return -linear_cross_entropy(h, w, y, reduction="none")


def contenders(s: Settings, task: str) -> dict[str, Logps]:
    """By name. `rft` chooses its kernel itself; `rft liger` is Liger's cross-entropy kernel after products in
    float32, for the tasks that it serves; `liger` is Liger's own fused head."""
    found: dict[str, Logps] = {"rft": token_logps, "plain": plain}
    if not s.small:
        found |= {
            "rft chunked": partial(token_logps, backend="chunked"),
            "rft triton": partial(token_logps, backend="triton"),
            "compiled": torch.compile(plain),
            "liger": liger,
            "cut-cross-entropy": cut_cross_entropy,
        }
        if task != "train":
            found["rft liger"] = partial(token_logps, backend="liger")
    return found


def inputs(s: Settings, m: int, h: int, v: int) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(m, h, device=s.device, dtype=s.dtype)
    weight = torch.randn(v, h, device=s.device, dtype=s.dtype) * (2 / h**0.5)
    return hidden, weight, torch.randint(v, (m,), device=s.device)


def errors(s: Settings) -> list[dict[str, Any]]:
    """Errors against float32, on sizes that are not multiples of a block: the largest error of the log-probs,
    the relative errors of the gradients."""
    rows = []
    for m, h, v in (
        ((33, 24, 150), (1, 16, 7))
        if s.small
        else ((1000, 1000, 50_001), (1, 512, 1024), (257, 4096, 131_071))
    ):
        hidden, weight, targets = inputs(s, m, h, v)
        pull = torch.randn(m, device=s.device)
        exact = [x.float().requires_grad_() for x in (hidden, weight)]
        wanted, _ = reference_logps(exact[0], exact[1], targets)
        wanted_grads = torch.autograd.grad((wanted * pull).sum(), exact)
        taken = [x.clone().requires_grad_() for x in (hidden, weight)]
        logps = token_logps(taken[0], taken[1], targets)
        grads = torch.autograd.grad((logps * pull).sum(), taken)
        found = {"logps": float((logps - wanted).detach().abs().max())}
        for name, a, b in zip(("hidden", "weight"), grads, wanted_grads, strict=True):
            found[name] = float((a.float() - b).norm() / b.norm())
        passed = max(found.values()) < (1e-4 if s.small else 2e-2)
        rows.append({"m": m, "h": h, "v": v, "errors": found, "passed": passed})
    return rows


def speed(s: Settings, task: str, m: int, h: int, v: int, rounds: int) -> dict[str, Any]:
    hidden, weight, targets = inputs(s, m, h, v)
    hidden.requires_grad_(task != "forward")
    weight.requires_grad_(task == "train")

    def run(logps: Logps) -> None:
        hidden.grad = weight.grad = None
        with torch.set_grad_enabled(task != "forward"):
            out = logps(hidden, weight, targets).sum()
            if task != "forward":
                out.backward()

    runs = {name: lambda f=f: run(f) for name, f in contenders(s, task).items()}  # type: ignore[misc]
    good, failed = guarded(runs)
    found = timed(good, rounds)
    held = {"forward": 0, "frozen": hidden.nbytes, "train": hidden.nbytes + weight.nbytes}[task] / 1e6
    for row in found.values():
        row["tflops"] = COUNTED[task] * m * h * v / row["seconds"] / 1e12
        row["workspace_mb"] = row.pop("peak_mb") - held
    peers = [row["seconds"] for name, row in found.items() if not name.startswith("rft")]
    best = min(peers) / found["rft"]["seconds"] if peers else None
    return {
        "task": task,
        "m": m,
        "h": h,
        "v": v,
        "contenders": found,
        "failed": failed,
        "chosen": pop_messages(),
        "over_best_peer": best,
    }


if __name__ == "__main__":
    s = settings("heads", __doc__)
    size = (64, 32, 512) if s.small else (16_384, 4096, 131_072)
    speeds = [speed(s, task, *size, rounds=2 if s.small else 10) for task in COUNTED]
    for row in speeds:
        target = TARGETS.get(row["task"])
        row["target_tflops"] = target
        row["passed"] = None if s.small or target is None else row["contenders"]["rft"]["tflops"] >= target
    s.finish({"correctness": errors(s), "speed": speeds})
