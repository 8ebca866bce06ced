"""What keeps a learner's ranks from working, found before anything starts."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING, Any

import torch

from rft.config.learner import AdapterConfig, LearnerConfig
from rft.utils.cores import parse_cores, usable_cores

if TYPE_CHECKING:
    from rft.algorithms.base import Algorithm
    from rft.config.schema import Config

ON_RANKS = ("lora", "dora")  # adapters that several ranks train

# What DeepSpeed's config may not say, and the key of rft's own that does.
OWN_KEYS = {
    "optimizer": "learner.learning_rate, betas, eps and weight_decay",
    "scheduler": "learner.schedule",
    "gradient_clipping": "learner.max_grad_norm",
    "gradient_accumulation_steps": "learner.tokens_per_micro_batch",
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "learner.tokens_per_micro_batch",
    "bf16": "learner.dtype",
    "fp16": "learner.dtype",
    "torch_autocast": "learner.dtype",
}


def parallel_problems(config: Config, device: str) -> list[str]:
    """Everything about ranks that cannot work, of the run's learner and of its warm start's."""
    found = _problems("learner", config.learner, config.algorithm, config, device)
    if config.learner.ranks > 1:
        found += _batch_problems(config)
    if config.warm_start is not None:
        found += _problems("warm_start.learner", config.warm_start.learner, None, config, device)
    return found


def describe_ranks(config: Config, device: str) -> str:
    """Where the ranks go, for the plan."""
    c = config.learner
    if c.parallel == "single":
        return f"1 process on {device}"
    stage = f" stage {_stage(c)}" if c.parallel == "deepspeed" else ""
    each = "GPU" if device == "cuda" else "CPU core"
    where = "the cluster, packed on as few machines as hold them" if config.ray.address else "this machine"
    return f"{c.ranks} ranks ({c.parallel}{stage}), one {each} each, on {where}"


def _problems(
    key: str, c: LearnerConfig, algorithm: Algorithm | None, config: Config, device: str
) -> list[str]:
    found = []
    if c.parallel == "single" and c.ranks > 1:
        found.append(f"ranks: {c.ranks} ranks need {key}.parallel fsdp2 or deepspeed; single is one process")
    if c.cpu_offload and c.parallel != "fsdp2":
        found.append(
            "cpu_offload: this is fsdp2's; for deepspeed write "
            f"{key}.deepspeed={{zero_optimization: {{stage: 2, offload_optimizer: {{device: cpu}}}}}}"
        )
    # A resolved config names the default too: it must stay a valid one.
    if c.parallel != "deepspeed" and c.deepspeed != LearnerConfig.model_fields["deepspeed"].default:
        found.append(f"deepspeed: read with {key}.parallel deepspeed only, which is {c.parallel}")
    if c.parallel != "single":
        found += _device_problems(c, config, device)
        found += [
            f"{name}: works in one process only; set {key}.parallel to single"
            for name in ("quantize", "strategy")
            if getattr(c, name) is not None
        ]
        if c.optimizer != "adamw":
            found.append(f"optimizer: {c.optimizer} works in one process only; use adamw")
        if c.adapter is not None:
            found += _adapter_problems(key, c, c.adapter, algorithm)
    if c.parallel == "deepspeed":
        found += _deepspeed_problems(c, algorithm)
    return [f"{key}.{problem}" for problem in found]


def _adapter_problems(
    key: str, c: LearnerConfig, adapter: AdapterConfig, algorithm: Algorithm | None
) -> list[str]:
    """The reference of other methods, and one that follows the policy, are kept aside as whole tensors."""
    found = []
    if adapter.method not in ON_RANKS or isinstance(adapter.options.get("init_lora_weights"), str):
        found.append(
            f"adapter.method: {adapter.method} works in one process only (on several ranks: "
            f"{', '.join(ON_RANKS)}, as peft begins them); set {key}.parallel to single"
        )
    if algorithm is not None and algorithm.refresh_reference:
        found.append(f"adapter: a reference that follows it needs one process; set {key}.parallel to single")
    if c.parallel == "deepspeed" and _stage(c) == 3:
        found.append("adapter: does not go with stage 3; use stage 2, or fsdp2")
    return found


def _device_problems(c: LearnerConfig, config: Config, device: str) -> list[str]:
    found = []
    if c.cores is not None and (count := _count_cores(c.cores)) is not None and count < c.ranks:
        found.append(f"cores: {c.ranks} ranks share {count} cores; give at least one for each")
    if config.ray.address is not None:
        return found  # the cluster's devices are counted when the learner starts
    gpu = device == "cuda"
    there = torch.cuda.device_count() if gpu else usable_cores()
    name = "GPUs" if gpu else "CPU cores"
    if c.ranks > there:
        return [
            *found,
            f"ranks: {c.ranks} ranks need {c.ranks} {name}, this machine has {there}; "
            "lower it, or join a cluster by ray.address",
        ]
    sampling = config.rollout.replicas * config.rollout.tensor_parallel if config.algorithm.online else 0
    if gpu and c.ranks + sampling > there:
        found.append(
            f"ranks: {c.ranks} ranks and the {sampling} GPUs of rollout.replicas make {c.ranks + sampling}, "
            f"this machine has {there}; lower one of them"
        )
    return found


def _count_cores(cores: str) -> int | None:
    try:
        return len(parse_cores(cores))
    except ValueError:
        return None  # reported where cores are checked


def _batch_problems(config: Config) -> list[str]:
    """Every rank should have something to do in every update."""
    c, t, algorithm = config.learner, config.train, config.algorithm
    units, what = t.batch_size // t.minibatches, "groups" if algorithm.online else "rows"
    if algorithm.online and algorithm.unit != "pair" and c.prefix_sharing != "on":
        units, what = units * t.num_generations, "completions"
    if units >= c.ranks:
        return []
    return [
        f"learner.ranks: an update has {units} {what}, too few for {c.ranks} ranks; raise train.batch_size, "
        "or lower learner.ranks or train.minibatches"
    ]


def _deepspeed_problems(c: LearnerConfig, algorithm: Algorithm | None) -> list[str]:
    found = []
    if importlib.util.find_spec("deepspeed") is None:
        found.append(
            "parallel: deepspeed is not installed: install rft with the extra deepspeed, or use fsdp2"
        )
    for key in sorted(c.deepspeed.keys() & OWN_KEYS.keys()):
        found.append(f"deepspeed.{key}: set by rft from {OWN_KEYS[key]}; remove it")
    stage = _stage(c)
    if stage not in (1, 2, 3):
        found.append(f"deepspeed.zero_optimization.stage: {stage!r} is none of 1, 2 and 3")
    zero = c.deepspeed.get("zero_optimization")
    for part in ("offload_optimizer", "offload_param"):
        entry = zero.get(part) if isinstance(zero, dict) else None
        if isinstance(entry, dict) and entry.get("device") == "nvme":
            found.append(f"deepspeed.zero_optimization.{part}: nvme is not supported; use cpu")
    if stage == 3 and algorithm is not None:
        if "kl" in algorithm.outputs:
            found.append(
                "deepspeed: this algorithm reads the reference's head, which stage 3 shards; use fsdp2"
            )
        if algorithm.refresh_reference:
            found.append("deepspeed: the reference cannot follow the policy under stage 3; use fsdp2")
    return found


def _stage(c: LearnerConfig) -> Any:
    zero = c.deepspeed.get("zero_optimization")
    return zero.get("stage", 0) if isinstance(zero, dict) else zero
