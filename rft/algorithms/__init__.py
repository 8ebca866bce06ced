"""Every algorithm by name. Adding one takes a file and an entry here."""

from __future__ import annotations

from rft.algorithms.base import Algorithm, PolicyOutput
from rft.algorithms.grpo import GRPO
from rft.algorithms.sft import SFT

ALGORITHMS: dict[str, type[Algorithm]] = {
    "grpo": GRPO,
    "sft": SFT,
}

__all__ = ["ALGORITHMS", "Algorithm", "PolicyOutput"]
