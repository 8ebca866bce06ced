"""Optional features of algorithms, each a protocol or base class.

Callers test for a feature by `isinstance`, or by its helper function, which returns a default for other
algorithms.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import torch

from rft.algorithms.base import Algorithm
from rft.batch import Batch, Group

# -- in the forward ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ReadsDistributions(Algorithm):
    """Algorithm whose `kl` output is a function of full next-token distributions."""

    @abstractmethod
    def divergence(self, logps: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Return `PolicyOutput.kl`, [...], from log-probs over the vocabulary, [..., V] each."""

    @property
    def known_divergence(self) -> tuple[Literal["reverse", "forward", "js"], float] | None:
        """Return (direction, beta) with which a fused kernel computes `divergence`; None: unsupported.

        The kernel, `rft.kernels.divergence`, does not materialise the distributions.
        """
        return None

    @property
    def compares_ranks(self) -> bool:
        """Return whether `divergence` depends on the sorted probabilities only, so that the two may have
        different vocabularies. Its second argument may then be the largest log-probs, sorted, [..., K]."""
        return False

    @property
    def compares_distributions(self) -> bool:
        """Return whether `divergence` reads the reference's distribution, which then runs in each forward.

        False: `kl` depends only on the policy's distribution.
        """
        return "kl" in self.outputs

    @property
    def needs_reference(self) -> bool:
        return super().needs_reference or self.compares_distributions


def compares_distributions(algorithm: Algorithm) -> bool:
    """Return whether the reference runs along with the policy in each forward."""
    return isinstance(algorithm, ReadsDistributions) and algorithm.compares_distributions


@runtime_checkable
class ChangesEmbeddings(Protocol):
    """Algorithm that modifies the input embeddings during training."""

    def embed(
        self, embeddings: torch.Tensor, batch: Batch, expected: Callable[[], torch.Tensor]
    ) -> torch.Tensor:
        """Return the input embeddings [T, H] to use instead of `embeddings` [T, H].

        expected: returns [T, H] without gradient, at the cost of a forward: the mean embedding under the
        policy's prediction of each token (the token's embedding if nothing predicts it).
        """


@runtime_checkable
class TrainsCritic(Protocol):
    """Algorithm that configures the critic of `values`.

    By default, the critic is a head on the policy's trunk, with the policy's learning rate.
    """

    @property
    def separate_critic(self) -> bool:
        """Return whether the critic is a separate model instead of a head on the policy's trunk."""

    @property
    def critic_rate(self) -> float:
        """Return the critic's learning rate, relative to the policy's."""

    def critic_only(self, state: Mapping[str, float]) -> bool:
        """Return whether a step with this `Batch.state` trains only the critic."""


def separate_critic(algorithm: Algorithm) -> bool:
    """Return whether the critic, if any, is a separate model."""
    return isinstance(algorithm, TrainsCritic) and algorithm.separate_critic


def critic_only(algorithm: Algorithm, state: Mapping[str, float]) -> bool:
    """Return whether a step with this `Batch.state` leaves the policy unchanged."""
    return isinstance(algorithm, TrainsCritic) and algorithm.critic_only(state)


@runtime_checkable
class TrainsScoreHead(Protocol):
    """Algorithm that trains a reward model, with a score head instead of the LM head."""

    @property
    def score_heads(self) -> int:
        """Return the number of outputs of the head, K of `PolicyOutput.scores`."""


def score_heads(algorithm: Algorithm) -> int:
    """Return the number of outputs of the score head; 0: no score head."""
    return algorithm.score_heads if isinstance(algorithm, TrainsScoreHead) else 0


# -- in the data ---------------------------------------------------------------------------------------


@runtime_checkable
class ArrangesGroups(Protocol):
    """Algorithm that rearranges the groups of an offline step before batching."""

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """Return the rearranged groups of one step."""


def arrange(algorithm: Algorithm, groups: Sequence[Group]) -> list[Group]:
    """Return the groups of one offline step, rearranged by the algorithm."""
    return algorithm.arrange(groups) if isinstance(algorithm, ArrangesGroups) else list(groups)


@runtime_checkable
class ComparesRows(Protocol):
    """Algorithm that says itself whether a row's loss depends on other rows."""

    @property
    def compares_rows(self) -> bool:
        """Return whether it does, with these settings."""


def compares_rows(algorithm: Algorithm) -> bool:
    """Return whether a row's loss may depend on other rows: those of its batch, or earlier ones through the
    state. Assumed of algorithms that prepare whole batches or have a state, unless they say otherwise."""
    if isinstance(algorithm, ComparesRows):
        return algorithm.compares_rows
    kind = type(algorithm)
    return kind.prepare is not Algorithm.prepare or kind.next_state is not Algorithm.next_state


@runtime_checkable
class ReadsStart(Protocol):
    """Algorithm that reads log-probs of the model that the run starts from, besides those of the reference.

    The offline loop computes them before the first step: `columns["start_logps"]` [N, L], the log-probs of
    the masked-in tokens of each sequence in order, padded with nan.
    """

    @property
    def reads_start(self) -> bool:
        """Return whether it does, with these settings."""


def reads_start(algorithm: Algorithm) -> bool:
    """Return whether the algorithm reads log-probs of the model that the run starts from."""
    return isinstance(algorithm, ReadsStart) and algorithm.reads_start


@dataclass(frozen=True)
class Steps:
    """Split of completions into individually valued steps.

    The rollout fills in `columns["step_ends"]` [N, K], the number of tokens up to the end of each step, and

    - `columns["step_values"]` [N, K], the mean reward of `branches` continuations from the start of each step
      (nan for the first), or, if `branches` is 0,
    - `columns["step_rewards"]` [N, K], the scores of a reward that scores each step.

    With `pairs`, the best and the worst continuation of the start of a step join the group if their rewards
    differ. They have the start as demonstrated tokens that are masked out, and its number, from 1, in
    `columns["prefix"]` [N]; the group's other completions have nan there.
    """

    separator: str
    branches: int
    pairs: bool = False


@runtime_checkable
class ValuesSteps(Protocol):
    """Algorithm that assigns values to the steps of completions."""

    @property
    def steps(self) -> Steps:
        """Return the split of completions into steps."""


# -- in the models -------------------------------------------------------------------------------------


@runtime_checkable
class TrainsCopies(Protocol):
    """Algorithm that may train two copies of the model, in two roles."""

    @property
    def copies(self) -> int:
        """Return the number of trained copies of the model, 1 or 2."""

    def copy_of(self, step: int, *, observer: bool) -> int:
        """Return the copy, 0 or 1, in a role (pioneer or observer) after `step` finished steps."""


def copies(algorithm: Algorithm) -> int:
    """Return the number of trained copies of the model, 1 or 2."""
    return algorithm.copies if isinstance(algorithm, TrainsCopies) else 1


def copy_of(algorithm: Algorithm, step: int, *, observer: bool) -> int:
    """Return the copy in a role after `step` finished steps; 0 if there is only one copy."""
    return algorithm.copy_of(step, observer=observer) if isinstance(algorithm, TrainsCopies) else 0
