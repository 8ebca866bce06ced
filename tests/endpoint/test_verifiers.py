"""Kind `verifiers`: what is refused by name, and episodes of tasksets (0.4) and of environments of v0 (0.3).

RFT_VERIFIERS_PYTHON and RFT_VERIFIERS_V0_PYTHON name Pythons that have them; else pip makes environments.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import psutil
import pytest

from rft.config.environment import EnvironmentConfig
from rft.environments.runner import EnvironmentRunner
from rft.environments.types import EnvironmentFault
from rft.metrics.log import read_jsonl
from tests.endpoint.served import END
from tests.endpoint.test_command import SAMPLING, Played, Prompt, Rollout, group, sampler
from tests.specs import session_metrics
from tests.venvs import VERIFIERS, VERIFIERS_V0, python_with

HERE = Path(__file__).parent
TASKSET = str(HERE / "countdown.py")
slow = [pytest.mark.slow, pytest.mark.timeout(1200)]


async def problem(python: str, path: str = TASKSET, **options: Any) -> str:
    settings = EnvironmentConfig(kind="verifiers", path=path, python=python, options=options)
    with pytest.raises(EnvironmentFault) as error:
        await EnvironmentRunner(settings, HERE).start()
    return str(error.value)


@pytest.mark.parametrize(
    ("python", "path", "options", "words"),
    [
        (
            "/no/such/bin/python",
            TASKSET,
            {},
            "python3 -m venv FOLDER && FOLDER/bin/pip install 'verifiers>=0.4",
        ),
        (sys.executable, TASKSET, {}, f"no verifiers: {sys.executable} -m pip install 'verifiers>=0.4,<0.5'"),
        ("true", TASKSET, {}, "ended with status 0"),
        (sys.executable, "harbor", {}, "harbor of verifiers needs containers"),
        (sys.executable, "nemo-gym", {"taskset": {"dataset": "x"}}, "needs a resource server of NeMo-Gym"),
        (sys.executable, "openenv", {"taskset": {"env": "echo"}}, "needs an OpenEnv server"),
    ],
)
async def test_what_is_missing(python: str, path: str, options: dict[str, Any], words: str) -> None:
    assert words in await problem(python, path, **options)


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_wrong_tasksets_and_options() -> None:
    new, old = (
        python_with("RFT_VERIFIERS_PYTHON", *VERIFIERS),
        python_with("RFT_VERIFIERS_V0_PYTHON", *VERIFIERS_V0),
    )
    assert "has no taskset 'no-such'" in await problem(new, "no-such")
    assert "an environment of verifiers v0" in await problem(new, str(HERE / "guess_v0.py"))
    assert "needs a module that cannot be imported" in await problem(new, str(HERE / "test_verifiers.py"))
    assert "needs a container" in await problem(new, agent={"harness": {"id": "codex"}})
    wrong = {"harness": {"id": "countdown", "turn": 3}}
    assert "environment.options.agent.harness.turn: Extra" in await problem(new, agent=wrong)
    assert "has the seats" in await problem(new, id="user_sim")
    assert "cannot be imported" in await problem(new, "textarena", taskset={"game": "Wordle-v0"})
    assert "has no environment 'no-such'" in await problem(old, "no-such")
    assert "for a taskset of v1" in await problem(old)
    assert "unexpected keyword" in await problem(old, str(HERE / "guess_v0.py"), rowz=3)


async def play(episodes: Any, row: dict[str, Any], size: int = 2) -> tuple[Played, dict[str, float]]:
    prompt = Prompt(0, tuple(episodes.render.prompt("hi")[1]), "what is 2+3?", row)
    played = await episodes.sample("t", prompt, [Rollout()] * size, SAMPLING)
    return played, session_metrics(episodes)


def taskset(**more: Any) -> dict[str, Any]:
    python = python_with("RFT_VERIFIERS_PYTHON", *VERIFIERS)
    return {"kind": "verifiers", "path": TASKSET, "python": python, "setup_timeout_s": 200, **more}


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_episodes_of_a_taskset(tmp_path: Path, ray_here: None) -> None:
    async with sampler(tmp_path, [], f"2{END}", f"3{END}", **taskset()) as episodes:
        for row in ({"task": 1}, {"task": "plus-1"}, {"answer": "3"}):  # by number, by name, as data
            played, metrics = await play(episodes, row)
            batch = await group(episodes, played)
            assert [c.reward for c in played.completions] == [1.5] * 2, read_jsonl(tmp_path / "events.jsonl")
            assert metrics["session/turns"] == 3 and metrics["session/branches"] == 1
            assert metrics["session/score/right"] == 1 and metrics["session/score/asked"] == 3
            assert int(batch.mask.sum()) == sum(c.num_sampled for c in played.completions)
            assert [m["content"] for m in played.completions[0].messages] == [
                "2",
                "again 0",
                "3",
                "again 1",
                "3",
            ]
        assert metrics["environment/workers/started"] == 2, "processes are kept"
        with pytest.raises(EnvironmentFault, match="3 is not among the 3 tasks of the taskset; write 0 to 2"):
            await play(episodes, {"task": 3}, 1)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    ("more", "ending", "reward"),
    [
        ({"max_turns": 2}, "turn_limit", 1.5),
        ({"max_episode_tokens": 40}, "context_full", 0.0),
        ({"fault": "raise"}, "environment_error", None),
        ({"fault": "exit"}, "environment_error", None),
        ({"fault": "hang"}, "timeout", None),
        ({"fault": "leave"}, "finished", 1.5),
    ],
)  # fmt: skip
async def test_how_an_episode_ends(
    tmp_path: Path, ray_here: None, more: dict[str, Any], ending: str, reward: float | None
) -> None:
    """`sampler` asserts that no process is left."""
    agent = {"harness": {"id": "countdown", "fault": more.pop("fault", "")}}
    settings = taskset(options={"agent": agent}, step_timeout_s=3, **more)
    async with sampler(tmp_path, [], f"3{END}", **settings) as episodes:
        played, metrics = await play(episodes, {"task": 1}, 1)
        for process in psutil.Process().children(recursive=True):
            assert process.name() != "sleep", "a process that the harness left behind"
    events = read_jsonl(tmp_path / "events.jsonl")
    assert metrics[f"session/ending/{ending}"] == 1, events
    assert [c.reward for c in played.completions] == ([] if reward is None else [reward])
    words = {"raise": "the harness raised", "exit": "ended with status 3", "hang": "took longer than"}
    if (fault := agent["harness"]["fault"]) in words:
        assert any(words[fault] in event.get("what", "") for event in events)


@pytest.mark.slow
@pytest.mark.timeout(1200)
async def test_episodes_of_an_environment_of_v0(tmp_path: Path, ray_here: None) -> None:
    python = python_with("RFT_VERIFIERS_V0_PYTHON", *VERIFIERS_V0)
    path, options = str(HERE / "guess_v0.py"), {"rows": 5}
    settings = {
        "kind": "verifiers",
        "path": path,
        "python": python,
        "options": options,
        "setup_timeout_s": 200,
    }
    async with sampler(tmp_path, [], f"2{END}", f"6{END}", **settings) as episodes:
        for row in ({"task": 4}, {"answer": "6"}):
            played, metrics = await play(episodes, row)
            await group(episodes, played)
            assert [c.reward for c in played.completions] == [1.0] * 2, read_jsonl(tmp_path / "events.jsonl")
            assert metrics["session/turns"] == 3 and metrics["session/branches"] == 1
        said = [m["content"] for m in played.completions[0].messages]
        assert said == ["2", "again", "6", "again", "6"]
    async with sampler(tmp_path, [], f"6{END}", **settings, max_turns=2) as episodes:
        played, metrics = await play(episodes, {"task": 4}, 1)
    assert metrics["session/ending/turn_limit"] == 1 and played.completions[0].reward == 1.0
