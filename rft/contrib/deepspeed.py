"""DeepSpeed: ZeRO stages 1, 2 and 3, configured with DeepSpeed's options."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from rft.config.learner import LearnerConfig
from rft.learner.load import resolve_dtype
from rft.learner.model import PolicyModel, head_of
from rft.learner.parallel import MakeOptimizer, Ranks, device_of

MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's


class ZeRO(Ranks):
    """Shard optimizer state (stage 1), gradients (2) and weights (3) with DeepSpeed's engine.

    The engine wraps the policy's network; in bfloat16 it keeps float32 master weights.
    """

    def __init__(self, config: LearnerConfig, device: str) -> None:
        super().__init__()
        os.environ.setdefault("DS_ACCELERATOR", device)
        self.device = device
        self.config: dict[str, Any] = {
            "zero_allow_untested_optimizer": True,  # all parallelism modes share torch's AdamW
            "zero_force_ds_cpu_optimizer": False,
            **config.deepspeed,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "bf16": {"enabled": resolve_dtype(config.dtype, device) == torch.bfloat16},
            "steps_per_print": 2**62,
        }
        self.stage = int(self.config.get("zero_optimization", {}).get("stage", 0))
        self.engine: Any = None
        self.trained: list[nn.Parameter] = []
        self.groups: list[dict[str, Any]] = []
        self.pending = False

    def loading_device(self, device: str) -> str:
        return "cpu" if self.stage == 3 else device

    def optimizer(self, policy: PolicyModel, make: MakeOptimizer) -> Any:
        import deepspeed

        plain = make()
        self.trained = [p for group in plain.param_groups for p in group["params"]]
        self.groups = plain.state_dict()["param_groups"]
        plain.param_groups = [group for group in plain.param_groups if group["params"]]
        self.engine, optimizer, _, _ = deepspeed.initialize(
            model=policy.network, optimizer=plain, config=self.config
        )
        self._prepare_state(optimizer)
        self._enter(policy, self.engine)
        return optimizer

    def _prepare_state(self, optimizer: Any) -> None:
        """Allocate AdamW's state up front. If it were left to the first step, DeepSpeed would see only the
        state of the first parameter group, and refuse to load the state of the others."""
        flats = (
            optimizer.fp32_partitioned_groups_flat
            if self.stage == 3
            else optimizer.single_partition_of_fp32_groups
        )
        for flat in flats:
            moments = {key: torch.zeros_like(flat, requires_grad=False) for key in MOMENTS}
            optimizer.optimizer.state[flat] = {"step": torch.tensor(0.0), **moments}
        if self.stage < 3:
            optimizer._lazy_init_hp_params_optimizer_state()

    def freeze(self, policy: PolicyModel) -> None:
        if self.stage < 3:
            return
        import deepspeed

        zero = {k: v for k, v in self.config["zero_optimization"].items() if k != "offload_optimizer"}
        config = {**self.config, "zero_optimization": zero}
        engine, _, _, _ = deepspeed.initialize(model=policy.network, config=config)
        self._enter(policy, engine)

    def _enter(self, policy: PolicyModel, engine: Any) -> None:
        if self.stage == 3:
            import deepspeed

            head = head_of(policy.model) if policy.score_layer is None else None
            # The log-prob kernel reads these outside their module's forward: gather with the whole network.
            for weight in (head.weight, head.bias) if head is not None else ():
                if weight is not None:
                    deepspeed.zero.register_external_parameter(engine.module, weight)
        policy.network = engine
        policy.device = device_of(self.device)

    # -- a step --------------------------------------------------------------------------------------

    def backward(self, loss: Tensor, *, last: bool) -> None:
        self.pending = True
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss * self.ranks)  # the engine averages over ranks; our loss is a sum

    def update(
        self, parameters: Iterable[nn.Parameter], optimizer: Any, bound: float | None
    ) -> tuple[float, bool]:
        optimizer.clip_grad = bound or 0.0
        self.engine.step()
        self.pending = False
        norm = float(self.engine.get_global_grad_norm())
        # The norm is -1 or infinite if a gradient is not finite; the engine has then skipped the update.
        return (norm, True) if not optimizer.overflow else (float("nan"), False)

    def discard(self, optimizer: Any) -> None:
        if self.pending:
            raise RuntimeError("DeepSpeed still holds the gradient of an aborted batch: restart the run")

    # -- weights and state ---------------------------------------------------------------------------

    @contextmanager
    def one_rank_at_a_time(self) -> Iterator[None]:
        """Run all ranks at once under ZeRO-3, where setting each weight is a collective."""
        with nullcontext() if self.stage == 3 else super().one_rank_at_a_time():
            yield

    def full_tensor(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        if not hasattr(tensor, "ds_id"):
            return super().full_tensor(tensor, dtype)
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            return tensor.detach().to(dtype or tensor.dtype, copy=True)

    def model_state(self, module: nn.Module) -> dict[str, Tensor]:
        local_state = module.state_dict(keep_vars=True)
        copies: dict[int, Tensor] = {}
        for tensor in local_state.values():
            if id(tensor) not in copies:
                copies[id(tensor)] = self.keep(self._master(tensor))
        return {} if self.rank else {name: copies[id(tensor)] for name, tensor in local_state.items()}

    def _master(self, tensor: Tensor) -> Tensor:
        """Return the full tensor, in float32 if it is trained."""
        from deepspeed.utils import safe_get_full_fp32_param

        master: Tensor | None = safe_get_full_fp32_param(tensor) if tensor.requires_grad else None
        return self.full_tensor(tensor) if master is None else master

    def copy(self, node: Any) -> Any:
        if isinstance(node, nn.Parameter) and node.requires_grad:  # its float32 master, in any precision
            return self.keep(self._master(node))
        return super().copy(node)

    def load_model_state(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        done: set[int] = set()
        for name, tensor in module.state_dict(keep_vars=True).items():
            if id(tensor) not in done:
                done.add(id(tensor))
                self.set_full(tensor, state[name])

    @torch.no_grad()
    def set_full(self, tensor: Tensor, value: Tensor) -> None:
        if hasattr(tensor, "ds_id"):
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([tensor], modifier_rank=0):
                if self.rank == 0:
                    tensor.copy_(value)
        else:
            tensor.copy_(value)
        if tensor.requires_grad:
            self._set_master(tensor, value, None)

    def _set_master(self, parameter: Tensor, value: Tensor, key: str | None) -> None:
        """Set the float32 master of a parameter (key None) or an entry of its optimizer state."""
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        value = value.to(self.engine.device, torch.float32)
        if hasattr(parameter, "ds_id"):
            size = parameter.partition_numel()  # type: ignore[attr-defined]
            padded = nn.functional.pad(value.flatten(), (0, size * self.ranks - value.numel()))
            part = padded[self.rank * size : (self.rank + 1) * size]
            parameter._z3_optimizer.set_local_hp_param(part, parameter, key)  # type: ignore[attr-defined]
        elif key is None:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[int, Any] = {}
        step = next(iter(optimizer.optimizer.state.values()))["step"]
        for index, parameter in enumerate(self.trained):
            moments = {key: self.keep(safe_get_full_optimizer_state(parameter, key)) for key in MOMENTS}
            state[index] = {"step": step.clone(), **moments}
        if self.rank:
            return {}
        return {"state": state, "param_groups": self.groups}

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        if not state["state"]:
            return
        for entry in optimizer.optimizer.state.values():
            entry["step"].copy_(state["state"][0]["step"])
        for index, parameter in enumerate(self.trained):
            for key in MOMENTS:
                self._set_master(parameter, state["state"][index][key], key)
