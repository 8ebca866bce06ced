"""Train a sparse subnetwork: the elements that a first run changed (`subnetwork`), the principal weights
(`lift`), or those with the largest gradient (`saft`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rft.config.learner import LiftConfig, SaftConfig, SubnetworkConfig
from rft.errors import ModelError
from rft.learner.load import load_causal_lm
from rft.learner.model import PolicyModel
from rft.learner.spec import LearnerSpec
from rft.learner.strategy import SetFull, Strategy, make_optimizer, outside_layers
from rft.utils.files import write_atomic


def find_mask(
    before: Mapping[str, Tensor], after: Mapping[str, Tensor], tolerance: float
) -> dict[str, Tensor]:
    """Return flat indices (int64, ascending) of the elements that differ by more than `tolerance` as bfloat16
    numbers, per parameter; parameters that did not change are left out.

    Raises ModelError if the two models do not have the same parameters.
    """
    mask = {}
    for name, old in before.items():
        if name not in after or after[name].shape != old.shape:
            raise ModelError(
                f"learner.strategy.tuned: it has no parameter {name} of shape {list(old.shape)}; give a "
                "model that was trained from model.path"
            )
        change = (after[name].bfloat16().float() - old.bfloat16().float()).abs()
        places = (change.reshape(-1) > tolerance).nonzero()[:, 0]
        if places.numel():
            mask[name] = places
    return mask


def principal_weights(weight: Tensor, rank: int, share: float) -> Tensor:
    """Return flat indices (int64, ascending) of the ceil(share * size) entries of a matrix [m, n] that are
    largest in its best approximation of rank `rank` (Liu et al., "LIFT the veil for the truth", 2025)."""
    u, s, v = torch.linalg.svd(weight.detach().float(), full_matrices=False)
    size = ((u[:, :rank] * s[:rank]) @ v[:rank]).abs().reshape(-1)
    return size.topk(math.ceil(share * size.numel())).indices.sort().values


def largest_gradients(gradients: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
    """Return flat indices (int64, ascending) of the ceil(share * number) elements with the largest gradient,
    over all parameters together; parameters without one are left out (Nguyen et al., "SAFT", 2024)."""
    sizes = torch.cat([g.detach().float().abs().reshape(-1) for g in gradients.values()])
    chosen = sizes.topk(math.ceil(share * sizes.numel())).indices.sort().values
    mask, start = {}, 0
    for name, gradient in gradients.items():
        end = start + gradient.numel()
        inside = chosen[(chosen >= start) & (chosen < end)] - start
        if inside.numel():
            mask[name] = inside
        start = end
    return mask


@dataclass
class Part:
    """The trained elements of one parameter. places: their flat indices, ascending, int64. gathered: their
    values, which the optimizer updates."""

    parameter: nn.Parameter
    places: Tensor
    gathered: nn.Parameter

    def take_gradient(self, parameter: Tensor) -> None:
        """Add the gradient of the trained elements to that of `gathered`, and free the dense one."""
        if parameter.grad is None:
            return
        part = parameter.grad.reshape(-1)[self.places]
        self.gathered.grad = part if self.gathered.grad is None else self.gathered.grad + part
        parameter.grad = None

    @torch.no_grad()
    def read(self) -> None:
        self.gathered.copy_(self.parameter.reshape(-1)[self.places])

    @torch.no_grad()
    def write(self) -> None:
        self.parameter.view(-1)[self.places] = self.gathered

    @torch.no_grad()
    def move(self, places: Tensor, moments: Iterable[Tensor]) -> None:
        """Train as many other elements; elements that stay keep their `moments`, those of new ones are 0."""
        index = torch.searchsorted(self.places, places).clamp(max=len(self.places) - 1)
        stays = self.places[index] == places
        for moment in moments:
            moment.copy_(torch.where(stays, moment[index], 0))
        self.places = places
        self.read()


class Masked(Strategy):
    """Keep optimizer, gradients and moments for the masked elements only, gathered into vectors.

    The dense gradient of a parameter is gathered, and freed, as soon as the backward pass has computed it.
    """

    def __init__(self, spec: LearnerSpec) -> None:
        super().__init__(spec)
        self.parts: dict[str, Part] = {}

    def install(self, parameters: Mapping[str, nn.Parameter], mask: Mapping[str, Tensor]) -> None:
        """Train the elements of `mask`, flat indices by parameter name."""
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in mask)
            if name not in mask:
                continue
            places = mask[name].to(parameter.device)
            part = Part(parameter, places, nn.Parameter(parameter.detach().reshape(-1)[places]))
            parameter.register_post_accumulate_grad_hook(part.take_gradient)
            self.parts[name] = part

    def optimizer(self, model: nn.Module, extra: list[dict[str, Any]]) -> torch.optim.Optimizer:
        decay, parts = self.spec.config.weight_decay, self.parts.values()
        groups = [
            {"params": [p.gathered for p in parts if p.parameter.ndim >= 2], "weight_decay": decay},
            {"params": [p.gathered for p in parts if p.parameter.ndim < 2], "weight_decay": 0.0},
        ]
        made = make_optimizer(self.spec.config, groups + extra)
        made.register_step_post_hook(self.after_update)
        return made

    def after_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Write the updated elements into the model."""
        for part in self.parts.values():
            part.write()

    def trained(self, policy: PolicyModel) -> Iterable[nn.Parameter]:
        yield from (part.gathered for part in self.parts.values())
        if policy.value_head is not None:
            yield from policy.value_head.trained()

    def load(self, model_state: Any, state: dict[str, Any], set_full: SetFull) -> bool:
        for part in self.parts.values():
            part.read()
        return False


class Subnetwork(Masked):
    """Train the elements that an earlier run changed."""

    def __init__(self, spec: LearnerSpec, config: SubnetworkConfig) -> None:
        super().__init__(spec)
        self.config = config

    def attach(self, model: Any) -> None:
        parameters = dict(model.named_parameters())
        mask = self._read(self.config, parameters)
        for name, places in mask.items():
            if name not in parameters or int(places[-1]) >= parameters[name].numel():
                raise ModelError(
                    f"learner.strategy.mask: it was made for another model: {name} does not exist here, or "
                    "is smaller; name another file"
                )
        self.install(parameters, mask)

    def _read(self, strategy: SubnetworkConfig, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
        path = Path(strategy.mask).expanduser()
        if path.exists():
            try:
                return load_file(path)
            except SafetensorError as error:
                raise ModelError(
                    f"learner.strategy.mask: {str(path)!r} is not a safetensors file: {error}"
                ) from error
        if strategy.tuned is None:
            raise ModelError(
                f"learner.strategy.mask: {str(path)!r} does not exist; set learner.strategy.tuned"
            )
        tuned = load_causal_lm(strategy.tuned, torch.float32, "cpu", self.spec.model.trust_remote_code)
        before = {name: p.detach().cpu() for name, p in parameters.items()}
        mask = find_mask(before, dict(tuned.named_parameters()), strategy.tolerance)
        if not mask:
            raise ModelError(
                f"learner.strategy: no weight of {strategy.tuned!r} differs from the model by more than "
                f"{strategy.tolerance}, so the mask is empty; lower learner.strategy.tolerance, or name "
                "another model"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomic(path) as temporary:
            save_file(mask, temporary)
        return mask


class Lift(Masked):
    """LIFT: train the principal weights of each layer's matrices, chosen anew every `every` updates.

    Moments of elements that stay chosen are kept. Embeddings, head and vectors are frozen.
    """

    def __init__(self, spec: LearnerSpec, config: LiftConfig) -> None:
        super().__init__(spec)
        self.config = config
        self.updates = 0

    def attach(self, model: Any) -> None:
        parameters, outside = dict(model.named_parameters()), outside_layers(model)
        matrices = {n: p for n, p in parameters.items() if p.ndim == 2 and id(p) not in outside}
        self.install(parameters, {name: self._choose(p) for name, p in matrices.items()})

    def _choose(self, weight: Tensor) -> Tensor:
        return principal_weights(weight, self.config.rank, self.config.share)

    def after_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        super().after_update(optimizer)
        self.updates += 1
        if not self.config.every or self.updates % self.config.every:
            return
        for part in self.parts.values():
            state = optimizer.state[part.gathered].values()
            moments = [t for t in state if isinstance(t, Tensor) and t.shape == part.places.shape]
            part.move(self._choose(part.parameter), moments)

    def state(self) -> dict[str, Any]:
        return {"updates": self.updates, "mask": {name: part.places for name, part in self.parts.items()}}

    def load(self, model_state: Any, state: dict[str, Any], set_full: SetFull) -> bool:
        self.updates = state["updates"]
        for name, part in self.parts.items():
            part.move(state["mask"][name].to(part.places.device), ())
        return False


class Saft(Masked):
    """SAFT: train the elements whose gradient on the first batch is largest.

    Until then nothing is trained; the dense gradient of the first batch is in memory once.
    """

    def __init__(self, spec: LearnerSpec, config: SaftConfig) -> None:
        super().__init__(spec)
        self.config = config

    def attach(self, model: Any) -> None:
        self.parameters = dict(model.named_parameters())

    def begin(self, forward: Callable[[], Any], backward: Callable[[], Any]) -> bool:
        if self.parts:
            return False
        backward()
        gradients = {name: p.grad for name, p in self.parameters.items() if p.grad is not None}
        mask = largest_gradients(gradients, self.config.share)
        for parameter in self.parameters.values():
            parameter.grad = None
        self.install(self.parameters, mask)
        return True

    def state(self) -> dict[str, Any]:
        return {"mask": {name: part.places for name, part in self.parts.items()}}

    def load(self, model_state: Any, state: dict[str, Any], set_full: SetFull) -> bool:
        made = not self.parts and bool(state["mask"])
        if made:
            self.install(self.parameters, state["mask"])
        super().load(model_state, state, set_full)
        return made
