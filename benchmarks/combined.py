"""Packing, shared prompts, fused log-probs and gradient checkpointing: each separately, and all at once.

    python benchmarks/combined.py [--rounds 3] [--threads 1]

Forward and backward of a weighted sum of log-probs, groups of completions of unequal length. The baseline
is a plain trainer: padded rows, all prompts repeated, `log_softmax` over the logits of the
completions' tokens. Sharing needs the packed layout, so its gain is the one over packing. All at once must
be at least 85 % of the product of the separate gains. Checkpointing trades time for memory: its "gain"
is below 1. Each row carries the largest relative difference of a gradient from the plain start in float32,
and its peak memory in a fresh process.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, gradient_error, in_fresh_process, interleaved, peak_of, write_result
from packing import batch_of
from shapes import SMALL
from torch import Tensor

from rft.batch import Batch
from rft.kernels.attention import hidden_states, prepare_model
from rft.kernels.logprob import token_logps
from rft.packing import micro_batches

BUDGET = 4096
SHAPE = replace(SMALL, vocabulary=16_384)


@dataclass(frozen=True)
class Features:
    packing: bool = False
    sharing: bool = False
    fused: bool = False
    checkpointing: bool = False


PLAIN = Features()
ALONE = {
    "packing": Features(packing=True),
    "sharing": Features(packing=True, sharing=True),
    "fused": Features(fused=True),
    "checkpointing": Features(checkpointing=True),
}
EVERYTHING = Features(True, True, True, True)
VARIANTS = {"plain": PLAIN, **ALONE, "all": EVERYTHING}


class Step:
    """Forward and backward over all sequences with the given features."""

    def __init__(self, features: Features) -> None:
        dice = random.Random(0)
        sizes = [(256, [dice.randint(32, 128) for _ in range(4)]) for _ in range(4)]
        self.features = features
        batch = batch_of(sizes, features.sharing)
        pull = torch.randn(int(batch.mask.sum()), generator=torch.Generator().manual_seed(0))
        self.batch = batch.with_(weight=torch.zeros(batch.num_tokens).masked_scatter(batch.mask, pull))
        self.model = SHAPE.build()
        if features.packing:
            prepare_model(self.model)
        if features.checkpointing:
            self.model.train()
            self.model.gradient_checkpointing_enable({"use_reentrant": False})

    def __call__(self) -> None:
        self.model.zero_grad()
        for part in self._parts(self.batch):
            assert part.weight is not None
            rows = part.mask.nonzero()[:, 0]
            hidden = self._hidden(part)[part.source[rows]]
            self._loss(hidden, part.tokens[rows], part.weight[rows]).backward()

    def _parts(self, batch: Batch) -> list[Batch]:
        return [batch.select(trees) for trees in micro_batches(batch, BUDGET, hidden_size=SHAPE.width)[0]]

    def _hidden(self, part: Batch) -> Tensor:
        """[T, H]: through the packed layout, or every sequence in a padded row."""
        if self.features.packing:
            return hidden_states(self.model, part)
        lengths = torch.bincount(part.tree[part.segment]).tolist()
        rows = list(part.tokens.split(lengths))
        tokens = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(tokens.shape[1]) < torch.tensor(lengths)[:, None]
        out = self.model.model(input_ids=tokens, attention_mask=mask.long(), use_cache=False)
        return out.last_hidden_state[mask]

    def _loss(self, hidden: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
        weight = self.model.lm_head.weight
        if self.features.fused:
            return (token_logps(hidden, weight, targets) * weights).sum()
        logps = (hidden @ weight.t()).float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        return (logps * weights).sum()


def peak(features: Features) -> float:
    """Peak memory beyond model and inputs, 10^6 bytes."""
    return round(peak_of(Step(features)), 1)


def measure(rounds: int) -> dict[str, Any]:
    steps = {name: Step(features) for name, features in VARIANTS.items()}
    times = interleaved(steps, rounds)
    gains = {name: times.gain("plain", name) for name in ALONE}
    gains["sharing"] = times.gain("packing", "sharing")
    together = times.gain("plain", "all")
    product = prod(gains.values())
    for step in steps.values():
        step()
    rows = [
        {
            "variant": name,
            "gain": round(gains.get(name, together if name == "all" else 1.0), 3),
            "seconds": round(times.medians[name], 4),
            "peak_mb": in_fresh_process(peak, features),
            "errors": {"gradient": gradient_error(steps[name].model, steps["plain"].model)},
        }
        for name, features in VARIANTS.items()
    ]
    return {
        "product": round(product, 3),
        "together": round(together, 3),
        "of_product": round(together / product, 3),
        "passed": together >= 0.85 * product,
        "results": rows,
        **times.summary(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--out", type=Path, default=RESULTS / "combined-cpu.json")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    found = measure(args.rounds)
    for row in found["results"]:
        print("  ".join(f"{k} {v}" for k, v in row.items()))
    print(f"all {found['together']} of a product of {found['product']}: {found['of_product']:.0%}")
    write_result(args.out, {"model": asdict(SHAPE), **found})
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
