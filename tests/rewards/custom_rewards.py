"""Rewards as users write them, good and bad, for the tests of the worker pool."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from typing import Any


def length(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(c)) for c in completions]


def with_columns(prompts: list[Any], completions: list[Any], answer: list[str]) -> list[float | None]:
    return [None if a == "skip" else float(c == a) for c, a in zip(completions, answer, strict=True)]


def with_option(completions: list[str], factor: float = 1.0, **kwargs: Any) -> list[float]:
    return [factor] * len(completions)


async def in_time(completions: list[str], **kwargs: Any) -> list[float]:
    import asyncio

    await asyncio.sleep(0.01)
    return [1.0] * len(completions)


def ends_a_program(completions: list[str], **kwargs: Any) -> list[float]:
    """Whether a program ends on the signal that the completion names."""
    rewards = []
    for name in completions:
        program = subprocess.Popen(["sleep", "30"])
        program.send_signal(signal.Signals[name])
        try:
            rewards.append(float(program.wait(5) == -signal.Signals[name]))
        except subprocess.TimeoutExpired:
            program.kill()
            rewards.append(0.0)
    return rewards


class Counter:
    """A reward with state, made once per worker."""

    def __init__(self, start: int = 0) -> None:
        self.count = start

    def __call__(self, completions: list[str], **kwargs: Any) -> list[float]:
        self.count += len(completions)
        return [float(self.count)] * len(completions)


def hangs(completions: list[str], **kwargs: Any) -> list[float]:
    if "hang" in completions:
        subprocess.Popen(["sleep", "987.65"], start_new_session=True)
        time.sleep(1000)
    return [1.0] * len(completions)


def hangs_in_c(completions: list[str], **kwargs: Any) -> list[float]:
    """A regular expression that backtracks forever while it holds the interpreter lock."""
    import re

    if "hang" in completions:
        re.fullmatch(r"(a+)+b", "a" * 60)
    return [1.0] * len(completions)


def raises(completions: list[str], **kwargs: Any) -> list[float]:
    if "bad" in completions:
        raise KeyError("the missing key")
    return [1.0] * len(completions)


def crashes(completions: list[str], **kwargs: Any) -> list[float]:
    if "bad" in completions:
        os.kill(os.getpid(), signal.SIGSEGV)
    return [1.0] * len(completions)


def exits(completions: list[str], **kwargs: Any) -> list[float]:
    if "bad" in completions:
        sys.exit(3)
    return [1.0] * len(completions)


def too_few(completions: list[str], **kwargs: Any) -> list[float]:
    return [1.0] * (len(completions) - 1)


def not_a_list(completions: list[str], **kwargs: Any) -> float:
    return 1.0


def garbage(completions: list[str], **kwargs: Any) -> list[Any]:
    values = {
        "nan": float("nan"),
        "inf": float("inf"),
        "text": "1.0",
        "list": [1],
        "none": None,
        "bool": True,
    }
    return [values.get(c, 0.5) for c in completions]


def pid(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(os.getpid())] * len(completions)


def slow(completions: list[str], **kwargs: Any) -> list[float]:
    time.sleep(0.4)
    return [1.0] * len(completions)


def torch_loaded(completions: list[str], **kwargs: Any) -> list[float]:
    return [float("torch" in sys.modules)] * len(completions)


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: Any = None
) -> dict[str, float]:
    """verl's signature."""
    return {"score": float(solution_str == ground_truth), "length": len(solution_str)}


def _daemon(seconds: str = "987.65") -> None:
    """Start a process that leaves the worker's session and parent."""
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            os.execvp("sleep", ["sleep", seconds])
        os._exit(0)


def daemonises(completions: list[str], **kwargs: Any) -> list[float]:
    """Leaves a daemon; on "crash", "exit" and "kill" the worker ends after that."""
    _daemon()
    time.sleep(0.2)
    if "crash" in completions:
        ctypes.string_at(0)
    if "exit" in completions:
        os._exit(0)
    if "kill" in completions:
        os.kill(os.getpid(), signal.SIGKILL)
    return [1.0] * len(completions)


HELD: list[bytearray] = []


def holds_memory(completions: list[str], **kwargs: Any) -> list[float]:
    """Holds so many MiB, itself or in a child."""
    for completion in completions:
        where, _, mib = completion.partition(" ")
        if where == "child" and os.fork() != 0:
            time.sleep(60)
        HELD.append(bytearray(b"x") * (int(mib) << 20))
        time.sleep(60 if int(mib) > 500 else 0)
    return [1.0] * len(completions)
