"""Environments of other projects, driven unchanged where the package is installed (extra dev)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rft.config.environment import EnvironmentConfig
from rft.environments.runner import EnvironmentRunner
from rft.environments.types import Ending
from tests.environments.scripted import ScriptedSession

ROW = {"prompt": "What is 3 + 4?", "reward_spec": {"method": "rule", "ground_truth": "7"}, "extra_info": {}}


def runner(**keys: Any) -> EnvironmentRunner:
    return EnvironmentRunner(EnvironmentConfig(kind="text", **keys), Path(__file__).parent)


async def test_gsm8k_of_skyrl_gym() -> None:
    pytest.importorskip("skyrl_gym")
    async with runner(path="skyrl_gym.envs.gsm8k.env:GSM8kEnv") as environment:
        right = await environment.run(ROW, ScriptedSession("It is 7.\n#### 7"))
        wrong = await environment.run(ROW, ScriptedSession("#### 8"))
    assert (right.reward, wrong.reward) == (1.0, 0.0)
    assert right.ending is Ending.finished and len(right.messages) == 2


async def test_registered_environment_of_skyrl_gym() -> None:
    pytest.importorskip("skyrl_gym")
    async with runner(path="skyrl_gym:make", options={"id": "gsm8k_multi_turn"}, max_turns=3) as environment:
        session = ScriptedSession("#### 5", "#### 6", "#### 7")
        episode = await environment.run(ROW, session)
    assert [value for value, _, _ in session.rewards] == pytest.approx([0.2 / 3, 0.2 / 3, 1.0])
    assert episode.reward == pytest.approx(1 + 0.4 / 3) and episode.scores == {"steps": 3.0}
    assert "final numeric answer" in session.seen[2][-1]["content"]


async def test_gymnasium_registry() -> None:
    pytest.importorskip("gymnasium")
    path = "samples.py:make_gymnasium"
    async with runner(path=path, options={"id": "rft/Echo-v0"}) as environment:
        episode = await environment.run(ROW, ScriptedSession("a", "b"))
    assert episode.reward == 1.0 and episode.ending is Ending.finished
    assert episode.messages[0]["content"] == "What is 3 + 4?\n\nseed 1"
