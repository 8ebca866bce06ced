"""The frame of the parity benchmarks: identical tensors through rft and a peer, differences in a table.

A `Comparison` makes inputs (plain tensors), and computes rft's answer from them in a given dtype. The
peer's answer comes from the function of the same `peer` name in a script that runs in the peer's own
environment. Both answers are dictionaries of tensors (loss, gradient, advantages); each is measured
against rft's in float64, so that where the two differ it is seen who is right.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peers.make_env import run_peer
from torch import Tensor

Tensors = dict[str, Any]
BOUND = 1e-5  # relative, float32


@dataclass(frozen=True)
class Comparison:
    """One loss, compared on every input of `inputs`.

    peer: the name of the function in the peer's script, called with (inputs, **settings).
    ours: (inputs, dtype) -> answers; each answer is compared with the peer's of the same name.
    reason: why the two may differ by more than the bound, where that is known and meant.
    """

    name: str
    peer: str
    ours: Callable[[Tensors, torch.dtype], dict[str, Tensor]]
    inputs: Callable[[], Iterable[Tensors]]
    settings: dict[str, Any] = field(default_factory=dict)
    reason: str = ""


def difference(got: Tensor, expected: Tensor, least: float = 1e-3) -> float:
    """Largest |got - expected| relative to the largest |expected|, or to `least` where that is more;
    infinite where one is not finite."""
    got, expected = got.double(), expected.double()
    if got.shape != expected.shape:
        raise ValueError(f"shapes differ: {tuple(got.shape)} and {tuple(expected.shape)}")
    if not got.numel():
        return 0.0
    gap = (got - expected).abs().max() / expected.abs().max().clamp(min=least)
    return float(gap.nan_to_num(nan=torch.inf))


def compare(
    comparisons: Iterable[Comparison], name: str, script: Path, only: str = ""
) -> list[dict[str, Any]]:
    """Run the comparisons that have `only` in their name against peer `name`, whose side is `script`;
    one row each, with the largest differences."""
    comparisons = [c for c in comparisons if only in c.name]
    if not comparisons:
        return []
    made = [list(c.inputs()) for c in comparisons]
    with tempfile.TemporaryDirectory() as folder:
        questions, answers = Path(folder) / "questions.pt", Path(folder) / "answers.pt"
        asked = [(c.peer, x, c.settings) for c, xs in zip(comparisons, made, strict=True) for x in xs]
        torch.save(asked, questions)
        run_peer(name, script, questions, answers)
        theirs = iter(torch.load(answers, weights_only=True))
    return [_row(c, xs, [next(theirs) for _ in xs]) for c, xs in zip(comparisons, made, strict=True)]


def _largest(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Over all answers. A loss is a sum whose terms may cancel: it is measured against the sum of its
    gradient's magnitudes where that is more."""
    least = {"loss": 1e-3}
    if "gradient" in expected:
        least["loss"] = max(1e-3, float(expected["gradient"].double().abs().sum().nan_to_num()))
    return max(difference(got[k], expected[k], least.get(k, 1e-3)) for k in expected)


def _row(c: Comparison, inputs: list[Tensors], theirs: list[dict[str, Tensor]]) -> dict[str, Any]:
    worst = {"difference": 0.0, "rft_error": 0.0, "peer_error": 0.0}
    over = 0
    for x, their in zip(inputs, theirs, strict=True):
        our, exact = c.ours(x, torch.float32), c.ours(x, torch.float64)
        if set(our) != set(their):
            raise ValueError(f"{c.name}: rft answers {sorted(our)}, the peer {sorted(their)}")
        found = {
            "difference": _largest(our, their),
            "rft_error": _largest(our, exact),
            "peer_error": _largest(their, exact),
        }
        over += found["difference"] > BOUND
        worst = {k: max(worst[k], found[k]) for k in worst}
    return {"loss": c.name, "inputs": len(inputs), **worst, "over_bound": over, "reason": c.reason}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as text: largest relative difference, and each side's error against float64."""
    lines = [f"{'loss':<28}{'inputs':>7}{'difference':>12}{'rft error':>12}{'peer error':>12}{'over':>6}"]
    for r in rows:
        numbers = (
            f"{r['difference']:>12.1e}{r['rft_error']:>12.1e}{r['peer_error']:>12.1e}{r['over_bound']:>6}"
        )
        lines.append(f"{r['loss']:<28}{r['inputs']:>7}{numbers}")
        if r["reason"]:
            lines.append(f"    {r['reason']}")
    return "\n".join(lines)


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The losses that differ by more than the bound without a reason."""
    return [r["loss"] for r in rows if r["over_bound"] and not r["reason"]]
