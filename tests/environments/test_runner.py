"""Episodes of every kind in real worker processes, with a session whose answers are scripted."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from rft.config.environment import EnvironmentConfig
from rft.config.rewards import RewardsConfig
from rft.environments.runner import EnvironmentRunner
from rft.environments.types import Ending, EnvironmentFault, Episode, Reply, ToolCall
from rft.rewards.runner import RewardRunner
from rft.utils.process import is_running
from tests.environments.scripted import ScriptedSession

HERE = Path(__file__).parent
ROW = {"prompt": "Guess my number.", "answer": "7"}
Make = Callable[..., EnvironmentRunner]


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def make() -> AsyncIterator[Make]:
    """Runners by their settings; `fresh`: one that no other test uses."""
    runners: dict[tuple[Any, ...], EnvironmentRunner] = {}

    def make(
        kind: str, path: str | None = None, tools: Any = (), *, fresh: bool = False, **keys: Any
    ) -> EnvironmentRunner:
        key = (kind, path, tools, str(keys), len(runners) if fresh else -1)
        if key not in runners:
            spec = None if path is None else f"samples.py:{path}" if ":" not in path else path
            names = [name if name in ("python", "calculator") else f"samples.py:{name}" for name in tools]
            config = EnvironmentConfig(kind=kind, path=spec, tools=names, **keys)  # type: ignore[arg-type]
            runners[key] = EnvironmentRunner(config, HERE)
        return runners[key]

    yield make
    pids = [pid for runner in runners.values() for pid in runner.pids]
    for runner in runners.values():
        await runner.close()
    assert not any(map(is_running, pids))


TOOLS = (
    "add", "slow_double", "raises", "calculator", "count", "eat_memory", "fork", "fork_bomb",
    "hang_with_child", "huge", "kill_itself", "kill_parent", "leak_thread", "leave", "leave_at_once",
    "leave_child", "move_away",
    "print_much", "random_number", "where_am_i", "write_garbage",
)  # fmt: skip
LIMITED: dict[str, Any] = {"step_timeout_s": 3.0, "worker_memory_gib": 0.3}
PYTHON: dict[str, Any] = {"tools": ("python",), "options": {"python": {"wall_s": 2.0}}}


def use(name: str, **arguments: Any) -> ToolCall:
    return ToolCall(name, arguments)


def contents(episode: Episode, role: str = "tool") -> list[str]:
    return [m["content"] for m in episode.messages if m["role"] == role]


# -- tools ---------------------------------------------------------------------------------------------


async def test_tools(make: Make) -> None:
    runner = make("tools", tools=TOOLS)
    both = Reply("", tool_calls=(use("add", a=1, b=2), use("slow_double", x=4)))
    session = ScriptedSession(
        both, use("raises"), use("add", a=1), use("ad", a=1), use("calculator", expression="2*(3+4)"), "done"
    )
    episode = await runner.run(ROW, session)
    assert episode.ending is Ending.finished and episode.reward is None
    sums, double, error, missing, unknown, calculated = contents(episode)
    assert (sums, double, calculated) == ("3", '{"double": 8}', "14")
    assert error == '{"error": "LookupError: no such page"}'
    assert "missing a required argument: 'b'" in missing
    assert "there is no tool 'ad' (did you mean 'add'" in unknown
    assert [t["function"]["name"] for t in session.tools] == [*TOOLS]
    assert session.tools[0]["function"]["parameters"]["properties"]["a"]["type"] == "integer"
    assert contents(episode, "assistant")[-1] == "done" and episode.start == 1
    metrics = runner.take_metrics()
    assert metrics["environment/tool_calls"] == 6 and metrics["environment/tool_errors"] == pytest.approx(0.5)


async def test_malformed_call_is_shown_to_the_policy(make: Make) -> None:
    session = ScriptedSession(Reply("<tool_call>{", error="not JSON"), "done")
    episode = await make("tools", tools=TOOLS).run(ROW, session)
    assert contents(episode) == ['{"error": "not JSON"}']


async def test_python_keeps_its_state_in_a_session_only(make: Make) -> None:
    runner = make("tools", **PYTHON)
    code = ("x = 20", "x + 1", "import os; os._exit(3)", "x")
    episode = await runner.run(ROW, ScriptedSession(*(use("python", code=c) for c in code), "done"))
    empty, value, ended, lost = contents(episode)
    assert (empty, value) == ("(no output)", "21")
    assert "variables are lost" in ended and "NameError" in lost
    again = await runner.run(ROW, ScriptedSession(use("python", code="x"), "done"))
    assert "NameError" in contents(again)[0]
    assert runner.counts["started"] == 1  # the sandbox is kept with its worker


async def test_python_that_overruns_is_stopped(make: Make) -> None:
    runner = make("tools", **PYTHON)
    session = ScriptedSession(use("python", code="while True: pass"), use("python", code="1 + 1"), "done")
    stopped, value = contents(await runner.run(ROW, session))
    assert "exceeded its limit" in stopped and value == "2"


async def test_random_draws_follow_the_sessions_seed(make: Make) -> None:
    runner = make("tools", tools=TOOLS)
    sessions = [ScriptedSession(use("random_number"), "done", seed=seed) for seed in (5, 5, 6)]
    drawn = [contents(await runner.run(ROW, session))[0] for session in sessions]
    assert drawn[0] == drawn[1] != drawn[2]


# -- class ---------------------------------------------------------------------------------------------


async def test_class_of_trl(make: Make) -> None:
    runner = make("class", "Guess")
    session = ScriptedSession(use("hint"), use("guess", number=3), use("guess", number=7), "It is 7.")
    episode = await runner.run(ROW, session)
    assert [t["function"]["name"] for t in runner.tools] == ["crash", "guess", "hint", "stuck"]
    assert session.seen[0][0]["content"] == "Guess my number. It is between 1 and 100."
    assert contents(episode) == ["odd", "larger", "right"]
    assert episode.reward == 0.5
    assert (await runner.run({**ROW, "answer": 9}, ScriptedSession("no idea"))).reward == 0.0


async def test_class_is_scored_at_the_turn_limit(make: Make) -> None:
    episode = await make("class", "Guess").run(ROW, ScriptedSession(use("guess", number=7)))
    assert (episode.ending, episode.reward) == (Ending.turn_limit, 1.0) and not episode.failed


async def test_factory_and_more_tools(make: Make) -> None:
    runner = make("class", "make_guess", tools=("add",))
    episode = await runner.run(ROW, ScriptedSession(use("add", a=3, b=4), use("guess", number=7), "done"))
    assert contents(episode) == ["7", "right"] and episode.reward == 1.0


@pytest.mark.parametrize(
    ("path", "reward", "scores"),
    [("NoReward", None, {}), ("NamedRewards", 1.5, {"format": 0.5, "answer": 1.0}), ("Abstains", None, {})],
)
async def test_rewards(make: Make, path: str, reward: float | None, scores: dict[str, float]) -> None:
    episode = await make("class", path).run(ROW, ScriptedSession("done"))
    assert (episode.reward, episode.scores, episode.ending) == (reward, scores, Ending.finished)


@pytest.mark.parametrize(
    ("kind", "path", "says"),
    [
        ("class", "NanReward", "get_reward returned nan (float) as its reward"),
        ("class", "RaisesInReset", "ConnectionError: no server"),
        ("text", "RaisesInTurnTwo", "RuntimeError: second turn"),
        ("text", "BadStep", "step returned 'done': return (observation, reward, terminated"),
    ],
)
async def test_environment_errors(make: Make, kind: str, path: str, says: str) -> None:
    episode = await make(kind, path).run(ROW, ScriptedSession("2", "1"))
    assert episode.ending is Ending.environment_error and episode.failed and episode.reward is None
    assert says in episode.detail


@pytest.mark.parametrize(
    ("kind", "path", "says"),
    [
        ("class", "StringReward", "get_reward returned 'good' (str) as its reward: return a finite number"),
        ("text", "StringStep", "step returned 'good' (str) as its reward"),
        ("function", "string_reward", "string_reward returned 'good' (str) as its reward"),
    ],
)
async def test_a_reward_of_a_wrong_type_ends_the_run(make: Make, kind: str, path: str, says: str) -> None:
    """It is an error of the environment's code, which playing again does not mend."""
    with pytest.raises(EnvironmentFault) as error:
        await make(kind, path).run(ROW, ScriptedSession("2", "1"))
    assert says in str(error.value)


async def test_faults_of_a_class_end_its_episode(make: Make) -> None:
    runner = make("class", "Guess", step_timeout_s=0.5)
    stuck, crash = await asyncio.gather(
        runner.run(ROW, ScriptedSession(use("stuck"), "done")),
        runner.run(ROW, ScriptedSession(use("crash"), "done")),
    )
    assert stuck.ending is Ending.timeout and "samples.py" in stuck.detail and "hang" in stuck.detail
    assert crash.ending is Ending.tool_error and "exited with status 5" in crash.detail
    assert (await runner.run(ROW, ScriptedSession(use("guess", number=7), "done"))).reward == 1.0


async def test_rewards_that_read_the_environments(make: Make) -> None:
    """As TRL calls them, where the instance is. A hang costs its state, so that later ones fail."""
    functions = [{"function": f"samples.py:{name}"} for name in ("solved", "tries", "text_length")]
    faulty = [{"function": f"samples.py:{name}"} for name in ("without_attribute", "stuck_reward")]
    later = [{"function": "samples.py:solved", "name": "later"}]
    runner = make("class", "Guess", fresh=True, step_timeout_s=2.0)
    async with RewardRunner(RewardsConfig.model_validate({"functions": functions}), HERE) as rewards:
        assert [c.label for c in rewards.in_environment] == ["solved", "tries"]
        runner.rewards = rewards.in_environment
        session = ScriptedSession(use("guess", number=3), use("guess", number=7), "It is 7.")
        episode = await runner.run(ROW, session)
        given = {label: [score] for label, score in episode.judged.items()}
        (reward,) = await rewards.score(["Guess my number."], ["It is 7."], given=given)
    assert {k: s.value for k, s in episode.judged.items()} == {"solved": 1.0, "tries": 2.5}  # 5 messages
    assert episode.scores == {"tries": 2.0} and episode.reward == 0.5
    assert list(reward.scores) == ["solved", "tries", "text_length"] and reward.value == 1.0 + 2.5 + 8.0
    runner.rewards = RewardsConfig.model_validate({"functions": faulty + later}).functions
    episode = await runner.run(ROW, ScriptedSession(use("guess", number=7), "done"))
    lost, hung, after = episode.judged.values()
    assert not episode.failed and episode.reward == 1.0
    assert (lost.value, lost.outcome) == (None, "error") and "has no attribute 'score'" in lost.detail
    assert (hung.value, hung.outcome) == (None, "timeout") and "step_timeout_s = 2 s" in hung.detail
    assert after.failed and after.detail.startswith("not called: ")


# -- text ----------------------------------------------------------------------------------------------


async def test_gymnasium(make: Make) -> None:
    session = ScriptedSession("2", "5", "0")
    episode = await make("text", "Countdown").run(ROW, session)
    assert session.seen[0][0]["content"] == "Guess my number.\n\nCount down from 2."
    assert contents(episode, "user")[1:] == ["next", "next"]
    assert session.rewards == [(0.5, "reward", 0), (0.0, "reward", 1), (0.5, "reward", 2)]
    assert episode.reward == 1.0 and episode.ending is Ending.finished


async def test_columns_by_name_and_four_values(make: Make) -> None:
    episode = await make("text", "OldGym").run(ROW, ScriptedSession("6", "7"))
    assert episode.reward == 1.0 and contents(episode, "user")[-1] == "again"


async def test_skyrl(make: Make) -> None:
    session = ScriptedSession("a", "b", "c")
    episode = await make("text", "SkyRL", max_turns=2).run(ROW, session)
    assert [m["content"] for m in session.seen[1]] == ["Be brief.", "Guess my number.", "A", "more"]
    assert episode.reward == 2.0 and episode.scores == {"steps": 2.0}


async def test_textarena(make: Make) -> None:
    episode = await make("text", "Arena").run(ROW, ScriptedSession("a", "b"))
    assert contents(episode, "user") == ["Guess my number.\n\nround 0", "round 1"]
    assert episode.reward == 0.75


async def test_text_at_the_turn_limit(make: Make) -> None:
    episode = await make("text", "Countdown").run(ROW, ScriptedSession("2"))
    assert (episode.ending, episode.reward) == (Ending.turn_limit, 0.5)


async def test_reasoning_gym(make: Make) -> None:
    from rft.tasks.reasoning_gym import ReasoningGym

    (row,) = ReasoningGym(task="chain_sum").rows("train", 1, seed=3)
    runner = make("reasoning_gym", options={"tries": 3, "discount": 0.5})
    session = ScriptedSession("I do not know", "<answer>-1</answer>", f"<answer>{row['answer']}</answer>")
    episode = await runner.run(row, session)
    question, unparsed, wrong = contents(episode, "user")
    assert question == row["prompt"]
    assert "no answer in your message" in unparsed and "2 tries left" in unparsed
    assert wrong == "The answer -1 is wrong. Try again; you have 1 try left."
    assert episode.reward == 0.25 and session.rewards[-1] == (0.25, "reward", 2)
    missed = await runner.run(row, ScriptedSession(*["<answer>-1</answer>"] * 3))
    assert missed.reward == 0.0 or missed.reward < 0.25
    assert missed.ending is Ending.finished


# -- function ------------------------------------------------------------------------------------------


async def test_function(make: Make) -> None:
    session = ScriptedSession("6", "7")
    episode = await make("function", "two_turns", options={"bonus": 0.5}).run(ROW, session)
    assert episode.reward == 1.5 and episode.scores == {"length": 2.0}
    assert session.rewards == [(0.25, "reward", 1), (2.0, "length", None)]
    assert [m["content"] for m in episode.messages] == ["Guess my number.", "6", "sure?", "7"]
    assert episode.start == 1


async def test_function_that_lets_the_limit_pass(make: Make) -> None:
    episode = await make("function", "turn_rewards").run(ROW, ScriptedSession("a", "b"))
    assert (episode.ending, episode.reward) == (Ending.turn_limit, 1.0)


async def test_parallel_calls_and_tokens(make: Make) -> None:
    session = ScriptedSession(*(lambda m: m[0]["content"] for _ in range(4)))
    episode = await make("function", "in_parallel").run(ROW, session)
    assert episode.reward == 0.5 and episode.scores == {"answers": 4.0, "reward": 0.5}
    episode = await make("function", "tokens").run(ROW, ScriptedSession())
    assert episode.reward == 1.0, episode.detail


async def test_errors_of_the_session(make: Make) -> None:
    runner = make("function", "two_turns")
    episode = await runner.run(ROW, ScriptedSession(ValueError("messages must alternate")))
    assert episode.ending is Ending.environment_error and "messages must alternate" in episode.detail
    with pytest.raises(ConnectionError, match="engine"):
        await runner.run(ROW, ScriptedSession(ConnectionError("the engine died")))
    assert (await runner.run(ROW, ScriptedSession("7", "7"))).reward == 1.0


async def test_deadlines(make: Make) -> None:
    started = time.monotonic()
    hung = await make("function", "hangs", step_timeout_s=0.5).run(ROW, ScriptedSession("x"))
    assert hung.ending is Ending.timeout and "step_timeout_s = 0.5 s" in hung.detail and "hang" in hung.detail
    setup = await make("class", "HangsInReset", setup_timeout_s=0.5).run(ROW, ScriptedSession("x"))
    assert setup.ending is Ending.timeout and "setup_timeout_s = 0.5 s" in setup.detail
    slow = ScriptedSession(*"abcdefgh", delay_s=0.3)
    episode = make("function", "turn_rewards", episode_timeout_s=1.0, step_timeout_s=0.2, setup_timeout_s=0.5)
    late = await episode.run(ROW, slow)  # the model's time counts for the episode, not for a step
    assert late.ending is Ending.timeout and "episode_timeout_s = 1 s" in late.detail
    assert time.monotonic() - started < 20


# -- hostile tools -------------------------------------------------------------------------------------


async def test_hang_is_killed_with_its_children(make: Make, tmp_path: Path) -> None:
    runner = make("tools", tools=TOOLS, **LIMITED)
    pid_file = tmp_path / "pid"
    session = ScriptedSession(use("hang_with_child", path=str(pid_file)), use("add", a=1, b=1), "done")
    episode = await runner.run(ROW, session)
    error, value = contents(episode)
    assert "did not return within 3 s and was stopped" in error and value == "2"
    assert not is_running(int(pid_file.read_text()))
    assert runner.counts["killed"] >= 1


async def test_daemon_ends_with_the_episode(make: Make, tmp_path: Path) -> None:
    runner = make("tools", tools=TOOLS)
    pid_file = tmp_path / "pid"
    await runner.run(ROW, ScriptedSession(use("leave_child", path=str(pid_file)), "done"))
    assert not is_running(int(pid_file.read_text()))


async def test_hostile_tools(make: Make, capfd: pytest.CaptureFixture[str]) -> None:
    names = (
        "fork",
        "fork_bomb",
        "print_much",
        "kill_itself",
        "leave",
        "leave_at_once",
        "write_garbage",
        "huge",
    )
    runner = make("tools", tools=TOOLS, **LIMITED)
    results = {}
    for name in names:
        session = ScriptedSession(use(name), use("add", a=1, b=1), "done")
        episode = await runner.run(ROW, session)
        assert episode.ending is Ending.finished, (name, episode.detail)
        results[name], after = contents(episode)
        assert after == "2", name
    assert results["fork"].startswith("forked in")
    assert "was stopped" in results["fork_bomb"]
    assert results["print_much"] == "printed"
    assert "SIGKILL" in results["kill_itself"]
    assert "SystemExit: 3" in results["leave"]
    assert "exited with status 4" in results["leave_at_once"]
    assert "something other than messages" in results["write_garbage"] or "error" in results["write_garbage"]
    assert "the limit is" in results["huge"]
    assert "noise" not in capfd.readouterr().out


async def test_memory_limit(make: Make) -> None:
    runner = make("tools", tools=TOOLS, **{**LIMITED, "step_timeout_s": 30.0})
    session = ScriptedSession(use("eat_memory"), use("add", a=1, b=1), "done")
    error, value = contents(await runner.run(ROW, session))
    assert "more memory than environment.worker_memory_gib = 0.3" in error and value == "2"


async def test_worker_that_kills_the_zygote(make: Make) -> None:
    runner = make("tools", tools=TOOLS, **LIMITED)
    session = ScriptedSession(use("kill_parent"), use("add", a=1, b=1), "done")
    error, value = contents(await runner.run(ROW, session))
    assert "the process that forked it ended" in error and value == "2"


async def test_a_worker_is_used_again_only_if_clean(make: Make) -> None:
    runner = make("tools", tools=TOOLS)

    async def result(name: str) -> str:
        return contents(await runner.run(ROW, ScriptedSession(use(name), "done")))[0]

    moved = await result("move_away")
    again = await result("where_am_i")  # the same process, in its own folder again
    assert again.split()[-1] == moved.split()[-1] and again.split()[1] == "None"
    assert again.split()[0] != "/"
    leaked = await result("leak_thread")
    assert (await result("where_am_i")).split()[-1] != leaked.split()[-1]
    assert [await result("count"), await result("count")] == ["1", "2"]


async def test_recycling(make: Make) -> None:
    runner = make("tools", tools=("count",), recycle_after=1)
    counts = [contents(await runner.run(ROW, ScriptedSession(use("count"), "done")))[0] for _ in range(3)]
    assert counts == ["1", "1", "1"] and runner.counts["recycled"] == 3


async def test_concurrency(make: Make) -> None:
    runner = make("function", "two_turns", concurrency=8)
    sessions = [ScriptedSession("6", "7", delay_s=0.05) for _ in range(24)]
    episodes = await asyncio.gather(*(runner.run(ROW, session) for session in sessions))
    assert [e.reward for e in episodes] == [1.0] * 24
    assert runner.counts["started"] <= 8 and len(runner.pids) <= 8


async def test_cancelled_episode_frees_its_worker(make: Make) -> None:
    runner = make("function", "two_turns", concurrency=1)
    task = asyncio.create_task(runner.run(ROW, ScriptedSession("6", "7", delay_s=30)))
    await asyncio.sleep(0.5 if runner.tools else 3.0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (await runner.run(ROW, ScriptedSession("6", "7"))).reward == 1.0


# -- loading -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "path", "tools", "says"),
    [
        ("tools", None, ("no_annotations",), "no_annotations needs an annotation for each parameter"),
        ("tools", None, ("undescribed",), "no description for the argument 'a'"),
        ("tools", None, ("add", "other.add"), "two tools are called 'add'"),
        ("tools", None, ("ad",), "has no function or class 'ad' (did you mean 'add'"),
        ("class", "NoReset", (), "has no `reset`"),
        ("class", "Guess", ("add", "add"), "two tools are called 'add'"),
        ("text", "NoReset", (), "has neither `reset` nor `init`"),
        ("class", "AnnotatedText", (), "AnnotatedText.get_reward is annotated to return text as its reward"),
        ("function", "annotated_text", (), "annotated_text is annotated to return text as its reward"),
        ("text", "NoStep", (), "has no `step(text)`, which a text environment needs"),
        ("function", "not_async", (), "must be an async function"),
        ("function", "missing.py:f", (), "no file"),
    ],
)
async def test_loading_errors(
    make: Make, kind: str, path: str | None, tools: tuple[str, ...], says: str
) -> None:
    with pytest.raises(EnvironmentFault) as error:
        await make(kind, path, tools).start()
    assert says in str(error.value)


async def test_threads_started_by_loading_are_not_forked(make: Make, tmp_path: Path) -> None:
    (tmp_path / "threaded.py").write_text(
        "import threading, time\n"
        "threading.Thread(target=time.sleep, args=(1000,), daemon=True).start()\n"
        "def threads() -> int:\n"
        "    'Count the threads.'\n"
        "    return threading.active_count()\n"
    )
    config = EnvironmentConfig(kind="tools", tools=[f"{tmp_path}/threaded.py:threads"])
    async with EnvironmentRunner(config, HERE) as runner:
        assert not runner.spec.preload
        episode = await runner.run(ROW, ScriptedSession(use("threads"), "done"))
        assert contents(episode) == ["2"]


async def test_loading_that_hangs(make: Make, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import time\ntime.sleep(1000)\n")
    config = EnvironmentConfig(kind="function", path=f"{tmp_path}/slow.py:f", load_timeout_s=1.0)
    with pytest.raises(EnvironmentFault, match=r"load_timeout_s = 1 s; it was at .*slow.py, line 2"):
        await EnvironmentRunner(config).start()
