"""The learner on one device: the rate of a LoRA step of a 7B-shaped model on 4,096 tokens against the
measured rate of matrix products (target: above 45 %), the peak memory of a QLoRA step, and the memory that
`rft check` predicts against what full training really takes.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from forest import SHAPES, groups_of
from harness import Settings, random_model, settings, timed
from shapes import QWEN3_600M

from rft.algorithms import ALGORITHMS
from rft.batch import Batch
from rft.config.learner import LearnerConfig
from rft.config.rollout import SamplingConfig
from rft.config.schema import ModelConfig, TrainConfig
from rft.learner.learner import Learner
from rft.learner.spec import LearnerSpec
from rft.preflight.memory import ModelShape, learner_bytes

TARGET = 0.45


def save(name: str, s: Settings, folder: Path) -> str:
    shape = SHAPES[name] if s.small else replace(SHAPES[name], vocabulary=QWEN3_600M.vocabulary)
    random_model(shape, s).save_pretrained(folder / name)
    return str(folder / name)


def step(name: str, model: str, s: Settings, **options: Any) -> dict[str, Any]:
    """SFT steps on `tokens` tokens: seconds and the peak of everything held, in 10^6 bytes."""
    tokens = 256 if s.small else 4096
    config = LearnerConfig(
        learning_rate=1e-6,
        entropy=False,
        tokens_per_micro_batch=tokens,
        threads=torch.get_num_threads(),
        **options,
    )
    learner = Learner(
        LearnerSpec(
            algorithm=ALGORITHMS["sft"](),
            model=ModelConfig(path=model),
            config=config,
            train=TrainConfig(steps=100),
            sampling=SamplingConfig(max_completion_length=tokens),
            device=s.device,
            seed=1,
        )
    )
    batch = Batch.build(groups_of(tokens // 8, [tokens // 8], 4))
    found: dict[str, Any] = {"name": name, "tokens": tokens}
    found |= timed({"step": lambda: learner.step(batch, 0)}, rounds=2 if s.small else 5)["step"]
    parameters = sum(p.numel() for p in learner.policy.model.parameters())
    trained = sum(p.numel() for p in learner.policy.trained())
    if not s.small:
        found["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6
    return found | {"parameters": parameters, "trained": trained}


def lora_rate(model: str, s: Settings) -> dict[str, Any]:
    """Operations of a LoRA step: 2 per weight and token forward and 2 for the gradient of activations; the
    head on the half of the tokens that the loss acts on, the embedding's look-up not at all. What
    checkpointing computes again is not counted as useful."""
    row = step("LoRA", model, s, adapter={"r": 16}, dtype="auto", gradient_checkpointing=not s.small)
    head = ModelShape.of(model, ModelConfig(path=model))
    matrix = head.vocab * head.hidden
    weights = (row["parameters"] - 2 * matrix) * row["tokens"] + matrix * row["tokens"] // 2
    row["tflops"] = 4 * weights / row["seconds"] / 1e12
    ceiling = s.earlier("ceilings")
    if ceiling is not None:
        row["of_matmul_rate"] = row["tflops"] / ceiling["matmul_tflops"]
        row["passed"] = None if s.small else row["of_matmul_rate"] >= TARGET
    return row


def qlora(model: str, s: Settings) -> dict[str, Any]:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        return {"name": "QLoRA", "left_out": str(error)}
    return step("QLoRA", model, s, adapter={"r": 16}, quantize="nf4", gradient_checkpointing=not s.small)


def prediction(model: str, s: Settings) -> dict[str, Any]:
    row = step("full", model, s)
    config = LearnerConfig(tokens_per_micro_batch=row["tokens"], dtype="float32" if s.small else "bfloat16")
    shape = ModelShape.of(model, ModelConfig(path=model))
    row["predicted_mb"] = learner_bytes(shape, config, reference=False, tokens=row["tokens"]) / 1e6
    if not s.small:  # a CPU does not account memory per learner
        row["predicted_over_measured"] = row["predicted_mb"] / row["peak_mb"]
    return row


if __name__ == "__main__":
    s = settings("learner", __doc__)
    with tempfile.TemporaryDirectory(prefix="gpu-learner-") as folder:
        large = save("small" if s.small else "7B", s, Path(folder))
        medium = save("small" if s.small else "1B", s, Path(folder))
        s.finish({"results": [lora_rate(large, s), qlora(large, s), prediction(medium, s)]})
