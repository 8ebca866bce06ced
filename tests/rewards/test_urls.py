"""Credentials in a judge's URL reach no log."""

from __future__ import annotations

import pytest

from rft.config.rewards import RewardConfig, RewardsConfig
from rft.preflight.rewards import check_reward
from rft.rewards import load_reward
from rft.utils.urls import has_credentials, without_credentials

SECRET = "https://user:hunter2@judge.example/v1"


def test_a_judge_with_a_password_in_its_url_is_refused_without_showing_it() -> None:
    config = RewardsConfig(
        functions=[RewardConfig(function="judge", options={"base_url": SECRET, "model": "m"})]
    )
    (problem,) = check_reward(config, columns=["prompt"])
    assert "base_url contains a user name or password" in problem and "api_key_env" in problem
    assert "hunter2" not in problem
    with pytest.raises(ValueError, match=r"\*\*\*@judge.example") as caught:
        load_reward("judge", base_url=SECRET, model="m")
    assert "hunter2" not in str(caught.value)


def test_only_credentials_are_taken_out() -> None:
    assert without_credentials(f"see {SECRET} and a@b.c") == "see https://***@judge.example/v1 and a@b.c"
    assert not has_credentials("https://judge.example/v1/@x")
    assert has_credentials("http://key@host")
