"""What the device can do at most: the rate of matrix products and the bandwidth of memory, as measured.

All other parts are judged by these, not by a data sheet.
"""

from __future__ import annotations

from typing import Any

import torch
from harness import Settings, settings, timed


def products(s: Settings) -> list[dict[str, Any]]:
    rows = []
    for m, n, k in (
        ((64, 64, 64),) if s.small else ((8192, 8192, 8192), (16384, 16384, 4096), (4096, 131072, 4096))
    ):
        a = torch.randn(m, k, device=s.device, dtype=s.dtype)
        b = torch.randn(n, k, device=s.device, dtype=s.dtype)
        out = torch.empty(m, n, device=s.device, dtype=s.dtype)
        found = timed({"mm": lambda a=a, b=b, out=out: torch.mm(a, b.t(), out=out)}, rounds=20)["mm"]  # type: ignore[misc]
        rows.append({"m": m, "n": n, "k": k, "tflops": 2 * m * n * k / found["seconds"] / 1e12, **found})
    return rows


def bandwidth(s: Settings) -> dict[str, float]:
    """Read and write of a copy, 10^9 bytes a second."""
    x = torch.randn(1 << (16 if s.small else 30), device=s.device)
    y = torch.empty_like(x)
    found = timed({"copy": lambda: y.copy_(x)}, rounds=20)["copy"]
    return {"gb_per_s": 2 * x.nbytes / found["seconds"] / 1e9, **found}


if __name__ == "__main__":
    s = settings("ceilings", __doc__)
    rows = products(s)
    s.finish({"products": rows, "copy": bandwidth(s), "matmul_tflops": max(r["tflops"] for r in rows)})
