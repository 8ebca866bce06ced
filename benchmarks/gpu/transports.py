"""A push of weights from GPU to GPU, whole (`nccl`) and only the changes (`sparse`): seconds, bytes, the
share of weights that a step changed, and whether the engine samples from the pushed weights. Two GPUs.

The model and the steps of the `colocated` part. In its small setting, on a CPU, both go over gloo.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from colocated import MODEL, in_turn
from harness import Settings, missing_engine, settings
from online import SMALL, engine_of, run, summary

FIGURES = ("sync/changed_share", "time/sync_announce")


def obstacle(s: Settings) -> str | None:
    """Why this machine cannot measure; None where it can."""
    if s.small:
        return None
    if torch.cuda.device_count() < 2:
        return f"needs two GPUs, this machine has {torch.cuda.device_count()}"
    return missing_engine()


def pushes(s: Settings, engine: str, transport: str) -> dict[str, Any]:
    """Ten steps at a learning rate of reinforcement learning; medians of their pushes."""
    with tempfile.TemporaryDirectory(prefix="gpu-transports-") as folder:
        base = in_turn(s, engine, Path(folder))
        chosen = {"transport": "gloo" if s.small and transport == "nccl" else transport, "full_every": 100}
        learner = {**base["learner"], "learning_rate": 1e-6}
        rows = run(s, {**base, "name": transport, "sync": chosen, "learner": learner}, Path(folder))
    return {"transport": transport, **summary(rows, *FIGURES)}


if __name__ == "__main__":
    s = settings("transports", __doc__)
    s.out.mkdir(parents=True, exist_ok=True)
    if (why := obstacle(s)) is not None:
        s.finish({"left_out": why})
    else:
        engine = engine_of(s)
        results = [pushes(s, engine, transport) for transport in ("nccl", "sparse")]
        s.finish({"model": SMALL if s.small else MODEL, "engine": engine, "results": results})
