"""Sessions train as their calls do one by one: losses and gradients of the packed forest against one row for
each call through the untouched model, for every architecture."""

from __future__ import annotations

import copy
import random
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from rft.algorithms import ALGORITHMS
from rft.algorithms.math.policy_gradient import group_mean
from rft.batch import Batch, Group, Prompt
from rft.learner import objective
from rft.learner.model import PolicyModel
from rft.rollout.calls import Call, lay_out

sys.path.insert(0, str(Path(__file__).parent))
from architectures import ALL, build
from attention_helpers import assert_same_gradients

Session = list[Call]
GRPO = ALGORITHMS["dr_grpo"](normalization="token", epsilon=1.0, epsilon_high=1e3)  # a clip that never binds


def sessions() -> list[Session]:
    """One session that only appends, one whose every turn drifts from the last, and one that branches: two
    samples of one prompt that begin alike, a continuation, a call with another history, one on its own."""
    draw = random.Random(5)

    def new(n: int) -> tuple[int, ...]:
        return tuple(draw.randrange(3, 96) for _ in range(n))

    def call(prompt: tuple[int, ...], sampled: tuple[int, ...]) -> Call:
        logps = tuple(-4.5 + draw.random() for _ in sampled)
        return Call(prompt, sampled, logps, "stop", ((0, 0, len(sampled)),))

    prompt = new(9)
    appended: Session = [call(prompt, new(5))]
    drifted: Session = [call(prompt, new(6))]
    for _ in range(2):
        appended.append(call(appended[-1].prompt + appended[-1].sampled + new(3), new(4)))
        drifted.append(call(drifted[-1].prompt + drifted[-1].sampled[:-2] + new(4), new(5)))
    begin = new(3)
    first, second = call(prompt, begin + new(3)), call(prompt, begin + new(2))
    history = call(first.prompt + first.sampled + new(8), new(4))
    branched = [first, second, history, call(prompt[:6] + new(7), new(4)), call(new(5), new(4))]
    return [appended, drifted, branched]


def group_of(calls: list[Session]) -> Group:
    prompt = calls[0][0].prompt
    rewards = (1.0, 0.0, 0.8)
    completions = (replace(lay_out(prompt, s), reward=r) for s, r in zip(calls, rewards, strict=True))
    return Group(Prompt(0, prompt, ""), tuple(completions))


def packed_loss(model: nn.Module, group: Group, share: bool) -> Tensor:
    """The learner's loss of one micro-batch; `old_logps` are set, so that it depends on the log-probs."""
    batch = Batch.build([group], share_prefix=share)
    batch = GRPO.prepare(batch.with_(old_logps=batch.sampler_logps))
    batch, scale = objective.weigh(GRPO, batch, 1)
    policy = PolicyModel(model, temperature=1.0, compute_dtype=torch.float32)
    return objective.reduce_loss(GRPO, policy.run(batch), batch, scale)


def rows_loss(model: Any, calls: list[Session], group: Group) -> Tensor:
    """-A * exp(log p - old), averaged over sampled tokens, each call alone; A: reward minus group mean."""
    rewards = torch.tensor([c.reward for c in group.completions])
    advantages = rewards - group_mean(rewards, torch.zeros(len(rewards), dtype=torch.int64))
    total, tokens = torch.zeros(()), 0
    for session, advantage in zip(calls, advantages, strict=True):
        for call in session:
            ids = torch.tensor([call.prompt + call.sampled])
            logits = model(input_ids=ids, use_cache=False).logits[0, len(call.prompt) - 1 : -1].float()
            logps = logits.log_softmax(-1).gather(-1, ids[0, len(call.prompt) :, None])[:, 0]
            total = total - advantage * (logps - torch.tensor(call.logps)).exp().sum()
            tokens += len(call.sampled)
    return total / tokens


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def without_dropout(model: nn.Module) -> nn.Module:
    """In training mode, which checkpointing needs."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)
    return model.train()


def with_lora(model: Any) -> nn.Module:
    torch.manual_seed(3)
    left_out = ["out_proj", "conv1d", "router"]  # peft refuses Mamba's; Llama 4's router returns a pair
    settings = LoraConfig(r=4, target_modules="all-linear", lora_alpha=8, exclude_modules=left_out)
    adapted: nn.Module = get_peft_model(model, settings)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:  # 0 at the start, which would leave lora_A without a gradient
            nn.init.normal_(parameter, std=0.1)
    return adapted


@pytest.mark.numerics
@pytest.mark.parametrize("adapter", [False, True], ids=["full", "lora-checkpointing"])
@pytest.mark.parametrize("name", sorted(ALL))
def test_sessions_equal_one_row_for_each_call(name: str, adapter: bool) -> None:
    model: Any = without_dropout(build(name))
    if adapter:
        model = with_lora(model)
        if model.supports_gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
    untouched = copy.deepcopy(model)
    calls = sessions()
    group = group_of(calls)
    expected = rows_loss(untouched, calls, group)
    reference = gradients(untouched, expected)
    for share in (False, True):
        model.zero_grad()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*cannot run packed.*")
            loss = packed_loss(model, group, share)
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
        assert_same_gradients(gradients(model, loss), reference)
