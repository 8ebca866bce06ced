"""Full-vocabulary divergences and sampled supports against plain softmax."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rft.algorithms.base import Algorithm
from rft.algorithms.policy_gradient.distill import Distill
from rft.algorithms.policy_gradient.ppo import PPO
from rft.algorithms.preference.dpo import DPO
from rft.algorithms.supervised.asft import ASFT
from rft.algorithms.supervised.weak_to_strong import WeakToStrong
from rft.kernels import logprob_chunked as chunked
from rft.kernels import logprob_common as common
from rft.kernels import logprob_linear as linear
from rft.kernels.divergence import head_divergence
from rft.kernels.logprob import token_logps
from rft.kernels.logprob_chunked import unpack_support
from rft.kernels.logprob_support import sampled_support
from rft.learner.distribution import full_divergence, next_logps
from rft.learner.model import Head
from tests.kernels.rounding import tolerance

pytestmark = pytest.mark.numerics

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "softcap": {"softcap": 2.0, "logit_scale": 0.7},
    "bias": {"bias": torch.linspace(-1, 1, 29), "ref_bias": torch.linspace(1, -1, 29)},
    "mask": {"mask": torch.tensor([True, False, True, True, False, True, True, True, False])},
}


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "CHUNK_BYTES", 400)
    monkeypatch.setattr(common, "MIN_CHUNK_ROWS", 4)
    monkeypatch.setattr(chunked, "TILE_BYTES", {"cpu": 300, "cuda": 300})
    monkeypatch.setattr(linear, "BLOCK_ELEMENTS", 40)


def heads(dtype: torch.dtype, frozen: bool = False) -> list[Tensor]:
    torch.manual_seed(0)
    h, w = torch.randn(9, 6).to(dtype).requires_grad_(), torch.randn(29, 6).to(dtype)
    return [h, w.requires_grad_(not frozen), torch.randn(9, 4).to(dtype), torch.randn(29, 4).to(dtype)]


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("direction", ["reverse", "forward", "js"])
def test_agrees_with_the_reference(direction: Any, options: str, dtype: torch.dtype, frozen: bool) -> None:
    extra = {k: v.to(dtype) if k.endswith("bias") else v for k, v in OPTIONS[options].items()}
    found = []
    for backend in ("reference", "chunked"):
        x = heads(dtype, frozen)
        out = head_divergence(x[0], x[1], x[2], x[3], direction, beta=0.3, backend=backend, **extra)
        (out * torch.linspace(-1, 2, 9)).sum().backward()
        found.append([out, *(p.grad for p in x if p.grad is not None)])
    slope = extra.get("logit_scale", 1.0) / extra.get("temperature", 1.0)
    policy, teacher = tolerance(dtype, x[0], x[1], slope, 1.0), tolerance(dtype, x[2], x[3], slope, 1.0)
    for a, b in zip(*found, strict=True):
        assert ((a - b).norm() / b.norm()).item() < policy + teacher


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("direction", ["reverse", "forward", "js"])
def test_gradcheck(direction: Any, frozen: bool) -> None:
    h, w, rh, rw = heads(torch.float64, frozen)
    assert torch.autograd.gradcheck(
        lambda *_: head_divergence(h, w, rh, rw, direction, beta=0.2), [h] if frozen else [h, w]
    )


WITH_DISTRIBUTIONS = [
    PPO(kl_in="loss", kl_estimator="full", beta=0.1),
    ASFT(direction="reverse"),
    ASFT(direction="forward"),
    *(Distill(beta=beta) for beta in (0.0, 0.3, 1.0)),
    WeakToStrong(),
    DPO(weighting="aligned"),
]


@pytest.mark.parametrize("algorithm", WITH_DISTRIBUTIONS, ids=lambda a: type(a).__name__)
@pytest.mark.parametrize("lora", [False, True])
def test_what_algorithms_ask_of_distributions(algorithm: Algorithm, lora: bool) -> None:
    """The learner's divergence, fused or not, is the algorithm's own of plain softmax."""
    h, w, rh, rw = heads(torch.float64)
    factors = (torch.randn(2, 6).double(), torch.randn(29, 2).double(), 0.5) if lora else None
    head = Head(w, torch.linspace(-1, 1, 29).double(), 2.0, 0.7, factors)
    reference = Head(rw, torch.linspace(1, -1, 29).double(), 2.0, 0.7)
    found = []
    plain = [next_logps(x, y, 0.6) for x, y in ((head, h), (reference, rh))]
    for out in (
        algorithm.divergence(plain[0], plain[1].detach()),
        full_divergence(algorithm, head, h, reference, rh, 0.6),
    ):
        found.append([out, *torch.autograd.grad((out * torch.linspace(-1, 2, 9)).sum(), [h, w])])
    for a, b in zip(*found, strict=True):
        assert ((a - b).norm() / b.norm()).item() < 1e-5


def test_by_hand() -> None:
    """p = (1/2, 1/2), q = (3/4, 1/4), taken from the two heads' biases."""
    zero, none = torch.zeros(1, 1), torch.zeros(2, 1)
    biases = {"bias": torch.zeros(2), "ref_bias": torch.tensor([0.75, 0.25]).log()}
    p, q, m = torch.tensor([0.5, 0.5]), torch.tensor([0.75, 0.25]), torch.tensor([0.6, 0.4])
    kl = lambda a, b: (a * (a / b).log()).sum()  # noqa: E731
    for direction, wanted in (
        ("reverse", kl(p, q)),
        ("forward", kl(q, p)),
        ("js", 0.4 * kl(q, m) + 0.6 * kl(p, m)),
    ):
        got = head_divergence(zero, none, zero, none, direction, beta=0.4, **biases)  # type: ignore[arg-type]
        assert torch.allclose(got, wanted[None], atol=1e-6)


@pytest.mark.parametrize("direction", ["reverse", "forward", "js"])
def test_same_heads_differ_by_nothing_and_impossible_tokens_count_nothing(direction: Any) -> None:
    h, w, _, _ = heads(torch.float32)
    bias = torch.zeros(29).index_fill(0, torch.tensor([3, 28]), -torch.inf)
    out = head_divergence(h, w, h.detach(), w.detach(), direction, bias=bias, ref_bias=bias)
    assert out.abs().max() < 1e-6
    for grad in torch.autograd.grad(out.sum(), [h, w]):
        assert grad.abs().max() < 1e-5


def test_bad_input_is_named() -> None:
    h, w, rh, rw = heads(torch.float32)
    with pytest.raises(ValueError, match=r"rows or vocabulary.*\[29, 6\].*\[28, 4\]"):
        head_divergence(h, w, rh, rw[:28])
    with pytest.raises(ValueError, match="direction must be one of reverse, forward, js"):
        head_divergence(h, w, rh, rw, "both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="ref_hidden and ref_weight differ in width"):
        head_divergence(h, w, rh, rw[:, :3])
    with pytest.raises(ValueError, match="beta"):
        head_divergence(h, w, rh, rw, "js", beta=1.0)
    with pytest.raises(ValueError, match="top_p"):
        sampled_support(h, w, top_p=0.0)


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(None, 1.0), (4, 1.0), (None, 0.5), (6, 0.7), (1, 0.9), (None, 1e-9)]
)
def test_sampled_support(top_k: int | None, top_p: float) -> None:
    h, w, _, _ = heads(torch.float32)
    kept = unpack_support(sampled_support(h, w, top_k=top_k, top_p=top_p, temperature=0.9), 29)
    z = (h @ w.t()) / 0.9
    for row, logits in zip(kept, z, strict=True):
        order = logits.argsort(descending=True)[: top_k or 29]
        p = logits[order].softmax(0)
        count = 1
        while p[:count].sum() < min(top_p, 1 - 1e-6) and count < len(order):
            count += 1
        wanted = set(order[: len(order) if top_p == 1 else count].tolist())
        assert set(row.nonzero()[:, 0].tolist()) == wanted
    target = z.argmax(1)
    logps = token_logps(
        h,
        w,
        target,
        temperature=0.9,
        support=sampled_support(h, w, top_k=top_k, top_p=top_p, temperature=0.9),
    )
    assert torch.allclose(
        logps, z.masked_fill(~kept, -torch.inf).log_softmax(1).gather(1, target[:, None])[:, 0]
    )
