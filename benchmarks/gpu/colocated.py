"""Learner and engine in turn on one GPU (`sync.transport: ipc`): GPU memory in use in each turn, the cost of
the switches and of the push by CUDA handles, and whether the engine samples from the pushed weights.

A model of 0.6 G parameters from random weights, fully trained: nothing is learned, every byte moves. In its
small setting, on a CPU, learner and engine do not share a device: weights go over gloo.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from harness import Settings, missing_engine, settings
from online import SMALL, config, engine_of, run, summary

MODEL = {"hidden_size": 1024, "layers": 44, "heads": 16, "intermediate_size": 3072}
FIGURES = (
    "time/switch",
    "time/sync_announce",
    "memory/device/train",
    "memory/device/push",
    "memory/device/rollout",
    "memory/learner_peak",
)


def in_turn(s: Settings, engine: str, work: Path) -> dict[str, Any]:
    """The online part's run with another model and no warm start, for ten steps."""
    base = config(s, engine, work)
    return {
        **base,
        "name": "colocated",
        "model": {"path": "tiny", "options": SMALL if s.small else MODEL},
        "warm_start": None,
        "train": {**base["train"], "steps": 2 if s.small else 10},
        "sync": {"transport": "gloo" if s.small else "ipc", "measure_changes": "off"},
        "eval": {"every": 0},
    }


if __name__ == "__main__":
    s = settings("colocated", __doc__)
    s.out.mkdir(parents=True, exist_ok=True)
    missing = missing_engine()
    if missing is not None and not s.small:
        s.finish({"left_out": missing})
    else:
        engine = engine_of(s)
        with tempfile.TemporaryDirectory(prefix="gpu-colocated-") as folder:
            rows = run(s, in_turn(s, engine, Path(folder)), Path(folder))
        s.finish({"model": SMALL if s.small else MODEL, "engine": engine, **summary(rows, *FIGURES)})
