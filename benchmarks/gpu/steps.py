"""Whole SFT, DPO and GRPO steps of rft against TRL's, on the same tokens: `train_step.py` on the GPU.

A Qwen3-0.6B-shaped model with all its layers; TRL in its own environment (RFT_PEER_TRL names a Python that
has it, where nothing can be downloaded). Without it, rft's own steps are timed alone, and the result says so.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec

from harness import script, settings

FULL = (
    "--layers",
    "28",
    "--vocabulary",
    "151936",
    "--prompt",
    "2048",
    "--completion",
    "512",
    "--rounds",
    "5",
)
SMALL = ("--layers", "1", "--vocabulary", "500", "--width", "128", "--prompt", "16", "--completion", "8")

if __name__ == "__main__":
    s = settings("steps", __doc__)
    out, log = s.out / "gpu-steps.partial.json", s.out / "gpu-steps.log"
    s.out.mkdir(parents=True, exist_ok=True)
    peers = not s.small and ("RFT_PEER_TRL" in os.environ or find_spec("trl") is not None)
    sizes = (*SMALL, "--rounds", "1", "--device", "cpu") if s.small else (*FULL, "--device", "cuda")
    script("train_step.py", *sizes, *(["--peers"] if peers else []), "--out", out, log=log)
    found = json.loads(out.read_text())
    out.unlink()
    del found["machine"]
    s.finish({"peers": peers, **found})
