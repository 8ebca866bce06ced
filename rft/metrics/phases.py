"""The parts of a step as they begin and end: for `events.jsonl` and for the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rft.metrics.log import RunLog
from rft.metrics.progress import Progress


@dataclass(frozen=True)
class Phases:
    """`with phases("train", step): ...` writes `phase/started` and, unless it raises, `phase/ended`."""

    log: RunLog
    progress: Progress

    @contextmanager
    def __call__(self, name: str, step: int) -> Iterator[None]:
        self.progress.phase(name, 0, 1)
        self.log.event("phase/started", phase=name, step=step)
        begin = time.perf_counter()
        yield
        self.log.event("phase/ended", phase=name, step=step, seconds=round(time.perf_counter() - begin, 4))
