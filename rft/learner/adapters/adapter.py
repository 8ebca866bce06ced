"""Train an adapter on a frozen policy, through peft, which replaces layers in place."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rft.batch import Batch
from rft.config.learner import AdapterConfig
from rft.errors import ModelError
from rft.learner.adapters.merge import merged_layer, merged_weights, plain_name
from rft.learner.adapters.methods import (
    DATA_DRIVEN,
    LOFTQ,
    check_layers,
    check_targets,
    peft_config,
    rewrites_base,
)
from rft.learner.load import load_causal_lm, resolve_dtype
from rft.learner.model import Head, PolicyModel
from rft.learner.spec import LearnerSpec
from rft.learner.strategy import FullTensor, Named, SetFull, Strategy
from rft.utils.dotted import load_dotted

NAME = "default"  # peft's name of the one adapter
_REDISTRIBUTED = ("rank_pattern", "alpha_pattern", "target_modules")  # set by EVA, which chooses the ranks


class Adapter(Strategy):
    """Train only an adapter; the base is frozen, and quantised where `learner.quantize` asks for it."""

    def __init__(self, spec: LearnerSpec, config: AdapterConfig) -> None:
        super().__init__(spec)
        self.config = config
        self.quantize = spec.config.quantize
        self.names: list[str] = []
        self.keys: set[str] = set()  # keys of the plain model's state
        self.peft: Any = None  # peft's wrapper; None before a data-driven adapter is made
        self.base: Any = None
        # The initial adapter, if the method moved part of the base's weights into it (PiSSA and the like).
        self.initial: dict[str, Tensor] = {}
        self.snapshot: dict[str, Tensor] = {}  # the reference's adapter, if it is not the initial one
        self.updates = 0

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype, since the base is never updated; float32 if adapters are merged into it, whose
        updates would be lost in bfloat16's rounding."""
        if self.config.restart_every:
            return torch.float32
        return resolve_dtype(self.spec.config.dtype, self.spec.device)

    # -- making the adapter --------------------------------------------------------------------------

    def attach(self, model: Any) -> None:
        check_targets(self.config, model)
        check_layers(model, self.config)
        self.base, self.names = model, [name for name, _ in model.named_parameters()]
        self.keys = set(model.state_dict())
        if self.config.method in DATA_DRIVEN:
            self._settings()  # raises errors in the settings at once
            model.requires_grad_(False)  # the adapter is made from the first batch
            return
        self._wrap(self._settings())
        if self.config.method == "loftq":
            load_dotted(LOFTQ)(tuner_layers(model), self._full_weights())
            self.follow()  # the run starts from base and adapter together

    def _settings(self, **fixed: Any) -> Any:
        if self.config.method == "adalora":
            total = self.spec.train.steps * self.spec.train.num_iterations * self.spec.train.minibatches
            # The budget shrinks over the middle of the run, as in the paper.
            fixed = {"total_step": total, "tinit": total // 10, "tfinal": total // 2} | fixed
            fixed = {k: v for k, v in fixed.items() if k not in self.config.options}
        return peft_config(self.config, **fixed)

    def _wrap(self, settings: Any) -> Any:
        """Insert the adapter; return peft's model. Keep the initial state of methods that change the base."""
        from peft import get_peft_model

        marks = {name: _mark(p) for name, p in self.base.named_parameters()}
        copies = self._originals() if rewrites_base(settings) else {}
        try:
            self.peft = get_peft_model(self.base, settings)
        except (ValueError, TypeError, RuntimeError, ImportError, NotImplementedError) as error:
            raise ModelError(f"learner.adapter: {self.config.method}: {error}") from error
        self._check_merge()
        if copies:
            self.initial = self._tensors(copy=True)
            self._rebase(copies)
        elif any(_mark(p) != marks[plain_name(n)] for n, p in self._base_parameters()):
            raise ModelError(
                f"learner.adapter: {self.config.method} with these options changes the base weights, and rft "
                "cannot restore them for the reference; use pissa, olora, corda or lora_ga"
            )
        return self.peft

    def _check_merge(self) -> None:
        """Raise ModelError if the method cannot merge on this model: its policy could not be pushed."""
        for path, layer in tuner_layers(self.base):
            try:
                merged_layer(layer)
            except (ValueError, TypeError, AttributeError, NotImplementedError, RuntimeError) as error:
                raise ModelError(
                    f"learner.adapter: {self.config.method} on {path} cannot be merged into the weights that "
                    f"engines sample with: {error}"
                ) from error
            return

    def _originals(self) -> dict[str, Tensor]:
        return {n: p.detach().to("cpu", copy=True) for n, p in self.base.named_parameters() if p.ndim == 2}

    def _base_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        known = set(self.names)
        return ((n, p) for n, p in self.base.named_parameters() if plain_name(n) in known)

    @torch.no_grad()
    def _rebase(self, originals: dict[str, Tensor]) -> None:
        """Set base = original - initial adapter, with the same numbers on every start."""
        now = self._tensors(copy=True)
        self._set_parameters(self.initial)
        for path, layer in tuner_layers(self.base):
            weight = layer.get_base_layer().weight
            original = originals[f"{path}.weight"].to(weight.device)
            weight.data.copy_(original.float() - layer.get_delta_weight(NAME).float())
        self._set_parameters(now)

    def begin(self, forward: Callable[[], Any], backward: Callable[[], Any]) -> bool:
        if self.peft is not None:
            return False
        make = load_dotted(DATA_DRIVEN[self.config.method])
        make(self.base, self._settings, self._wrap, forward, backward)
        return True

    # -- the reference -------------------------------------------------------------------------------

    def reference(self, policy: PolicyModel) -> PolicyModel | None:
        return None if self.config.restart_every else AdapterReference(policy, self)

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Switch the model to the reference within the block: the initial policy, or that of `follow`."""
        if self.peft is None:
            yield
            return
        tensors = self.snapshot or self.initial
        if not tensors:
            with self.peft.disable_adapter():
                yield
            return
        parameters = self._parameters()
        kept = {name: parameters[name].data for name in tensors}
        for name, tensor in tensors.items():
            parameters[name].data = tensor
        try:
            yield
        finally:
            for name, data in kept.items():
                parameters[name].data = data

    def follow(self) -> None:
        """Make the current policy the reference."""
        self.snapshot = self._tensors(copy=True)

    # -- training ------------------------------------------------------------------------------------

    def optimizer(self, model: nn.Module, extra: list[dict[str, Any]]) -> torch.optim.Optimizer:
        made = super().optimizer(model, extra)
        if self.config.method == "adalora":
            made.register_step_post_hook(self._allocate)
        if self.config.restart_every:
            made.register_step_post_hook(self._restart)
        return made

    @torch.no_grad()
    def _restart(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Merge the adapter into the base every few updates, and begin with a new one and empty moments."""
        self.updates += 1
        if self.updates % self.config.restart_every:
            return
        for _path, layer in tuner_layers(self.base):
            merged = merged_layer(layer)
            for name, weight in layer.get_base_layer().named_parameters():
                weight.copy_(merged[name])
            layer.reset_lora_parameters(NAME, True)
        for parameter in self._parameters().values():
            optimizer.state.pop(parameter, None)

    def _allocate(self, *_: Any) -> None:
        """Let AdaLoRA reassign ranks, after each update and before gradients are dropped."""
        self.peft.base_model.update_and_allocate(self.updates)
        self.updates += 1

    def penalty(self) -> Tensor | None:
        """Return AdaLoRA's orthogonality penalty (Zhang et al. 2023, eq. 4)."""
        if self.config.method != "adalora" or self.peft is None:
            return None
        weight = self.peft.peft_config[NAME].orth_reg_weight
        terms = []
        for _, layer in tuner_layers(self.base):
            for factor in (layer.lora_A[NAME], layer.lora_B[NAME].t()):
                terms.append(torch.norm(factor @ factor.t() - torch.eye(len(factor), device=factor.device)))
        return weight * torch.stack(terms).mean()

    # -- weights and state ---------------------------------------------------------------------------

    def weights(self, model: nn.Module, full_tensor: FullTensor, dtype: torch.dtype | None = None) -> Named:
        return merged_weights(model, self.names, full_tensor, dtype)

    def adapter(self, full_tensor: FullTensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the adapter on the *original* base: tensors by peft's names, and its config as plain data.

        Weights that PiSSA and the like moved from the base are returned to it, which doubles the adapter's
        rank.
        """
        from peft import get_peft_model_state_dict

        if self.peft is None:
            raise ModelError(
                f"learner.adapter: {self.config.method} is initialised from the first batch, and no batch "
                "was trained on yet"
            )
        tensors = {n: full_tensor(t) for n, t in get_peft_model_state_dict(self.peft).items()}
        settings = self.peft.peft_config[NAME]
        if self.initial:
            with self._as_initial():
                initial = {n: t.detach().clone() for n, t in get_peft_model_state_dict(self.peft).items()}
            return as_plain_lora(tensors, initial, settings)
        return tensors, settings.to_dict()

    @contextmanager
    def _as_initial(self) -> Iterator[None]:
        snapshot, self.snapshot = self.snapshot, {}
        try:
            with self.as_reference():
                yield
        finally:
            self.snapshot = snapshot

    def export(self, folder: Path, full_tensor: FullTensor, write: bool) -> None:
        """Write the merged model in the base's dtype, and the adapter in peft's format in a subfolder."""
        from transformers import AutoModelForCausalLM

        config = type(self.base.config).from_dict(
            {k: v for k, v in self.base.config.to_dict().items() if k != "quantization_config"}
        )
        with torch.device("meta"):
            plain = AutoModelForCausalLM.from_config(
                config, dtype=self.dtype, trust_remote_code=self.spec.model.trust_remote_code
            )
        weights = merged_weights(self.base, self.names, full_tensor)
        merged = {n: t.to("cpu", self.dtype) if write else None for n, t in weights}
        if write:
            plain.generation_config = self.base.generation_config
            plain.save_pretrained(folder, state_dict=merged)
        if self.peft is not None and not self.config.restart_every:
            tensors = self.adapter(full_tensor)
            if write:
                self._write_adapter(folder / "adapter", *tensors)

    def _write_adapter(self, folder: Path, tensors: dict[str, Tensor], settings: dict[str, Any]) -> None:
        import json

        from safetensors.torch import save_file

        folder.mkdir(parents=True, exist_ok=True)
        save_file(
            {n: t.cpu().contiguous().clone() for n, t in tensors.items()},
            folder / "adapter_model.safetensors",
        )
        settings |= {"base_model_name_or_path": self.spec.model.path, "inference_mode": True}
        text = json.dumps(settings, indent=2, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
        (folder / "adapter_config.json").write_text(text, encoding="utf-8")

    def _parameters(self) -> dict[str, Tensor]:
        """Return the parameters and buffers that the adapter added, by their names in the model."""
        known = self.keys
        state: dict[str, Tensor] = self.base.state_dict(keep_vars=True)
        return {n: t for n, t in state.items() if n not in known and not _of_base(n)}

    def _tensors(self, *, copy: bool) -> dict[str, Tensor]:
        return {n: t.detach().clone() if copy else t.detach() for n, t in self._parameters().items()}

    @torch.no_grad()
    def _set_parameters(self, tensors: dict[str, Tensor]) -> None:
        parameters = self._parameters()
        for name, tensor in tensors.items():
            parameters[name].data.copy_(tensor)

    def model_state(self) -> dict[str, Tensor]:
        return {} if self.peft is None else self._parameters()

    def state(self) -> dict[str, Any]:
        state: dict[str, Any] = {"initial": self.initial, "snapshot": self.snapshot, "updates": self.updates}
        if self.config.method == "adalora":
            allocator = self.peft.base_model.rankallocator
            state["allocator"] = {k: getattr(allocator, k) for k in ("ipt", "exp_avg_ipt", "exp_avg_unc")}
            state["rank_pattern"] = self.peft.peft_config[NAME].rank_pattern
        if self.config.method == "eva" and self.peft is not None:
            settings = self.peft.peft_config[NAME]
            state["eva"] = {key: _plain(getattr(settings, key)) for key in _REDISTRIBUTED}
        if self.config.restart_every:
            state["base"] = {n: p.detach() for n, p in self._layer_parameters()}
        return state

    def _layer_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the base parameters of the layers with an adapter, by their names in the plain model."""
        for path, layer in tuner_layers(self.base):
            for name, parameter in layer.get_base_layer().named_parameters():
                yield f"{path}.{name}", parameter

    def load(self, model_state: dict[str, Tensor] | None, state: dict[str, Any], set_full: SetFull) -> bool:
        if not model_state:  # saved before the first batch, from which the adapter is made
            return False
        made = self.peft is None
        if made:
            self._wrap(self._settings(init_lora_weights=True, **state.get("eva", {})))
        parameters = self._parameters()
        saved = {
            k: {n: t.to(parameters[n].device, copy=True) for n, t in state[k].items()}
            for k in ("initial", "snapshot")
        }
        self._restore_base(saved["initial"])
        for name, tensor in model_state.items():
            set_full(parameters[name], tensor)
        self.snapshot, self.updates = saved["snapshot"], state["updates"]
        if self.config.method == "adalora":
            allocator = self.peft.base_model.rankallocator
            for name, value in state["allocator"].items():
                setattr(allocator, name, value)
            self.peft.peft_config[NAME].rank_pattern = state["rank_pattern"]
        if self.config.restart_every:
            for name, parameter in self._layer_parameters():
                parameter.data.copy_(state["base"][name])
        return made

    def _restore_base(self, initial: dict[str, Tensor]) -> None:
        """Set the base to that of the run that started with `initial`."""
        if not initial or _same(initial, self.initial):
            return
        if self.initial:  # this start moved other weights: begin from the original again
            originals = self._full_weights()
        else:
            originals = {plain_name(n): p.detach().clone() for n, p in self._base_parameters()}
        self.initial = initial
        self._rebase(originals)

    def _full_weights(self) -> dict[str, Tensor]:
        """Load the base's parameters from disk to CPU."""
        plain = load_causal_lm(self.spec.model.path, self.dtype, "cpu", self.spec.model.trust_remote_code)
        return {name: p.detach() for name, p in plain.named_parameters()}


class AdapterReference(PolicyModel):
    """The policy's model with its initial adapter, or none, instead of a second copy of the weights."""

    def __init__(self, policy: PolicyModel, strategy: Adapter) -> None:
        self.__dict__.update(policy.__dict__)
        self.value_head = None
        self.strategy = strategy

    def run(self, batch: Batch, outputs: frozenset[str] = frozenset(), **kwargs: Any) -> Any:
        with self.strategy.as_reference(), torch.no_grad():
            return super().run(batch, outputs, **kwargs)

    def states(self, batch: Batch, rows: Tensor) -> Tensor:
        with self.strategy.as_reference():
            return super().states(batch, rows)

    def head(self) -> Head:
        with self.strategy.as_reference(), torch.no_grad():
            return super().head().detached()

    def follow(self, policy: PolicyModel) -> None:
        self.strategy.follow()

    def unshared_state(self) -> nn.Module | None:
        return None  # the strategy's state contains it


def _plain(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


def tuner_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Yield (path, layer) of every layer with an adapter, only the outermost of nested ones."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for path, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not path.endswith(".base_layer"):
            yield path, module


def _of_base(name: str) -> bool:
    """Whether a state entry belongs to a wrapped layer of the plain model. bitsandbytes adds entries to 8-bit
    layers in the first forward."""
    return ".base_layer." in name or ".original_module." in name or name.endswith((".SCB", ".weight_format"))


def _mark(parameter: nn.Parameter) -> tuple[Any, ...]:
    """Return a checksum that detects a changed weight without a copy of it."""
    data = parameter.detach()
    total = data.sum(dtype=torch.float64 if data.is_floating_point() else torch.int64)
    some = data.reshape(-1)[:: max(1, data.numel() // 97)].float().norm()
    return tuple(data.shape), float(total), float(some)


def _same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t.to(b[n].device), b[n]) for n, t in a.items())


def as_plain_lora(
    now: dict[str, Tensor], initial: dict[str, Tensor], settings: Any
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return LoRA of twice the rank, with product s (B A - B0 A0): the change relative to the original base.

    now, initial: peft's state dicts of the same adapter, A [r, in] and B [out, r] per layer.
    Returns tensors and config as plain data.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in now.items():
        if ".lora_A." in name:
            tensors[name] = torch.cat([tensor, initial[name]], 0)
        elif ".lora_B." in name:
            tensors[name] = torch.cat([tensor, -initial[name]], 1)
        else:
            tensors[name] = tensor
    config: dict[str, Any] = settings.to_dict()
    grown = math.sqrt(2) if settings.use_rslora else 2  # keeps the scale: alpha / sqrt(r), or alpha / r
    config["r"] = 2 * settings.r
    config["lora_alpha"] = grown * settings.lora_alpha
    config["rank_pattern"] = {k: 2 * v for k, v in settings.rank_pattern.items()}
    config["alpha_pattern"] = {k: grown * v for k, v in settings.alpha_pattern.items()}
    config["init_lora_weights"] = True
    for key in ("eva_config", "corda_config", "lora_ga_config"):
        config[key] = None
    return tensors, config
