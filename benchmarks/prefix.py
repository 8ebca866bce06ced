"""What sharing a prompt gains: forward and backward of a group's sequences with the prompt computed once,
against the same sequences padded side by side through the model as transformers runs it (sdpa).

    python benchmarks/prefix.py [--rounds 5] [--threads 1] [--grid] [--out benchmarks/results/prefix-cpu.json]

Every row gives both median times of interleaved rounds, their ratio, the bound (the ratio of floating-point
operations), and the largest relative differences of hidden states and gradients in float32. The times
cover the base transformer; the head, which sharing does not change, is left out. A row's `share` is
what the cost model would have chosen. Between rounds a matrix product is timed, so that a machine busy
with something else is seen.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from rft.batch import Batch, Completion, Group, Prompt
from rft.kernels.attention import hidden_states, prepare_model
from rft.packing import segment_pairs, worth_sharing

VOCABULARY = 512
CASES = [(512, 64, 2), (256, 64, 8), (1024, 128, 8), (64, 256, 8)]
GRID = [(p, r, g) for p, r in ((32, 256), (128, 128), (512, 128), (512, 64)) for g in (4, 8, 16)]


@dataclass(frozen=True)
class Shape:
    """The model that is timed."""

    hidden_size: int = 256
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 64

    def build(self) -> Qwen3ForCausalLM:
        torch.manual_seed(0)
        config = Qwen3Config(
            vocab_size=VOCABULARY,
            intermediate_size=3 * self.hidden_size,
            max_position_embeddings=1 << 15,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            num_key_value_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
        )
        return Qwen3ForCausalLM(config)

    def flops(self, batch: Batch) -> float:
        """Multiply-adds of the forward's matrix products: two per weight and token, and the attention."""
        h, heads, shared, d = (
            self.hidden_size,
            self.num_attention_heads,
            self.num_key_value_heads,
            self.head_dim,
        )
        weights = 2 * h * heads * d + 2 * h * shared * d + 3 * h * 3 * h
        pairs = int(segment_pairs(batch.segment, batch.parent).sum())
        return self.num_hidden_layers * (2 * weights * batch.num_tokens + 4 * heads * d * pairs)


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """Median seconds of each run, timed in turns, after one turn that is not counted. On one thread it is
    processor time, which other work on the machine lengthens less."""
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            start = clock()
            run()
            if turn:
                times[name].append(clock() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def yardstick() -> float:
    """Billions of floating-point operations per second of a plain float32 matrix product, now."""
    a = torch.randn(1024, 1024)
    seconds = interleaved({"mm": lambda: a @ a}, rounds=5)["mm"]
    return 2 * 1024**3 / seconds / 1e9


def machine() -> dict[str, Any]:
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


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

    def __call__(self) -> Tensor:
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
        return tuple(torch.randint(0, VOCABULARY, (n,), generator=g).tolist())

    return Group(
        Prompt(0, tokens(prompt), ""), tuple(Completion(tokens(completion)) for _ in range(generations))
    )


def measure(shape: Shape, case: tuple[int, int, int], rounds: int) -> dict[str, Any]:
    """One row: (prompt, completion, generations) shared against padded."""
    prompt, completion, generations = case
    reference, model = shape.build(), shape.build()
    prepare_model(model)
    group = group_of(*case)
    shared, separate = (Batch.build([group], share_prefix=share) for share in (True, False))
    rows = list(separate.tokens.split(prompt + completion))
    pull = torch.randn(
        generations, prompt + completion, shape.hidden_size, generator=torch.Generator().manual_seed(1)
    )
    padded = Padded(reference, rows, list(pull))
    # a prompt token's pull is the sum over the rows that repeat it, so both have the same gradient
    shared_pull = torch.cat([pull[:, :prompt].sum(0), pull[:, prompt:].flatten(0, 1)])

    def run() -> Tensor:
        model.zero_grad()
        hidden = hidden_states(model, shared)
        (hidden * shared_pull).sum().backward()
        return hidden.detach()

    before = yardstick()
    hidden, expected = run(), padded().unflatten(0, (generations, -1))
    expected = torch.cat([expected[0, :prompt], expected[:, prompt:].flatten(0, 1)])
    errors = [
        float((a.grad - b.grad).norm() / b.grad.norm())
        for (_, a), (_, b) in zip(model.named_parameters(), reference.named_parameters(), strict=True)
        if b.grad is not None and b.grad.norm() > 0
    ]
    times = interleaved({"shared": run, "padded": padded}, rounds)
    bound = shape.flops(separate) / shape.flops(shared)
    gain = times["padded"] / times["shared"]
    return {
        "prompt": prompt,
        "completion": completion,
        "generations": generations,
        "padded_s": round(times["padded"], 4),
        "shared_s": round(times["shared"], 4),
        "gain": round(gain, 3),
        "bound": round(bound, 3),
        "of_bound": round(gain / bound, 3),
        "share": worth_sharing([(prompt, [completion] * generations)], shape.hidden_size),
        "hidden_error": float((hidden - expected).norm(dim=-1).max() / expected.norm(dim=-1).max()),
        "gradient_error": max(errors),
        "yardstick_gflops": [round(before), round(yardstick())],
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds per case")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--grid", action="store_true", help="also G in 4, 8, 16 by p/R in 1/8, 1, 4, 8")
    parser.add_argument("--out", type=Path, default=None, help="where to write the rows as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    shape, rows = Shape(), []
    print("    p     R   G   padded   shared    gain   bound  of bound   hidden    grads")
    for case in [*CASES, *(GRID if args.grid else [])]:
        row = measure(shape, case, args.rounds)
        rows.append(row)
        print(
            f"{row['prompt']:5d} {row['completion']:5d} {row['generations']:3d} {row['padded_s']:7.3f}s "
            f"{row['shared_s']:7.3f}s {row['gain']:7.2f} {row['bound']:7.2f} {row['of_bound']:8.0%} "
            f"{row['hidden_error']:9.1e} {row['gradient_error']:8.1e}",
            flush=True,
        )
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": machine(), "model": shape.__dict__, "rounds": args.rounds, "rows": rows}
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
