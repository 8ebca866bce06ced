"""Liger's kernel against the reference, interpreted on CPU and on a GPU, and the choice by measured time."""

from __future__ import annotations

import importlib.util
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from rft.config.learner import LIGER_REMEDY
from rft.config.load import parse_config
from rft.config.validate import problems
from rft.contrib import liger as rft_liger
from rft.contrib.liger import ROUNDS, CallKind, Choice, Logps, Task, choose, task_of
from rft.kernels.logprob import token_logps
from rft.kernels.logprob_common import LogitMap, pop_messages
from rft.learner.learner import Learner
from tests.kernels.on_device import answer
from tests.specs import facts

SCRIPT = """
import json, sys, torch
from rft.contrib import liger
from rft.kernels import logprob
from rft.kernels.logprob import token_logps
from rft.kernels.logprob_common import LogitMap, pop_messages

device, served = sys.argv[1], []
whole = liger.token_logps
liger.token_logps = lambda *args: served.append(1) or whole(*args)
found = {}

def inputs(t, h, v, dtype, name):
    torch.manual_seed(0)
    x, w, b = torch.randn(t, h), torch.randn(v, h), torch.randn(v)
    if name == "impossible":
        b[1::3] = -torch.inf
    y = (torch.randint(v, (t,)) // 3 * 3).to(device)
    return x.to(device, dtype), w.to(device, dtype), b.to(device, dtype), y

CASES = {
    "plain": {},
    "temperature": {"temperature": 0.7, "logit_scale": 2.0},
    "softcap": {"softcap": 3.0, "logit_scale": 0.5, "temperature": 1.2},
    "bias": {},
    "impossible": {},
    "masked": {},
}
for dtype in (torch.float32, torch.bfloat16):
    for t, h, v in ((9, 24, 150), (1, 16, 5), (8, 16, 32)):
        liger.CHUNK_BYTES = 4 * v * 4  # several chunks of rows
        for name, options in CASES.items():
            answers = []
            for backend in ("reference", "liger"):
                x, w, b, y = inputs(t, h, v, dtype, name)
                options["bias"] = b if name in ("bias", "impossible") else None
                options["mask"] = torch.arange(t, device=device) % 3 > 0 if name == "masked" else None
                with torch.no_grad():
                    scored = token_logps(x, w, y, backend=backend, **options)
                logps = token_logps(x.requires_grad_(), w, y, backend=backend, **options)
                (grad,) = torch.autograd.grad(logps, x, torch.randn(t).to(device))
                answers.append((scored, logps, grad))
            for what, a, b in zip(("scored", "logps", "grad"), answers[1], answers[0]):
                assert a.dtype == b.dtype
                error = ((a - b).norm() / b.norm().clamp(min=1)).item()
                key = f"{dtype} {what} {name}"
                found[key] = max(found.get(key, 0.0), error if error == error else 9e9)
# one row that is masked out leaves Liger nothing to do
assert len(served) == 2 * (2 * 3 * len(CASES) - 2)

served.clear()  # what it does not serve takes Triton
for trained, entropy in ((True, False), (False, True)):
    answers = []
    for backend in ("reference", "liger"):
        x, w, _, y = inputs(9, 16, 40, torch.float32, "")
        wanted = [x.requires_grad_(), w.requires_grad_()] if trained else [x.requires_grad_()]
        out = token_logps(x, w, y, backend=backend, entropy=entropy)
        out = out if entropy else (out,)
        answers.append((*out, *torch.autograd.grad(out, wanted, [torch.ones_like(o) for o in out])))
    worst = max(((a - b).norm() / b.norm()).item() for a, b in zip(answers[1], answers[0]))
    found[f"torch.float32 trained={trained} entropy={entropy}"] = worst
assert not served

# what "auto" does on a GPU: it measures once, and goes by that
x, w, _, y = inputs(7, 24, 150, torch.float32, "")
f, lines = LogitMap(), []
for x in (x, x.clone().requires_grad_()):
    for _ in range(2):
        right = token_logps(x, w, y, backend="reference")
        served.clear()
        logps, _ = logprob._on_gpu(x, w, y, None, f, False, "auto")
        assert torch.allclose(logps, right, atol=1e-4 if device == "cpu" else 2e-2)
        lines += pop_messages()
    kind = liger.CallKind.of("frozen" if x.requires_grad else "scoring", x, w, None, f)
    assert len(served) == (liger._chosen[kind] == "liger")
    assert len(lines) == len(liger._chosen)
logprob._liger_installed = lambda: False
liger._chosen.clear()
served.clear()
logprob._on_gpu(x, w, y, None, f, False, "auto")
assert not served and not liger._chosen
print(json.dumps([found, lines]))
"""
needs_liger = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed"
)


def check(device: str, **env: str) -> None:
    errors, lines = answer(SCRIPT, device, **env)
    assert len(errors) == 2 * 3 * 6 + 2
    # log-probs of 16-bit inputs too: the logits are not rounded to 16 bits
    bad = {k: e for k, e in errors.items() if not e < (1e-2 if "bfloat16 grad" in k else 1e-5)}
    assert not bad
    for path, line in zip(("scoring", "a frozen head"), lines, strict=True):
        assert line.startswith(f"log-probs ({path}, up to 8 rows, H=24, V=150, float32): ")
        assert re.search(
            r"(Triton|Liger's kernel); measured Triton [\d.e+]+ ms, Liger's kernel [\d.e+]+ ms$", line
        )


@needs_liger
def test_interpreted_agrees_with_the_reference() -> None:
    check("cpu", TRITON_INTERPRET="1")


@needs_liger
@pytest.mark.gpu
def test_on_gpu_agrees_with_the_reference() -> None:
    check("cuda")


# -- the choice ------------------------------------------------------------------------------------

HIDDEN = torch.randn(5, 8)
KIND = CallKind("scoring", 8, 8, 16, torch.float32, HIDDEN.device, False, LogitMap())


@pytest.fixture(autouse=True)
def nothing_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(rft_liger, "_chosen", {})
    pop_messages()
    yield
    pop_messages()


class Run:
    """Row sums that take `seconds`, off by `off`; `grad` scales their gradient."""

    def __init__(self, seconds: float = 0.0, off: float = 0.0, grad: float = 1.0) -> None:
        self.seconds, self.off, self.grad, self.calls = seconds, off, grad, 0

    def __call__(self, hidden: Tensor) -> Tensor:
        self.calls += 1
        time.sleep(self.seconds)
        sums = hidden.sum(1)
        return sums.detach() * (1 - self.grad) + sums * self.grad + self.off


def failing(hidden: Tensor) -> Tensor:
    raise TypeError("cross_entropy_forward() got an unexpected argument")


@pytest.mark.parametrize("path", ["scoring", "frozen"])
@pytest.mark.parametrize(("triton", "liger", "chosen"), [(0.02, 0.0, "liger"), (0.0, 0.02, "triton")])
def test_the_faster_one_is_taken_told_and_remembered(
    triton: float, liger: float, chosen: str, path: Task, caplog: pytest.LogCaptureFixture
) -> None:
    runs: dict[Choice, Run] = {"triton": Run(triton), "liger": Run(liger)}
    kind = replace(KIND, task=path)
    with caplog.at_level(logging.INFO, logger="rft"):
        assert choose(kind, HIDDEN, runs) == chosen
    measured = [run.calls for run in runs.values()]
    assert measured == [ROUNDS + 1] * 2
    (line,) = pop_messages()
    assert "up to 8 rows, H=8, V=16, float32" in line and "measured Triton" in line
    assert caplog.messages == [line]
    assert choose(kind, HIDDEN, {"triton": failing, "liger": failing}) == chosen
    assert pop_messages() == []
    choose(replace(kind, rows=16), HIDDEN, runs)
    assert len(pop_messages()) == 1


@pytest.mark.parametrize(
    ("liger", "words"),
    [
        (failing, "Liger's kernel failed: TypeError: cross_entropy_forward() got an unexpected argument"),
        (Run(off=0.5), "Liger's kernel is off by 5.0e-01"),
        (Run(off=float("nan")), "Liger's kernel is off by nan"),
        (Run(grad=1.5), "Liger's kernel is off by 5.0e-01"),
    ],
)
def test_a_kernel_that_fails_or_differs_is_left_out_and_that_is_told(
    liger: Logps, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    assert choose(replace(KIND, task="frozen"), HIDDEN, {"triton": Run(0.01), "liger": liger}) == "triton"
    (line,) = pop_messages()
    assert line.endswith(f": Triton; {words}")
    assert [r.levelno for r in caplog.records] == [logging.WARNING]


def test_a_choice_in_the_learners_process_is_told_by_the_run() -> None:
    choose(KIND, HIDDEN, {"triton": Run(0.01), "liger": Run()})
    learner = Learner.__new__(Learner)
    learner.messages = []
    (told,) = learner.pop_messages()
    assert "Liger's kernel; measured Triton" in told
    assert not learner.pop_messages()


def test_tritons_own_failure_is_not_hidden() -> None:
    with pytest.raises(TypeError, match="unexpected argument"):
        choose(KIND, HIDDEN, {"triton": failing, "liger": Run()})
    assert pop_messages() == []


def test_infinite_and_undefined_log_probs_of_both_do_not_differ() -> None:
    hidden = HIDDEN.clone()
    hidden[0], hidden[1, 0] = -torch.inf, torch.nan
    assert choose(KIND, hidden, {"triton": Run(0.01), "liger": Run()}) == "liger"


# -- what it serves, and where it is refused -------------------------------------------------------


def test_the_paths_it_serves() -> None:
    h, w, b = torch.zeros(2, 3), torch.zeros(4, 3), torch.zeros(4)
    path: Callable[..., str | None] = task_of
    assert path(h, w, b, False) == "scoring"
    assert path(h, w, b, True) is None and path(h[:0], w, b, False) is None
    h.requires_grad_()
    assert path(h, w, b, False) == "frozen"
    b.requires_grad_()
    assert path(h, w, None, False) == "frozen" and path(h, w, b, False) is None
    w.requires_grad_()
    assert path(h, w, None, False) is None
    with torch.no_grad():
        assert path(h, w, b, False) == "scoring"


def test_it_is_refused_where_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    h, w, y = torch.zeros(2, 3), torch.zeros(4, 3), torch.tensor([0, 1])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"liger-kernel is not installed: pip install 'liger-kernel>=0\.8"):
        token_logps(h, w, y, backend="liger")
    forced = parse_config(
        {"algorithm": "grpo", "rewards": [{"function": "math"}], "learner": {"kernels": {"logprob": "liger"}}}
    )
    gpu = facts(device="cuda", gpus=2)
    assert problems(forced, facts(device="cuda", gpus=2, installed=frozenset())) == [
        "learner.kernels.logprob: liger needs liger-kernel, which is not installed: "
        f"{LIGER_REMEDY}, or write auto or triton"
    ]
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ValueError, match="backend liger needs CUDA tensors, hidden is on cpu"):
        token_logps(h, w, y, backend="liger")
    assert problems(forced, gpu) == [] and len(problems(forced, facts())) == 1
