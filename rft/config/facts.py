"""Facts that config checks use: of the machine, the model and the data, and derived from the config."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rft.algorithms.base import Rollout
from rft.config.environment import EnvironmentConfig
from rft.config.schema import Config

Device = Literal["cpu", "cuda"]
Engine = Literal["vllm", "hf"]
Check = tuple[bool, str]  # (condition of an invalid config, error message)

PACKAGES = (
    "vllm",
    "bitsandbytes",
    "deepspeed",
    "liger_kernel",
)  # optional packages that a config may require


@dataclass(frozen=True)
class Facts:
    """Facts resolved from the machine, the model and the data. None: unknown, so not checked.

    device: device of learner and engines. engine: resolved rollout engine. samples: whether the run samples
    completions. gpus, cores: of this machine; `usable_cores` respects a container's CPU quota. rows: number
    of training rows; None for a stream.
    """

    device: Device
    engine: Engine
    samples: bool
    installed: frozenset[str]  # of PACKAGES
    gpus: int
    cores: frozenset[int]
    usable_cores: int
    layers: int | None = None
    positions: int | None = None
    vocabulary: int | None = None
    largest_token: int | None = None  # largest token id of the tokenizer
    stored_quantization: str | None = None  # quantisation method of the model's stored weights
    rows: int | None = None
    longest_prompt: Mapping[str, int] | None = None  # of the training rows, in tokens, by source ("": all)
    held_out_rows: int | None = None  # of an offline run
    demonstrations: bool | None = None  # whether any training prompt has one


def rollouts(config: Config, demonstration: bool = False) -> Sequence[Rollout]:
    """Return the algorithm's rollouts of one group at the start of the run."""
    return config.algorithm.rollouts(config.train.num_generations, progress=0.0, demonstration=demonstration)


def longest_sequence(config: Config) -> int:
    """Return the maximum sequence length of the engines, in tokens; an observer reads two turns."""
    s = config.rollout.sampling
    turns = 2 if any(r.role for r in rollouts(config)) else 1
    lengths = [longest_session(config, e) for e in config.environments.values()]
    lengths += [turns * (s.max_prompt_length + s.max_completion_length)] if config.single_turn else []
    return max(lengths)


def longest_session(config: Config, environment: EnvironmentConfig) -> int:
    """Return the maximum length of a session's context, in tokens."""
    s = config.rollout.sampling
    return environment.max_episode_tokens or s.max_prompt_length + s.max_completion_length


def environment_key(source: str) -> str:
    """Return the config key of an environment of `Config.environments`."""
    return f"data.mixture.{source}.environment" if source else "environment"


def samples_held_out(config: Config) -> bool:
    """Return whether an offline run samples completions of held-out prompts."""
    return bool(config.eval.every) and (config.eval.generate or bool(config.eval.sampled_sets(online=False)))


def mixes_reference(config: Config) -> bool:
    """Return whether engines sample from a mixture of policy and reference."""
    return config.algorithm.online and any(r.mixture for r in rollouts(config))
