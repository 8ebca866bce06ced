"""The policy: find its head, and run it on packed batches, with a critic or as a reward model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rft.algorithms.base import Algorithm, PolicyOutput
from rft.algorithms.extras import ChangesEmbeddings, critic_only
from rft.algorithms.math.sequences import last_tokens
from rft.batch import Batch
from rft.config.learner import KernelsConfig
from rft.config.rollout import SamplingConfig
from rft.errors import ModelError
from rft.kernels.attention import hidden_states, prepare_model, relative_error, self_check, tolerance_of
from rft.kernels.attention_route import Kernel, decoder_of
from rft.kernels.logprob import token_logps
from rft.kernels.logprob_common import LogitMap, RowGradient
from rft.learner.load import score_layer
from rft.utils.dotted import load_dotted
from rft.utils.quantized import evaluation_mode

# Only a few runs change embeddings, need full distributions or sample from truncated ones.
TRUNCATION = "rft.learner.truncation.kept_tokens"
READING = "rft.learner.distribution.reading"
DIVERGENCE = "rft.learner.distribution.divergence"


@dataclass(frozen=True)
class Head:
    """The language-model head: logits = softcap(logit_scale * (hidden weight^T + bias)).

    weight: [V, H]. bias: [V] or None. softcap: Gemma's soft cap of the final logits, or None.
    lora: (A [r, H], B [V, r], scale): scale * B A is added to the weight; None: no LoRA.
    """

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logit_scale: float
    lora: tuple[Tensor, Tensor, float] | None = None

    def detached(self) -> Head:
        """Return a copy without gradient, whose values stay fixed when the policy is updated."""
        lora = None if self.lora is None else (self.lora[0].detach(), self.lora[1].detach(), self.lora[2])
        bias = None if self.bias is None else self.bias.detach()
        return replace(self, weight=self.weight.detach(), bias=bias, lora=lora)


def head_of(model: Any) -> Head:
    """Return the head of a causal LM, with its family's softcap and scale of the logits."""
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear) and not hasattr(layer, "weight"):
        raise ModelError(
            f"{type(model).__name__} has no linear LM head; use a causal language model with one"
        )
    config = model.config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier", "output_multiplier"):
        scale *= float(getattr(config, name, None) or 1.0)
    if factor := getattr(config, "logits_scaling", None):  # Granite divides by it, HyperCLOVA X multiplies
        scale *= float(factor) if config.model_type.startswith("hyperclovax") else 1 / float(factor)
    return Head(layer.weight, getattr(layer, "bias", None), _softcap(config), scale, _lora(layer))


@torch.no_grad()
def check_head(model: Any) -> None:
    """Raise ModelError unless the logits of a causal LM are those of its head, as `head_of` reads it, on the
    decoder's hidden states. Compares a few random tokens."""
    decoder, layer = decoder_of(model), model.get_output_embeddings()
    vocabulary = int(decoder.get_input_embeddings().weight.shape[0])
    tokens = torch.randint(0, vocabulary, (1, 8), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(next(decoder.parameters()).device)
    with evaluation_mode(model):
        logits = model(input_ids=tokens, use_cache=False).logits.float()
        products = layer(decoder(input_ids=tokens, use_cache=False).last_hidden_state).float()
    head = head_of(model)
    error = relative_error(LogitMap(1.0, head.softcap, head.logit_scale)(products), logits)
    if error > tolerance_of(decoder):
        raise ModelError(
            f"the logits of {type(model).__name__} differ by {error:.1e} of their norm from its head's "
            f"products, with the scale {head.logit_scale:g} and softcap {head.softcap} of its config: rft "
            "does not know how this architecture computes them. Use another architecture"
        )


def _lora(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """Return the factors of plain LoRA on the head; None if it has none, or if they are disabled."""
    if not hasattr(layer, "lora_A") or layer.disable_adapters:
        return None
    (name,) = layer.active_adapters
    return layer.lora_A[name].weight, layer.lora_B[name].weight, float(layer.scaling[name])


def _softcap(config: Any) -> float | None:
    value = getattr(config, "final_logit_softcapping", None) or getattr(config, "logits_soft_cap", None)
    return float(value) if value else None


class Critic(nn.Module):
    """A linear head initialised to 0, on the policy's hidden states or on those of `trunk`.

    trunk: a causal LM that is trained with the head and shares no weights with the policy; its language
    model head is not used. None: the head reads the policy's states, and its gradient flows there too,
        except in steps that train only the critic.
    kernel: the attention of `trunk`, as in `prepare_model`.
    """

    def __init__(self, hidden_size: int, trunk: Any | None = None, kernel: Kernel = "auto") -> None:
        super().__init__()
        self.trunk = trunk
        self.head = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)
        if trunk is not None:
            prepare_model(trunk, kernel)

    def states(self, batch: Batch, of_policy: Tensor) -> Tensor:
        """Return the states [T, H] that the head reads; of_policy: the policy's [T, H]."""
        if self.trunk is None:
            return of_policy
        states: Tensor = hidden_states(self.trunk, batch)
        return states

    def forward(self, states: Tensor) -> Tensor:
        """Return the values [n] float32 at states [n, H]."""
        # The head is float32, except where DeepSpeed holds the whole network in bfloat16.
        values: Tensor = self.head(states.to(self.head.weight.dtype))
        return values[:, 0].float()

    def trained(self) -> Iterator[nn.Parameter]:
        """Yield the critic's parameters, without the trunk's language-model head where that is not tied."""
        yield from self.head.parameters()
        if self.trunk is None:
            return
        output = self.trunk.get_output_embeddings()
        tied = output.weight is self.trunk.get_input_embeddings().weight
        for parameter in self.trunk.parameters():
            if parameter.requires_grad and (tied or all(parameter is not p for p in output.parameters())):
                yield parameter


class Network(nn.Module):
    """The modules of a policy as one. All code that reads their weights runs through `forward`: sharded
    weights (FSDP2, ZeRO-3) are gathered there, and their gradients are reduced afterwards."""

    def __init__(self, model: Any, critic: Critic | None) -> None:
        super().__init__()
        self.model = model
        self.critic = critic

    def forward(self, work: Callable[..., Any], *args: Any) -> Any:
        """Run `work(*args)`. Its result must expose its tensors: a tensor, or a dict of them."""
        return work(*args)


class PolicyModel:
    """A causal LM, its head, and an optional critic, run on packed batches. `compute_dtype` bfloat16 runs the
    float32 parameters under autocast."""

    def __init__(
        self,
        model: Any,
        *,
        temperature: float,
        compute_dtype: torch.dtype,
        value_head: Critic | None = None,
        truncation: SamplingConfig | None = None,
        kernels: KernelsConfig = KernelsConfig(),  # noqa: B008 (frozen)
    ) -> None:
        self.model = model
        self.route = prepare_model(model, kernels.attention)
        self.kernels = kernels
        self.temperature = temperature
        self.compute_dtype = compute_dtype
        self.value_head = value_head
        self.truncation = truncation if truncation is not None and truncation.truncated else None
        self.score_layer = score_layer(model)
        if self.score_layer is None:
            check_head(model)
        self.network: nn.Module = Network(model, value_head)
        self.device = next(model.parameters()).device

    def run(
        self,
        batch: Batch,
        outputs: frozenset[str] = frozenset(),
        *,
        algorithm: Algorithm | None = None,
        reference: PolicyModel | None = None,
        expected: Tensor | RowGradient | None = None,
    ) -> PolicyOutput:
        """Compute the log-probs of the masked-in tokens, and `outputs`: entropy, values, end_values, kl.
        Other tokens get 0. A reward model has only scores: its log-probs are 0.

        algorithm: in training; it may change embeddings, and defines the divergence `kl` from `reference`.
        expected: the gradient [T] that the log-probs will get, if known; the head is then faster.
        """
        expected = None if expected is None else expected.to(self.device)
        arguments = (batch.to(self.device), outputs, algorithm, reference, expected)
        return PolicyOutput(**self.network(self._run, *arguments))

    def _run(
        self,
        batch: Batch,
        outputs: frozenset[str],
        algorithm: Algorithm | None,
        reference: PolicyModel | None,
        expected: Tensor | RowGradient | None,
    ) -> dict[str, Tensor]:
        rows = batch.mask.nonzero()[:, 0]
        embedding: AbstractContextManager[None] = nullcontext()
        if algorithm is not None and isinstance(algorithm, ChangesEmbeddings):
            embedding = load_dotted(READING)(self.model, batch, algorithm, self.temperature)
        with self._autocast(), embedding:
            states = hidden_states(self.model, batch)
        values: dict[str, Tensor] = {}  # at `rows`
        if self.score_layer is not None:
            values["scores"] = self.score_layer(states[rows].to(self.score_layer.weight.dtype)).float()
            values["logps"] = values["scores"].new_zeros(len(rows))
            return {name: _spread(value, rows, batch.num_tokens) for name, value in values.items()}
        hidden, head = states[batch.source[rows]], self.head()
        options: dict[str, Any] = {
            "bias": None if head.bias is None else head.bias.to(hidden.dtype),
            "temperature": self.temperature,
            "softcap": head.softcap,
            "logit_scale": head.logit_scale,
            "lora": head.lora,
            "expected": None if expected is None else expected[rows],
            "backend": self.kernels.logprob,
        }
        weight, targets = head.weight.to(hidden.dtype), batch.tokens[rows]
        if self.truncation is not None:
            options["support"] = load_dotted(TRUNCATION)(
                batch, rows, hidden, head, self.truncation, self.temperature
            )
            if "support" in outputs:
                values["support"] = options["support"]
        if "entropy" in outputs:
            values["logps"], values["entropy"] = token_logps(hidden, weight, targets, entropy=True, **options)
        else:
            values["logps"] = token_logps(hidden, weight, targets, **options)
        if outputs & {"values", "end_values"}:
            if self.value_head is None:
                raise ValueError("the algorithm reads values, but no value head was made")
            detached = algorithm is not None and critic_only(algorithm, batch.state)
            with self._autocast():
                seen = self.value_head.states(batch, states.detach() if detached else states)
            at_rows = self.value_head(seen[batch.source[rows]])
            if "values" in outputs:
                values["values"] = at_rows
            if "end_values" in outputs:
                ends = _cut_off(batch)
                values["end_values"] = torch.zeros_like(at_rows).index_put(
                    (torch.searchsorted(rows, ends),), self.value_head(seen[ends])
                )
        if "kl" in outputs:
            arguments = (algorithm, batch, rows, head, hidden, reference, self.temperature)
            values["kl"] = load_dotted(DIVERGENCE)(*arguments, self.kernels.logprob)
        return {name: _spread(value, rows, batch.num_tokens) for name, value in values.items()}

    def at_temperature(self, temperature: float) -> PolicyModel:
        """Return the same network with log-probs at another temperature, over the whole vocabulary."""
        other = copy(self)
        other.temperature, other.truncation = temperature, None
        return other

    def self_check(self, batch: Batch, *, fall_back: bool) -> float:
        """Return the largest relative difference between packed hidden states and those of separate
        sequences, on part of a batch. Raises RuntimeError if rounding does not explain it; with `fall_back`
        it warns, and the model runs unpacked from now on."""
        with self._autocast():
            check = partial(self_check, fall_back=fall_back)
            difference = self.network(
                lambda *args: torch.tensor(check(*args)), self.model, batch.to(self.device)
            )
        return float(difference)

    @torch.no_grad()
    def states(self, batch: Batch, rows: Tensor) -> Tensor:
        """Return the hidden states [n, H] that predict the tokens at `rows`, without gradient."""
        with self._autocast():
            states: Tensor = self.network(hidden_states, self.model, batch.to(self.device))
        return states[batch.source[rows]]

    def head(self) -> Head:
        """Return the language-model head with its current weights."""
        return head_of(self.model)

    def follow(self, policy: PolicyModel) -> None:
        """Copy the weights of a policy, to refresh a reference."""
        self.model.load_state_dict(policy.model.state_dict())

    def unshared_state(self) -> nn.Module | None:
        """Return the module whose weights are not shared with the policy; None if all are shared."""
        module: nn.Module = self.model
        return module

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def trained(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that the optimizer updates."""
        yield from (p for p in self.model.parameters() if p.requires_grad)
        if self.value_head is not None:
            yield from self.value_head.trained()


def _cut_off(batch: Batch) -> Tensor:
    """[E] int64: the last masked-in token of each sequence truncated by the length limit."""
    last = last_tokens(batch)
    chosen = last >= 0 if batch.truncated is None else batch.truncated & (last >= 0)
    return last[chosen] if batch.truncated is not None else last[:0]


def _spread(values: Tensor, rows: Tensor, total: int) -> Tensor:
    return values.new_zeros(total, *values.shape[1:]).index_put((rows,), values)
