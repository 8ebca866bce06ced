"""The micro-batch that `auto` chooses fits the memory; a run that does not fit is told what would."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rft.config.load import apply_overrides, parse_config
from rft.config.schema import Config
from rft.preflight.capacity import USABLE, MemoryPlan, StepSize, online_step, plan_memory
from rft.preflight.memory import ModelShape, replica_bytes
from tests.specs import engine_spec

GIB = 1 << 30
# SmolLM2-135M and Qwen2.5-0.5B (linear: parameters of the layers' maps; the heads are tied).
SMALL = ModelShape(134_515_008, 576, 1536, 30, 49152, 8192, 576, 192, False, 106_168_320)
MIDDLE = ModelShape(494_032_768, 896, 4864, 24, 151936, 32768, 896, 128, False, 357_826_560)


def config(**sections: Any) -> Config:
    return parse_config({"algorithm": "grpo", "rewards": [{"function": "math"}], **sections})


def planned(
    shape: ModelShape, made: Config, gib: float | None, device: str = "cpu", step: StepSize | None = None
) -> MemoryPlan:
    spec = replace(engine_spec(Path("unused"), kv_cache_gib=made.rollout.kv_cache_gib), kind="vllm")
    length = made.rollout.sampling.max_prompt_length + made.rollout.sampling.max_completion_length
    step = step or online_step(made, length, shape.hidden)
    capacity = None if gib is None else int(gib * GIB)
    return plan_memory(
        made, made.learner, shape, spec, step, device=device, reference=False, capacity=capacity
    )


@pytest.mark.parametrize(
    ("shape", "machines"), [(SMALL, (24, 48, 96)), (MIDDLE, (48, 64, 128))], ids=["small", "middle"]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("extra", [{}, {"gradient_checkpointing": True}, {"optimizer": "adamw_8bit"}])
def test_auto_fits_and_uses_the_memory(
    shape: ModelShape, machines: tuple[int, ...], dtype: str, extra: dict[str, Any]
) -> None:
    made = config(learner={"dtype": dtype, **extra})
    chosen = [planned(shape, made, gib) for gib in machines]
    assert [p.total <= USABLE * (p.capacity or 0) for p in chosen] == [True] * 3
    sizes = [p.tokens for p in chosen]
    assert sizes == sorted(sizes)
    assert sizes[-1] == 16384
    assert not any(p.warnings() for p in chosen)


def test_auto_leaves_the_default_where_memory_is_unknown() -> None:
    assert planned(SMALL, config(), None).tokens == 16384
    assert planned(SMALL, config(), 24).tokens < 16384  # 22 GiB for the learner alone


@pytest.mark.parametrize(
    ("shape", "machines"), [(SMALL, (16, 20, 24)), (MIDDLE, (32, 40, 48))], ids=["small", "middle"]
)
def test_the_advice_fits(shape: ModelShape, machines: tuple[int, ...]) -> None:
    made = config(learner={"tokens_per_micro_batch": 16384})
    for gib in machines:
        plan = planned(shape, made, gib)
        (warning,) = plan.warnings()
        assert f"and this machine has {gib}.0" in warning
        assert "learner.tokens_per_micro_batch: " in warning
        raw = apply_overrides(made.to_dict(), [line.replace(": ", "=") for line in plan.advice])
        assert not planned(shape, parse_config(raw), gib).exceeds, plan.advice


def test_a_model_that_cannot_fit_says_so() -> None:
    (warning,) = planned(MIDDLE, config(), 6).warnings()
    assert "use a smaller model, learner.adapter, or a device with more memory" in warning
    (on_gpu,) = planned(MIDDLE, config(), 4, "cuda").warnings()
    assert "and the GPU has 4.0" in on_gpu


def test_gradients_of_earlier_micro_batches_count() -> None:
    """With the same micro-batch, a step of several needs room for their gradients: 4 bytes a parameter."""
    made = config(learner={"tokens_per_micro_batch": 4096}, checkpoint={"every": 0})
    once, several = (planned(SMALL, made, 24, step=StepSize(total, 100)).learner for total in (4096, 4097))
    assert several - once == 4 * SMALL.parameters


def test_a_background_checkpoint_counts() -> None:
    made = {"learner": {"tokens_per_micro_batch": 1024}}
    with_copy = planned(SMALL, config(**made), 24)
    for without in ({"every": 0}, {"background": False}, {"every": 100}):  # the last: only at the end
        plan = planned(SMALL, config(**made, checkpoint=without), 24)
        assert with_copy.total - plan.total == 12 * SMALL.parameters


def test_a_tree_is_not_split() -> None:
    """A prompt of 512 tokens is shared with 8 completions of 512: no micro-batch is smaller than that."""
    assert planned(SMALL, config(learner={"tokens_per_micro_batch": 256}), 24).largest == 512 + 8 * 512
    apart = config(learner={"tokens_per_micro_batch": 256, "prefix_sharing": "off"})
    assert planned(SMALL, apart, 24).largest == 1024
    few = config(train={"batch_size": 2, "num_generations": 2, "steps": 10})
    assert planned(SMALL, few, 96).largest < 16384  # the whole step is smaller


@pytest.mark.parametrize("value", [0, -3, 1.5, True, "many"])
def test_bad_values(value: object) -> None:
    with pytest.raises(Exception, match="write a number of tokens, 1 or more, or auto"):
        config(learner={"tokens_per_micro_batch": value})


def test_a_replica_of_smollm2_is_within_15_percent_of_the_measured_one() -> None:
    """Measured on two cores, float32, 1 GiB of cache: the engine 3.2 GiB at 256 sequences, its actor 0.66."""
    spec = replace(engine_spec(Path("unused"), kv_cache_gib=1.0, max_num_seqs=256), kind="vllm")
    assert 0.85 < replica_bytes(SMALL, spec) / ((3.21 + 0.66) * GIB) < 1.15
