"""Abilities that few algorithms have. Each is a protocol, or a base class; whoever serves it asks by
`isinstance`, or by the function beside it, which also answers for all other algorithms."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

from torch import Tensor

from rft.algorithms.base import Algorithm
from rft.batch import Batch, Group

# -- in the forward ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadsDistributions(Algorithm):
    """Where `outputs` names `kl`, the loss reads a function of whole next-token distributions."""

    @abstractmethod
    def divergence(self, logps: Tensor, reference: Tensor) -> Tensor:
        """`PolicyOutput.kl`: a divergence of two next-token distributions, given as log-probs over the
        vocabulary, [..., V] each: [...]."""

    @property
    def known_divergence(self) -> tuple[Literal["reverse", "forward", "js"], float] | None:
        """The direction and the beta by which `rft.kernels.divergence` computes the same as `divergence`,
        without the vocabulary's distributions in memory; None where it has none."""
        return None

    @property
    def compares_distributions(self) -> bool:
        """Whether `divergence` reads the reference's distribution, for which that model runs beside the
        policy. False: `kl` is a function of the policy's alone."""
        return "kl" in self.outputs

    @property
    def needs_reference(self) -> bool:
        return super().needs_reference or self.compares_distributions


def compares_distributions(algorithm: Algorithm) -> bool:
    """Whether the reference runs beside the policy in each forward."""
    return isinstance(algorithm, ReadsDistributions) and algorithm.compares_distributions


@runtime_checkable
class ChangesEmbeddings(Protocol):
    """The model reads other embeddings than the tokens' in training."""

    def embed(self, embeddings: Tensor, batch: Batch, expected: Callable[[], Tensor]) -> Tensor:
        """What the model reads in place of `embeddings`, [T, H]. `expected()`, at the price of a forward, is
        [T, H] without gradient: at each token the mean embedding under the policy's prediction there (the
        token's own embedding where nothing predicts it)."""


@runtime_checkable
class TrainsCritic(Protocol):
    """The critic, for an algorithm that reads `values`: without these members a head on the policy's trunk,
    which learns as fast as the policy."""

    @property
    def separate_critic(self) -> bool:
        """Whether the critic is another model, instead of a head on the policy's trunk."""

    @property
    def critic_rate(self) -> float:
        """The critic's learning rate over the policy's."""

    def critic_only(self, state: Mapping[str, float]) -> bool:
        """Whether a step with this `Batch.state` trains the critic and nothing else."""


def separate_critic(algorithm: Algorithm) -> bool:
    """Whether the critic, where there is one, is another model."""
    return isinstance(algorithm, TrainsCritic) and algorithm.separate_critic


def critic_only(algorithm: Algorithm, state: Mapping[str, float]) -> bool:
    """Whether a step with this `Batch.state` leaves the policy as it is."""
    return isinstance(algorithm, TrainsCritic) and algorithm.critic_only(state)


@runtime_checkable
class TrainsScoreHead(Protocol):
    """A reward model is trained: a head that scores instead of one that predicts tokens."""

    @property
    def score_heads(self) -> int:
        """K of `PolicyOutput.scores`: how many numbers the head gives."""


def score_heads(algorithm: Algorithm) -> int:
    """How many numbers the reward head gives; 0: there is none."""
    return algorithm.score_heads if isinstance(algorithm, TrainsScoreHead) else 0


# -- in the data ---------------------------------------------------------------------------------------


@runtime_checkable
class ArrangesGroups(Protocol):
    """The groups of an offline step are rearranged before they are laid out as a batch."""

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """The groups of one step."""


def arrange(algorithm: Algorithm, groups: Sequence[Group]) -> list[Group]:
    """The groups of one offline step, as the algorithm wants them laid out."""
    return algorithm.arrange(groups) if isinstance(algorithm, ArrangesGroups) else list(groups)


@dataclass(frozen=True)
class Steps:
    """How a completion is cut into steps that are valued one by one. The rollout carries it out, and fills in
    `columns["step_ends"]` [N, K] with how many tokens lie before the end of each step, and

    - `columns["step_values"]` [N, K], the mean reward of `branches` continuations from before each step
      (nan before the first one), or, where `branches` is 0,
    - `columns["step_rewards"]` [N, K], the steps' scores from a reward that judges step by step.
    """

    separator: str
    branches: int


@runtime_checkable
class ValuesSteps(Protocol):
    """Completions are cut into steps that are valued one by one."""

    @property
    def steps(self) -> Steps:
        """How they are cut."""


# -- in the models -------------------------------------------------------------------------------------


@runtime_checkable
class TrainsCopies(Protocol):
    """Two copies of the model may be trained, which play two roles."""

    @property
    def copies(self) -> int:
        """How many copies of the model are trained, 1 or 2."""

    def copy_of(self, step: int, *, observer: bool) -> int:
        """Which copy, 0 or 1, plays a role (pioneer or observer) after `step` finished steps."""


def copies(algorithm: Algorithm) -> int:
    """How many copies of the model are trained, 1 or 2."""
    return algorithm.copies if isinstance(algorithm, TrainsCopies) else 1


def copy_of(algorithm: Algorithm, step: int, *, observer: bool) -> int:
    """Which copy plays a role after `step` finished steps; the only one where there is one."""
    return algorithm.copy_of(step, observer=observer) if isinstance(algorithm, TrainsCopies) else 0
