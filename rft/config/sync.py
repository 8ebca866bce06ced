"""Config of the weight channel."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rft.config.base import ConfigModel
from rft.utils.paths import PathText

Measure = Literal["off", "overall", "matrices"]


class SyncConfig(ConfigModel):
    """How weights travel from learner to rollout, and how their arrival is proven."""

    transport: Literal["auto", "gloo", "nccl", "ipc", "sparse", "file", "adapter"] = Field(
        "auto",
        description="gloo (CPU), nccl (GPUs), ipc (learner and engine in turn on one GPU), sparse (changed "
        "elements only, between GPUs over NCCL), file (for engines elsewhere), adapter (LoRA alone, not "
        "merged), or auto: gloo on CPU, ipc on a machine with one GPU, else nccl",
    )
    folder: PathText | None = Field(
        None,
        description="folder that every node sees, for transport file (none: shared memory of this machine) "
        "and, where given, for sparse",
    )
    full_every: int = Field(
        20, ge=1, description="transport sparse: every n-th push carries all elements, changed or not"
    )
    measure_changes: Measure = Field(
        "off",
        description="measure the share of weights that a step changed in bfloat16: off, overall, or "
        "matrices (each one); copies all weights to host memory at each push and keeps 2 bytes a parameter "
        "there, but for transport sparse in bfloat16, which knows the figure",
    )
    prove_every: int = Field(
        1,
        ge=1,
        description="every n-th version is proven to have arrived: engines and learner score the same fixed "
        "tokens, and the run stops where they differ by more than the two bounds below; the first push and "
        "those to rebuilt engines always are",
    )
    max_logp_gap: float | None = Field(
        None,
        ge=0,
        description="largest |learner - engine| log-prob of a fresh or fixed token before the run stops "
        "(none: 0.02 where both run in float32, unbounded otherwise)",
    )
    max_logp_gap_mean: float | None = Field(
        None,
        ge=0,
        description="the same for the mean over a step's fresh tokens, or a proof's fixed ones "
        "(none: 0.001 in float32, else 0.05)",
    )
    timeout_s: float = Field(120, gt=0, description="seconds that a push or a rendezvous may take")
