"""Choose the trained parameters and the optimizer: all parameters here, adapters and parts by dotted path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from rft.config.learner import LearnerConfig
from rft.errors import ModelError
from rft.learner.model import PolicyModel
from rft.learner.spec import LearnerSpec
from rft.utils.dotted import load_dotted

Named = Iterator[tuple[str, Tensor]]
SetFull = Callable[[Tensor, Tensor], None]  # `Parallel.set_full`; collective
Quantize = Literal["nf4", "fp4", "int8"]

STRATEGIES = {
    "lisa": "rft.contrib.strategies.layer_sampling.Lisa",
    "hft": "rft.contrib.strategies.layer_sampling.Hft",
    "galore": "rft.contrib.strategies.galore.Galore",
    "subnetwork": "rft.contrib.strategies.subnetwork.Subnetwork",
    "lift": "rft.contrib.strategies.subnetwork.Lift",
    "saft": "rft.contrib.strategies.subnetwork.Saft",
}
MUON = "rft.contrib.muon.make"


class FullTensor(Protocol):
    """`Parallel.full_tensor`; collective."""

    def __call__(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor: ...


class Strategy:
    """Train all parameters; the base class of the other strategies.

    Order of calls: `attach` once after loading, `optimizer`, `begin` per step, `penalty` and `trained` per
    update. Code around an update is registered as a hook of the optimizer.
    """

    quantize: Quantize | None = None  # the quantisation of the base's weights in memory

    def __init__(self, spec: LearnerSpec) -> None:
        self.spec = spec

    # -- loading -------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the policy's stored weights."""
        return torch.float32

    def attach(self, model: Any) -> None:
        """Prepare a loaded model in place, and set `requires_grad` of its parameters."""

    def reference(self, policy: PolicyModel) -> PolicyModel | None:
        """Return the initial model as a view of the policy; None: it must be loaded."""
        return None

    # -- training ------------------------------------------------------------------------------------

    def begin(self, forward: Callable[[], Any], backward: Callable[[], Any]) -> bool:
        """Prepare a step: `forward` runs the batch without gradient, `backward` adds the gradient of its
        loss. Return whether the trained parameters have changed, so that the optimizer must be recreated."""
        return False

    def optimizer(self, model: nn.Module, extra: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Make the optimizer of the trained parameters and of the groups `extra` (a critic's)."""
        config = self.spec.config
        if config.optimizer == "muon":
            made: torch.optim.Optimizer = load_dotted(MUON)(model, config, extra)
            return made
        return make_optimizer(config, decay_groups(model, config.weight_decay) + extra)

    def trained(self, policy: PolicyModel) -> Iterable[nn.Parameter]:
        """List the parameters that the optimizer updates; their gradients are clipped together."""
        return policy.trained()

    def penalty(self) -> Tensor | None:
        """Return a term to add to the loss once per update."""
        return None

    # -- weights and state ---------------------------------------------------------------------------

    def weights(self, model: nn.Module, full_tensor: FullTensor, dtype: torch.dtype | None = None) -> Named:
        """Yield (name, tensor) of the plain model under Hugging Face parameter names, tied ones once."""
        for name, parameter in model.named_parameters():
            yield name, full_tensor(parameter, dtype)

    def adapter(self, full_tensor: FullTensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the adapter's tensors and config. Raises ValueError without an adapter; the preflight allows
        the transport that calls this only with one."""
        raise ValueError("learner.adapter is not set: there is no adapter to send")

    def model_state(self) -> dict[str, Tensor] | None:
        """Return the part of the model that a checkpoint holds; None: the whole model."""
        return None

    def state(self) -> dict[str, Any]:
        """Return the plain data and tensors that a resumed strategy needs besides the model."""
        return {}

    def load(self, model_state: dict[str, Tensor] | None, state: dict[str, Any], set_full: SetFull) -> bool:
        """Load `model_state` and `state`; return the same flag as `begin`."""
        return False

    def export(self, folder: Path, full_tensor: FullTensor, write: bool) -> None:
        """Write the merged model, and the part that `model_state` returns, to a folder. Every rank takes
        part; the one with `write` writes."""
        raise NotImplementedError


def make_strategy(spec: LearnerSpec) -> Strategy:
    """Make the strategy that the learner's config asks for."""
    made: Strategy
    if spec.config.adapter is not None:
        made = load_dotted("rft.learner.adapters.adapter.Adapter")(spec, spec.config.adapter)
    elif spec.config.strategy is not None:
        made = load_dotted(STRATEGIES[spec.config.strategy.name])(spec, spec.config.strategy)
    else:
        made = Strategy(spec)
    return made


def outside_layers(model: Any) -> set[int]:
    """Return the ids of the parameters of the embeddings and of the LM head, if the model has them."""
    ends = (getattr(model, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output"))
    return {id(p) for end in ends if end is not None for p in end.parameters()}


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Return optimizer groups: matrices decay, vectors (norms, biases) do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]


def make_moments(optimizer: torch.optim.AdamW) -> None:
    """Make the moments of all parameters, which AdamW otherwise makes in its first step, and page in their
    memory and that of the gradients. Weights, moments (0) and step counts (0) are those before that step."""
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # nothing is changed, by weight decay neither
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for parameter in parameters:
        optimizer.state[parameter]["step"].zero_()


def make_optimizer(config: LearnerConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """Make `config.optimizer` over parameter groups. Raises ModelError if bitsandbytes is not installed."""
    settings: dict[str, Any] = {"lr": config.learning_rate, "betas": config.betas, "eps": config.eps}
    if config.optimizer == "adamw":
        # one pass over each parameter, where `foreach` and the plain loop take a dozen
        return torch.optim.AdamW(groups, fused=True, **settings)
    try:
        from bitsandbytes import optim
    except ImportError as error:
        raise ModelError(
            f"learner.optimizer: {config.optimizer} needs bitsandbytes: install rft with the extra quant"
        ) from error
    kinds = {
        "adamw_8bit": optim.AdamW8bit,
        "paged_adamw": optim.PagedAdamW,
        "paged_adamw_8bit": optim.PagedAdamW8bit,
    }
    made: torch.optim.Optimizer = kinds[config.optimizer](groups, **settings)
    return made
