"""What sharing a prompt gains: forward and backward of a group's sequences with the prompt computed once,
against the same sequences padded side by side through the model as transformers runs it (sdpa).

    python benchmarks/prefix.py [--rounds 5] [--threads 1] [--cases 512x64x2 ...]

Every row gives both median times of interleaved rounds, the median of their ratio, the bound (the ratio of
floating-point operations), the largest relative differences of hidden states and gradients in float32
from the padded run, and both peaks of memory, each in a separate process. The times cover the base
transformer; the head, which sharing does not change, is left out. A row's `share` is the cost model's choice;
where it is false, rft trains unshared. Between rounds a matrix product is timed, so that
a machine busy with something else is seen. Four cases, then G in 4, 8, 16 by p/R in 1/8, 1, 4, 8.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from common import (
    RESULTS,
    gradient_error,
    in_fresh_process,
    interleaved,
    merge_rows,
    peak_of,
    write_result,
)
from shapes import SMALL, Shape
from torch import Tensor

from rft.batch import Batch, Completion, Group, Prompt
from rft.kernels.attention import hidden_states, prepare_model
from rft.work import worth_sharing

CASES = [(512, 64, 2), (256, 64, 8), (1024, 128, 8), (64, 256, 8)]
GRID = [(p, r, g) for p, r in ((32, 256), (128, 128), (512, 128), (512, 64)) for g in (4, 8, 16)]


class Padded:
    """Sequences side by side, padded on the right, through the model as it comes."""

    def __init__(self, model: Any, rows: Sequence[Tensor], weights: Sequence[Tensor]) -> None:
        self.model = model
        width = max(len(row) for row in rows)
        self.tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        self.mask = torch.zeros(len(rows), width, dtype=torch.int64)
        self.pull = torch.zeros(len(rows), width, weights[0].shape[-1])
        for i, (row, weight) in enumerate(zip(rows, weights, strict=True)):
            self.tokens[i, : len(row)], self.mask[i, : len(row)] = row, 1
            self.pull[i, : len(row)] = weight

    def __call__(self, clear: bool = True) -> Tensor:
        """Forward and backward; the real tokens' hidden states [n, H]. `clear`: gradients start anew."""
        if clear:
            self.model.zero_grad()
        mask = None if bool(self.mask.all()) else self.mask
        hidden = self.model.model(
            input_ids=self.tokens, attention_mask=mask, use_cache=False
        ).last_hidden_state
        (hidden * self.pull).sum().backward()
        return hidden.detach()[self.mask.bool()]


def group_of(prompt: int, completion: int, generations: int) -> Group:
    g = torch.Generator().manual_seed(prompt + completion)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, SMALL.vocabulary, (n,), generator=g).tolist())

    return Group(
        Prompt(0, tokens(prompt), ""), tuple(Completion(tokens(completion)) for _ in range(generations))
    )


class Pair:
    """One group of `generations` completions, ready to run shared and padded, with the same pull on every
    hidden state."""

    def __init__(self, shape: Shape, case: tuple[int, int, int]) -> None:
        prompt, completion, generations = case
        self.case, self.reference, self.model = case, shape.build(), shape.build()
        prepare_model(self.model)
        group = group_of(*case)
        self.shared, self.separate = (Batch.build([group], share_prefix=share) for share in (True, False))
        generator = torch.Generator().manual_seed(1)
        pull = torch.randn(generations, prompt + completion, shape.width, generator=generator)
        self.padded = Padded(
            self.reference, list(self.separate.tokens.split(prompt + completion)), list(pull)
        )
        # a prompt token's pull is the sum over the rows that repeat it, so both have the same gradient
        self.pull = torch.cat([pull[:, :prompt].sum(0), pull[:, prompt:].flatten(0, 1)])

    def run_shared(self) -> Tensor:
        self.model.zero_grad()
        hidden = hidden_states(self.model, self.shared)
        (hidden * self.pull).sum().backward()
        return hidden.detach()

    def errors(self) -> dict[str, float]:
        """Largest differences, relative to the largest norm of a hidden state and to each gradient's norm."""
        prompt, _, generations = self.case
        hidden, padded = self.run_shared(), self.padded().unflatten(0, (generations, -1))
        expected = torch.cat([padded[0, :prompt], padded[:, prompt:].flatten(0, 1)])
        return {
            "hidden": float((hidden - expected).norm(dim=-1).max() / expected.norm(dim=-1).max()),
            "gradient": gradient_error(self.model, self.reference),
        }


def peak(shape: Shape, case: tuple[int, int, int], which: str) -> float:
    """Peak memory beyond models and inputs, 10^6 bytes."""
    pair = Pair(shape, case)
    runs: dict[str, Callable[[], object]] = {"shared": pair.run_shared, "padded": pair.padded}
    return round(peak_of(runs[which]), 1)


def measure(shape: Shape, case: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """One row: (prompt, completion, generations) shared against padded."""
    pair = Pair(shape, case)
    found = pair.errors()
    times = interleaved({"shared": pair.run_shared, "padded": pair.padded}, rounds)
    bound = shape.operations(pair.separate) / shape.operations(pair.shared)
    gain = times.gain("padded", "shared")
    prompt, completion, generations = case
    share = worth_sharing([(prompt, [completion] * generations)], shape.width)
    gate = 0.9 * bound if share else None
    return {
        "prompt": prompt,
        "completion": completion,
        "generations": generations,
        "gain": round(gain, 3),
        "bound": round(bound, 3),
        "of_bound": round(gain / bound, 3),
        "share": share,
        "passed": None if gate is None else gain >= gate and gain >= 1,
        "errors": found,
        "peak_mb": {which: in_fresh_process(peak, shape, case, which) for which in ("shared", "padded")},
        **times.summary(),
    }


def case_of(text: str) -> tuple[int, int, int]:
    prompt, completion, generations = (int(n) for n in text.split("x"))
    return prompt, completion, generations


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per case")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--cases", nargs="+", type=case_of, metavar="PxRxG", help="only these")
    parser.add_argument("--out", type=Path, default=RESULTS / "prefix-cpu.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    shape, rows = SMALL, []
    print("    p     R   G   padded   shared    gain   bound  of bound   hidden    grads")
    for case in args.cases or [*CASES, *GRID]:
        row = measure(shape, case, args.rounds)
        rows.append(row)
        seconds, errors = row["seconds"], row["errors"]
        print(
            f"{row['prompt']:5d} {row['completion']:5d} {row['generations']:3d} {seconds['padded']:7.3f}s "
            f"{seconds['shared']:7.3f}s {row['gain']:7.2f} {row['bound']:7.2f} {row['of_bound']:8.0%} "
            f"{errors['hidden']:9.1e} {errors['gradient']:8.1e}",
            flush=True,
        )
        kept = merge_rows(args.out, ("prompt", "completion", "generations"), rows)
        write_result(args.out, {"model": asdict(shape), "rounds": args.rounds, "results": kept})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
