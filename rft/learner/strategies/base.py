"""What of a policy is trained, and how. The learner asks its strategy and never which one it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor, nn

from rft.learner.forward import PolicyModel
from rft.learner.model import decay_groups
from rft.learner.strategies.optimizers import make_optimizer

if TYPE_CHECKING:
    from rft.learner.spec import LearnerSpec

Named = Iterator[tuple[str, Tensor]]


class FullTensor(Protocol):
    """Return a tensor with all its elements, whichever part of it this rank holds; in `dtype` if given."""

    def __call__(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor: ...


SetFull = Callable[
    [Tensor, Tensor], None
]  # sets a tensor to a whole value; both are `Parallel`'s, and collective
Quantize = Literal["nf4", "fp4", "int8"]


class Strategy:
    """Full parameters; the base of the others, which change what they must.

    The order of calls: `attach` once after loading, `optimizer`, then per step `begin`, and per update
    `penalty`, `trained`; what must happen around an update hangs on the optimizer's own hooks.
    """

    quantize: Quantize | None = None  # how the base is held in memory

    def __init__(self, spec: LearnerSpec) -> None:
        self.spec = spec

    # -- loading -------------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        """The precision in which the policy's weights are held."""
        return torch.float32

    def attach(self, model: Any) -> None:
        """Prepare a loaded model in place: what is trained has `requires_grad` afterwards."""

    def reference(self, policy: PolicyModel) -> PolicyModel | None:
        """The model that the run starts from, out of the policy itself; None: it must be loaded."""
        return None

    # -- training ------------------------------------------------------------------------------------

    def begin(self, forward: Callable[[], Any], backward: Callable[[], Any]) -> bool:
        """Before every step: `forward` runs the batch without gradient, `backward` adds the gradient of its
        loss. Returns whether the trained parameters are others now: then the optimizer is made anew."""
        return False

    def optimizer(self, model: nn.Module, extra: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """The optimizer of what is trained, and of the groups `extra` (a critic's)."""
        config = self.spec.config
        return make_optimizer(config, decay_groups(model, config.weight_decay) + extra)

    def trained(self, policy: PolicyModel) -> Iterable[nn.Parameter]:
        """What the optimizer updates: their gradients are clipped together."""
        return policy.trained()

    def penalty(self) -> Tensor | None:
        """A term that is added to the loss once per update."""
        return None

    # -- weights and state ---------------------------------------------------------------------------

    def weights(self, model: nn.Module, full_tensor: FullTensor, dtype: torch.dtype | None = None) -> Named:
        """(name, tensor) of the plain model's parameters under their Hugging Face names, tied ones once."""
        for name, parameter in model.named_parameters():
            yield name, full_tensor(parameter, dtype)

    def adapter(self, full_tensor: FullTensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """An adapter alone: its tensors and its config. Raises ValueError where there is none (the preflight
        lets only adapters choose the transport that asks)."""
        raise ValueError("learner.adapter is not set: there is no adapter to send")

    def model_state(self) -> dict[str, Tensor] | None:
        """What of the model a checkpoint holds, where it is not the whole model."""
        return None

    def state(self) -> dict[str, Any]:
        """Plain data and tensors that a resumed strategy needs, besides the model."""
        return {}

    def load(self, model_state: dict[str, Tensor] | None, state: dict[str, Any], set_full: SetFull) -> bool:
        """Take over `model_state` and `state`; returns as `begin` does."""
        return False

    def export(self, folder: Path, full_tensor: FullTensor, write: bool) -> None:
        """Write a policy of which `model_state` is a part: the plain model, and the part alone. Every rank
        takes part, one of them writes."""
        raise NotImplementedError
