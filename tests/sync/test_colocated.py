"""One GPU for learner and engine: which layouts may, and what a learner takes along when it rests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rft.algorithms import ALGORITHMS
from rft.batch import Batch
from rft.config.load import parse_config
from rft.config.validate import choose_transport, problems
from rft.learner.learner import Learner
from rft.learner.offload import move, resident
from tests.specs import facts, learner_spec


def config(**more: Any) -> Any:
    base = {"algorithm": "grpo", "rewards": [{"function": "math"}], "data": {"kind": "arithmetic"}}
    return parse_config({**base, **more})


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ({}, None),
        ({"rollout": {"replicas": 2}}, "set rollout.replicas and rollout.tensor_parallel to 1"),
        ({"rollout": {"tensor_parallel": 2}}, "set rollout.replicas and rollout.tensor_parallel to 1"),
        ({"rollout": {"staleness": 1}}, "set rollout.staleness to 0"),
        ({"learner": {"parallel": "fsdp2"}}, "set learner.parallel to single"),
        ({"ray": {"address": "auto"}}, "ray.address names a cluster"),
        ({"algorithm": "cory"}, "ipc does not support two policies"),
    ],
)
def test_what_may_share_one_gpu(layout: dict, words: str | None) -> None:
    gpu, cpu = facts(device="cuda", engine="vllm", gpus=1), facts(engine="vllm")
    asked = config(**layout, sync={"transport": "ipc"})
    found = [problem for problem in problems(asked, gpu) if problem.startswith("sync.transport")]
    assert [words in problem for problem in found] == [True] if words else found == []
    assert any("ipc needs a GPU" in problem for problem in problems(asked, cpu))
    assert any("needs rollout.engine vllm" in p for p in problems(asked, replace(gpu, engine="hf")))
    assert choose_transport(config(**layout), gpu) == ("nccl" if words else "ipc")


def test_more_parts_than_gpus_are_refused() -> None:
    gpus = facts(device="cuda", engine="vllm", gpus=2)
    assert problems(config(), gpus) == []
    assert choose_transport(config(), gpus) == "nccl"
    sparse = config(sync={"transport": "sparse"})
    assert choose_transport(sparse, gpus) == "sparse_nccl"
    for other in (facts(engine="vllm"), replace(gpus, engine="hf")):
        assert choose_transport(sparse, other) == "sparse"
    (told,) = problems(config(rollout={"replicas": 2}), gpus)
    assert "the learner needs 1 GPU and the replicas need 2, but this machine has 2" in told


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"optimizer": "adamw_8bit"},
        {"adapter": {"r": 4}, "quantize": "nf4"},
        {"strategy": {"name": "galore"}},
    ],
    ids=["full", "8-bit", "qlora", "galore"],
)
def test_a_learner_that_has_rested_goes_on_as_one_that_has_not(
    tiny_folder: Path, make_groups: Any, options: dict
) -> None:
    """On CPU nothing moves by itself, so every resident tensor is replaced by a copy, as moving does."""
    spec = learner_spec(tiny_folder, learning_rate=1e-2, **options)
    spec = replace(spec, algorithm=ALGORITHMS["grpo"](beta=0.1))
    rested, other = Learner(spec), Learner(spec)
    for number in range(3):
        batch = Batch.build(make_groups(seed=number))
        found = resident(rested)
        held = {id(p) for p in (*rested.policy.network.parameters(), *rested.policy.network.buffers())}
        assert held <= {id(tensor) for tensor in found}
        if number and not options:  # both moments of every weight, and the reference
            assert len(found) >= 4 * len(list(rested.policy.model.parameters()))
        for tensor in found:
            tensor.data = tensor.data.clone()
        move(found, torch.device("cpu"))
        assert rested.step(batch, number)["train/loss"] == other.step(batch, number)["train/loss"]
    pairs = zip(rested.weights(), other.weights(), strict=True)
    assert all(torch.equal(a, b) for (_, a), (_, b) in pairs)
