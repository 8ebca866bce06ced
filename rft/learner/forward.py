"""From a batch to what the policy says of it: the one place where the model is run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from copy import copy
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rft.algorithms.base import Algorithm, PolicyOutput
from rft.algorithms.math.sequences import last_tokens
from rft.batch import Batch
from rft.config.learner import KernelsConfig
from rft.kernels.attention import hidden_states, prepare_model, self_check
from rft.kernels.logprob import token_logps
from rft.learner.critic import Critic
from rft.learner.distribution import full_divergence, reading
from rft.learner.model import Head, head_of
from rft.learner.scoring import score_layer


class Network(nn.Module):
    """A policy's modules under one roof. All that reads their weights is called through `forward`, so that
    weights which lie in shards (FSDP2, ZeRO-3) are whole there and their gradients are reduced after it."""

    def __init__(self, model: Any, critic: Critic | None) -> None:
        super().__init__()
        self.model = model
        self.critic = critic

    def forward(self, work: Callable[..., Any], *args: Any) -> Any:
        """`work(*args)`. What it returns must show its tensors: a tensor, or a dict of them."""
        return work(*args)


class PolicyModel:
    """A causal LM, its head, and an optional critic, run on packed batches.

    `compute_dtype` bfloat16 runs the float32 parameters under autocast.
    """

    def __init__(
        self,
        model: Any,
        *,
        temperature: float,
        compute_dtype: torch.dtype,
        value_head: Critic | None = None,
        kernels: KernelsConfig = KernelsConfig(),  # noqa: B008 (frozen)
    ) -> None:
        self.model = model
        self.route = prepare_model(model, kernels.attention)
        self.kernels = kernels
        self.temperature = temperature
        self.compute_dtype = compute_dtype
        self.value_head = value_head
        self.score_layer = score_layer(model)
        self.network: Callable[..., Any] = Network(model, value_head)
        self.device = next(model.parameters()).device

    def run(
        self,
        batch: Batch,
        outputs: frozenset[str] = frozenset(),
        *,
        algorithm: Algorithm | None = None,
        reference: PolicyModel | None = None,
        expected: Tensor | None = None,
    ) -> PolicyOutput:
        """Log-probs of the masked-in tokens, and of `outputs`: entropy, values, kl, scores. 0 elsewhere.

        A reward model has scores and nothing else: its log-probs are 0. In training, `algorithm` says what
        the model reads and which divergence `kl` is; `expected` [T] is the gradient that the log-probs will
        get, where it is known: their head is then faster.
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
        expected: Tensor | None,
    ) -> dict[str, Tensor]:
        rows = batch.mask.nonzero()[:, 0]
        with self._autocast(), reading(self.model, batch, algorithm, self.temperature):
            states = hidden_states(self.model, batch)
        found: dict[str, Tensor] = {}
        if self.score_layer is not None:
            found["scores"] = self.score_layer(states[rows].to(self.score_layer.weight.dtype)).float()
            found["logps"] = found["scores"].new_zeros(len(rows))
            return {name: _spread(values, rows, batch.num_tokens) for name, values in found.items()}
        hidden = states[batch.source[rows]]
        known = None if expected is None else expected[rows]
        found["logps"], entropy = self._head(hidden, batch.tokens[rows], "entropy" in outputs, known)
        if entropy is not None:
            found["entropy"] = entropy
        if outputs & {"values", "end_values"}:
            assert self.value_head is not None, "the algorithm reads values, but no value head was made"
            alone = algorithm is not None and algorithm.critic_only(batch.state)
            with self._autocast():
                seen = self.value_head.states(batch, states.detach() if alone else states)
            found["values"] = self.value_head(seen[batch.source[rows]])
            if "end_values" in outputs:
                ends = _cut_off(batch)
                found["end_values"] = torch.zeros_like(found["values"]).index_put(
                    (torch.searchsorted(rows, ends),), self.value_head(seen[ends])
                )
        if "kl" in outputs:
            assert algorithm is not None, "kl is the divergence of an algorithm"
            other = reference if algorithm.compares_distributions else None
            ref_hidden = None if other is None else other.states(batch, rows)
            ref_head = None if other is None else other.head()
            backend = self.kernels.logprob
            found["kl"] = full_divergence(
                algorithm,
                self.head(),
                hidden,
                ref_head,
                ref_hidden,
                self.temperature,
                "auto" if backend == "triton" or backend == "liger" else backend,
            )
        return {
            name: _spread(values, rows, batch.num_tokens)
            for name, values in found.items()
            if name in outputs or name in ("logps", "entropy")
        }

    def at_temperature(self, temperature: float) -> PolicyModel:
        """The same network, whose log-probs are those of another temperature."""
        other = copy(self)
        other.temperature = temperature
        return other

    def self_check(self, batch: Batch, *, fall_back: bool) -> float:
        """The largest relative difference of packed hidden states from those of separate sequences, on part
        of a batch. Raises RuntimeError where it is more than rounding explains; with `fall_back` it warns
        and the model runs unpacked from now on."""
        with self._autocast():
            check = partial(self_check, fall_back=fall_back)
            found = self.network(lambda *args: torch.tensor(check(*args)), self.model, batch.to(self.device))
        return float(found)

    @torch.no_grad()
    def states(self, batch: Batch, rows: Tensor) -> Tensor:
        """[n, H]: the hidden states that predict the tokens at `rows`, without gradient."""
        with self._autocast():
            found: Tensor = self.network(hidden_states, self.model, batch.to(self.device))
        return found[batch.source[rows]]

    def head(self) -> Head:
        """The language-model head as it is at the moment."""
        return head_of(self.model)

    def follow(self, policy: PolicyModel) -> None:
        """Take over the weights of a policy: a reference is refreshed so."""
        self.model.load_state_dict(policy.model.state_dict())

    def own_state(self) -> nn.Module | None:
        """The module whose weights are this model's alone; None where it has none of its own."""
        own: nn.Module = self.model
        return own

    def _head(
        self, hidden: Tensor, targets: Tensor, entropy: bool, expected: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        head = self.head()
        weight = head.weight.to(hidden.dtype)
        bias = None if head.bias is None else head.bias.to(hidden.dtype)
        kwargs: dict[str, Any] = {
            "bias": bias,
            "temperature": self.temperature,
            "softcap": head.softcap,
            "logit_scale": head.logit_scale,
            "lora": head.lora,
            "expected": expected,
            "backend": self.kernels.logprob,
        }
        if entropy:
            logps, h = token_logps(hidden, weight, targets, entropy=True, **kwargs)
            return logps, h
        return token_logps(hidden, weight, targets, **kwargs), None

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.compute_dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, dtype=self.compute_dtype)

    def trained(self) -> Iterator[nn.Parameter]:
        """All parameters that the optimizer updates."""
        yield from (p for p in self.model.parameters() if p.requires_grad)
        if self.value_head is not None:
            yield from self.value_head.trained()


def _cut_off(batch: Batch) -> Tensor:
    """[E] int64: the last masked-in token of each sequence that ran into the length limit."""
    last = last_tokens(batch)
    chosen = last >= 0 if batch.truncated is None else batch.truncated & (last >= 0)
    return last[chosen] if batch.truncated is not None else last[:0]


def _spread(values: Tensor, rows: Tensor, total: int) -> Tensor:
    return values.new_zeros(total, *values.shape[1:]).index_put((rows,), values)
