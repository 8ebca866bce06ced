"""The methods of peft, supported and refused, and their configs."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from rft.config.learner import AdapterConfig, LearnerConfig
from rft.errors import ModelError
from rft.utils.did_you_mean import did_you_mean, did_you_mean_or_list
from rft.utils.dotted import load_dotted

# LoRA variants by the names in their papers, as fields of peft's LoraConfig.
LORA: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa"},
    "olora": {"init_lora_weights": "olora"},
    "eva": {"init_lora_weights": "eva"},
    "corda": {"init_lora_weights": "corda"},
    "lora_ga": {"init_lora_weights": "lora_ga"},
    "loftq": {"init_lora_weights": True},  # replaced layer by layer, see `data_init.loftq`
}
# Variants of other methods.
VARIANTS: dict[str, dict[str, Any]] = LORA | {
    # W_b + W_b M + M for the blocks W_b [r, r] of a row of blocks (Kang et al. 2024, arXiv 2409.15371)
    "bone": {"init_weights": "bat"},
}
ON_HEAD = ("lora", "eva", "pissa", "olora", "corda", "lora_ga")  # plain factors, applied without logits
ALIASES = {"bone": "miss", "dora": "lora"} | dict.fromkeys(LORA, "lora")

# Unsupported methods, with the reason.
_PROMPT = "adds tokens or states to the prompt, which packed batches and merged weights cannot carry"
_INPUT = "cannot be merged into the weights that engines sample with: the added part depends on the input"
REFUSED: dict[str, str] = {
    "prompt_tuning": _PROMPT,
    "multitask_prompt_tuning": _PROMPT,
    "p_tuning": _PROMPT,
    "prefix_tuning": _PROMPT,
    "adaption_prompt": _PROMPT,
    "cpt": _PROMPT,
    "cartridge": _PROMPT,
    "poly": _INPUT,
    "xlora": _INPUT,
    "shadow": _INPUT,
    "lily": "cannot be merged into the weights that engines sample with: peft has no merge for it",
    "ln_tuning": "swaps whole layers in and out, which leaves nothing to merge",
    "trainable_tokens": "trains rows of the embeddings, which most models share with their head",
    "pvera": "samples new weights in every forward pass, so its log-probs cannot match those of the engine",
}


# Methods initialised from the first batch, and their initialisers; LoftQ uses the base's rounding.
DATA_DRIVEN = {
    "eva": "rft.contrib.strategies.data_init.eva",
    "corda": "rft.contrib.strategies.data_init.corda",
    "lora_ga": "rft.contrib.strategies.data_init.lora_ga",
}
DATA_CONFIG = "rft.contrib.strategies.data_init.data_config"
LOFTQ = "rft.contrib.strategies.data_init.loftq"
# Number of sequences for activation-based methods, if the data are known in advance: CorDA's authors use 256.
_PREVIEWED = {"eva": 256, "corda": 256}


def previewed_sequences(config: LearnerConfig) -> int:
    """Return how many sequences the data-driven initialisation of an adapter reads."""
    return 0 if config.adapter is None else _PREVIEWED.get(config.adapter.method, 0)


def known_methods() -> list[str]:
    """List every name that `learner.adapter.method` accepts."""
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    names = {kind.value.lower() for kind in PEFT_TYPE_TO_CONFIG_MAPPING}
    return sorted((names | set(ALIASES)) - set(REFUSED))


def peft_config(config: AdapterConfig, **fixed: Any) -> Any:
    """Build peft's config of the method; `fixed` are fields that the run determines.

    Raises ModelError for an unknown or unsupported method, and for options that the method does not have
    or accept, naming them.
    """
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = {kind.value.lower(): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    method = config.method.lower()
    name = ALIASES.get(method, method)
    if name in REFUSED:
        raise ModelError(f"method {method!r} cannot be used: it {REFUSED[name]}; use lora")
    if name not in kinds:
        raise ModelError(f"unknown method {config.method!r}{did_you_mean_or_list(method, known_methods())}")
    fields = {f.name for f in dataclasses.fields(kinds[name]) if f.init}
    given = {**_settings(config, method, fields), **VARIANTS.get(method, {}), **config.options, **fixed}
    if method in DATA_DRIVEN:
        options = config.options.get(f"{method}_config", {})
        given[f"{method}_config"] = load_dotted(DATA_CONFIG)(method, options)
    for key in given:
        if key not in fields:
            raise ModelError(
                f"method {method!r} has no option {key!r} in peft{did_you_mean_or_list(key, fields)}"
            )
    try:
        return kinds[name](**given)
    except (TypeError, ValueError, ImportError) as error:
        raise ModelError(f"method {method!r}: {error}") from error


def _settings(config: AdapterConfig, method: str, fields: set[str]) -> dict[str, Any]:
    """Translate rft's setting names to the method's. Raises ModelError for a setting that it lacks."""
    given: dict[str, Any] = {}
    if "target_modules" in fields:
        given["target_modules"] = config.target_modules
    elif config.target_modules != "all-linear":
        raise ModelError(f"method {method!r} chooses its layers itself: leave target_modules out")
    if config.r is not None:
        given[_first(method, "r", ("init_r", "r", "rank"), fields)] = config.r
    lora = ALIASES.get(method, method) in ("lora", "adalora")
    if config.alpha is not None or lora:
        key = _first(method, "alpha", ("lora_alpha", "alpha"), fields)
        rank = config.r or (12 if method == "adalora" else 8)  # peft's defaults
        given[key] = 2 * rank if config.alpha is None else config.alpha
    if config.rslora:
        given[_first(method, "rslora", ("use_rslora",), fields)] = True
    return given


def _first(method: str, what: str, names: tuple[str, ...], fields: set[str]) -> str:
    for name in names:
        if name in fields:
            return name
    raise ModelError(f"method {method!r} has no setting {what!r}; see its options in peft")


def rewrites_base(settings: Any) -> bool:
    """Whether a method with these peft settings moves part of the base's weights into the adapter.

    Raises ModelError for combinations in which that part cannot be separated from the rest.
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
            f"learner.adapter: {init} moves a part of the base into the adapter and cannot be combined with "
            "use_dora or lora_bias; remove those, or choose another init_lora_weights"
        )
    return moves


def check_targets(config: AdapterConfig, model: torch.nn.Module) -> None:
    """Raise ModelError if a target does not match any layer of the model; the message lists the layers."""
    targets = config.target_modules
    if targets == "all-linear":
        return
    names = {name: module for name, module in model.named_modules() if name}
    peft = peft_config(config)
    from peft.tuners.tuners_utils import check_target_module_exists

    wanted = [targets] if isinstance(targets, str) else list(targets)
    for target in wanted:
        one = dataclasses.replace(peft, target_modules=target if isinstance(targets, str) else [target])
        if not any(check_target_module_exists(one, name) for name in names):
            layers = {
                n.rsplit(".", 1)[-1] for n, m in names.items() if not list(m.children()) and has_weight(m)
            }
            raise ModelError(
                f"target_modules: {target!r} matches no layer{did_you_mean(target, layers)}; the linear "
                f"layers are: {', '.join(sorted(layers))}"
            )


def check_layers(model: Any, config: AdapterConfig) -> None:
    """Raise ModelError if an adapter would be placed on a layer that rft cannot push or run.

    model: before the adapter is inserted.
    """
    if config.target_modules == "all-linear":
        return
    from peft.tuners.tuners_utils import check_target_module_exists

    head, table = model.get_output_embeddings(), model.get_input_embeddings()
    peft = peft_config(config)
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    for name, module in model.named_modules():
        if module is not head and module is not table:
            continue
        if not check_target_module_exists(peft, name):
            continue
        if tied:
            raise ModelError(
                f"target_modules: {name} shares its weights with the embeddings, and an adapter would "
                "separate the two; leave it out"
            )
        if module is head and config.method not in ON_HEAD:
            raise ModelError(
                f"target_modules: on the head {name} only plain LoRA is possible, not {config.method}; "
                "leave it out"
            )


def has_weight(module: torch.nn.Module) -> bool:
    return getattr(getattr(module, "weight", None), "ndim", 0) >= 2
