"""`rft sample`: sample K completions of each prompt, and keep the best or the right ones as demonstrations.

The sampling, the folder and going on after a stop are those of `rft collect`; `samples.jsonl` is written from
its sessions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

from rft.config.schema import Config
from rft.errors import ConfigError
from rft.metrics.log import iterate_jsonl
from rft.tools.collect import SESSIONS, Arguments, Say, collect
from rft.utils.files import write_atomic
from rft.utils.signals import StopRequests

SAMPLES = "samples.jsonl"
Keep = Literal["best", "success", "all"]


@dataclass(frozen=True)
class Sampled:
    """A finished file of samples."""

    file: Path
    prompts: int
    solved: int  # prompts with a completion that the rewards judge correct
    kept: int

    def __str__(self) -> str:
        return f"{self.file}: completions kept: {self.kept}; {self.solved} of {self.prompts} prompts solved"


def sample(
    config: Config,
    out: Path,
    arguments: Arguments,
    keep: Keep,
    at_least: float | None,
    signals: StopRequests,
    say: Say,
) -> Sampled:
    """Sample into a folder: OUT/sessions has the sessions, OUT/samples.jsonl the completions kept.

    keep: best (the one of highest reward of each prompt: best-of-K, one round of RAFT offline), success
    (rejection sampling: all that the rewards judge correct), or all. at_least: lowest reward that is kept.
    Raises ConfigError, and RunStopped on a stop signal, as `collect`.
    """
    if config.environments:
        raise ConfigError(
            ["rft sample: sessions in an environment are not single completions; use rft collect, and train "
             "on them by data.sessions"]
        )  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    sessions = out / "sessions"
    solved = collect(config, sessions, arguments, signals, say).solved
    prompts, kept = 0, 0
    with write_atomic(out / SAMPLES) as temporary, temporary.open("w", encoding="utf-8") as file:
        lines = iterate_jsonl(sessions / SESSIONS)
        for _, group in groupby(lines, key=lambda line: line["prompt_id"]):
            prompts += 1
            for row in kept_rows(list(group), keep, at_least):
                file.write(json.dumps(row, ensure_ascii=False, default=str) + "\n")
                kept += 1
    return Sampled(out / SAMPLES, prompts, solved, kept)


def kept_rows(sessions: list[dict[str, Any]], keep: Keep, at_least: float | None) -> Iterator[dict[str, Any]]:
    """Yield the rows of one prompt: its columns with `completion`, `reward` and `scores`."""
    judged = [s for s in sessions if s["reward"] is not None]
    judged = [s for s in judged if at_least is None or s["reward"] >= at_least]
    if keep == "best":
        judged = sorted(judged, key=lambda s: -s["reward"])[:1]  # the first of equally good ones
    elif keep == "success":
        judged = [s for s in judged if s["success"]]
    for s in judged:
        text = s["messages"][-1]["content"]
        completion = text if isinstance(s["row"]["prompt"], str) else [{"role": "assistant", "content": text}]
        yield {**s["row"], "completion": completion, "reward": s["reward"], "scores": s["scores"]}
