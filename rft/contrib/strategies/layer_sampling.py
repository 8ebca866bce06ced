"""Train a random part of the parameters at a time: LISA and HFT. Draws depend only on seed and update."""

from __future__ import annotations

import abc
import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from rft.config.learner import HftConfig, LisaConfig
from rft.errors import ModelError
from rft.kernels.attention_route import decoder_of
from rft.learner.spec import LearnerSpec
from rft.learner.strategy import SetFull, Strategy


def layers_of(model: nn.Module) -> nn.ModuleList:
    """Return the decoder layers, in order. Raises ModelError if the model stores them in an unknown place."""
    decoder = decoder_of(model)
    count = decoder.config.get_text_config().num_hidden_layers
    for module in decoder.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise ModelError(
        f"{type(decoder).__name__} does not hold its {count} layers in one list, which "
        "learner.strategy needs; leave the strategy out"
    )


class LayerSampling(Strategy, abc.ABC):
    """Freeze the parameters that `frozen` draws, redrawn every `every` updates (0: once).

    The optimizer's moments of frozen parameters are dropped, which saves their memory.
    """

    every: int

    def __init__(self, spec: LearnerSpec) -> None:
        super().__init__(spec)
        self.updates = 0
        self.made: torch.optim.Optimizer | None = None

    @abc.abstractmethod
    def frozen(self, model: nn.Module, rng: random.Random) -> Iterator[nn.Parameter]:
        """Yield the parameters that are not trained until the next draw."""

    def attach(self, model: Any) -> None:
        self.model = model
        self._draw()

    def _draw(self) -> None:
        number = self.updates // self.every if self.every else 0
        frozen = {id(p) for p in self.frozen(self.model, random.Random(f"{self.spec.seed}/{number}"))}
        for parameter in self.model.parameters():
            parameter.requires_grad_(id(parameter) not in frozen)
            if self.made is not None and id(parameter) in frozen:
                self.made.state.pop(parameter, None)
                parameter.grad = None

    def optimizer(self, model: nn.Module, extra: list[dict[str, Any]]) -> torch.optim.Optimizer:
        model.requires_grad_(True)  # its groups hold all parameters; those without a gradient are skipped
        self.made = super().optimizer(model, extra)
        self._draw()
        self.made.register_step_post_hook(self._count)
        return self.made

    def _count(self, *_: Any) -> None:
        self.updates += 1
        if self.every and self.updates % self.every == 0:
            self._draw()

    def state(self) -> dict[str, Any]:
        return {"updates": self.updates}

    def load(self, model_state: Any, state: dict[str, Any], set_full: SetFull) -> bool:
        self.updates = state["updates"]
        self._draw()
        return False


class Lisa(LayerSampling):
    """Layerwise importance sampling: embeddings, head and `layers` decoder layers at a time."""

    def __init__(self, spec: LearnerSpec, config: LisaConfig) -> None:
        super().__init__(spec)
        self.layers, self.every = config.layers, config.every

    def frozen(self, model: nn.Module, rng: random.Random) -> Iterator[nn.Parameter]:
        layers = layers_of(model)
        if self.layers >= len(layers):
            raise ModelError(
                f"learner.strategy.layers: the model has only {len(layers)} layers, so {self.layers} at a "
                "time selects all of them; lower it, or remove the strategy"
            )
        chosen = rng.sample(range(len(layers)), self.layers)
        for index, layer in enumerate(layers):
            if index not in chosen:
                yield from layer.parameters()


class Hft(LayerSampling):
    """Half fine-tuning: in every layer, half of the attention matrices and half of the others are frozen.

    Embeddings and head are trained, as in the paper; vectors are trained too.
    """

    def __init__(self, spec: LearnerSpec, config: HftConfig) -> None:
        super().__init__(spec)
        self.every = config.every

    def frozen(self, model: nn.Module, rng: random.Random) -> Iterator[nn.Parameter]:
        spare = 0  # an odd group assigns its extra matrix to either half in turn
        for layer in layers_of(model):
            matrices = [(n, p) for n, p in layer.named_parameters() if p.ndim >= 2]
            attention = [p for n, p in matrices if "attn" in n or "attention" in n]
            rest = [p for n, p in matrices if not ("attn" in n or "attention" in n)]
            for group in (attention, rest):
                half, odd = divmod(len(group), 2)
                if odd:
                    half, spare = half + spare, 1 - spare
                yield from rng.sample(group, half)
