"""Reward models: a transformer with a linear head instead of a vocabulary, loaded and saved as transformers'
own classification models, so that whatever reads those reads what is trained here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rft.data.reward_texts import TEXTS
from rft.learner.model import ModelError


def load_scoring_model(
    path: str,
    heads: int,
    *,
    per_token: bool,
    texts: Mapping[str, Any] | None,
    dtype: torch.dtype,
    device: str,
    trust_remote_code: bool = False,
) -> Any:
    """A model with `heads` outputs for each sequence, or with `per_token` for each token.

    From a causal model's folder the head is made anew, small and random; from a scoring model's it is read.
    `texts` is kept in the config. Raises ModelError naming the path.
    """
    from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

    kind = AutoModelForTokenClassification if per_token else AutoModelForSequenceClassification
    try:
        model = kind.from_pretrained(
            path,
            num_labels=heads,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            problem_type="regression",
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"no reward model can be made of {path!r}: {error}") from error
    score_layer(model)
    config = model.config.get_text_config()
    ends = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    if config.pad_token_id in ends:
        config.pad_token_id = None  # else transformers takes the end token for padding, and reads before it
    if texts is not None:
        setattr(model.config, TEXTS, dict(texts))
    return model.to(device)


def score_layer(model: Any) -> nn.Linear | None:
    """The linear layer that gives the scores; None for a language model. Raises ModelError where a
    classification model keeps its head elsewhere."""
    if "Classification" not in type(model).__name__:
        return None
    layer = getattr(model, "score", None) or getattr(model, "classifier", None)
    if not isinstance(layer, nn.Linear):
        raise ModelError(f"{type(model).__name__} has no single linear head to train")
    return layer
