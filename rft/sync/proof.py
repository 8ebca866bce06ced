"""Prove that pushed weights arrived: learner and engines score the same fixed tokens with them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from rft.batch import Prompt
from rft.errors import LogpGapError
from rft.utils.seeds import derive_seed

PROOF_TOKENS = 64  # 0.9 % of a learner step on 3,500 tokens, less of a larger one


@dataclass(frozen=True)
class ProofSpec:
    """The tokens to score, how often, and the largest gaps allowed (nats; None: any gap).

    Every `every`-th version is proven, and always the first push to a new set of engines. rounded: one of the
    two computes in 16 bits. Its error grows with the logits, and tokens of prompts, on which a policy is not
    trained, may have log-probs of -20: from 1 nat on, their gaps are then divided by the log-prob.
    """

    tokens: tuple[int, ...]
    every: int
    max_gap_mean: float | None
    max_gap: float | None
    rounded: bool = False


class Gap(NamedTuple):
    """|learner's log-prob - engine's| over the fixed tokens, in nats; see `ProofSpec.rounded`."""

    mean: float
    largest: float

    @staticmethod
    def between(ours: Sequence[float], theirs: Sequence[float], *, rounded: bool = False) -> Gap:
        """Compare two lists; NaN on either side is an infinite gap. Raises ValueError for unequal lengths."""
        gaps = [
            abs(a - b) / (max(abs(a), 1.0) if rounded else 1.0) for a, b in zip(ours, theirs, strict=True)
        ]
        gaps = [float("inf") if gap != gap else gap for gap in gaps]
        return Gap(sum(gaps) / len(gaps), max(gaps))


@dataclass(frozen=True)
class Proof:
    """The gaps between each replica's log-probs and the learner's at one version."""

    version: int
    tokens: int
    gaps: Mapping[int, Gap]
    seconds: float

    @property
    def metrics(self) -> dict[str, float]:
        """Return the gaps of the worst replica."""
        return {
            "sync/proof_gap": max(gap.largest for gap in self.gaps.values()),
            "sync/proof_gap_mean": max(gap.mean for gap in self.gaps.values()),
            "time/proof": self.seconds,
        }

    def check(self, spec: ProofSpec) -> None:
        """Raise LogpGapError, naming every replica whose gap exceeds a bound."""
        problems = []
        for index, gap in sorted(self.gaps.items()):
            for what, value, bound in (
                ("mean", gap.mean, spec.max_gap_mean),
                ("largest", gap.largest, spec.max_gap),
            ):
                if bound is not None and value > bound:
                    problems.append(f"replica {index}: {what} gap {value:.4g}, allowed {bound:.4g}")
                    break
        if problems:
            raise LogpGapError(
                f"rollout engine and learner disagree at policy version {self.version} about the log-probs "
                f"of {self.tokens} fixed tokens ({'; '.join(problems)}). Version {self.version} did not "
                "arrive as it was sent, or the two compute differently (sync.max_logp_gap and "
                "sync.max_logp_gap_mean set the bounds)."
            )


def fixed_tokens(prompts: Sequence[Prompt], seed: int, limit: int) -> tuple[int, ...]:
    """Return PROOF_TOKENS tokens, at most `limit`: data prompts in a seeded order, concatenated."""
    size, order = min(PROOF_TOKENS, limit), list(range(len(prompts)))
    random.Random(derive_seed(seed, "proof")).shuffle(order)
    tokens: list[int] = []
    while len(tokens) < size:
        for index in order:
            tokens += prompts[index].tokens
            if len(tokens) >= size:
                break
    return tuple(tokens[:size])
