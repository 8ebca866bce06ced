"""Initialise adapters with peft from data (EVA, CorDA, LoRA-GA) or from the base's rounding error (LoftQ)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rft.errors import ModelError
from rft.utils.quantized import full_weight

Settings = Callable[..., Any]
Wrap = Callable[[Any], Any]
Run = Callable[[], Any]


_SETTINGS: dict[str, dict[str, Any]] = {
    "eva": {"rho": 1.0},
    # Instruction-previewed mode, on batches of the task. The other mode, kpm, protects the directions that
    # the given samples use: it expects samples of other knowledge, and on task samples would exclude the
    # directions that the task needs.
    "corda": {"corda_method": "ipm"},
    "lora_ga": {},
}


def data_config(method: str, options: dict[str, Any]) -> Any:
    """Build peft's config of a data-driven initialisation. Raises ModelError for options that it refuses."""
    from peft import EvaConfig, LoraGAConfig
    from peft.tuners.lora.config import CordaConfig

    kind = {"eva": EvaConfig, "corda": CordaConfig, "lora_ga": LoraGAConfig}[method]
    try:
        return kind(**(_SETTINGS[method] | options))
    except (TypeError, ValueError) as error:
        raise ModelError(f"{method}_config: {error}") from error


def eva(base: Any, settings: Settings, wrap: Wrap, forward: Run, backward: Run) -> None:
    """EVA: A from the principal components of the activations (Paischer et al. 2024, arXiv 2410.07170).

    With `rho` > 1 the ranks are redistributed (section 3.3): the components of all layers that explain the
    most variance share the budget of r per layer; no layer has more than rho * r, and one may have none.
    """
    from peft import initialize_lora_eva_weights

    model = wrap(settings())
    initialize_lora_eva_weights(
        model,
        dataloader=[{}],
        forward_fn=lambda _, __: forward(),
        prepare_model_inputs_fn=None,
        prepare_layer_inputs_fn=_rows,
        gather_distributed_inputs=False,
        show_progress_bar=False,
    )


def _rows(layer_input: Any, model_input: Any, layer_name: str) -> Tensor:
    """Return a layer's input as [tokens, H]: packed rows have no padding."""
    states: Tensor = layer_input[0] if isinstance(layer_input, tuple) else layer_input
    return states.reshape(-1, states.shape[-1]).float()


def _targets(base: Any, settings: Settings) -> dict[str, Any]:
    """Resolve `all-linear` to names: peft's initialisers match by name."""
    if settings().target_modules != "all-linear":
        return {}
    head = base.get_output_embeddings()
    linear = [n for n, m in base.named_modules() if isinstance(m, nn.Linear) and m is not head]
    return {"target_modules": linear}


def corda(base: Any, settings: Settings, wrap: Wrap, forward: Run, backward: Run) -> None:
    """CorDA: from the covariance of the activations (Yang et al. 2024, arXiv 2406.05223), by default in its
    instruction-previewed mode (section 3.3)."""
    from peft.tuners.lora.corda import preprocess_corda

    config = settings(**_targets(base, settings))
    preprocess_corda(base, config, run_model=forward)
    base.train()  # peft leaves the model in evaluation mode
    wrap(config)


def lora_ga(base: Any, settings: Settings, wrap: Wrap, forward: Run, backward: Run) -> None:
    """LoRA-GA: from the gradient of the first batch (Wang et al. 2024, arXiv 2407.05000)."""
    from peft.tuners.lora.loraga import preprocess_loraga

    config = settings(**_targets(base, settings))
    preprocess_loraga(base, config, train_step=backward)
    wrap(config)


@torch.no_grad()
def loftq(layers: Iterable[tuple[str, Any]], full: Mapping[str, Tensor]) -> None:
    """LoftQ on an already quantised base: factors that compensate its rounding (Li et al. 2023,
    arXiv 2310.08659, one iteration of algorithm 1).

    layers: (path, LoRA layer). full: the model's parameters before quantisation, by name.
    """
    for path, layer in layers:
        base = layer.get_base_layer()
        residual = full[f"{path}.weight"].float().to(base.weight.device) - full_weight(base).float()
        (name,) = layer.active_adapters
        a, b = layer.lora_A[name].weight, layer.lora_B[name].weight
        u, s, v = torch.linalg.svd(residual, full_matrices=False)
        root = s[: len(a)].sqrt()
        a.copy_(root[:, None] * v[: len(a)])
        b.copy_(u[:, : len(a)] * root / layer.scaling[name])
