"""What an algorithm is: a frozen dataclass whose fields are its config and whose methods are its math.

The learner runs the model, hands the algorithm what it computed (`PolicyOutput`) and the `Batch`,
and gets back an unreduced loss. Reduction is the learner's: it weighs every unit of the loss by its
share of the *whole* batch before splitting, so micro-batches, packing and data parallelism cannot
change a gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal

from torch import Tensor

from rft.batch import Batch

Normalization = Literal["token", "sequence", "constant"]
Unit = Literal["token", "sequence", "pair"]


@dataclass(frozen=True)
class PolicyOutput:
    """What the current policy says of a batch, with gradient.

    logps: [T] float32, log-prob of `batch.tokens[t]`; 0 where the mask is False.
    entropy, values, kl: [T] float32, present when the algorithm's `outputs` names them: the
        policy's entropy, the critic's value, the full-vocabulary divergence to the reference.
    """

    logps: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None
    kl: Tensor | None = None


def setting(
    default: Any,
    doc: str,
    *,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """A dataclass field with a one-line description and an optional range, checked at construction."""
    bounds = {k: v for k, v in (("ge", ge), ("gt", gt), ("le", le), ("lt", lt)) if v is not None}
    return field(default=default, metadata={"doc": doc, **bounds})


_CHECKS = {
    "ge": (lambda x, b: x >= b, "at least"),
    "gt": (lambda x, b: x > b, "greater than"),
    "le": (lambda x, b: x <= b, "at most"),
    "lt": (lambda x, b: x < b, "less than"),
}


@dataclass(frozen=True)
class Algorithm(ABC):
    """Base of all algorithms. Subclasses are frozen dataclasses with a `loss`.

    Class attributes:
        online: True if it trains on completions that the policy samples during the run.
        unit: what one element of `loss` belongs to: a token ([T]), a sequence ([N]), a pair ([P]).
        min_generations: the smallest group that makes sense.
        needs_demonstrations: True if prompts must come with a demonstrated completion.
    """

    online: ClassVar[bool] = True
    unit: ClassVar[Unit] = "token"
    min_generations: ClassVar[int] = 1
    needs_demonstrations: ClassVar[bool] = False

    def __post_init__(self) -> None:
        for f in fields(self):
            value = getattr(self, f.name)
            for name, (check, words) in _CHECKS.items():
                bound = f.metadata.get(name)
                if bound is not None and value is not None and not check(value, bound):
                    raise ValueError(f"{f.name} must be {words} {bound}, got {value}")

    @property
    def needs(self) -> frozenset[str]:
        """Batch fields to fill in before the step: of `old_logps`, `ref_logps`, `old_entropy`,
        `values`, `rewards`. `old_logps` is only computed where a batch is stepped on several times."""
        return frozenset()

    @property
    def outputs(self) -> frozenset[str]:
        """`PolicyOutput` fields beyond `logps` that the loss reads: of `entropy`, `values`, `kl`."""
        return frozenset()

    @property
    def normalizer(self) -> Normalization:
        """How token losses are averaged: over all tokens, over each sequence and then over sequences,
        or over sequences times a constant length (Dr.GRPO)."""
        return "token"

    def prepare(self, batch: Batch) -> Batch:
        """Fill in `advantages` (and `returns`) of a whole batch, before it is split."""
        return batch

    @abstractmethod
    def loss(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        """The unreduced loss of a (micro-)batch: [T], [N] or [P], by `unit`."""

    def next_state(self, state: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
        """The numbers that live from step to step (an adaptive KL coefficient): they reach the next
        step's batch as `batch.state` and are part of a checkpoint. `metrics` are the step's means."""
        return dict(state)

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, Tensor]:
        """Unreduced diagnostics [T], averaged over masked-in tokens of the whole batch."""
        return {}


def default_of(f: Any) -> Any:
    """The default of a dataclass field, made if it has a factory."""
    return f.default if f.default is not MISSING else f.default_factory()
