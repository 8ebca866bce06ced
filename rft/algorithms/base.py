"""Base class of all algorithms: a frozen dataclass whose fields are settings and whose methods are the math.

The learner runs the model, passes its outputs (`PolicyOutput`) and the `Batch` to the algorithm, and receives
an unreduced loss. The learner reduces it: every unit of the loss is weighted by its share of the *whole*
batch before the batch is split, so that micro-batches, packing and data parallelism do not change the
gradient. Features of few algorithms (a critic, a reward head, modified embeddings, a second model) are in
`extras`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import torch

from rft.batch import Batch

Normalization = Literal["token", "sequence", "constant"]
Unit = Literal["token", "sequence", "pair"]
DataKind = Literal["sft", "preference", "pairwise", "unpaired", "ranked", "scored", "steps"]


@dataclass(frozen=True)
class PolicyOutput:
    """Outputs of the current policy on a batch, with gradient.

    logps: [T] float32, log-prob of `batch.tokens[t]`; 0 where the mask is False.
    entropy, values, kl: [T] float32, present if listed in the algorithm's `outputs`: the policy's entropy in
        nats, the critic's value, and the full-vocabulary divergence from the reference.
    end_values: [T] float32, present if requested: the critic's value of the state after the last token of a
        sequence truncated by the length limit; 0 elsewhere.
    support: [T, ceil(V/8)] uint8, present if requested: the tokens that each one was sampled from, packed.
    scores: [T, K] float32, the K outputs of a reward head after reading token t (unlike `values`, which are
        before it); present if listed in `outputs`, for reward models.
    """

    logps: torch.Tensor
    entropy: torch.Tensor | None = None
    values: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    end_values: torch.Tensor | None = None
    support: torch.Tensor | None = None


@dataclass(frozen=True)
class Rollout:
    """Request for one completion of a prompt.

    greedy: greedy decoding instead of sampling.
    train: False for a baseline completion: it is scored, but excluded from the batch; its reward is
        `columns["baseline"]` [N] of the other completions of the group.
    prefix_share: fraction of a demonstration's tokens that the completion starts with; the policy continues
        it, with at least two tokens left to sample. 1: the whole demonstration, without sampling.
        Prefix tokens are True in `Batch.demonstrated` and in the mask. With several demonstrations, one is
        drawn at random per completion.
    prefix_least: if given, the fraction is drawn per completion, uniformly between this and `prefix_share`.
        Draws depend only on the prompt's seed.
    mixture: sample from policy^(1 - mixture) * reference^mixture, per token.
    role: an "observer" samples after the prompt and the answer of the preceding "pioneer";
        `columns["observer"]` [N] is 1 for observers, `columns["pair"]` [N] is the pair's index in its group.
    """

    greedy: bool = False
    train: bool = True
    prefix_share: float = 0.0
    prefix_least: float | None = None
    mixture: float = 0.0
    role: Literal["", "pioneer", "observer"] = ""


def setting(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """Return a dataclass field with a one-line description and an optional range. Ranges, and the choices of
    a `Literal`, are checked at construction."""
    bounds = {k: v for k, v in (("ge", ge), ("gt", gt), ("le", le), ("lt", lt)) if v is not None}
    return field(default=default, metadata={"doc": doc, **bounds})


_CHECKS = {
    "ge": (lambda x, b: x >= b, "at least"),
    "gt": (lambda x, b: x > b, "greater than"),
    "le": (lambda x, b: x <= b, "at most"),
    "lt": (lambda x, b: x < b, "less than"),
}


@cache
def _choices(kind: type[Algorithm]) -> dict[str, tuple[Any, ...]]:
    """Return the allowed values of the fields annotated as `Literal`."""
    hints = get_type_hints(kind)
    return {f.name: get_args(hints[f.name]) for f in fields(kind) if get_origin(hints[f.name]) is Literal}


@dataclass(frozen=True)
class Algorithm(ABC):
    """Base class of algorithms. Subclasses are frozen dataclasses with a `loss`.

    Class attributes:
        online: True if it trains on completions sampled during the run.
        unit: unit of the elements of `loss`: token ([T]), sequence ([N]) or pair ([P]).
        min_generations: minimum group size.
        needs_demonstrations: True if every prompt needs a demonstration.
        on_policy: True if each batch allows only one optimizer step.
        data: offline, the kind of groups, see `kind` of `rft.data.load_groups`.
    """

    online: ClassVar[bool] = True
    unit: ClassVar[Unit] = "token"
    min_generations: ClassVar[int] = 1
    needs_demonstrations: ClassVar[bool] = False
    on_policy: ClassVar[bool] = False
    data: ClassVar[DataKind] = "sft"

    def __post_init__(self) -> None:
        choices = _choices(type(self))
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name in choices and value not in choices[f.name]:
                known = ", ".join(map(str, choices[f.name]))
                raise ValueError(f"{f.name} must be one of {known}, got {value!r}")
            for name, (check, words) in _CHECKS.items():
                bound = f.metadata.get(name)
                if bound is not None and value is not None and not check(value, bound):
                    raise ValueError(f"{f.name} must be {words} {bound}, got {value}")

    @property
    def needs(self) -> frozenset[str]:
        """Return the batch fields to compute before the step. Choices are `old_logps`, `ref_logps`,
        `old_entropy`, `values`, `end_values`, `rewards`, `old_scores` (`columns["old_scores"]` [N, K], at the
        last tokens). `old_logps` is only computed for several optimizer steps per batch."""
        return frozenset()

    @property
    def prescored(self) -> bool:
        """Return whether `prepare` reads `old_logps`. They are then computed for every batch, even with a
        single optimizer step, for whose loss `old_logps_or` suffices."""
        return False

    @property
    def before_prepare(self) -> frozenset[str]:
        """Return the fields of `needs` that `prepare` reads; others are computed after it, on its mask."""
        return self.needs

    @property
    def needs_reference(self) -> bool:
        """Return whether the algorithm needs a reference model."""
        return "ref_logps" in self.needs

    @property
    def reads_order(self) -> bool:
        """Return whether it computes over the order of a sequence's tokens (GAE, discounts per token, steps).
        Sessions that branch have no such order, and are refused."""
        return False

    @property
    def uses_demonstrations(self) -> bool:
        """Return whether the algorithm trains on demonstrations, if prompts have them."""
        return self.needs_demonstrations

    @property
    def outputs(self) -> frozenset[str]:
        """Return the `PolicyOutput` fields read besides `logps`: `entropy`, `values`, `kl`, `scores`."""
        return frozenset()

    @property
    def normalizer(self) -> Normalization:
        """Return how token losses are averaged: over all tokens, over each sequence and then over sequences,
        or over sequences times a constant length (Dr.GRPO)."""
        return "token"

    def prepare(self, batch: Batch) -> Batch:
        """Compute `advantages` (and `returns`) of a whole batch, before it is split. It may also narrow the
        mask; removed tokens are excluded from all averages."""
        return batch

    @abstractmethod
    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        """Return the unreduced loss of a (micro-)batch: [T], [N] or [P], by `unit`."""

    def acts_on(self, batch: Batch) -> torch.Tensor:
        """Return the masked-in tokens of a prepared batch whose loss may have a gradient, [T] bool. Sequences
        without such tokens are not trained on, and at most used for metrics. They must not contribute to the
        loss, nor may the loss of other sequences depend on them."""
        return batch.mask

    def pairs(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sequence indices of the pairs of a loss of unit `pair`: ([P], [P]). Both sequences of a
        pair are in the same group, so splits that keep groups whole preserve pairs."""
        return batch.pairs()

    def next_state(self, state: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
        """Return the state after a step, e.g. an adaptive KL coefficient. It is `batch.state` of the next
        step and part of checkpoints. metrics: the step's mean metrics."""
        return dict(state)

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        """Return unreduced metrics [T], averaged over masked-in tokens of the batch; NaN: not measured."""
        return {}

    def held_out(self, policy: PolicyOutput, batch: Batch) -> dict[str, torch.Tensor]:
        """Return held-out metrics of offline training besides the loss, logged as `eval/NAME`. Each is a
        vector whose elements (tokens, sequences, pairs or steps) are averaged."""
        return {"nll": -policy.logps[batch.mask]}

    def report(self, batch: Batch) -> dict[str, float]:
        """Return metrics of a whole prepared batch, once per step, e.g. the number of degenerate groups."""
        return {}

    # -- rollouts ----------------------------------------------------------------------------------

    def rollouts(self, num_generations: int, *, progress: float, demonstration: bool) -> Sequence[Rollout]:
        """Return the completions to request for a prompt.

        progress: completed fraction of the run, in [0, 1]. demonstration: whether the prompt has one.
        """
        return (Rollout(),) * num_generations

    def keep_group(self, rewards: Sequence[float]) -> bool:
        """Return whether a scored group is trained on (dynamic sampling). A rejected group is counted and
        replaced by the group of another prompt."""
        return True

    @property
    def hooks(self) -> str:
        """Return the dotted path of the factory of online hooks (`rft/rollout/hooks.py`); empty: none."""
        return ""

    @property
    def refresh_reference(self) -> int:
        """Return the interval, in steps, at which the policy is copied to the reference; 0: never."""
        return 0

    @property
    def reset_optimizer(self) -> bool:
        """Return whether the optimizer starts anew, with empty moments, at each refresh of the reference."""
        return False

    def conflicts(self, num_generations: int) -> list[str]:
        """Return conflicts between settings, each as one sentence with the remedy."""
        return []


def default_of(f: Any) -> Any:
    """Return the default of a dataclass field, from its factory if it has one."""
    return f.default if f.default is not MISSING else f.default_factory()


def required(x: torch.Tensor | None, name: str) -> torch.Tensor:
    """Return `x`. Raises ValueError with the name of the missing field if it is None."""
    if x is None:
        raise ValueError(
            f"{name} is missing; declare it in the `needs` of the algorithm, or list its column under "
            "data.numbers"
        )
    return x


def column(batch: Batch, name: str) -> torch.Tensor:
    """Return a column of the batch. Raises ValueError with its name if it is missing."""
    return required(batch.columns.get(name), f'columns["{name}"]')
