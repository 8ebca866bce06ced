"""Rewards that misuse their arguments, their results or their process: never a hang, never a wrong number."""

from __future__ import annotations

import asyncio
import json
import os
import time
from pathlib import Path
from typing import Any

import pytest

from rft.config.rewards import RewardConfig, RewardsConfig
from rft.rewards import RewardError, SampleReward, load_reward
from rft.rewards.runner import RewardRunner
from rft.tools.reward import main as reward_command
from tests.cases import hostile_rewards

HERE = Path(__file__).parent
PROMPTS = ["p", "q", "r"]
COMPLETIONS = ["c", "a", "b"]
ANSWERS = ["c", "a", "x"]
MESSAGES = [[{"role": "user", "content": text}] for text in PROMPTS]
EXTRA = [{"deep": {"list": [0]}} for _ in PROMPTS]
COLUMNS: dict[str, list[Any]] = {"answer": ANSWERS}


def config(names: list[str], *, timeout_s: float = 20, workers: int = 1, **options: Any) -> RewardsConfig:
    functions = [
        RewardConfig(function=f"hostile_rewards.py:{name}", name=name, timeout_s=timeout_s, options=options)
        for name in names
    ]
    return RewardsConfig(functions=functions, on_error="drop", on_timeout="drop", workers=workers)


async def scored(
    names: list[str], columns: dict[str, Any] = COLUMNS, messages: bool = False, **changes: Any
) -> list[SampleReward]:
    prompts, completions = (MESSAGES, MESSAGES) if messages else (PROMPTS, COMPLETIONS)
    async with RewardRunner(config(names, **changes), HERE) as runner, asyncio.timeout(120):
        return await runner.score(prompts, completions, columns)  # type: ignore[arg-type]


def values(rewards: list[SampleReward], name: str) -> list[float | None]:
    return [r.scores[name].value for r in rewards]


async def test_lists_are_the_functions_own() -> None:
    names = ["clears", "appends", "sorts", "kwargs_pop", "ones"]
    rewards = await scored(names)
    assert values(rewards, "sorts") == [1, 1, 0]
    assert all(values(rewards, name) == [1] * 3 for name in names if name != "sorts")
    names = ["nested", "nested_then_raises"]
    rewards = await scored(names, {"extra": EXTRA}, messages=True)
    assert all(values(rewards, name) == [1] * 3 for name in names)


async def test_the_case_that_hung_a_run() -> None:
    functions = [RewardConfig(function="reward_pops.py:pops")]
    async with (
        RewardRunner(RewardsConfig(functions=functions, workers=1), HERE) as runner,
        asyncio.timeout(60),
    ):
        assert [r.value for r in await runner.score(PROMPTS, ["a", "bb", "ccc"])] == [3, 2, 1]


def test_lists_of_a_caller_in_python_stay_whole() -> None:
    completions, answers = list(COMPLETIONS), list(ANSWERS)
    reward = load_reward("hostile_rewards.py:clears", base_dir=HERE)
    assert reward(PROMPTS, completions, answer=answers) == [1, 1, 1]
    assert (completions, answers) == (COMPLETIONS, ANSWERS)


async def test_results_that_are_no_numbers_are_errors_that_say_so() -> None:
    names = [f"returns_{name}" for name in hostile_rewards.RESULTS]
    rewards = await scored(names)
    for name in names:
        for reward in rewards:
            score = reward.scores[name]
            assert (score.value, score.outcome) == (None, "error"), (name, score)
            assert name in score.detail or "hostile_rewards.py" in score.detail or name.endswith("_value")
    names = [f"returns_{name}" for name in hostile_rewards.GOOD_RESULTS]
    rewards = await scored(names)
    assert all(reward.scores[name].outcome == "correct" for reward in rewards for name in names)


BROKEN = {
    "raises_base": "NotAnException: boo",
    "exits": "status 'bye'",
    "exits_0": "status 0",
    "interrupts": "KeyboardInterrupt",
    "recurses": "RecursionError",
    "endless_message": "ValueError: xxx",
    "hard_exit": "exited with status 0",
    "stops_its_loop": "Event loop stopped",
    "async_generator": "returned a async_generator",
    "bad_extra": "log_extra('first') got 1 values for 3 completions",
}
HARMLESS = (
    "forks leaves_children prints moves looks starts_threads closes_descriptors "
    "writes_descriptors closes_output ones"
)


async def test_what_ends_a_process_is_an_error_with_its_cause() -> None:
    rewards = await scored(list(BROKEN))
    for name, words in BROKEN.items():
        for reward in rewards:
            score = reward.scores[name]
            assert (score.value, score.outcome) == (None, "error"), (name, score)
            assert words in score.detail, score.detail[-500:]
            assert len(score.detail) < 25_000
    assert 'hostile_rewards.py", line ' in rewards[0].scores["raises_base"].detail
    assert "load.py" not in rewards[0].scores["raises_base"].detail


async def test_what_a_function_does_to_its_process_harms_no_other(capfd: pytest.CaptureFixture[str]) -> None:
    names = HARMLESS.split()
    async with RewardRunner(config(names), HERE) as runner, asyncio.timeout(120):
        for _ in range(2):
            rewards = await runner.score(PROMPTS, COMPLETIONS, COLUMNS)
            assert [r.value for r in rewards] == [float(len(names))] * 3, rewards
        assert runner.take_metrics()["reward/workers/crashed"] == 0
    assert capfd.readouterr().out == ""  # a command's output is its own


async def test_a_module_keeps_its_state_between_calls() -> None:
    async with RewardRunner(config(["counts"]), HERE) as runner:
        seen = [(await runner.score(["p"], ["c"]))[0].value for _ in range(3)]
    assert seen == [1, 2, 3]


@pytest.mark.parametrize("name", ["sleeps", "blocks", "waits_for_ever", "spins", "Slow"])
async def test_a_hang_says_where(name: str) -> None:
    async with RewardRunner(config([name], timeout_s=0.5), HERE) as runner, asyncio.timeout(60):
        score = (await runner.score(["p"], ["c"]))[0].scores[name]
    assert score.outcome == "timeout"
    if name != "waits_for_ever":
        lines = (HERE / "hostile_rewards.py").read_text().splitlines()
        number = int(score.detail.partition("hostile_rewards.py, line ")[2].partition(",")[0])
        assert lines[number - 1].strip() in ("time.sleep(100)", "while True:", "pass"), score.detail


async def test_arguments_of_every_kind() -> None:
    names = ["by_place", "by_name_only", "anything"]
    rewards = await scored(names)
    assert all(values(rewards, name) == [1, 1, 0] for name in names)
    rewards = await scored(["by_place_default", "more_by_place", "never_awaits"])
    assert [r.value for r in rewards] == [4, 4, 4]
    assert values(await scored(["by_place"], bonus=0.5), "by_place") == [0.5, 0.5, 0]


async def test_what_trl_gives_to_rewards() -> None:
    names = ["trl", "trl_kwargs"]
    async with RewardRunner(config(names), HERE, steps=8) as runner:
        ids = {"completion_ids": [[5, 6], [7], [8]]}
        rewards = await runner.score(PROMPTS, COMPLETIONS, info=ids, progress=0.25)
        metrics = runner.take_metrics()
        assert "reward/trl/logged/share" not in runner.take_metrics()
    assert values(rewards, "trl") == [0.25] * 3
    assert values(rewards, "trl_kwargs") == [2] * 3
    assert [r.scores["trl"].detail for r in rewards] == ["first: 5", "first: 7", "first: 8"]
    assert metrics["reward/trl/logged/share"] == 0.25
    assert metrics["reward/trl_kwargs/logged/share"] == 0.75


IMPORTS = {
    "raise": ("import os\n\nraise ValueError('no key')\n", 'bad.py", line 3', "no key"),
    "exit": ("import sys\nsys.exit(3)\n", 'bad.py", line 2', "status 3"),
    "base": ("raise BaseException('no')\n", 'bad.py", line 1', "BaseException: no"),
    "syntax": ("def f(:\n", 'bad.py", line 1', "SyntaxError"),
    "hang": ("import time\n\ntime.sleep(1000)\n", "bad.py, line 3", "start_timeout_s = 4"),
    "os_exit": ("import os\nos._exit(0)\n", "bad.py", "status 0"),
    "crash": ("import ctypes\nctypes.string_at(0)\n", "bad.py, line 2", "SIGSEGV"),
    "needs": ("import nothing_like_this\n", 'bad.py", line 1', "nothing_like_this"),
}


@pytest.mark.parametrize("kind", IMPORTS)
async def test_a_file_that_does_not_load_is_named_with_its_line(kind: str, tmp_path: Path) -> None:
    text, where, words = IMPORTS[kind]
    (tmp_path / "bad.py").write_text(text + "\ndef one(completions):\n    return [1.0] * len(completions)\n")
    functions = [RewardConfig(function="format"), RewardConfig(function="bad.py:one")]
    rewards = RewardsConfig(functions=functions, workers=1, start_timeout_s=4 if kind == "hang" else 120)
    with pytest.raises(RewardError) as caught:
        async with asyncio.timeout(60), RewardRunner(rewards, tmp_path):
            pass
    assert "bad.py:one" in str(caught.value)
    assert where in str(caught.value), caught.value
    assert words in str(caught.value), caught.value


def test_check_names_the_missing_column(tmp_path: Path) -> None:
    from rft.preflight.rewards import check_reward

    def problems(function: str, *, base: Path = HERE, **columns: str) -> list[str]:
        rewards = RewardsConfig(functions=[RewardConfig(function=function, columns=columns)])
        rows = {3: ["answer", "level"], 7: ["level"]}
        return check_reward(rewards, base, rows={"the training data": rows})

    (problem,) = problems("reward_trl_signature.py:by_truth")
    for words in ("'ground_truth'", "the training data has answer, level", "columns: {ground_truth: "):
        assert words in problem
    (problem,) = problems("reward_trl_signature.py:by_truth", ground_truth="answer")
    assert "1 of 2 rows of the training data lack (7)" in problem
    assert problems("reward_trl_signature.py:by_truth", ground_truth="level") == []
    for name in ("by_place", "by_name_only"):
        assert "(7)" in problems(f"hostile_rewards.py:{name}")[0]
    for name in ("anything", "trl", "trl_kwargs", "bad_extra", "by_place_default", "more_by_place", "ones"):
        assert problems(f"hostile_rewards.py:{name}") == []
    (tmp_path / "v.py").write_text("def compute_score(solution_str, ground_truth):\n    return 1.0\n")
    rewards = RewardsConfig(functions=[RewardConfig(function="verl:v.py:compute_score")])
    (problem,) = check_reward(rewards, tmp_path, ["solution"])
    assert "'ground_truth' or 'reward_model' or 'answer'" in problem


def test_the_clash_case(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(HERE / "clash")
    assert reward_command(["my_reward.py:reward", "two.jsonl"]) == 0
    assert reward_command(["math", "two.jsonl"]) == 0
    assert "correct" in capsys.readouterr().out


LINE = "json random numbers types logging torch re asyncio socket typing tempfile string numpy pydantic"
NAMES = LINE.split()
REAL = """
import helper, {names}

def reward(completions, **kwargs):
    assert helper.HERE and helper.folder.HERE
    assert not any(hasattr(m, "MINE") for m in ({names},))
    return [1.0] * len(completions)
"""


def test_files_beside_a_reward_called_like_modules(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name in NAMES if name != "torch"]  # it takes long to import
    for name in NAMES:
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "__init__.py").write_text("HERE = True\n")
    (tmp_path / "helper.py").write_text("import folder\nHERE = True\n")
    (tmp_path / "my_reward.py").write_text(REAL.format(names=", ".join(names)))
    (tmp_path / "f.jsonl").write_text(json.dumps({"completion": "#### 4", "answer": "4"}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")  # as in a notebook or `python -m`
    for spec in ("my_reward.py:reward", "my_reward:reward", "math"):
        assert reward_command([spec, "f.jsonl"]) == 0, capfd.readouterr()


@pytest.mark.parametrize("command", [["-P", "-m", "rft.cli"], None])
def test_the_command_line_among_such_files(command: list[str] | None, tmp_path: Path) -> None:
    import subprocess
    import sys

    for name in NAMES:
        (tmp_path / f"{name}.py").write_text("MINE = True\n")
    (tmp_path / "my_reward.py").write_text("def reward(completions):\n    return [1.0] * len(completions)\n")
    (tmp_path / "f.jsonl").write_text(json.dumps({"completion": "4"}))
    start = [sys.executable, *command] if command else [str(Path(sys.executable).with_name("rft"))]
    done = subprocess.run(
        [*start, "reward", "my_reward.py:reward", "f.jsonl"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "correct" in done.stdout


def test_no_process_is_left() -> None:
    """Whatever the functions above started ended with their worker."""
    time.sleep(0.2)

    def command(pid: str) -> bytes:
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes()
        except OSError:
            return b""

    assert not [p for p in os.listdir("/proc") if p.isdigit() and b"987.65" in command(p)]
