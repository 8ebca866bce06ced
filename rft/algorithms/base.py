"""The base of all algorithms: a frozen dataclass whose fields are its config and whose methods are its math.

The learner runs the model, hands the algorithm what it computed (`PolicyOutput`) and the `Batch`,
and gets back an unreduced loss. Reduction is the learner's: it weighs every unit of the loss by its
share of the *whole* batch before splitting, so micro-batches, packing and data parallelism cannot
change a gradient. What only a few algorithms do besides (a critic, a reward head, other embeddings, a second
model) is in `extras`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

from torch import Tensor

from rft.batch import Batch

Normalization = Literal["token", "sequence", "constant"]
Unit = Literal["token", "sequence", "pair"]
DataKind = Literal["sft", "preference", "pairwise", "unpaired", "ranked", "scored", "steps"]


@dataclass(frozen=True)
class PolicyOutput:
    """Outputs of the current policy for a batch, with gradient.

    logps: [T] float32, log-prob of `batch.tokens[t]`; 0 where the mask is False.
    entropy, values, kl: [T] float32, present when the algorithm's `outputs` names them: the
        policy's entropy (without gradient), the critic's value, the full-vocabulary divergence to the
        reference.
    end_values: [T] float32, where it is asked for: at the last token of a sequence that ran into the length
        limit, the critic's value of the state after it; 0 elsewhere.
    scores: [T, K] float32, the K outputs of a reward head that has read token t (and not, as a value,
        the tokens before it); present when `outputs` names it, for reward models.
    """

    logps: Tensor
    entropy: Tensor | None = None
    values: Tensor | None = None
    kl: Tensor | None = None
    scores: Tensor | None = None
    end_values: Tensor | None = None


@dataclass(frozen=True)
class Rollout:
    """A request for one completion of a prompt. The rollout carries it out.

    greedy: the most likely token every time, instead of sampling.
    train: False for a completion that only serves as a baseline: it is scored, but takes no part in
        the batch; its reward stands in `columns["baseline"]` [N] of the others of its group.
    prefix_share: the share of a demonstration's tokens that the completion starts with; the policy
        goes on from there, with at least two tokens left to it. 1: the whole demonstration, nothing is
        sampled. Given tokens are marked in `Batch.demonstrated`, and in the mask. Of several demonstrations
        each completion gets one at random.
    prefix_least: where given, the share is drawn for each completion, uniformly between this and
        `prefix_share`. Draws depend on the prompt's seed alone.
    mixture: the sampling distribution is policy^(1 - mixture) * reference^mixture, per token.
    role: "observer" samples after the prompt and the answer of the "pioneer" before it in the plan;
        `columns["observer"]` [N] is 1 for observers, and `columns["pair"]` [N] counts the pairs of a group.
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
    """A dataclass field with a one-line description and an optional range, checked at construction (as are
    the choices of a `Literal`)."""
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
    """The values that the fields annotated as a `Literal` may have."""
    hints = get_type_hints(kind)
    return {f.name: get_args(hints[f.name]) for f in fields(kind) if get_origin(hints[f.name]) is Literal}


@dataclass(frozen=True)
class Algorithm(ABC):
    """Base of all algorithms. Subclasses are frozen dataclasses with a `loss`.

    Class attributes:
        online: True if it trains on completions that the policy samples during the run.
        unit: what one element of `loss` belongs to: a token ([T]), a sequence ([N]), a pair ([P]).
        min_generations: the smallest group that makes sense.
        needs_demonstrations: True if prompts must come with a demonstrated completion.
        on_policy: True if a batch may be stepped on only once.
        data: offline, the kind of groups it trains on, a `kind` of `rft.data.load_groups`.
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
        """Batch fields to fill in before the step: of `old_logps`, `ref_logps`, `old_entropy`,
        `values`, `end_values`, `rewards`. `old_logps` is only computed where a batch is stepped on several
        times."""
        return frozenset()

    @property
    def prescored(self) -> bool:
        """Whether `prepare` reads `old_logps`: they are then computed for every batch, even where it is
        stepped on once and `old_logps_or` would do for the loss."""
        return False

    @property
    def before_prepare(self) -> frozenset[str]:
        """Those of `needs` that `prepare` reads. The others are computed after it, for what it leaves in the
        mask."""
        return self.needs

    @property
    def needs_reference(self) -> bool:
        """Whether a reference model is kept."""
        return "ref_logps" in self.needs

    @property
    def uses_demonstrations(self) -> bool:
        """Whether demonstrated completions take part, where prompts have them."""
        return self.needs_demonstrations

    @property
    def outputs(self) -> frozenset[str]:
        """`PolicyOutput` fields that the loss reads beside `logps`: `entropy`, `values`, `kl`, `scores`."""
        return frozenset()

    @property
    def normalizer(self) -> Normalization:
        """How token losses are averaged: over all tokens, over each sequence and then over sequences,
        or over sequences times a constant length (Dr.GRPO)."""
        return "token"

    def prepare(self, batch: Batch) -> Batch:
        """Fill in `advantages` (and `returns`) of a whole batch, before it is split. It may narrow the
        mask too: tokens left out then count nowhere, in no average either."""
        return batch

    @abstractmethod
    def loss(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        """The unreduced loss of a (micro-)batch: [T], [N] or [P], by `unit`."""

    def acts_on(self, batch: Batch) -> Tensor:
        """[T] bool: the masked-in tokens of a prepared batch at which the loss can have a gradient, for some
        policy. Sequences without one are not trained on: at most, they are measured. They must add nothing to
        the loss, and the loss of the others must be the same without them."""
        return batch.mask

    def pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """([P], [P]): sequence indices of the pairs that a loss of unit `pair` is about. Pairs lie
        within groups, so they survive any split that keeps groups whole."""
        return batch.pairs()

    def next_state(self, state: Mapping[str, float], metrics: Mapping[str, float]) -> dict[str, float]:
        """The numbers that live from step to step (an adaptive KL coefficient): they reach the next
        step's batch as `batch.state` and are part of a checkpoint. `metrics` are the step's means."""
        return dict(state)

    def metrics(self, policy: PolicyOutput, batch: Batch) -> dict[str, Tensor]:
        """Unreduced diagnostics [T], averaged over masked-in tokens of the whole batch; NaN: not measured."""
        return {}

    def held_out(self, policy: PolicyOutput, batch: Batch) -> dict[str, Tensor]:
        """Offline: what is measured on held-out data beside the loss, each a vector whose elements are
        averaged (over tokens, sequences, pairs or steps, whichever it is about): `eval/NAME`."""
        return {"nll": -policy.logps[batch.mask]}

    def report(self, batch: Batch) -> dict[str, float]:
        """Numbers about a whole prepared batch, once a step (how many groups carry no gradient)."""
        return {}

    # -- what rollouts ask -------------------------------------------------------------------------

    def rollouts(self, num_generations: int, *, progress: float, demonstration: bool) -> Sequence[Rollout]:
        """The completions to get for one prompt. `progress` in [0, 1] is the share of the run that is
        done; `demonstration` says whether this prompt has one."""
        return (Rollout(),) * num_generations

    def keep_group(self, rewards: Sequence[float]) -> bool:
        """Whether a scored group enters the step. A group that does not is dropped, counted, and
        another prompt is sampled in its place (dynamic sampling)."""
        return True

    @property
    def hooks(self) -> str:
        """Dotted path of the function that makes the algorithm's hooks of the online loop
        (`rft/rollout/hooks.py`). Empty: it needs none."""
        return ""

    @property
    def refresh_reference(self) -> int:
        """The reference becomes a copy of the policy every so many steps. 0: it stays as it was."""
        return 0

    def conflicts(self, num_generations: int) -> list[str]:
        """Settings that do not go together, each as one sentence that says what to write instead."""
        return []


def default_of(f: Any) -> Any:
    """The default of a dataclass field, made if it has a factory."""
    return f.default if f.default is not MISSING else f.default_factory()


def required(x: Tensor | None, name: str) -> Tensor:
    """`x`, or a ValueError that names what the batch or the policy output lacks."""
    if x is None:
        raise ValueError(f"the algorithm needs {name}, and it was not filled in")
    return x


def column(batch: Batch, name: str) -> Tensor:
    """A column of the batch, or a ValueError that names it."""
    return required(batch.columns.get(name), f'columns["{name}"]')
