"""Config section `sync`: weight transfer from the learner to the rollout engines."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rft.config.base import ConfigModel
from rft.utils.paths import PathText

Measure = Literal["off", "overall", "matrices"]


class SyncConfig(ConfigModel):
    """Weight transfer from learner to rollout engines, and its verification."""

    transport: Literal["auto", "gloo", "nccl", "ipc", "sparse", "file", "adapter"] = Field(
        "auto",
        description="transport of the weight sync: gloo (CPU), nccl (GPUs), ipc (learner and engine "
        "colocated on one GPU), sparse (only changed elements; over NCCL between GPUs), file (engines on "
        "other machines), adapter (only the LoRA weights, not merged), or auto: gloo on CPU, ipc on a "
        "machine with one GPU, else nccl",
    )
    folder: PathText | None = Field(
        None,
        description="folder on a file system shared by all nodes, used by transport file (none: shared "
        "memory of this machine) and optionally by transport sparse",
    )
    full_every: int = Field(
        20, ge=1, description="transport sparse: send all elements, changed or not, at every n-th sync"
    )
    measure_changes: Measure = Field(
        "off",
        description="measure the fraction of weights whose bfloat16 value a step changed: off, overall, or "
        "matrices (per matrix); copies all weights to host memory at each sync and keeps 2 bytes per "
        "parameter there; free with transport sparse in bfloat16",
    )
    prove_every: int = Field(
        1,
        ge=1,
        description="verify every n-th weight sync: engines and learner score the same fixed tokens, and the "
        "run stops if they differ by more than max_logp_gap or max_logp_gap_mean; the first sync and every "
        "sync to a rebuilt engine are always verified",
    )
    max_logp_gap: float | None = Field(
        None,
        ge=0,
        description="stop the run if |learner - engine| log-prob exceeds this at any token of the current "
        "policy version, or at any fixed token of a verification (none: 0.02 if both run in float32, else "
        "unbounded)",
    )
    max_logp_gap_mean: float | None = Field(
        None,
        ge=0,
        description="stop the run if the mean |learner - engine| log-prob exceeds this over a step's tokens "
        "of the current policy version, or over the fixed tokens of a verification, in 16 bits divided by "
        "log-probs of more than 1 nat (none: 0.001 if both run in float32, else 0.1)",
    )
    timeout_s: float = Field(120, gt=0, description="timeout of a weight sync or a rendezvous, in seconds")
