"""The Triton kernels against the reference: interpreted on CPU in a process of its own, and on a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from rft.kernels.logprob import token_logps
from tests.kernels.on_device import answer

SCRIPT = """
import json, sys, torch
from rft.kernels import logprob_triton
from rft.kernels.logprob import token_logps

device = sys.argv[1]
logprob_triton.GRAD_BYTES = 1 << 13  # several vocabulary blocks
worst = {}
for dtype in (torch.float32, torch.bfloat16):
    for t, h, v in ((17, 24, 150), (1, 16, 5), (16, 16, 32)):
        for name, options, biased, frozen in (
            ("plain", {}, False, False),
            ("frozen", {"temperature": 0.7}, False, True),
            ("softcap", {"softcap": 3.0, "logit_scale": 0.5, "temperature": 1.2}, False, False),
            ("bias", {}, True, False),
            ("impossible", {}, True, False),
        ):
            for entropy in (False, True):
                found = []
                for backend in ("reference", "triton"):
                    torch.manual_seed(0)
                    x = [torch.randn(t, h), torch.randn(v, h), torch.randn(v)]
                    if name == "impossible":
                        x[2][1::3] = -torch.inf
                    x = [a.to(device, dtype) for a in x]
                    x[0].requires_grad_()
                    x[1].requires_grad_(not frozen)
                    x[2].requires_grad_(biased)
                    y = (torch.randint(v, (t,)) // 3 * 3).to(device)
                    options["bias"] = x[2] if biased else None
                    out = token_logps(x[0], x[1], y, entropy=entropy, backend=backend, **options)
                    out = out if entropy else (out,)
                    wanted = [a for a in x if a.requires_grad]
                    grads = torch.autograd.grad(out, wanted, [torch.randn(t).to(device) for _ in out])
                    found.append([*out, *grads])
                error = max(((a - b).norm() / b.norm().clamp(min=1e-6)).item() for a, b in zip(*found))
                key = str(dtype) + " " + name + (" entropy" if entropy else "")
                worst[key] = max(worst.get(key, 0.0), error if error == error else 9e9)
print(json.dumps(worst))
"""


def errors(device: str, **env: str) -> dict[str, float]:
    result: dict[str, float] = answer(SCRIPT, device, **env)
    assert len(result) == 20
    return result


def check(result: dict[str, float]) -> None:
    bad = {k: e for k, e in result.items() if not e < (1e-2 if "bfloat16" in k else 1e-5)}
    assert not bad


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed (Linux only)")
def test_interpreted_agrees_with_the_reference() -> None:
    check(errors("cpu", TRITON_INTERPRET="1"))


@pytest.mark.gpu
def test_on_gpu_agrees_with_the_reference() -> None:
    check(errors("cuda"))


def test_triton_is_refused_where_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    h, w, y = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="needs CUDA tensors, hidden is on cpu"):
        token_logps(h, w, y, backend="triton")
    with pytest.raises(ValueError, match="neither lora, support nor float64"):
        token_logps(h.double(), w.double(), y, backend="triton")
