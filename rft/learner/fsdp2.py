"""FSDP2: torch's `fully_shard`, parameters as DTensors, gathered layer by layer where they are used."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from rft.config.learner import LearnerConfig
from rft.kernels.attention_route import decoder_of
from rft.learner.load import resolve_dtype
from rft.learner.model import PolicyModel
from rft.learner.parallel import Ranks, device_of


class FSDP2(Ranks):
    """Shard weights, gradients and optimizer state, one part per rank.

    A decoder layer is the unit that is gathered. The rest (embedding, final norm, head) belongs to the
    root and stays gathered from the beginning of a forward to the end of its backward: the fused
    log-prob kernel reads the whole head. On GPU, gathered weights and activations are in the compute
    dtype and gradients are reduced in float32.
    """

    def __init__(self, config: LearnerConfig, device: str) -> None:
        super().__init__()
        self.device = device
        self.mesh: DeviceMesh = init_device_mesh(device, (self.ranks,))
        self.compute_dtype = resolve_dtype(config.dtype, device)
        self.offload: OffloadPolicy = CPUOffloadPolicy() if config.cpu_offload else OffloadPolicy()
        self.reshard_after_forward = config.reshard_after_forward
        self.roots: list[FSDPModule] = []

    def loading_device(self, device: str) -> str:
        return "cpu"

    def shard(self, policy: PolicyModel) -> None:
        # Inputs are not cast: that would also copy objects other than tensors, such as an attention layout.
        mixed = MixedPrecisionPolicy(self.compute_dtype, torch.float32, cast_forward_inputs=False)
        exact = MixedPrecisionPolicy(torch.float32, torch.float32, cast_forward_inputs=False)
        critic = policy.value_head
        for head in (None if critic is None else critic.head, policy.score_layer):
            if head is not None:  # small, and always computed in float32
                fully_shard(head, mesh=self.mesh, mp_policy=exact, offload_policy=self.offload)
        trunks = [policy.model] if critic is None or critic.trunk is None else [policy.model, critic.trunk]
        for layer in (layer for trunk in trunks for layer in gathered_units(trunk)):
            fully_shard(
                layer,
                mesh=self.mesh,
                mp_policy=mixed,
                offload_policy=self.offload,
                reshard_after_forward=self.reshard_after_forward,
            )
        root = fully_shard(
            policy.network,
            mesh=self.mesh,
            mp_policy=mixed,
            offload_policy=self.offload,
            reshard_after_forward=False,
        )
        self.roots.append(root)
        for module in policy.network.modules():
            if isinstance(module, FSDPModule):
                # The loss is already weighted by the whole batch: gradients are summed. (A sum instead of an
                # average, because gloo does not support averaging.)
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        policy.device = device_of(self.device)
        for buffer in policy.network.buffers():
            buffer.data = buffer.data.to(policy.device)

    def clip(self, parameters: Iterable[nn.Parameter], bound: float) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(parameters, bound)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    def full_tensor(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        tensor = super().full_tensor(tensor, dtype)  # cast before gathering: fewer bytes are sent
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def reshard(self) -> None:
        for root in self.roots:  # after a forward without backward, the root's weights are still gathered
            root.reshard()

    def load_model_state(self, module: nn.Module, state: Mapping[str, Tensor]) -> None:
        self.reshard()
        local_state = module.state_dict(keep_vars=True)
        missing = sorted(local_state.keys() - state.keys())
        if missing:
            raise ValueError(
                f"the saved model lacks {', '.join(missing[:3])}: it was saved from another model; start a "
                f"new run"
            )
        for name, tensor in local_state.items():
            self.set_full(tensor, state[name])

    def set_full(self, tensor: Tensor, value: Tensor) -> None:
        with torch.no_grad():
            _local(tensor).copy_(_local(self._part(value, tensor)))

    def load_optimizer_state(self, optimizer: Any, state: dict[str, Any]) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        spread = {
            index: {
                key: self._part(value, parameters[index])
                if isinstance(value, Tensor) and value.shape == parameters[index].shape
                else value
                for key, value in entries.items()
            }
            for index, entries in state["state"].items()
        }
        optimizer.load_state_dict({**state, "state": spread})

    def _part(self, whole: Tensor, like: Tensor) -> Tensor:
        """Return this rank's part of a tensor that every rank has read in full."""
        if not isinstance(like, DTensor):
            return whole
        whole = whole.to(like.device)
        return distribute_tensor(
            whole, like.device_mesh, list(like.placements), src_data_rank=None
        ).clone()  # a view would keep the full tensor alive


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered_units(model: nn.Module) -> list[nn.Module]:
    """Return the decoder's layers: the units that are gathered one after another."""
    decoder = decoder_of(model)
    blocks = [m for name, m in decoder.named_children() if name in ("layers", "h", "blocks")]
    if len(blocks) != 1 or not isinstance(layers := blocks[0], nn.ModuleList):
        raise ValueError(
            f"{type(decoder).__name__} has no list of layers named layers, h or blocks, which "
            "learner.parallel: fsdp2 needs; use deepspeed"
        )
    return list(layers)
