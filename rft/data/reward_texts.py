"""How the texts of a reward model's training data were rendered, as its config records it for scoring."""

from __future__ import annotations

from typing import Any

from rft.config.data import DataConfig

TEXTS = "rft_texts"  # in a reward model's config; read by rft/contrib/rewards/trained.py


def reward_texts(kind: str, data: DataConfig) -> dict[str, Any]:
    """Return what scoring needs to render texts alike. kind: of the rows, as `Algorithm.data`."""
    names = {"system", "chat_template", "chat_template_options", "train_on"}
    return {"kind": kind, "data": data.model_dump(mode="json", include=names)}
