"""What packing gains: the same sequences packed into micro-batches of a token budget, and padded side by
side, forward and backward of the base transformer.

    python benchmarks/packing.py [--rounds 3] [--threads 1] [--out benchmarks/results/packing-cpu.json]

Padded micro-batches take sequences in the order they come, as many as fit the same budget with padding
counted. `fill` is the share of the budget that packed micro-batches use, `waste` the share of padding in
padded ones. Pairs are also run with shared prompts. Planning is timed alone, for 20,000 sequences.

Profiles: `equal` and `short` are what the embedded arithmetic tasks look like; `tail` is log-normal;
`gsm8k-pairs` are the lengths of ../shared/data/gsm8k/preferences.jsonl in words and signs, a stand-in for
tokens, and is left out (and said so) where that file is absent; RFT_DATA names another folder for it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from prefix import VOCABULARY, Padded, Shape, interleaved, machine, yardstick
from torch import Tensor

from rft.batch import Batch, Completion, Group, Prompt
from rft.kernels.attention import hidden_states, prepare_model
from rft.packing import micro_batches, tree_costs, tree_tokens

BUDGET = 4096
Sizes = list[tuple[int, list[int]]]


def profiles() -> dict[str, Sizes]:
    """(prompt tokens, completion tokens of each sequence) per group."""
    rng = random.Random(0)
    out: dict[str, Sizes] = {
        "equal": [(20, [40]) for _ in range(256)],
        "short": [(n // 3, [n - n // 3]) for n in (rng.randint(40, 80) for _ in range(256))],
        "tail": [(64, [max(8, int(rng.lognormvariate(4.5, 0.9)))]) for _ in range(96)],
    }
    data = Path(os.environ.get("RFT_DATA", Path(__file__).parents[2] / "shared" / "data"))
    pairs = data / "gsm8k" / "preferences.jsonl"
    if pairs.exists():
        with pairs.open() as lines:
            rows = [json.loads(line) for line, _ in zip(lines, range(64), strict=False)]
        out["gsm8k-pairs"] = [
            (pieces(r["prompt"]), [pieces(r["chosen"]), pieces(r["rejected"])]) for r in rows
        ]
    else:
        print(f"gsm8k-pairs left out: no {pairs}")
    return out


def pieces(text: str) -> int:
    return max(1, len(re.findall(r"\w+|[^\w\s]", text)))


def batch_of(sizes: Sizes, share: bool) -> Batch:
    rng = random.Random(1)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(VOCABULARY) for _ in range(n))

    groups = [
        Group(Prompt(i, tokens(p), ""), tuple(Completion(tokens(r)) for r in rs))
        for i, (p, rs) in enumerate(sizes)
    ]
    return Batch.build(groups, share_prefix=share)


def padded_runs(model: Any, batch: Batch, budget: int) -> list[Padded]:
    """Sequences in order, as many to a micro-batch as fit with padding."""
    rows = list(batch.tokens.split(tree_tokens(batch).tolist()))
    parts: list[list[Tensor]] = [[]]
    for row in rows:
        width = max(len(r) for r in [*parts[-1], row])
        if parts[-1] and width * (len(parts[-1]) + 1) > budget:
            parts.append([])
        parts[-1].append(row)
    pull = torch.ones(1, model.config.hidden_size)
    return [Padded(model, part, [pull.expand(len(row), -1) for row in part]) for part in parts]


def packed_run(model: Any, batch: Batch) -> None:
    """All micro-batches of a batch, planning and layout included."""
    model.zero_grad()
    for trees in micro_batches(batch, BUDGET, hidden_size=model.config.hidden_size)[0]:
        hidden_states(model, batch.select(trees)).sum().backward()


def measure(name: str, sizes: Sizes, rounds: int) -> dict[str, Any]:
    shape = Shape()
    reference, model = shape.build(), shape.build()
    prepare_model(model)
    separate, shared = batch_of(sizes, False), batch_of(sizes, True)
    padded = padded_runs(reference, separate, BUDGET)
    runs = {"padded": lambda: [run() for run in padded], "packed": lambda: packed_run(model, separate)}
    if any(len(completions) > 1 for _, completions in sizes):
        runs["shared"] = lambda: packed_run(model, shared)
    before = yardstick()
    times = interleaved(runs, rounds)
    plan = micro_batches(separate, BUDGET)[0]
    slots = sum(run.tokens.numel() for run in padded)
    row = {
        "profile": name,
        "sequences": separate.num_sequences,
        "tokens": separate.num_tokens,
        **{f"{key}_s": round(value, 4) for key, value in times.items()},
        "packed_gain": round(times["padded"] / times["packed"], 3),
        "fill": round(separate.num_tokens / (BUDGET * len(plan)), 3),
        "waste": round(1 - separate.num_tokens / slots, 3),
        "yardstick_gflops": [round(before), round(yardstick())],
    }
    if "shared" in times:
        row["shared_gain"] = round(times["padded"] / times["shared"], 3)
        row["shared_bound"] = round(shape.flops(separate) / shape.flops(shared), 3)
    return row


def planning(sequences: int = 20_000, ranks: int = 8) -> dict[str, Any]:
    """Time and balance of one plan for many sequences, lengths uniform in 16 to 512."""
    lengths = torch.randint(16, 512, (sequences,), generator=torch.Generator().manual_seed(0))
    segment = torch.repeat_interleave(torch.arange(sequences), lengths)
    total = segment.numel()
    batch = Batch(
        tokens=segment,
        positions=segment,
        segment=segment,
        source=segment,
        mask=torch.ones(total, dtype=torch.bool),
        sequence=segment,
        parent=torch.full((sequences,), -1),
        group=torch.arange(sequences),
    )
    start = time.perf_counter()
    plan = micro_batches(batch, BUDGET, ranks)
    seconds = time.perf_counter() - start
    costs = tree_costs(batch, 1024)
    loads = [sum(float(costs[part].sum()) for part in rank) for rank in plan]
    return {
        "sequences": sequences,
        "ranks": ranks,
        "seconds": round(seconds, 2),
        "fill": round(total / (BUDGET * sum(map(len, plan))), 4),
        "imbalance": round(max(loads) / (sum(loads) / ranks) - 1, 5),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds per profile")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--out", type=Path, default=None, help="where to write the rows as JSON")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = []
    for name, sizes in profiles().items():
        rows.append(measure(name, sizes, args.rounds))
        print("  ".join(f"{k} {v}" for k, v in rows[-1].items()), flush=True)
    plan = planning()
    print("planning:", "  ".join(f"{k} {v}" for k, v in plan.items()))
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        result = {"machine": machine(), "model": Shape().__dict__, "budget": BUDGET, "rows": rows}
        args.out.write_text(json.dumps(result | {"planning": plan}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
