"""Check the shape that docs/architecture.md promises: counted reading lists, steps that stay on them,
one import graph over every file."""

from __future__ import annotations

import asyncio
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Any

import grimp
import pytest

from rft.config.load import parse_config
from rft.loops.offline import train_offline
from rft.loops.online import Controller, Parts
from rft.metrics import Progress, RunLog
from rft.plan import OfflinePlan, OnlinePlan, make_plan
from rft.rollout.pool import Member, Replica
from rft.run_dir import RunFolder
from rft.sync.channel import WeightChannel
from tests.in_process import InProcessLearner
from tests.simulated import Handle, SimPool, SimRewards, alternating

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
LIMITS = {"online": (25, 5000), "offline": (20, 4000)}  # files, lines


@dataclass(frozen=True)
class ReadingList:
    """The files of one path of docs/architecture.md, with the line counts given there."""

    lines: dict[str, int]
    total_files: int
    total_lines: int


def reading_list(path: str) -> ReadingList:
    section = PAGE.split(f"<!-- reading list: {path} -->")[1].split("<!-- end -->")[0]
    rows = re.findall(r"^\| *\d+ *\| *`(rft/[\w/]+\.py)` *\| *([\d,]+) *\|", section, re.MULTILINE)
    files, lines = re.search(r"\*\*([\d,]+) files, ([\d,]+) lines\*\*", section).groups()  # type: ignore[union-attr]
    number = lambda text: int(text.replace(",", ""))  # noqa: E731
    return ReadingList({name: number(count) for name, count in rows}, number(files), number(lines))


def black_boxes() -> dict[str, list[str]]:
    """Name -> file patterns."""
    section = PAGE.split("<!-- black boxes -->")[1].split("<!-- end -->")[0]
    rows = re.findall(r"^\| *([\w ,/-]+?) *\| *((?:`rft/[\w/*.]+`(?:, )?)+) *\|", section, re.MULTILINE)
    return {name: re.findall(r"`(rft/[\w/*.]+)`", patterns) for name, patterns in rows}


@pytest.mark.parametrize("path", LIMITS)
def test_the_reading_list_is_counted(path: str) -> None:
    listed = reading_list(path)
    counted = {name: len((ROOT / name).read_text(encoding="utf-8").splitlines()) for name in listed.lines}
    assert listed.lines == counted
    assert (listed.total_files, listed.total_lines) == (len(counted), sum(counted.values()))
    files, lines = LIMITS[path]
    assert listed.total_files <= files and listed.total_lines <= lines


def test_the_readme_counts_as_the_reading_list_does() -> None:
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    match = re.search(r"in (\d+) files with fewer than ([\d,]+) lines", text)
    assert match is not None
    listed = reading_list("online")
    assert int(match[1]) == listed.total_files and listed.total_lines < int(match[2].replace(",", ""))


@contextmanager
def executed_files() -> Iterator[set[str]]:
    """The files of rft whose functions run in the block, in any thread; importing a module does not count."""
    files: set[str] = set()
    prefix = f"{ROOT}/"

    def record(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(f"{prefix}rft/") and code.co_name != "<module>":
            files.add(code.co_filename.removeprefix(prefix))

    before = sys.getprofile()
    threading.setprofile(record)
    sys.setprofile(record)
    try:
        yield files
    finally:
        sys.setprofile(before)
        threading.setprofile(None)


class InProcessPool(SimPool):
    """The real pool and the real replicas with the hf engine, in this process."""

    async def _start(self, index: int) -> None:
        replica = Replica(self.spec, index)
        await replica.start()
        self.members[index] = Member(Handle(replica), next(self._serials))


def online_step(folder: Path) -> set[str]:
    """Sample, score, train on and push one step; returns the files that ran."""
    plan = make_plan(
        parse_config(
            {
                "name": "run",
                "output_dir": str(folder),
                "algorithm": "grpo",
                "data": {"kind": "arithmetic", "limit": 64},
                "rewards": [{"function": "math"}],
                "train": {"steps": 1, "batch_size": 2, "num_generations": 2},
                "rollout": {"engine": "hf", "sampling": {"max_completion_length": 16}},
                "sync": {"transport": "file", "timeout_s": 60},
                "learner": {"threads": 1},
                "eval": {"every": 0},
                "checkpoint": {"every": 0},
                "tracking": {"display": "off", "trackers": []},
            }
        )
    )
    assert isinstance(plan, OnlinePlan)
    config = plan.config
    learner = InProcessLearner(plan.learner_spec(), plan.channel_spec())
    pool = InProcessPool(plan.engine_spec())
    log = RunLog(config.run_dir, 1, config.tracking, config=config.to_dict())
    rewards = SimRewards(config.rewards, folder)
    rewards.judge = alternating
    with Progress(1, config.name, display="off") as progress:
        channel = WeightChannel(learner, pool, plan.channel_spec(), "keep")
        parts = Parts(learner, pool, channel, rewards, log, progress)

        async def run() -> set[str]:
            await pool.start()
            with executed_files() as files:
                await Controller(plan, parts, folder / "checkpoints").run(None)
            return files

        files = asyncio.run(run())
    log.close("done")
    return files


def offline_step(folder: Path) -> set[str]:
    """Train on one batch of preference pairs; returns the files that ran."""
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "1+1=", "chosen": "2", "rejected": "3"}\n' * 8)
    plan = make_plan(
        parse_config(
            {
                "output_dir": str(folder),
                "algorithm": "dpo",
                "data": {"path": str(rows), "chat_template": "never"},
                "train": {"steps": 1, "batch_size": 2},
                "learner": {"threads": 1},
                "eval": {"every": 0},
                "checkpoint": {"every": 0},
                "tracking": {"display": "off", "trackers": []},
            }
        )
    )
    assert isinstance(plan, OfflinePlan)
    config = plan.config
    learner = InProcessLearner(plan.learner_spec(), plan.channel_spec())
    log = RunLog(config.run_dir, 1, config.tracking)
    with Progress(1, config.name, display="off") as progress:
        run = train_offline(
            plan, RunFolder(config.run_dir, None), learner, progress, log, asyncio.Event(), None
        )
        with executed_files() as files:
            asyncio.run(run)
    log.close("done")
    return files


@pytest.mark.timeout(120)
@pytest.mark.parametrize(("path", "step"), [("online", online_step), ("offline", offline_step)])
def test_a_step_runs_through_listed_files_and_named_black_boxes_only(
    path: str, step: Callable[[Path], set[str]], tmp_path: Path
) -> None:
    files = step(tmp_path)
    allowed = [*reading_list(path).lines, *(pattern for box in black_boxes().values() for pattern in box)]
    unlisted = sorted(name for name in files if not any(fnmatch(name, pattern) for pattern in allowed))
    assert not unlisted, f"name these in docs/architecture.md, or keep them off the path: {unlisted}"
    assert "rft/learner/learner.py" in files and "rft/algorithms/base.py" in files


def test_the_import_graph_holds_every_file() -> None:
    """A file that the graph does not hold is under no contract (rft/kernels has no __init__.py)."""
    graph = grimp.build_graph("rft", "rft.kernels", cache_dir=None)
    files = {
        str(path.relative_to(ROOT).with_suffix("")).replace("/", ".").removesuffix(".__init__")
        for path in (ROOT / "rft").rglob("*.py")
    }
    assert files <= graph.modules
    assert not (ROOT / "rft" / "kernels" / "__init__.py").exists()


def test_the_top_of_the_package_is_small() -> None:
    top = sorted(path.name for path in (ROOT / "rft").glob("*.py"))
    assert len(top) <= 12, top
    assert not list((ROOT / "rft").rglob("train.py")), "rft.train is the function"
