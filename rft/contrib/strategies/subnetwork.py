"""Train a sparse subnetwork: only the elements that a first run changed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rft.config.learner import SubnetworkConfig
from rft.errors import ModelError
from rft.learner.load import load_causal_lm
from rft.learner.model import PolicyModel
from rft.learner.spec import LearnerSpec
from rft.learner.strategy import SetFull, Strategy, make_optimizer
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


class Subnetwork(Strategy):
    """Keep optimizer, gradients and moments for the masked elements only, gathered into vectors.

    The dense gradient of a parameter is gathered, and freed, as soon as the backward pass has computed it.
    """

    def __init__(self, spec: LearnerSpec, config: SubnetworkConfig) -> None:
        super().__init__(spec)
        self.config = config

    def attach(self, model: Any) -> None:
        parameters = dict(model.named_parameters())
        self.mask = self._read(self.config, parameters)
        self._install(parameters)

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

    def _install(self, parameters: Mapping[str, nn.Parameter]) -> None:
        self.pairs: list[tuple[nn.Parameter, Tensor, nn.Parameter]] = []  # (full, indices, gathered)
        for name, places in self.mask.items():
            if name not in parameters or int(places[-1]) >= parameters[name].numel():
                raise ModelError(
                    f"learner.strategy.mask: it was made for another model: {name} does not exist here, or "
                    "is smaller; name another file"
                )
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in self.mask)
            if name not in self.mask:
                continue
            places = self.mask[name].to(parameter.device)
            gathered = nn.Parameter(parameter.detach().reshape(-1)[places])
            parameter.register_post_accumulate_grad_hook(_gatherer(places, gathered))
            self.pairs.append((parameter, places, gathered))

    def optimizer(self, model: nn.Module, extra: list[dict[str, Any]]) -> torch.optim.Optimizer:
        decay = self.spec.config.weight_decay
        groups = [
            {"params": [g for p, _, g in self.pairs if p.ndim >= 2], "weight_decay": decay},
            {"params": [g for p, _, g in self.pairs if p.ndim < 2], "weight_decay": 0.0},
        ]
        made = make_optimizer(self.spec.config, groups + extra)
        made.register_step_post_hook(self._scatter)
        return made

    @torch.no_grad()
    def _scatter(self, *_: Any) -> None:
        for parameter, places, gathered in self.pairs:
            parameter.view(-1)[places] = gathered

    def trained(self, policy: PolicyModel) -> Iterable[nn.Parameter]:
        yield from (gathered for _, _, gathered in self.pairs)
        if policy.value_head is not None:
            yield from policy.value_head.trained()

    @torch.no_grad()
    def load(self, model_state: Any, state: dict[str, Any], set_full: SetFull) -> bool:
        for parameter, places, gathered in self.pairs:
            gathered.copy_(parameter.reshape(-1)[places])
        return False


def _gatherer(places: Tensor, gathered: nn.Parameter) -> Any:
    def gather(parameter: Tensor) -> None:
        if parameter.grad is None:
            return
        part = parameter.grad.reshape(-1)[places]
        gathered.grad = part if gathered.grad is None else gathered.grad + part
        parameter.grad = None

    return gather
