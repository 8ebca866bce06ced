"""Config of the weight channel."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from rft.section import Section


class SyncConfig(Section):
    """How weights travel from learner to rollout, and how their arrival is proven."""

    transport: Literal["auto", "gloo", "nccl"] = Field(
        "auto", description="gloo (CPU), nccl (GPUs), or auto: by the learner's device"
    )
    max_logp_gap: float | None = Field(
        None,
        ge=0,
        description="largest |learner - engine| log-prob of a fresh token before the run stops "
        "(none: 0.02 where both run in float32, unbounded otherwise)",
    )
    max_logp_gap_mean: float | None = Field(
        None,
        ge=0,
        description="the same for the mean over a step's fresh tokens (none: 0.001 in float32, else 0.05)",
    )
    timeout_s: float = Field(120, gt=0, description="seconds that a push or a rendezvous may take")
