"""Fused log-probs against the plain reference: values, gradients, edge cases, memory, messages."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from rft.kernels import logprob_chunked as chunked
from rft.kernels import logprob_common as common
from rft.kernels import logprob_linear as linear
from rft.kernels.logprob import Backend, token_logps
from rft.kernels.logprob_common import RowGradient
from rft.kernels.logprob_support import pack_support
from tests.kernels.rounding import tolerance

pytestmark = pytest.mark.numerics

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "softcap": {"softcap": 3.0, "logit_scale": 0.5},
    "bias": {"bias": True},
    "lora": {"lora": True},
    "support": {"support": True},
    "mask": {"mask": True},
    "frozen": {"frozen": True},
    "frozen_softcap": {"frozen": True, "softcap": 2.0, "temperature": 1.5},
    "all": {"softcap": 2.0, "bias": True, "lora": True, "temperature": 1.3, "mask": True, "support": True},
}


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks and tiles with odd remainders even at the sizes of a test."""
    monkeypatch.setattr(common, "CHUNK_BYTES", 400)
    monkeypatch.setattr(common, "MIN_CHUNK_ROWS", 5)
    monkeypatch.setattr(chunked, "TILE_BYTES", {"cpu": 600, "cuda": 600})
    monkeypatch.setattr(linear, "BLOCK_ELEMENTS", 50)


def inputs(case: dict[str, Any], t: int, h: int, v: int, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(1)
    leaf = {n: torch.randn(s).to(dtype) for n, s in (("hidden", (t, h)), ("weight", (v, h)))}
    options = dict(case)
    frozen = options.pop("frozen", False)
    if options.pop("bias", False):
        options["bias"] = leaf["bias"] = torch.randn(v).to(dtype)
    if options.pop("lora", False):
        leaf |= {"a": torch.randn(3, h).to(dtype), "b": torch.randn(v, 3).to(dtype)}
        options["lora"] = (leaf["a"], leaf["b"], 0.5)
    if options.pop("support", False):
        options["support"] = pack_support(torch.rand(t, v) < 0.4)
    if options.pop("mask", False):
        options["mask"] = torch.rand(t) < 0.5
    targets = torch.randint(v, (t,))
    for name, x in leaf.items():
        x.requires_grad_(name == "hidden" or not frozen)
    return {"leaf": leaf, "options": options, "targets": targets}


def outcome(
    case: dict[str, Any], size: tuple[int, int, int], dtype: torch.dtype, entropy: bool, backend: Any
) -> list[Tensor]:
    x = inputs(case, *size, dtype)
    leaf, targets = x["leaf"], x["targets"]
    made = token_logps(
        leaf["hidden"], leaf["weight"], targets, entropy=entropy, backend=backend, **x["options"]
    )
    outs = made if isinstance(made, tuple) else (made,)
    torch.autograd.backward(outs, [torch.randn(o.shape).to(o.dtype) for o in outs])
    return [*outs, *(p.grad for p in leaf.values() if p.grad is not None)]


def allowed(case: dict[str, Any], size: tuple[int, int, int], dtype: torch.dtype) -> float:
    """What rounding explains of a case, see `rounding.tolerance`."""
    x = inputs(case, *size, dtype)
    leaf, options = x["leaf"], x["options"]
    low = float(leaf["bias"].detach().abs().max()) if "bias" in leaf else 0.0
    if "a" in leaf:
        a, b = leaf["a"].detach().double(), leaf["b"].detach().double()
        low += 0.5 * float((leaf["hidden"].detach().double() @ a.t() @ b.t()).abs().max())
    slope = options.get("logit_scale", 1.0) / options.get("temperature", 1.0)
    return tolerance(dtype, leaf["hidden"], leaf["weight"], slope, low)


def relative(a: Tensor, b: Tensor) -> float:
    a, b = a.double(), b.double()
    return ((a - b).norm() / b.norm().clamp(min=1e-6)).item()


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("size", [(13, 8, 37), (1, 5, 2), (64, 16, 8)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_agrees_with_the_reference(
    case: str, dtype: torch.dtype, size: tuple[int, int, int], entropy: bool
) -> None:
    wanted = outcome(CASES[case], size, dtype, entropy, "reference")
    got = outcome(CASES[case], size, dtype, entropy, "chunked")
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        assert relative(a, b) < allowed(CASES[case], size, dtype)


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 1)], ids=["logps", "entropy", "both"])
@pytest.mark.parametrize("case", CASES)
def test_a_single_chunk_and_a_second_backward(case: str, wanted: tuple[int, ...]) -> None:
    """All rows in one chunk, which the first backward spends; results used in part."""
    found = []
    backends: tuple[Backend, ...] = ("reference", "chunked")
    for backend in backends:
        x = inputs(CASES[case], 13, 8, 37, torch.float64)
        leaf = x["leaf"]
        outs = token_logps(
            leaf["hidden"], leaf["weight"], x["targets"], entropy=True, backend=backend, **x["options"]
        )
        loss = sum(((i + 1) * outs[i].sin().sum() for i in wanted), torch.zeros(()))
        leaves = [p for p in leaf.values() if p.requires_grad]
        first = torch.autograd.grad(loss, leaves, retain_graph=True)
        found.append([*first, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*found, strict=True):
        assert relative(a, b) < 1e-12


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("case", ["plain", "softcap", "bias", "lora", "support", "frozen"])
def test_gradcheck(case: str) -> None:
    x = inputs(CASES[case], 7, 4, 11, torch.float64)
    leaves = [p for p in x["leaf"].values() if p.requires_grad]
    entropy = case not in ("frozen",)

    def f(*_: Tensor) -> Any:
        hidden, weight = x["leaf"]["hidden"], x["leaf"]["weight"]
        return token_logps(hidden, weight, x["targets"], entropy=entropy, **x["options"])

    assert torch.autograd.gradcheck(f, leaves)


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_no_rows_and_all_masked(backend: Any) -> None:
    w = torch.randn(7, 4, dtype=torch.bfloat16, requires_grad=True)
    for t in (0, 3):
        h = torch.randn(t, 4, dtype=torch.bfloat16, requires_grad=True)
        mask, y = torch.zeros(t, dtype=torch.bool), torch.zeros(t, dtype=torch.int64)
        logps, entropy = token_logps(h, w, y, mask=mask, entropy=True, backend=backend)
        assert logps.tolist() == entropy.tolist() == [0.0] * t
        for grad in torch.autograd.grad(logps.sum() + entropy.sum(), [h, w]):
            assert not grad.any()


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_huge_and_impossible_logits(backend: Any) -> None:
    h = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    w = torch.tensor([[1e4], [-1e4], [0.0], [0.0]], requires_grad=True)
    bias = torch.tensor([0.0, 0.0, 0.0, -torch.inf], requires_grad=True)
    y = torch.tensor([0, 0])
    logps, entropy = token_logps(h, w, y, bias=bias, entropy=True, backend=backend)
    assert logps.tolist() == [0.0, -2e4]
    assert entropy.tolist() == [0.0, 0.0]
    grad_w, grad_b = torch.autograd.grad(logps.sum() + entropy.sum(), [w, bias])
    assert torch.equal(grad_w, torch.tensor([[-1.0], [1.0], [0.0], [0.0]]))
    assert torch.equal(grad_b, torch.tensor([1.0, -1.0, 0.0, 0.0]))
    impossible = token_logps(h, w, torch.tensor([3, 3]), bias=bias, backend=backend)
    assert impossible.tolist() == [-torch.inf] * 2


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("case", ["plain", "softcap", "bias", "lora", "support"])
@pytest.mark.parametrize("entropy", [False, True])
def test_rows_without_a_gradient_stay_out_of_the_backward(case: str, entropy: bool) -> None:
    """What they would add is 0 times infinity: had they reached the head, gradients would be nan. (Through
    LoRA's A they are, outside the kernel.)"""
    x = inputs(CASES[case], 13, 8, 37, torch.float64)
    leaf, targets, options = x["leaf"], x["targets"], x["options"]
    leaves = [p for p in leaf.values() if p.requires_grad]
    pulled = torch.tensor([0, 3, 4, 12])

    def gradients(backend: Backend, rows: Tensor) -> tuple[Tensor, ...]:
        few = dict(options) if "support" not in options else options | {"support": options["support"][rows]}
        made = token_logps(
            leaf["hidden"][rows], leaf["weight"], targets[rows], entropy=True, backend=backend, **few
        )
        here = torch.isin(rows, pulled)
        loss = made[0][here].sin().sum() + (made[1][here].sin().sum() if entropy else 0)
        return torch.autograd.grad(loss, leaves)

    wanted = gradients("reference", pulled)
    if case != "lora":
        leaf["hidden"].data[1:3] = torch.inf
    for a, b in zip(gradients("chunked", torch.arange(13)), wanted, strict=True):
        assert relative(a, b) < 1e-12


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_an_expected_gradient_spares_the_recomputation(
    case: str, entropy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Predicted up to a factor, the gradient is there already; else it is right too, only slower."""
    recomputed, calls = chunked.recomputed, []
    monkeypatch.setattr(chunked, "recomputed", lambda *args: (calls.append(1), recomputed(*args))[1])
    torch.manual_seed(4)
    pull = torch.randn(13, dtype=torch.float64)
    pull[[2, 7, 8]] = 0.0
    x = inputs(CASES[case], 13, 8, 37, torch.float64)
    leaf = x["leaf"]
    leaves = [p for p in leaf.values() if p.requires_grad]
    head = (leaf["hidden"], leaf["weight"], x["targets"])
    frozen = "frozen" in CASES[case] and not entropy
    tries = [(pull, 0), (3 * pull, 0), (0 * pull, 1), (pull + 1e-4, 1), (torch.randn(13).double(), 1)]
    wanted = token_logps(*head, entropy=True, backend="reference", **x["options"])
    grads = torch.autograd.grad((wanted[0] * pull).sum(), leaves)
    for expected, misses in tries:
        calls.clear()
        made = token_logps(*head, entropy=entropy, expected=expected, **x["options"])
        found = made if isinstance(made, tuple) else (made,)
        for a, b in zip(found, wanted, strict=False):
            assert relative(a, b) < 1e-12
        for a, b in zip(torch.autograd.grad((found[0] * pull).sum(), leaves), grads, strict=True):
            assert relative(a, b) < 1e-12
        assert len(calls) == (0 if frozen else misses)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("case", CASES)
def test_a_gradient_that_depends_on_its_own_log_prob_spares_the_recomputation(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recomputed, calls = chunked.recomputed, []
    monkeypatch.setattr(chunked, "recomputed", lambda *args: (calls.append(1), recomputed(*args))[1])
    torch.manual_seed(5)
    pull = torch.randn(13, dtype=torch.float64)
    pull[[0, 7, 8]] = 0.0
    x = inputs(CASES[case], 13, 8, 37, torch.float64)
    leaf = x["leaf"]
    leaves = [p for p in leaf.values() if p.requires_grad]
    head = (leaf["hidden"], leaf["weight"], x["targets"])
    wanted, _ = token_logps(*head, entropy=True, backend="reference", **x["options"])
    grads = torch.autograd.grad((wanted.sin() * pull).sum(), leaves)
    right = RowGradient(lambda logps: pull * logps.cos(), pull != 0)
    wrong = RowGradient(lambda logps: pull * logps.cos().sum(), pull != 0)
    for expected, misses in ((right, 0), (wrong, 1)):
        calls.clear()
        made = token_logps(*head, expected=expected, **x["options"])
        assert relative(made, wanted) < 1e-12
        for a, b in zip(torch.autograd.grad((made.sin() * pull).sum(), leaves), grads, strict=True):
            assert relative(a, b) < 1e-12
        assert len(calls) == (0 if "frozen" in CASES[case] else misses)


def test_a_gradient_of_entropies_is_never_left_out_for_an_expected_one() -> None:
    x = inputs({}, 13, 8, 37, torch.float64)
    leaves = list(x["leaf"].values())
    found = []
    for expected in (None, torch.ones(13)):
        logps, entropy = token_logps(*leaves, x["targets"], entropy=True, expected=expected)
        found.append(torch.autograd.grad(logps.sum() + entropy.sin().sum(), leaves))
    for a, b in zip(*found, strict=True):
        assert relative(a, b) < 1e-12


def test_uniform_distribution_by_hand() -> None:
    logps, entropy = token_logps(torch.zeros(2, 3), torch.randn(8, 3), torch.tensor([0, 5]), entropy=True)
    assert torch.allclose(logps, -torch.tensor([8.0, 8.0]).log())
    assert torch.allclose(entropy, torch.tensor([8.0, 8.0]).log())


def test_tied_head_gets_both_gradients() -> None:
    y = torch.randint(20, (9,))
    found: list[Tensor] = []
    backends: tuple[Backend, ...] = ("reference", "chunked")
    for backend in backends:
        torch.manual_seed(0)
        w = torch.randn(20, 6, requires_grad=True)
        found += torch.autograd.grad(token_logps(w[y].tanh(), w, y, backend=backend).sum(), w)
    assert relative(found[1], found[0]) < 1e-6


def test_weight_gradient_in_bfloat16_does_not_drift() -> None:
    """200 chunks summed in plain bfloat16 lose over a percent; here only the last rounding is left."""
    torch.manual_seed(0)
    w = torch.zeros(6, 4, dtype=torch.bfloat16)
    sums = linear.WeightGrad(w, chunks=200)
    exact = torch.zeros(6, 4, dtype=torch.float64)
    for _ in range(200):
        g, h = torch.rand(3, 6).bfloat16().float(), torch.rand(3, 4).bfloat16().float()
        sums.add(g, h)
        exact += g.double().t() @ h.double()
    assert torch.equal(sums.result(), exact.bfloat16())


def test_deterministic() -> None:
    size = (300, 16, 101)
    a = outcome(CASES["all"], size, torch.bfloat16, True, "chunked")
    b = outcome(CASES["all"], size, torch.bfloat16, True, "chunked")
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_autocast_takes_the_dtype_of_a_linear_layer() -> None:
    h, w = torch.randn(4, 8), torch.randn(9, 8, requires_grad=True)
    y = torch.tensor([0, 1, 2, 3])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logps = token_logps(h, w, y)
    assert torch.equal(logps, token_logps(h.bfloat16(), w.bfloat16(), y))
    logps.sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32


WORKSPACE = """
import sys, torch
from pathlib import Path
from rft.kernels.logprob import token_logps
torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[1])
def step(n, v):
    h = torch.randn(n, 64).to(dtype).requires_grad_()
    w = torch.randn(v, 64).to(dtype).requires_grad_()
    y = torch.randint(v, (n,))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    base = status("VmRSS")
    token_logps(h, w, y).sum().backward()
    return status("VmHWM") - base - (h.grad.nbytes + w.grad.nbytes) / 2**20
def status(key):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) / 1024
step(2, 9)
print(*(step(*map(int, size.split("x"))) for size in sys.argv[2:]))
"""


def workspaces(dtype: str, *sizes: str) -> list[float]:
    """MiB of peak memory beyond inputs and gradients for each size TxV, in a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", WORKSPACE, dtype, *sizes],
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # freed memory is given back at once
        capture_output=True,
        text=True,
        check=True,
    )
    return [float(x) for x in done.stdout.split()]


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak memory from Linux's /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_workspace_does_not_grow_with_rows_or_vocabulary(dtype: str) -> None:
    small, rows, vocab = workspaces(dtype, "2048x8192", "8192x8192", "2048x65536")
    assert 16 < small < 80, small
    assert rows < small + 16, "more rows"
    # one byte per weight element in bfloat16, and at least 64 rows of logits, are all that may grow
    assert vocab < small + 24, "larger vocabulary"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"hidden": torch.zeros(2, 3, 4)}, r"hidden must be \[T, H\], got \[2, 3, 4\]"),
        ({"weight": torch.zeros(7, 5)}, r"differ in width.*\[3, 4\].*\[7, 5\].*\[V, 4\]"),
        ({"weight": torch.zeros(7, 4).double()}, "share one float dtype"),
        ({"targets": torch.tensor([0, 1, 7])}, r"0\.\.6 \(weight has 7 rows\), found 0\.\.7"),
        ({"targets": torch.tensor([-100, 1, 2])}, r"found -100\.\.2"),
        ({"targets": torch.tensor([0, 1])}, r"targets must be \[3\]"),
        ({"targets": torch.tensor([0, 1, 2], dtype=torch.int32)}, "int64"),
        ({"bias": torch.zeros(6)}, r"bias must be \[7\]"),
        ({"temperature": 0.0}, "temperature must be greater than 0"),
        ({"softcap": -1.0}, "softcap must be greater than 0"),
        ({"lora": (torch.zeros(2, 4), torch.zeros(6, 2), 1.0)}, r"lora must be .*B \[7, r\]"),
        ({"support": torch.zeros(3, 7, dtype=torch.bool)}, r"support must be \[3, 1\] uint8"),
        ({"mask": torch.zeros(2, dtype=torch.bool)}, r"mask must be \[3\] bool"),
        ({"expected": torch.zeros(2)}, r"expected must be \[3\] without gradient, got \[2\]"),
        ({"backend": "fast"}, "one of auto, reference, chunked, triton"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], words: str) -> None:
    good = {"hidden": torch.zeros(3, 4), "weight": torch.zeros(7, 4), "targets": torch.tensor([0, 1, 2])}
    with pytest.raises(ValueError, match=words):
        token_logps(**(good | change))
