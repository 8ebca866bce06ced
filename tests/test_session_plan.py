"""`rft check` plans the sessions of a run, and warns where their keys and values do not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rft.config.facts import longest_sequence
from rft.config.load import parse_config
from rft.preflight.sessions import SessionPlan, cache_warnings, plan_sessions
from tests.specs import engine_spec
from tests.test_capacity import MIDDLE, SMALL

TOOLS = {"kind": "tools", "tools": ["calculator"], "max_episode_tokens": 4096, "max_tokens_per_turn": 100}


def planned(
    environment: dict[str, Any],
    rollout: dict[str, Any],
    *,
    kind: Any = "vllm",
    device: Any = "cpu",
    capacity: int | None = None,
    shape: Any = SMALL,
) -> SessionPlan:
    made = parse_config(
        {
            "algorithm": "grpo",
            "rewards": ["math"],
            "train": {"batch_size": 8, "num_generations": 4},
            "environment": {**TOOLS, **environment},
            "rollout": rollout,
        }
    )
    spec = engine_spec(Path("unused"))
    length = longest_sequence(made)
    spec = replace(spec, kind=kind, device=device, config=made.rollout, max_model_len=length)
    plan = plan_sessions(made, shape, replace(spec, dtype="bfloat16"), capacity)
    assert plan is not None
    return plan


def test_the_sizes_are_those_of_the_model() -> None:
    plan = planned({}, {"kv_cache_gib": 2})
    assert plan.token_bytes == 2 * 30 * 192 * 2  # keys and values, layers, width, bytes: 23,040
    assert plan.fitting == (2 << 30) // (4096 * 23040) == 22
    assert (plan.samples, plan.running, plan.sampled) == (32, 32, 32 * 8 * 100)
    assert plan.lines() == [
        "sessions     32 a step, 32 at a time (all that may be in flight; environment.concurrency allows 64)",
        "kv cache     90.0 MiB for a session of 4,096 tokens; 2.0 GiB per replica hold 22",
        "step tokens  up to 25,600 sampled; up to 131,072 read and trained, "
        "and 1,048,576 if every turn starts a branch",
        "staleness    the first call of a session is at most 0 versions before it is trained on",
    ]


def test_what_does_not_fit_is_named_with_its_value() -> None:
    (warning,) = planned({}, {"kv_cache_gib": 2}).warnings()
    assert warning == (
        "environment.concurrency: 32 sessions of up to 4,096 tokens need 2.8 GiB, and rollout.kv_cache_gib "
        "gives 2.0 GiB of KV cache per replica: it holds 22 of them, and the prompts of the others are "
        "computed again; set rollout.kv_cache_gib: 3, or set environment.concurrency: 22"
    )
    assert planned({}, {"kv_cache_gib": 3}).warnings() == []
    assert planned({"concurrency": 22}, {"kv_cache_gib": 2}).warnings() == []
    assert planned({}, {"kv_cache_gib": 2, "replicas": 2}).warnings() == []


def test_a_session_that_does_not_fit_at_all() -> None:
    (warning,) = planned({"max_episode_tokens": 60_000}, {"kv_cache_gib": 1}).warnings()
    assert "max_episode_tokens: a session of 60,000 tokens needs 1.3 GiB" in warning
    assert "set rollout.kv_cache_gib: 2, or lower environment.max_episode_tokens to 46,603" in warning
    assert planned({"max_episode_tokens": 46_603, "concurrency": 1}, {"kv_cache_gib": 1}).warnings() == []


def test_staleness_lets_more_sessions_be_in_flight() -> None:
    plan = planned({}, {"kv_cache_gib": 8, "staleness": 2})
    assert plan.running == 64 and "environment.concurrency; 96 may be in flight" in plan.lines()[0]
    assert plan.lines()[-1].endswith(
        "at most 2 versions before it is trained on, and its turns may have up to 3"
    )


@pytest.mark.parametrize(("kind", "capacity"), [("hf", 80 << 30), ("vllm", None)])
def test_an_engine_whose_cache_is_unknown(kind: str, capacity: int | None) -> None:
    plan = planned({}, {}, kind=kind, device="cuda", capacity=capacity)
    assert plan.fitting is None and plan.warnings() == [] and plan.lines()[1].endswith("4,096 tokens")


def test_a_gpu_keeps_what_the_weights_leave() -> None:
    rollout = {"gpu_memory_utilization": 0.5}
    environment = {"max_episode_tokens": 30_000, "concurrency": 32}
    plan = planned(environment, rollout, device="cuda", capacity=4 << 30, shape=MIDDLE)
    assert plan.cache == int(0.5 * (4 << 30) - 2 * MIDDLE.parameters)
    (warning,) = plan.warnings()
    assert "0.5, or add replicas, or set environment.concurrency: 3" in warning


def test_a_cache_on_cpu_that_holds_no_sequence_is_named() -> None:
    """SMALL needs 2 * 30 * 192 * 4 = 46,080 bytes a token; 300 tokens are 10 blocks, and one is free."""
    settings = {"sampling": {"max_prompt_length": 200, "max_completion_length": 100}, "dtype": "float32"}

    def checked(**rollout: Any) -> list[str]:
        section = {**settings, **rollout}
        return cache_warnings(
            parse_config({"algorithm": "grpo", "rewards": ["math"], "rollout": section}), SMALL
        )

    assert checked(kv_cache_gib=11 * 32 * 46080 / 2**30) == []
    assert checked(kv_cache_gib=0.01) == [
        "rollout.kv_cache_gib: 0.01 GiB do not hold the longest sequence, whose 300 tokens need 15.5 MiB: "
        "the engine may not start; set rollout.kv_cache_gib: 0.016, or lower the lengths"
    ]
    assert checked(kv_cache_gib=0.01, engine_args={"kv_cache_memory_bytes": 1 << 30}) == []
