"""TRL's own code for the offline losses, on given tensors. Runs in TRL's environment:

    python trl_offline.py QUESTIONS ANSWERS

What TRL computes in the middle of a long method is cut out of the method's source and run unchanged,
with a stand-in for the trainer that has only its settings, and for the model, that returns the given
log-probs. `cpo_loss` and `odds_ratio_loss` are called unchanged.
"""

from __future__ import annotations

import math
import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from trl.experimental.cpo.cpo_trainer import CPOTrainer
from trl.experimental.orpo.orpo_trainer import ORPOTrainer
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.sft_trainer import SFTTrainer
from trl_online import cut

Inputs = dict[str, Any]
Answer = dict[str, torch.Tensor]

DPO = cut(DPOTrainer._compute_loss, "if self.ld_alpha is None", "for loss_type, loss_weight in")
KTO = cut(KTOTrainer._compute_loss, "if self.calculate_KL", "losses = torch.cat(")
SFT = cut(SFTTrainer.compute_loss, "per_token_loss = -outputs.log_probs", "loss = per_token_loss.sum()")
REWARD = cut(RewardTrainer.compute_loss, "rewards_chosen, rewards_rejected", "if self.args.center_rewards")


def masked(x: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """(leaf [2P, L] with gradient, mask [2P, L] int64)."""
    leaf = x["logps"].clone().requires_grad_()
    return leaf, (torch.arange(leaf.shape[1])[None, :] < x["lengths"][:, None]).long()


def answer(loss: torch.Tensor, leaf: torch.Tensor) -> Answer:
    loss.backward()
    return {"loss": loss.detach(), "gradient": leaf.grad}


def dpo(
    x: Inputs,
    loss_type: str = "sigmoid",
    ld_alpha: float | None = None,
    label_smoothing: float = 0.0,
    f_divergence_type: str = "reverse_kl",
    f_alpha: float = 1.0,
    use_weighting: bool = False,
    nll: float = 0.0,
) -> Answer:
    leaf, mask = masked(x)
    reference = SimpleNamespace(log_probs=x["ref_logps"] * mask)
    trainer = SimpleNamespace(
        ld_alpha=ld_alpha,
        precompute_ref_logps=False,
        model=None,
        ref_model=lambda **kwargs: reference,
        args=SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.05),
        f_divergence_type=f_divergence_type,
        f_alpha_divergence_coef=f_alpha,
        loss_types=[loss_type, "sft"] if nll else [loss_type],
        loss_weights=[1.0, nll] if nll else [1.0],
        beta=0.1,
        label_smoothing=label_smoothing,
        use_weighting=use_weighting,
    )
    names = {
        "self": trainer,
        "torch": torch,
        "F": F,
        "math": math,
        "is_peft_model": lambda model: False,
        "disable_gradient_checkpointing": lambda *args: nullcontext(),
        "inputs": {},
        "labels": None,
        "model_kwargs": {},
        "device": "cpu",
        "seq_len": leaf.shape[1],
        "per_token_logps": leaf * mask,
        "shift_completion_mask": mask,
        "completion_mask": F.pad(mask, (1, 0)),
        "outputs": SimpleNamespace(log_sum_sq_probs=x["sum_squares"]),
    }
    exec(DPO, names)
    return answer(names["loss"], leaf)


def kto(x: Inputs, loss_type: str) -> Answer:
    leaf, mask = masked(x)
    label = x["labels"]
    logps, reference = (leaf * mask).sum(1), (x["ref_logps"] * mask).sum(1)
    trainer = SimpleNamespace(
        calculate_KL=loss_type == "kto",
        loss_type=loss_type,
        beta=0.1,
        desirable_weight=1.0,
        undesirable_weight=0.5,
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda y: y),
    )
    names = {
        "self": trainer,
        "torch": torch,
        "F": F,
        "KL_logps": (x["other_logps"] * mask).sum(1),
        "ref_KL_logps": (x["other_ref_logps"] * mask).sum(1),
        "chosen_logps": logps[label],
        "rejected_logps": logps[~label],
        "ref_chosen_logps": reference[label],
        "ref_rejected_logps": reference[~label],
    }
    exec(KTO, names)
    return answer(names["losses"].nanmean(), leaf)


def sft(x: Inputs, loss_type: str) -> Answer:
    leaf, mask = masked(x)
    trainer = SimpleNamespace(args=SimpleNamespace(loss_type=loss_type))
    outputs = SimpleNamespace(log_probs=leaf * mask, label_mask=mask.bool())
    names = {"self": trainer, "torch": torch, "outputs": outputs, "num_items_in_batch": None}
    exec(SFT, names)
    return answer(names["loss"], leaf)


def _sides(x: Inputs, average: bool) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(leaf, chosen, rejected, negative log-likelihood of the chosen's tokens)."""
    leaf, mask = masked(x)
    logps = (leaf * mask).sum(1)
    if average:
        logps = logps / mask.sum(1)
    chosen, rejected = logps.chunk(2)
    half = len(leaf) // 2
    return leaf, chosen, rejected, -leaf[:half][mask[:half].bool()].mean()


def cpo(
    x: Inputs,
    loss_type: str,
    beta: float = 0.1,
    cpo_alpha: float = 0.0,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
) -> Answer:
    leaf, chosen, rejected, nll = _sides(x, average=loss_type in ("ipo", "simpo"))
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"),
        alpha=alpha,
        beta=beta,
        label_smoothing=label_smoothing,
        loss_type=loss_type,
        simpo_gamma=1.0,
    )
    losses = CPOTrainer.cpo_loss(trainer, chosen, rejected)[0]
    return answer(losses.mean() + cpo_alpha * nll, leaf)


def orpo(x: Inputs) -> Answer:
    leaf, chosen, rejected, nll = _sides(x, average=True)
    trainer = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=0.1)
    losses = ORPOTrainer.odds_ratio_loss(trainer, chosen, rejected)[0]
    return answer(nll - losses.mean(), leaf)


def reward_model(x: Inputs, margin: bool = False, centre: float | None = None) -> Answer:
    leaf = x["rewards"].clone().requires_grad_()
    names = {
        "self": SimpleNamespace(args=SimpleNamespace(center_rewards_coefficient=centre)),
        "torch": torch,
        "nn": torch.nn,
        "outputs": SimpleNamespace(logits=leaf[:, None]),
        "inputs": {"margin": x["margin"]} if margin else {},
    }
    exec(REWARD, names)
    return answer(names["loss"], leaf)


FUNCTIONS = {f.__name__: f for f in (dpo, kto, sft, cpo, orpo, reward_model)}

if __name__ == "__main__":
    torch.set_num_threads(1)
    questions = torch.load(sys.argv[1], weights_only=True)
    torch.save([FUNCTIONS[name](inputs, **settings) for name, inputs, settings in questions], sys.argv[2])
