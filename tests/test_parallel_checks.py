"""Ranks that cannot work are told apart before anything starts, and placed in the plan."""

from __future__ import annotations

from typing import Any

import pytest

from rft.config.facts import PACKAGES
from rft.config.load import parse_config
from rft.config.schema import Config
from rft.config.validate import problems
from rft.learner.parallel import local_share
from rft.report.plan_text import describe_ranks
from tests.specs import facts

STAGE_1 = {"zero_optimization": {"stage": 1}}


def config(**changes: Any) -> Config:
    learner = {"parallel": "fsdp2", "ranks": 2, **changes.pop("learner", {})}
    return parse_config(
        {
            "algorithm": "grpo",
            "rewards": [{"function": "math"}],
            "train": {"batch_size": 4, "num_generations": 4},
            "learner": learner,
            **changes,
        }
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"learner": {"parallel": "single"}}, "2 ranks need learner.parallel fsdp2 or deepspeed"),
        ({"learner": {"ranks": 8}}, "8 ranks need 8 CPU cores, this machine has 4"),
        ({"learner": {"cores": "1"}}, "learner.cores: 2 ranks share 1 cores"),
        (
            {"learner": {"ranks": 3}, "train": {"batch_size": 2, "num_generations": 4, "minibatches": 2}}
            | {"learner": {"ranks": 3, "prefix_sharing": "on"}},
            "an update has 1 groups, too few for 3 ranks",
        ),
        (
            {"learner": {"parallel": "deepspeed", "cpu_offload": True}},
            "only fsdp2 uses it; for deepspeed write",
        ),
        (
            {"learner": {"deepspeed": {"zero_optimization": {"stage": 1}}}},
            "only used with learner.parallel: deepspeed",
        ),
        (
            {"learner": {"parallel": "deepspeed", "deepspeed": {"zero_optimization": {"stage": 4}}}},
            "stage: must be 1, 2 or 3, got 4",
        ),
        (
            {
                "learner": {
                    "parallel": "deepspeed",
                    "deepspeed": {"zero_optimization": {"stage": 2}, "bf16": {}},
                }
            },
            "learner.deepspeed.bf16: set by rft from learner.dtype; remove it",
        ),
        ({"learner": {"strategy": {"name": "lisa"}}}, "learner.strategy: works in one process only"),
        ({"learner": {"adapter": {"method": "pissa"}}}, "pissa works in one process only"),
        (
            {"learner": {"adapter": {"options": {"init_lora_weights": "olora"}}}},
            "as peft begins them); set learner.parallel to single",
        ),
        (
            {
                "learner": {
                    "adapter": {},
                    "parallel": "deepspeed",
                    "deepspeed": {"zero_optimization": {"stage": 3}},
                }
            },
            "adapter: not supported with ZeRO stage 3; use stage 2, or fsdp2",
        ),
        ({"learner": {"adapter": {}, "quantize": "nf4"}}, "learner.quantize: works in one process only"),
        ({"learner": {"optimizer": "adamw_8bit"}}, "learner.optimizer: adamw_8bit works in one process only"),
        (
            {"learner": {"ranks": 1, "parallel": "single"}, "warm_start": {"learner": {"ranks": 2}}},
            "warm_start.learner.ranks: 2 ranks need warm_start.learner.parallel",
        ),
    ],
)
def test_what_cannot_work_is_told(changes: dict[str, Any], words: str) -> None:
    found = problems(config(**changes), facts())
    assert len(found) == 1 and words in found[0], found


def test_gpus_are_counted_with_those_of_the_engines() -> None:
    gpus = facts(device="cuda", gpus=4, engine="vllm")
    rollout = {"replicas": 1, "tensor_parallel": 2}
    assert problems(config(rollout=rollout), gpus) == []
    (found,) = problems(config(learner={"ranks": 3}, rollout=rollout), gpus)
    assert "make 5, this machine has 4" in found
    assert "8 ranks need 8 GPUs" in problems(config(learner={"ranks": 8}), gpus)[0]
    cluster = config(learner={"ranks": 8}, train={"batch_size": 64}, ray={"address": "auto"})
    assert problems(cluster, gpus) == []


def test_deepspeed_must_be_installed() -> None:
    installed = frozenset(PACKAGES) - {"deepspeed"}
    (found,) = problems(config(learner={"parallel": "deepspeed"}), facts(installed=installed))
    assert "learner.parallel: deepspeed is not installed" in found


def test_the_plan_says_where_the_ranks_go() -> None:
    assert describe_ranks(config(), "cpu") == "2 ranks (fsdp2), one CPU core each, on this machine"
    zero = config(learner={"parallel": "deepspeed"}, ray={"address": "auto"})
    assert describe_ranks(zero, "cuda").startswith(
        "2 ranks (deepspeed stage 2), one GPU each, on the cluster"
    )
    assert describe_ranks(config(learner={"ranks": 1, "parallel": "single"}), "cpu") == "1 process on cpu"


def test_ranks_share_the_cores_of_their_machine() -> None:
    assert [local_share({4, 5, 6, 7, 9}, rank, 2) for rank in range(2)] == [{4, 5}, {6, 7, 9}]
    with pytest.raises(ValueError, match="1 cores cannot be shared by 2 ranks"):
        local_share({3}, 0, 2)
