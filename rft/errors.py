"""Faults of a running job, shared by the rollout, the learner and the weight sync."""

from __future__ import annotations


class EngineError(RuntimeError):
    """An engine failed or did not answer in time; the message names the engine and the call."""


class LearnerError(RuntimeError):
    """A fault in training itself: a non-finite gradient, an impossible batch."""


class LogpGapError(RuntimeError):
    """Engine and learner disagree about the log-probs of the same tokens: the push did not arrive."""


class TransferError(RuntimeError):
    """The received weights are not the ones that were sent, or do not fit the engine's."""
