"""Whole SFT, DPO and GRPO steps of rft against TRL's, on the same tokens: `train_step.py` on the GPU.

A Qwen3-0.6B-shaped model with all its layers; TRL in its own environment (RFT_PEER_TRL names a Python that
has it, where nothing can be downloaded). Without it, rft's own steps are timed alone, and the result says so.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec

from harness import script, settings

FULL = ("--model", "whole", "--scale", "8", "--rounds", "5", "--device", "cuda")
SMALL = ("--model", "toy", "--scale", "0.0625", "--rounds", "1", "--device", "cpu")

if __name__ == "__main__":
    s = settings("steps", __doc__)
    out, log = s.out / "gpu-steps.partial.json", s.out / "gpu-steps.log"
    s.out.mkdir(parents=True, exist_ok=True)
    peers = not s.small and ("RFT_PEER_TRL" in os.environ or find_spec("trl") is not None)
    sizes = SMALL if s.small else FULL
    script("train_step.py", *sizes, *(["--peers"] if peers else []), "--out", out, log=log)
    found = json.loads(out.read_text())
    out.unlink()
    del found["machine"]
    s.finish({"peers": peers, **found})
