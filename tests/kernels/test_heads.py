"""Heads of every family: log-probs equal those of the model's own logits, or the model is refused."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from rft.batch import Batch, Completion, Group, Prompt
from rft.errors import ModelError
from rft.learner.model import PolicyModel

sys.path.insert(0, str(Path(__file__).parent))
from architectures import _SMALL, ALL, build

HEADS: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("cohere", {"logit_scale": 0.25}),
    ("granite", {"logits_scaling": 8.0}),
    ("hyperclovax", {"logits_scaling": 8.0}),
    ("falcon_h1", {"lm_head_multiplier": 3.0}),
    ("gemma2", {"final_logit_softcapping": 0.5}),
    ("recurrent_gemma", {"logits_soft_cap": 0.5}),
]


@pytest.mark.parametrize(("name", "settings"), HEADS)
def test_log_probs_are_those_of_the_models_logits(name: str, settings: dict[str, Any]) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(_SMALL | ALL.get(name, {}) | settings))
    model = AutoModelForCausalLM.from_config(config).float().eval()
    nn.init.normal_(model.get_output_embeddings().weight, std=0.5)  # logits large enough to be capped
    tokens = torch.arange(3, 15)
    expected = model(input_ids=tokens[None], use_cache=False).logits[0, :-1].log_softmax(-1)
    expected = expected.gather(-1, tokens[1:, None])[:, 0].detach()
    batch = Batch.build([Group(Prompt(0, (3,), ""), (Completion(tuple(range(4, 15))),))])
    policy = PolicyModel(model, temperature=1.0, compute_dtype=torch.float32)
    torch.testing.assert_close(policy.run(batch).logps[batch.mask], expected, rtol=1e-5, atol=1e-5)


def test_logits_that_are_not_the_heads_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    forward = type(model).forward

    def halved(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        out.logits = out.logits / 2
        return out

    monkeypatch.setattr(type(model), "forward", halved)
    with pytest.raises(ModelError, match=r"the logits of LlamaForCausalLM differ by 1\.0e\+00"):
        PolicyModel(model, temperature=1.0, compute_dtype=torch.float32)
