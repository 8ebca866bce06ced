"""Adapters that begin as something the data or the base's own numbers say, through peft's functions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rft.learner.model import ModelError
from rft.learner.strategy_config import AdapterConfig

Settings = Callable[..., Any]
Wrap = Callable[[Any], Any]
Run = Callable[[], Any]


def rewrites_base(config: AdapterConfig, settings: Any) -> bool:
    """Whether the method moves a part of the base's weights into the adapter.

    Raises ModelError for combinations in which that part cannot be told from the rest.
    """
    init = getattr(settings, "init_lora_weights", None)
    moves = isinstance(init, str) and init.lower().split("_niter_")[0] in (
        "pissa",
        "olora",
        "corda",
        "lora_ga",
    )
    if moves and (settings.use_dora or settings.lora_bias):
        raise ModelError(
            f"learner.adapter: {init} takes a part of the base over, which goes with neither use_dora nor "
            "lora_bias; use one of the two"
        )
    return moves


def eva(base: Any, settings: Settings, wrap: Wrap, forward: Run, backward: Run) -> None:
    """EVA: A from the principal components of the activations (Paischer et al. 2024, arXiv 2410.07170)."""
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
    """[tokens, H] of what a layer reads: packed rows have no padding."""
    states: Tensor = layer_input[0] if isinstance(layer_input, tuple) else layer_input
    return states.reshape(-1, states.shape[-1]).float()


def corda(base: Any, settings: Settings, wrap: Wrap, forward: Run, backward: Run) -> None:
    """CorDA: by the covariance of the activations (Yang et al. 2024, arXiv 2406.05223)."""
    from peft.tuners.lora.corda import preprocess_corda

    made = settings()
    preprocess_corda(base, made, run_model=forward)
    wrap(made)


def lora_ga(base: Any, settings: Settings, wrap: Wrap, forward: Run, backward: Run) -> None:
    """LoRA-GA: by the gradient of the first batch (Wang et al. 2024, arXiv 2407.05000)."""
    from peft.tuners.lora.loraga import preprocess_loraga

    made = settings()
    preprocess_loraga(base, made, train_step=backward)
    wrap(made)


MAKERS = {"eva": eva, "corda": corda, "lora_ga": lora_ga}  # those that need the first batch


def loftq(model: Any, path: str) -> None:
    """LoftQ: factors that make up for the base's rounding to 4 bits (Li et al. 2023, arXiv 2310.08659).

    Raises ModelError where the model's full weights are not at hand as safetensors.
    """
    from peft import replace_lora_weights_loftq

    folder = Path(path).expanduser()
    single = folder / "model.safetensors"
    sharded = folder / "model.safetensors.index.json"
    if folder.is_dir() and not (single.exists() or sharded.exists()):
        raise ModelError(f"learner.adapter: loftq reads safetensors, and {path!r} has none")
    generator = torch.get_rng_state()
    replace_lora_weights_loftq(model, model_path=str(single) if single.exists() else None)
    torch.set_rng_state(generator)
