"""TRL's own code for the online losses, on given tensors. Runs in TRL's environment:

    python trl_online.py QUESTIONS ANSWERS

QUESTIONS is a saved list of (function, inputs, settings); ANSWERS becomes the list of their results.
`_compute_loss` of the trainers is called unchanged, with a stand-in for the trainer that has only its
settings. What TRL computes in the middle of a long method (advantages, the correction for vLLM, online
DPO's loss) is cut out of the method's source and run unchanged.
"""

from __future__ import annotations

import ast
import inspect
import math
import sys
import textwrap
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.online_dpo.online_dpo_trainer import OnlineDPOTrainer
from trl.trainer import grpo_trainer, rloo_trainer

Inputs = dict[str, Any]


def cut(method: Any, first: str, last: str) -> Any:
    """The compiled statements of `method`, from the first that starts with `first` to the next that
    starts with `last`, both included, at any depth of nesting. Raises LookupError where there are none."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(method))))
    for node in ast.walk(tree):
        for body in (getattr(node, "body", None), getattr(node, "orelse", None)):
            if not isinstance(body, list):
                continue
            text = [ast.unparse(s) for s in body]
            start = next((i for i, t in enumerate(text) if t.startswith(first)), None)
            if start is None:
                continue
            end = next((i for i in range(start, len(text)) if text[i].startswith(last)), None)
            if end is not None:
                return compile(
                    ast.Module(body[start : end + 1], type_ignores=[]), method.__qualname__, "exec"
                )
    raise LookupError(f"{method.__qualname__} has no statements from {first!r} to {last!r}: TRL has changed")


GENERATE = grpo_trainer.GRPOTrainer._generate_and_score_completions
ADVANTAGES = cut(GENERATE, "if self.multi_objective_aggregation ==", "advantages = torch.nan_to_num")
CORRECTION = cut(GENERATE, "mask = completion_mask if", "if self.vllm_importance_sampling_mode in")
RLOO_ADVANTAGES = cut(
    rloo_trainer.RLOOTrainer._generate_and_score_completions,
    "grouped_rewards =",
    "advantages = torch.nan_to_num",
)
ONLINE_DPO = cut(OnlineDPOTrainer.training_step, "batch_range =", "loss = losses.mean()")


class Accelerator:
    """One process."""

    num_processes = 1
    sync_gradients = True

    def reduce(self, x: torch.Tensor, reduction: str = "sum") -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def pad_across_processes(self, x: torch.Tensor, dim: int, pad_index: float) -> torch.Tensor:
        return x


def grouped_advantages(x: Inputs, scale_rewards: str) -> torch.Tensor:
    rewards = x["rewards"]
    trainer = SimpleNamespace(
        multi_objective_aggregation="sum_then_normalize",
        scale_rewards=scale_rewards,
        reward_weights=torch.ones(1),
    )
    names = {
        "self": trainer,
        "torch": torch,
        "nanstd": grpo_trainer.nanstd,
        "rewards_per_func": rewards[:, None].clone(),
        "unscorable_mask": torch.zeros(len(rewards), dtype=torch.bool),
        "num_generations": x["size"],
        "device": "cpu",
    }
    exec(ADVANTAGES, names)
    return names["advantages"]


def leave_one_out(x: Inputs) -> torch.Tensor:
    names = {
        "self": SimpleNamespace(normalize_advantages=False),
        "torch": torch,
        "nanstd": getattr(rloo_trainer, "nanstd", None),
        "rewards": x["rewards"].clone(),
        "num_generations": x["size"],
    }
    exec(RLOO_ADVANTAGES, names)
    return names["advantages"]


def correct(x: Inputs, mode: str, cap: float, floor: float | None = None) -> torch.Tensor:
    """The importance ratios for vLLM: [B, L], or [B, 1] for a mode by sequence."""
    trainer = SimpleNamespace(
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_max=cap,
        vllm_importance_sampling_clip_min=floor,
    )
    names = {
        "self": trainer,
        "torch": torch,
        "math": math,
        "completion_mask": x["mask"].long(),
        "tool_mask": None,
        "old_per_token_logps": x["old_logps"],
        "sampling_per_token_logps": x["sampler_logps"],
    }
    exec(CORRECTION, names)
    return names["vllm_importance_sampling_ratio"]


def stand_in(x: Inputs, leaf: torch.Tensor, s: Inputs) -> SimpleNamespace:
    """All of a trainer that `_compute_loss` reads."""
    entropies = s.get("entropies", x["entropy"])
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (leaf, entropies, None),
        accelerator=Accelerator(),
        args=SimpleNamespace(
            delta=s.get("delta"),
            use_bias_correction_kl=False,
            steps_per_generation=1,
            sapo_temperature_pos=1.0,
            sapo_temperature_neg=1.05,
            vespo_k_pos=2.0,
            vespo_lambda_pos=3.0,
            vespo_k_neg=3.0,
            vespo_lambda_neg=2.0,
            entropy_target=s.get("entropy_target"),
            entropy_coef_delta=0.005,
            entropy_coef_max=1.0,
            entropy_coef_min=0.0,
        ),
        get_gamma_weights=grpo_trainer.GRPOTrainer.get_gamma_weights,
        get_high_entropy_mask=lambda *a: grpo_trainer.GRPOTrainer.get_high_entropy_mask(trainer, *a),
        model=SimpleNamespace(training=True),
        _metrics=defaultdict(lambda: defaultdict(list)),
        aux_loss_enabled=False,
        beta=s.get("beta", 0.0),
        current_gradient_accumulation_steps=1,
        epsilon_low=s.get("epsilon", 0.2),
        epsilon_high=s.get("epsilon_high", 0.2),
        importance_sampling_level=s.get("level", "token"),
        loss_type=s["loss_type"],
        max_completion_length=leaf.shape[1],
        off_policy_mask_threshold=None,
        top_entropy_quantile=s.get("top_entropy", 1.0),
        use_vllm="mode" in s,
        vllm_importance_sampling_correction=True,
        _entropy_bonus_enabled="entropy_coef" in s,
        entropy_coef=s.get("entropy_coef", 0.0),
        use_adaptive_entropy="entropy_target" in s,
        _last_world_entropy=s.get("entropy", 0.0),
        _entropy_window_stats=None,
    )
    return trainer


def loss(x: Inputs, **s: Any) -> dict[str, torch.Tensor]:
    return compute_loss(x, s)[0]


def entropy_bonus(x: Inputs, **s: Any) -> dict[str, torch.Tensor]:
    """The loss with its gradient by entropy, and the weight of the bonus after the step."""
    entropies = x["entropy"].clone().requires_grad_()
    answers, trainer = compute_loss(x, {**s, "entropies": entropies})
    by_entropy = torch.zeros_like(entropies) if entropies.grad is None else entropies.grad
    return {**answers, "by_entropy": by_entropy * x["mask"], "weight": torch.tensor(trainer.entropy_coef)}


def compute_loss(x: Inputs, s: Inputs) -> tuple[dict[str, torch.Tensor], SimpleNamespace]:
    leaf = x["logps"].clone().requires_grad_()
    mask = x["mask"].long()
    empty = torch.zeros(len(mask), 0, dtype=torch.long)
    inputs = {
        "prompt_ids": empty,
        "prompt_mask": empty,
        "completion_ids": torch.zeros_like(mask),
        "completion_mask": mask,
        "old_per_token_logps": x["old_logps"],
        "ref_per_token_logps": x["ref_logps"],
        "num_items_in_batch": mask.sum(),
    }
    trainer = stand_in(x, leaf, s)
    if s["loss_type"] == "rloo":
        inputs |= {"advantages": leave_one_out(x), "old_logps": (x["old_logps"] * mask).sum(1)}
        value = inspect.unwrap(rloo_trainer.RLOOTrainer._compute_loss)(trainer, None, inputs)
    else:
        inputs["advantages"] = grouped_advantages(x, s.get("scale_rewards", "group"))
        if "mode" in s:
            inputs["importance_sampling_ratio"] = correct(x, s["mode"], s["cap"])
        value = inspect.unwrap(grpo_trainer.GRPOTrainer._compute_loss)(trainer, None, inputs)
    value.backward()
    return {"loss": value.detach(), "gradient": leaf.grad * x["mask"]}, trainer


def advantages(x: Inputs, scale_rewards: str) -> dict[str, torch.Tensor]:
    return {"advantages": grouped_advantages(x, scale_rewards)}


def rloo_advantages(x: Inputs) -> dict[str, torch.Tensor]:
    return {"advantages": leave_one_out(x)}


def correction(x: Inputs, mode: str, cap: float, floor: float | None) -> dict[str, torch.Tensor]:
    return {"weights": correct(x, mode, cap, floor) * x["mask"]}


def online_dpo(x: Inputs, beta: float, loss_type: str) -> dict[str, torch.Tensor]:
    """Pairs are (2 i, 2 i + 1); TRL wants all firsts, then all seconds. Ties have no pair in rft."""
    leaf = x["logps"].clone().requires_grad_()
    decided = x["rewards"][0::2] != x["rewards"][1::2]

    def halves(y: torch.Tensor) -> torch.Tensor:
        return torch.cat([y[0::2][decided], y[1::2][decided]])

    if not decided.any():
        return {"loss": torch.zeros(()), "gradient": torch.zeros_like(leaf)}
    names = {
        "self": SimpleNamespace(args=SimpleNamespace(loss_type=loss_type), beta=beta),
        "torch": torch,
        "F": F,
        "device": "cpu",
        "batch_size": int(decided.sum()),
        "mask": (x["rewards"][0::2] > x["rewards"][1::2])[decided],
        "logprobs": halves(leaf),
        "ref_logprobs": halves(x["ref_logps"]),
        "completion_mask": halves(x["mask"].long()),
    }
    exec(ONLINE_DPO, names)
    names["loss"].backward()
    return {"loss": names["loss"].detach(), "gradient": leaf.grad * x["mask"]}


def distill(x: Inputs, beta: float) -> dict[str, torch.Tensor]:
    leaf = x["student"].clone().requires_grad_()
    value = GKDTrainer.generalized_jsd_loss(leaf, x["teacher"], beta=beta, reduction="sum")
    value.backward()
    return {"loss": value.detach(), "gradient": leaf.grad}


FUNCTIONS = {
    f.__name__: f for f in (loss, entropy_bonus, advantages, rloo_advantages, correction, online_dpo, distill)
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    questions = torch.load(sys.argv[1], weights_only=True)
    torch.save([FUNCTIONS[name](inputs, **settings) for name, inputs, settings in questions], sys.argv[2])
