"""Lengths of real data: (prompt tokens, completion tokens of each sequence) per group.

`paper`: the six preference sets of Wang and Hegde, "Accelerating Direct Preference Optimization with Prefix
Sharing" (arXiv:2410.20305), tables 1 and 2. The paper publishes no histograms: per set, it states the median
length and the median ratio of prefix to completion. A profile here is pairs of that median length and ratio,
every pair alike; "length" is read as prompt plus one completion. What spread would add is not modelled.

`gsm8k`: the lengths of gsm8k's preference pairs (preferences.jsonl), in words and signs, a stand-in for
tokens: those of examples/data, or of the folder gsm8k/ in RFT_DATA.
"""

from __future__ import annotations

import json
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

Sizes = list[tuple[int, list[int]]]


@dataclass(frozen=True)
class PaperSet:
    """A preference set: median tokens of a sequence, median prefix over completion, and the paper's packed
    throughput with prefix sharing over FlashAttention-3 with packing (8 H100, 7B and 8B models)."""

    length: int
    ratio: float
    paper_gain: float

    def pair(self, scale: float = 1.0) -> tuple[int, list[int]]:
        completion = max(1, round(self.length * scale / (1 + self.ratio)))
        return max(1, round(self.length * scale) - completion), [completion, completion]


PAPER = {
    "Capybara": PaperSet(1160, 1.59, 1.34),
    "HH-RLHF": PaperSet(186, 2.15, 1.41),
    "MetaMath-DPO": PaperSet(872, 3.91, 1.57),
    "TLDR": PaperSet(416, 11.14, 1.35),
    "Tulu-HelpSteer": PaperSet(775, 6.34, 1.48),
    "UltraFeedback": PaperSet(409, 0.42, 1.17),
}


def pieces(text: str) -> int:
    """Words and signs."""
    return max(1, len(re.findall(r"\w+|[^\w\s]", text)))


def gsm8k_pairs(tokens: int) -> Sizes | None:
    """Lengths of gsm8k's first preference pairs, about `tokens` together; None where the file is absent."""
    data = Path(os.environ.get("RFT_DATA", Path(__file__).parents[1] / "examples" / "data"))
    pairs = data / "gsm8k" / "preferences.jsonl"
    if not pairs.exists():
        return None
    found: Sizes = []
    with pairs.open() as lines:
        for row in map(json.loads, lines):
            prompt, *sides = (pieces(row[key]) for key in ("prompt", "chosen", "rejected"))
            found.append((prompt, sides))
            tokens -= 2 * prompt + sum(sides)
            if tokens <= 0:
                break
    return found


def all_profiles(tokens: int = 16_000) -> dict[str, Sizes]:
    """By name: about `tokens` tokens each, unshared. `equal` and `short` are what the embedded arithmetic
    tasks look like, `tail` is log-normal."""
    rng = random.Random(0)
    out: dict[str, Sizes] = {
        "equal": [(20, [40])] * (tokens // 60),
        "short": [(n // 3, [n - n // 3]) for n in (rng.randint(40, 80) for _ in range(tokens // 60))],
        "tail": [(64, [max(8, int(rng.lognormvariate(4.5, 0.9)))]) for _ in range(tokens // 200)],
    }
    for name, described in PAPER.items():
        out[name] = [described.pair()] * max(2, tokens // (2 * described.length))
    if (pairs := gsm8k_pairs(tokens)) is not None:
        out["gsm8k-pairs"] = pairs
    return out
