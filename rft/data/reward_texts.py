"""Text rendering of a reward model's training data, stored in its config and reused for scoring."""

from __future__ import annotations

from typing import Any

from rft.config.data import DataConfig

TEXTS = "rft_texts"  # key in a reward model's config; read by rft/contrib/rewards/trained.py


def reward_texts(kind: str, data: DataConfig) -> dict[str, Any]:
    """Return the rendering settings needed for scoring. kind: kind of the rows, see `Algorithm.data`."""
    names = {"system", "chat_template", "chat_template_options", "train_on"}
    return {"kind": kind, "data": data.model_dump(mode="json", include=names)}
