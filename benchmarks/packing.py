"""What packing gains: the same sequences packed into micro-batches of a token budget, and padded side by
side, forward and backward of the base transformer.

    python benchmarks/packing.py [--rounds 3] [--threads 1] [--profiles gsm8k-pairs ...]

Padded micro-batches take sequences in the order they come, as many as fit the same budget with padding
counted. `fill` is the share of the budget that packed micro-batches use, `waste` the share of padding in
padded ones. Pairs are also run with shared prompts, as fast as the bound says at best. Each row carries the
largest relative difference of the gradients from the padded run's in float32, and both peaks of memory,
each in a separate process. Planning is timed separately, for 20,000 sequences. Profiles: `profiles.py`.
"""

from __future__ import annotations

import argparse
import random
import time
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
from prefix import Padded
from profiles import PAPER, Sizes, all_profiles
from shapes import SMALL
from torch import Tensor

from rft.batch import Batch, Completion, Group, Prompt
from rft.kernels.attention import hidden_states, prepare_model
from rft.packing import micro_batches
from rft.work import tree_costs, tree_tokens, worth_sharing

BUDGET = 4096


def batch_of(sizes: Sizes, share: bool) -> Batch:
    """A batch whose `weight` says of how many sequences a token is part."""
    rng = random.Random(1)

    def tokens(n: int) -> tuple[int, ...]:
        return tuple(rng.randrange(SMALL.vocabulary) for _ in range(n))

    groups = [
        Group(Prompt(i, tokens(p), ""), tuple(Completion(tokens(r)) for r in rs))
        for i, (p, rs) in enumerate(sizes)
    ]
    batch = Batch.build(groups, share_prefix=share)
    children = torch.bincount(batch.parent[batch.parent >= 0], minlength=batch.parent.numel())
    return batch.with_(weight=children.clamp(min=1)[batch.segment].float())


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
        part = batch.select(trees)
        assert part.weight is not None
        (hidden_states(model, part) * part.weight[:, None]).sum().backward()


class Ways:
    """One profile, ready to run padded, packed and, where a prompt has several completions, shared."""

    def __init__(self, sizes: Sizes) -> None:
        self.reference, self.model = SMALL.build(), SMALL.build()
        prepare_model(self.model)
        self.separate, self.shared = batch_of(sizes, False), batch_of(sizes, True)
        self.padded = padded_runs(self.reference, self.separate, BUDGET)
        self.runs: dict[str, Callable[[], object]] = {
            "padded": self.run_padded,
            "packed": lambda: packed_run(self.model, self.separate),
        }
        if any(len(completions) > 1 for _, completions in sizes):
            self.runs["shared"] = lambda: packed_run(self.model, self.shared)

    def run_padded(self) -> None:
        self.reference.zero_grad()
        for part in self.padded:
            part(clear=False)

    def errors(self) -> dict[str, float]:
        """Of each way's gradients, from the padded run's."""
        self.run_padded()
        found = {}
        for which in self.runs.keys() - {"padded"}:
            self.runs[which]()
            found[f"{which} gradient"] = gradient_error(self.model, self.reference)
        return found


def peak(sizes: Sizes, which: str) -> float:
    """Peak memory beyond models and inputs, 10^6 bytes."""
    return round(peak_of(Ways(sizes).runs[which]), 1)


def measure(name: str, sizes: Sizes, rounds: int) -> dict[str, Any]:
    ways = Ways(sizes)
    separate = ways.separate
    times = interleaved(ways.runs, rounds)
    slots = sum(run.tokens.numel() for run in ways.padded)
    row = {
        "profile": name,
        "sequences": separate.num_sequences,
        "tokens": separate.num_tokens,
        "packed_gain": round(times.gain("padded", "packed"), 3),
        "fill": round(separate.num_tokens / (BUDGET * len(micro_batches(separate, BUDGET)[0])), 3),
        "waste": round(1 - separate.num_tokens / slots, 3),
        "errors": ways.errors(),
        "peak_mb": {which: in_fresh_process(peak, sizes, which) for which in ways.runs},
        **times.summary(),
    }
    if "shared" in ways.runs:
        bound = SMALL.operations(separate) / SMALL.operations(ways.shared)
        gain = times.gain("packed", "shared")
        row["shared_gain"] = round(gain, 3)
        row["shared_bound"] = round(bound, 3)
        row["of_bound"] = round(gain / bound, 3)
        row["share"] = worth_sharing(sizes, SMALL.width)
        row["passed"] = gain >= 0.9 * bound if row["share"] else None
    if name in PAPER:
        row["paper_gain_8xH100"] = PAPER[name].paper_gain
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
    parser.add_argument("--tokens", type=int, default=16_000, help="tokens of a profile, about")
    parser.add_argument("--profiles", nargs="+", help="only these")
    parser.add_argument("--out", type=Path, default=RESULTS / "packing-cpu.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found = all_profiles(args.tokens)
    if unknown := sorted(set(args.profiles or ()) - set(found)):
        parser.error(f"no profile {', '.join(unknown)}; there are {', '.join(found)}")
    if "gsm8k-pairs" not in found:
        print("gsm8k-pairs left out: set RFT_DATA to the folder that holds gsm8k/preferences.jsonl")
    plan = planning()
    print("planning:", "  ".join(f"{k} {v}" for k, v in plan.items()))
    settings = {"model": asdict(SMALL), "budget": BUDGET, "rounds": args.rounds, "planning": plan}
    for name in args.profiles or found:
        row = measure(name, found[name], args.rounds)
        print("  ".join(f"{k} {v}" for k, v in row.items()), flush=True)
        write_result(args.out, settings | {"results": merge_rows(args.out, ("profile",), [row])})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
