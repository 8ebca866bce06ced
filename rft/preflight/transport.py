"""Which transport a run uses, and which ones its layout cannot use."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from rft.sync.adapter import adapter_problems
from rft.sync.spec import ChannelSpec
from rft.utils.hashing import short_digest

if TYPE_CHECKING:
    from rft.config.schema import Config

SHARED_MEMORY = Path("/dev/shm")
_FOR_ANY_ENGINE = ("gloo", "sparse", "file")


def choose_transport(config: Config, device: str, engine: str) -> str:
    """The transport's name: `auto` resolved, and `sparse` where it goes from GPU to GPU."""
    chosen, gpus = config.sync.transport, device == "cuda" and engine == "vllm"
    if chosen == "sparse" and gpus and config.sync.folder is None:
        return "sparse_nccl"
    if chosen != "auto":
        return chosen
    if not gpus:
        return "gloo"
    alone = torch.cuda.device_count() == 1 and not _ipc_problems(config, device)
    return "ipc" if alone else "nccl"


def channel_spec(config: Config, transport: str, wire_dtype: str) -> ChannelSpec:
    """What learner and engines are told about the channel."""
    folder = folder_for(config) if transport == "file" or config.sync.folder else None
    return ChannelSpec(
        transport=transport,
        wire_dtype=wire_dtype,
        folder=None if folder is None else str(folder),
        full_every=config.sync.full_every,
        measure=config.sync.measure_changes,
        timeout_s=config.sync.timeout_s,
    )


def folder_for(config: Config) -> Path:
    """Where this run's weight files go: a folder of its own, the same one when the run is resumed."""
    name = short_digest(str(config.run_dir.resolve()))
    base = SHARED_MEMORY if config.sync.folder is None else Path(config.sync.folder).expanduser().resolve()
    return base / f"rft-{config.name}-{name}"


def layout_problems(config: Config, device: str, engine: str, weight_bytes: int | None) -> list[str]:
    """What keeps this layout from using the transport that it asks for; [] where nothing does."""
    sync, transport = config.sync, config.sync.transport
    if not config.algorithm.online:
        return []
    found = []
    if transport == "nccl" and device == "cpu":
        found.append("nccl needs GPUs, and this machine has none; use gloo or auto")
    if engine == "hf" and transport not in ("auto", *_FOR_ANY_ENGINE):
        found.append(f"{transport} needs rollout.engine vllm; hf receives over {', '.join(_FOR_ANY_ENGINE)}")
    if transport == "adapter":
        found += adapter_problems(config)
    if transport == "ipc":
        found += _ipc_problems(config, device)
    out = [f"sync.transport: {problem}" for problem in found]
    if device == "cuda" and config.learner.parallel == "single":
        out += _device_problems(config, choose_transport(config, device, engine))
    if transport == "file" or sync.folder is not None:
        out += [f"sync.folder: {problem}" for problem in _folder_problems(config, weight_bytes)]
    return out


def _device_problems(config: Config, transport: str) -> list[str]:
    """Too few GPUs for a learner of one rank and engines; of more ranks `learner.parallel.checks` asks."""
    there, engines = torch.cuda.device_count(), config.rollout.replicas * config.rollout.tensor_parallel
    if transport == "ipc" or config.ray.address is not None or 1 + engines <= there:
        return []
    return [
        f"rollout.replicas: the learner's GPU and {engines} of rollout.replicas make {1 + engines}, this "
        f"machine has {there}; lower it, or let one engine (vllm) share the learner's by sync.transport ipc"
    ]


def _ipc_problems(config: Config, device: str) -> list[str]:
    found = []
    if device == "cpu":
        found.append("ipc needs a GPU, and this machine has none; use gloo or auto")
    if config.learner.parallel != "single":
        found.append("ipc is for a learner of one rank; set learner.parallel to single, or use nccl")
    if config.rollout.replicas * config.rollout.tensor_parallel > 1:
        found.append(
            "ipc shares one GPU between the learner and one engine; set rollout.replicas and "
            "rollout.tensor_parallel to 1, or use nccl"
        )
    if config.rollout.staleness:
        found.append("with ipc the engine sleeps while the learner trains; set rollout.staleness to 0")
    if config.algorithm.copies == 2:
        found.append("two policies do not share one GPU by ipc; use nccl")
    if config.ray.address is not None:
        found.append("ipc stays within one machine, and ray.address names a cluster; use nccl")
    return found


def _folder_problems(config: Config, weight_bytes: int | None) -> list[str]:
    sync = config.sync
    if sync.transport not in ("file", "sparse"):
        return [f"transport {sync.transport} writes no files; remove it, or use file or sparse"]
    if config.algorithm.copies == 2:
        return ["two policies would write to the same files; use transport gloo or nccl"]
    if sync.folder is None and config.ray.address is not None:
        return [
            "shared memory reaches one machine only, and ray.address names a cluster; give a folder that "
            "all its nodes share under the same path"
        ]
    base = SHARED_MEMORY if sync.folder is None else Path(sync.folder).expanduser()
    if not base.is_dir() or not os.access(base, os.W_OK):
        return [f"{base} is no folder that this user can write to"]
    need = 2 * (weight_bytes or 0)  # the version in use and the one that is being written
    free = shutil.disk_usage(base).free
    if need > free:
        return [
            f"two versions of the weights need {need / 2**30:.2f} GiB, {base} has {free / 2**30:.2f} free"
        ]
    return []
