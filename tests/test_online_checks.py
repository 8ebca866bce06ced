"""Online configs, made from the examples, that cannot work are refused by the plan."""

from __future__ import annotations

from pathlib import Path

import pytest

from rft.config.load import load_config
from rft.errors import ConfigError
from rft.plan import Plan, make_plan
from tests.specs import needs_vllm

FOLDER = Path(__file__).parent.parent / "examples" / "online"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path) -> list[str]:
    folder = tmp_path_factory.mktemp("runs")
    return [f"output_dir={folder}", "data.limit=64", "eval.problems=8", f"model.path={tiny_folder}"]


def checked(name: str, small: list[str], *overrides: str) -> Plan:
    return make_plan(load_config(FOLDER / f"{name}.yaml", [*small, *overrides]))


def refusal(name: str, small: list[str], *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        checked(name, small, *overrides)
    return "\n".join(caught.value.problems)


@needs_vllm
def test_only_the_plain_engine_mixes_policy_and_reference(small: list[str], tiny_folder: Path) -> None:
    assert checked("nash_md", small).engine_spec().reference == str(tiny_folder)
    assert "write mixture: 0, or set rollout.engine: hf" in refusal("nash_md", small, "rollout.engine=vllm")
    own = checked("nash_md", small, "rollout.engine=vllm", "algorithm.mixture=0")
    assert own.engine_spec().reference is None


def test_an_observer_s_sequence_holds_two_prompts_and_two_answers(small: list[str]) -> None:
    lengths = ["rollout.sampling.max_prompt_length=64", "rollout.sampling.max_completion_length=24"]
    assert checked("cory", small, *lengths).engine_spec().max_model_len == 2 * (64 + 24)
    assert "allow sequences of 2176 tokens" in refusal(
        "cory", small, lengths[0], "rollout.sampling.max_completion_length=1024"
    )


def test_process_credit_needs_a_reward_that_judges_steps(small: list[str]) -> None:
    process = "algorithm={name: per_step, source: process}"
    assert "source: process needs a reward that judges step by step" in refusal("per_step", small, process)
    rewards = "rewards=[{function: math}, {function: process, options: {function: length%s}}]"
    assert "differs from the separator of the reward process" in refusal(
        "per_step", small, process, rewards % ""
    )
    options = '{function: not_truncated, separator: "\\n"}'
    rewards = f"rewards=[{{function: math}}, {{function: process, options: {options}}}]"
    assert checked("per_step", small, process, rewards).config.algorithm.steps.branches == 0


def test_a_teacher_that_does_not_exist_is_named(small: list[str]) -> None:
    assert "model.reference: " in refusal("distill", small, "model.reference=/nowhere")
