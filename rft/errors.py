"""How a running job ends early: its faults, and a requested stop."""

from __future__ import annotations


class EngineError(RuntimeError):
    """An engine failed or did not answer in time; the message names the engine and the call."""


class LearnerError(RuntimeError):
    """A fault in training itself: a non-finite gradient, an impossible batch."""


class BrokenWeights(LearnerError):
    """The learner's weights are not finite: there is nothing left in it that is worth saving or sending."""


class LogpGapError(RuntimeError):
    """Engine and learner disagree about the log-probs of the same tokens: the push did not arrive."""


class TransferError(RuntimeError):
    """The received weights are not the ones that were sent, or do not fit the engine's."""


class RunStopped(Exception):
    """The run was asked to stop, after `step` finished steps (None: before the first one could begin).
    `stage` is empty for the run itself."""

    def __init__(self, step: int | None, stage: str = "") -> None:
        where = "before the first step" if step is None else f"at step {step}"
        super().__init__(f"stopped {where}{stage and f' of the {stage}'}")
        self.step, self.stage = step, stage
