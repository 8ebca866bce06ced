"""A reward written for verl. In a config: `verl:examples/rewards/compute_score.py:compute_score`."""

from __future__ import annotations

from typing import Any


def compute_score(data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None) -> float:
    """1 where the last word is the ground truth."""
    words = solution_str.split()
    return float(bool(words) and words[-1].strip(".") == ground_truth)
