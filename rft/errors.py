"""How a running job ends early: its faults, and a requested stop."""

from __future__ import annotations

import re
from collections.abc import Sequence

_OF_A_PEER = re.compile(
    r"gloo|NCCL|Connection (closed|reset|refused)|Broken pipe|Dist(Backend|Network|Store)?Error"
)
_OF_A_DEVICE = re.compile(r"CUDA error|out of memory|\[Errno \d+\]")


class ConfigError(ValueError):
    """The config is wrong; `problems` lists everything at once."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = list(problems)


class ModelError(ValueError):
    """A model cannot be loaded or used; the message says which and why."""


class EngineError(RuntimeError):
    """An engine failed or did not answer in time; the message names the engine and the call."""


class ReplicasLost(EngineError):
    """Replicas that a push, or forming the channel, has lost, with the reasons. The others hold the pushed
    version, or are paused and take the next push."""

    def __init__(self, lost: dict[int, str]) -> None:
        super().__init__("; ".join(lost.values()))
        self.lost = lost


class LearnerError(RuntimeError):
    """A fault in training itself: a non-finite gradient, an impossible batch."""


class BrokenWeights(LearnerError):
    """The learner's weights are not finite, so they can be neither saved nor sent."""


class LogpGapError(RuntimeError):
    """Engine and learner disagree about the log-probs of the same tokens: the push did not arrive."""


class TransferError(RuntimeError):
    """The received weights are not the ones that were sent, or do not fit the engine's."""


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or cannot be used. The text gives the reason and the remedy."""


class RecordError(ValueError):
    """The record of a step cannot be read: missing, damaged, or written by another version of rft."""


class NoSignal(RuntimeError):
    """Too many groups in a row without a learning signal."""


class CallbackError(RuntimeError):
    """A callback raised an exception, which is its cause; the message names the callback and the step."""


class RunStopped(Exception):
    """The run was asked to stop, after `step` finished steps (None: before the first one could begin).
    `stage` is empty for the run itself."""

    def __init__(self, step: int | None, stage: str = "") -> None:
        where = "before the first step" if step is None else f"at step {step}"
        super().__init__(f"stopped {where}{stage and f' of the {stage}'}")
        self.step, self.stage = step, stage


def lost_a_peer(error: BaseException) -> bool:
    """Return whether a process group reports with this error that another member died or timed out."""
    return bool(_OF_A_PEER.search(f"{type(error).__name__}: {error}"))


def is_engine_fault(error: BaseException) -> bool:
    """Return whether an error on the engine side of a push was caused by its machine, so that a rebuilt
    engine may succeed. Any other error is a programming error."""
    if type(error) is Exception:  # vLLM forwards the text of its processes' errors without the type
        return True
    text = f"{type(error).__name__}: {error}"
    return isinstance(error, OSError) or (
        isinstance(error, RuntimeError)
        and (lost_a_peer(error) or "imed out" in text or bool(_OF_A_DEVICE.search(text)))
    )
