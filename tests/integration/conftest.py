"""Real actors, real engines: a rollout pool and a learner joined by the real weight channel."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from rft.config.load import parse_config
from rft.plan import make_plan
from rft.run_training import make_channel, make_pool, start_engines, start_learner
from rft.sync.channel import WeightChannel
from rft.sync.ipc import ColocatedChannel

ROOT = Path(__file__).parent.parent.parent
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@dataclass
class Stage:
    """A loop of its own, so that one engine serves a whole module of tests."""

    loop: asyncio.AbstractEventLoop
    plan: Any
    pool: Any
    learner: Any
    channel: WeightChannel

    def run(self, awaitable: Any) -> Any:
        return self.loop.run_until_complete(awaitable)


def raise_stage(
    tiny_folder: Path,
    engine: str,
    replicas: int = 1,
    more: dict[str, Any] | None = None,
    update: str = "keep",
    in_turn: bool = False,
    nccl_on_cpu: str | None = None,
) -> Stage:
    """`in_turn`: learner and engine act as if they shared one device, on a machine that has none to share.
    `nccl_on_cpu`: a transport between GPUs, with what stands in for NCCL (tests/sync/nccl_on_cpu.py)."""
    plan = make_plan(
        parse_config(
            {
                "algorithm": "grpo",
                "model": {"path": str(tiny_folder)},
                "data": {"kind": "arithmetic", "limit": 64},
                "rewards": [{"function": "math"}],
                "train": {"batch_size": 4, "num_generations": 4},
                "rollout": {
                    "engine": engine,
                    "replicas": replicas,
                    "update": update,
                    "threads": 1,
                    "kv_cache_gib": 0.1,
                    "sampling": {"max_prompt_length": 400, "max_completion_length": 48},
                },
                "learner": {"learning_rate": 1e-2, "threads": 1},
                "eval": {"every": 0},
                "sync": {"measure_changes": "overall"},
                **(more or {}),
            }
        )
    )
    loop = asyncio.new_event_loop()
    if nccl_on_cpu is not None:  # the preflight refuses it on a machine without GPUs
        plan = dataclasses.replace(plan, transport=nccl_on_cpu)
    pool = make_pool(plan)
    learner = start_learner(plan, plan.learner_spec())
    channel = make_channel(plan, learner, pool)
    if nccl_on_cpu is not None:
        stand_in(learner, pool)
    if in_turn:
        pool.spec = dataclasses.replace(pool.spec, sleeps=True)
        how = (plan.channel_spec(), plan.config.rollout.update, plan.proof_spec())
        channel = ColocatedChannel(learner, pool, *how)
    loop.run_until_complete(start_engines(channel, pool))
    loop.run_until_complete(channel.connect())
    loop.run_until_complete(channel.push(0))
    return Stage(loop, plan, pool, learner, channel)


def stand_in(learner: Any, pool: Any) -> None:
    """For NCCL, in the learner's process and in those of the engines' workers."""
    import ray

    args = {"worker_extension_cls": "tests.sync.nccl_worker.Extension"}
    pool.spec = dataclasses.replace(pool.spec, engine_args={**pool.spec.engine_args, **args})

    def in_learner(actor: Any) -> None:
        from tests.sync import nccl_on_cpu

        nccl_on_cpu.install()

    ray.get([actor.__ray_call__.remote(in_learner) for actor in learner._actors])


def with_transport(stage: Stage, transport: str, folder: str | None = None) -> Stage:
    """The same engines with a new learner that sends over another transport. Not connected yet."""
    folder = folder if transport == "file" else None
    sync = stage.plan.config.sync.model_copy(update={"transport": transport, "folder": folder})
    config = stage.plan.config.model_copy(update={"sync": sync})
    plan = dataclasses.replace(stage.plan, config=config, transport=transport)
    learner = start_learner(plan, plan.learner_spec())
    channel = WeightChannel(learner, stage.pool, plan.channel_spec(), "keep", plan.proof_spec())
    return Stage(stage.loop, plan, stage.pool, learner, channel)


@pytest.fixture(scope="module")
def vllm_stage(ray_here: None, tiny_folder: Path) -> Iterator[Stage]:
    stage = raise_stage(tiny_folder, "vllm")
    yield stage
    stage.run(stage.pool.close())


def rft(
    *args: str,
    timeout: float = 240,
    check: bool = True,
    mark: str | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does; `mark` is for `processes_of` to find what it leaves behind."""
    marked = {} if mark is None else {"RFT_TEST_MARK": mark}
    done = subprocess.run(
        [sys.executable, "-m", "rft.cli", *args],
        cwd=ROOT,
        env={**ENV, **marked, **(env or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    if check and done.returncode:
        raise AssertionError(f"rft {' '.join(args)} -> {done.returncode}\n{done.stderr[-4000:]}")
    return done


def pids_of(marker: str) -> list[int]:
    """Living processes that carry `marker` in their environment."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and marker.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
    return found


def processes_of(marker: str) -> list[str]:
    """Their command lines."""
    found = []
    for pid in pids_of(marker):
        try:
            found.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()[:120])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
