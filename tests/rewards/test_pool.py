"""Worker processes and the error policy: rewards that hang, crash, raise, or return garbage."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rft.config.rewards import RewardConfig, RewardsConfig
from rft.rewards import Outcome, RewardError, SampleReward
from rft.rewards.runner import RewardRunner
from rft.utils.process import is_running
from rft.utils.signals import StopSignals

HERE = Path(__file__).parent


def config(function: str, **changes: Any) -> RewardsConfig:
    own = {k: changes.pop(k) for k in ("timeout_s", "batch_size", "options") if k in changes}
    own["columns"] = changes.pop("rename", {})
    spec = function if ":" in function else f"custom_rewards.py:{function}"
    changes = {"on_error": "drop", "on_timeout": "drop", **changes}
    return RewardsConfig(functions=[RewardConfig(function=spec, name="r", **own)], **changes)


async def score(
    function: str, completions: list[str], columns: dict[str, list[Any]] | None = None, **changes: Any
) -> list[SampleReward]:
    async with RewardRunner(config(function, **changes), HERE) as runner:
        return await runner.score(["p"] * len(completions), completions, columns)


def values(rewards: list[SampleReward]) -> list[float | None]:
    return [r.value for r in rewards]


def outcomes(rewards: list[SampleReward]) -> list[str]:
    return [r.scores["r"].outcome.value for r in rewards]


def sleepers() -> list[str]:
    return [p for p in os.listdir("/proc") if p.isdigit() and b"987.65" in _cmdline(p)]


def _cmdline(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


async def test_plain_functions_columns_options_async_and_classes() -> None:
    assert values(await score("length", ["a", "bbb"])) == [1.0, 3.0]
    columns = {"answer": ["a", "x", "skip"], "other": [1, 2, 3]}
    rewards = await score("with_columns", ["a", "b", "c"], columns)
    assert values(rewards) == [1.0, 0.0, None]
    assert outcomes(rewards) == ["correct", "wrong", "abstain"]
    assert values(await score("with_option", ["a"], options={"factor": 2.5})) == [2.5]
    assert values(await score("in_time", ["a", "b"])) == [1.0, 1.0]
    assert values(await score("Counter", ["a"], workers=1, options={"start": 4})) == [5.0]
    verl = await score("verl:custom_rewards.py:compute_score", ["4", "5"], {"ground_truth": ["4", "4"]})
    assert values(verl) == [1.0, 0.0]


async def test_stop_signals_are_the_default_ones_in_a_worker() -> None:
    """Though the run blocks them: a reward may end its programs with them."""
    with StopSignals():
        rewards = await score("ends_a_program", ["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1", "SIGUSR2"])
    assert values(rewards) == [1.0] * 5


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
async def test_a_stop_signal_ends_a_worker_without_a_traceback(
    name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """A job scheduler sends it to every process of a run, which then says once that it stops."""
    async with RewardRunner(config("length", workers=1), HERE) as runner:
        (pid,) = runner.pids
        os.kill(pid, signal.Signals[name])
        async with asyncio.timeout(10):
            while is_running(pid):
                await asyncio.sleep(0.01)
    assert capfd.readouterr().err == ""


async def test_a_hang_is_a_timeout_and_takes_its_children_along() -> None:
    rewards = await score("hangs", ["a", "b", "hang", "c", "d", "e"], timeout_s=0.6)
    assert values(rewards) == [1.0, 1.0, None, 1.0, 1.0, 1.0]
    assert outcomes(rewards)[2] == "timeout"
    assert "timeout_s = 0.6" in rewards[2].scores["r"].detail
    assert sleepers() == []


async def test_a_hang_that_holds_the_interpreter_is_killed_too() -> None:
    rewards = await score("hangs_in_c", ["hang", "b"], timeout_s=0.6, batch_size=1)
    assert outcomes(rewards) == ["timeout", "correct"]


@pytest.mark.parametrize(("function", "words"), [("crashes", "SIGSEGV"), ("exits", "status 3")])
async def test_a_crash_is_isolated(function: str, words: str) -> None:
    rewards = await score(function, ["a", "bad", *"cdefgh"])
    assert values(rewards) == [1.0, None] + [1.0] * 6
    assert outcomes(rewards)[1] == "error"
    assert words in rewards[1].scores["r"].detail


async def test_a_raise_costs_its_own_sample_only() -> None:
    rewards = await score("raises", ["a", "b", "bad", "c"])
    assert values(rewards) == [1.0, 1.0, None, 1.0]
    assert "the missing key" in rewards[2].scores["r"].detail


@pytest.mark.parametrize(("function", "words"), [("too_few", "values for"), ("not_a_list", "not a list")])
async def test_a_result_of_the_wrong_shape_is_an_error_for_all(function: str, words: str) -> None:
    rewards = await score(function, ["a", "b", "c"])
    assert values(rewards) == [None] * 3
    assert all(words in r.scores["r"].detail for r in rewards)


async def test_garbage_is_an_error_and_none_abstains() -> None:
    rewards = await score("garbage", ["nan", "inf", "text", "list", "none", "bool", "fine"])
    assert values(rewards) == [None, None, None, None, None, 1.0, 0.5]
    assert outcomes(rewards) == ["error"] * 4 + ["abstain", "correct", "correct"]


async def test_a_worker_killed_in_mid_call_is_replaced() -> None:
    async with RewardRunner(config("slow", batch_size=1), HERE) as runner:
        before = runner.pids
        call = asyncio.create_task(runner.score(["p"] * 4, list("abcd")))
        await asyncio.sleep(0.2)
        os.kill(before[0], signal.SIGKILL)
        rewards = await call
        assert sorted(outcomes(rewards)) == ["correct", "correct", "correct", "error"]
        again = await runner.score(["p"] * 4, list("abcd"))
        assert values(again) == [1.0] * 4
        assert len(runner.pids) == 2
        assert before[0] not in runner.pids


FALLS = """
import os, signal
from pathlib import Path

deaths = Path(__file__).with_suffix(".deaths")
done = len(deaths.read_text()) if deaths.exists() else 0
if done < {times}:
    deaths.write_text("x" * (done + 1))
    os.kill(os.getpid(), signal.SIGKILL)

def one(prompts, completions):
    return [1.0] * len(completions)
"""


async def test_a_worker_killed_while_it_loads_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "falls.py").write_text(FALLS.format(times=2))
    async with RewardRunner(config("falls.py:one", workers=1), tmp_path) as runner:
        assert values(await runner.score(["p"], ["a"])) == [1.0]
        assert runner.take_metrics()["reward/workers/crashed"] == 2


async def test_rewards_that_kill_whoever_loads_them_stop_the_start(tmp_path: Path) -> None:
    (tmp_path / "falls.py").write_text(FALLS.format(times=99))
    with pytest.raises(RewardError, match=r"3 reward workers in a row died while they loaded .* by SIGKILL"):
        async with RewardRunner(config("falls.py:one", workers=1), tmp_path):
            pass


async def test_workers_are_recycled() -> None:
    async with RewardRunner(config("pid", workers=1, recycle_after=4), HERE) as runner:
        seen = {(await runner.score(["p"] * 2, ["a", "b"]))[0].value for _ in range(6)}
        assert len(seen) == 3
        async with asyncio.timeout(10):  # the last is replaced after its results are handed out
            while runner.take_metrics()["reward/workers/recycled"] < 3:
                await asyncio.sleep(0.01)


async def test_calls_overlap() -> None:
    async with RewardRunner(config("slow", workers=2, batch_size=1), HERE) as runner:
        start = time.monotonic()
        await asyncio.gather(runner.score(["p"], ["a"]), runner.score(["p"], ["b"]))
        assert time.monotonic() - start < 0.75


async def test_close_leaves_no_process_even_in_mid_call() -> None:
    runner = RewardRunner(config("hangs"), HERE)
    await runner.start()
    pids = runner.pids
    call = asyncio.create_task(runner.score(["p"], ["hang"]))
    await asyncio.sleep(0.5)
    assert sleepers()
    await runner.close()
    with pytest.raises(RuntimeError, match="closed"):
        await call
    assert not any(map(is_running, pids))
    assert sleepers() == []


HOLDS = """
import time

def one(prompts, completions):
    held = bytearray(b"x" * (700 << 20))
    open(__file__ + ".holds", "x").close()
    time.sleep(100)
"""


async def test_close_waits_for_the_death_of_what_it_kills(tmp_path: Path) -> None:
    """The more memory a process holds, the longer the kernel takes to end it."""
    (tmp_path / "holds.py").write_text(HOLDS)
    runner = RewardRunner(config("holds.py:one", workers=1), tmp_path)
    await runner.start()
    pids = runner.pids
    call = asyncio.create_task(runner.score(["p"], ["a"]))
    async with asyncio.timeout(20):
        while not (tmp_path / "holds.py.holds").exists():
            await asyncio.sleep(0.01)
    await runner.close()
    assert not any(map(is_running, pids))
    with pytest.raises(RuntimeError, match="closed"):
        await call


@pytest.mark.parametrize("completion", ["hang", "a"])
@pytest.mark.parametrize("function", ["hangs", "hangs_in_c"])
def test_a_killed_parent_leaves_no_process(function: str, completion: str) -> None:
    program = f"""
import asyncio, sys
sys.path.insert(0, {str(HERE)!r})
from test_pool import RewardRunner, config, HERE
async def main():
    runner = RewardRunner(config({function!r}), HERE)
    await runner.start()
    print(*runner.pids, flush=True)
    await runner.score(["p"], [{completion!r}])
    await asyncio.sleep(100)
asyncio.run(main())
"""
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pids = [int(p) for p in parent.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.7)
    parent.kill()
    parent.wait()
    end = time.monotonic() + 10
    while (any(map(is_running, pids)) or sleepers()) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(map(is_running, pids))
    assert sleepers() == []


async def test_workers_do_not_load_torch_and_the_parent_may_have_it() -> None:
    import torch  # noqa: F401 - the parent's modules must not reach the workers

    assert values(await score("torch_loaded", ["a"])) == [0.0]


async def test_stop_raises_with_traceback_sample_and_threshold() -> None:
    with pytest.raises(RewardError) as caught:
        await score("raises", ["a", "bad"], on_error="stop")
    text = str(caught.value)
    assert all(
        word in text for word in ("the missing key", "Traceback", "'bad'", "on_error: stop", "max_errors: 0")
    )


async def test_a_fraction_of_errors_is_tolerated_and_no_more() -> None:
    batch = ["bad"] + ["a"] * 9
    policy = {"max_fraction": 0.15}
    rewards = await score("raises", batch, on_error=policy)
    assert values(rewards) == [None] + [1.0] * 9
    with pytest.raises(RewardError, match=r"max_fraction: 0\.15"):
        await score("raises", ["bad", "bad", *batch[2:]], on_error=policy)
    rewards = await score("raises", ["bad", "bad", *batch[2:]], on_error=policy, max_errors=2)
    assert values(rewards).count(None) == 2


async def test_timeouts_have_a_policy_of_their_own() -> None:
    with pytest.raises(RewardError, match="on_timeout: stop"):
        await score("hangs", ["hang"], timeout_s=0.3, on_timeout="stop", max_timeouts=0)


async def test_metrics_count_outcomes_per_component() -> None:
    async with RewardRunner(config("garbage"), HERE) as runner:
        await runner.score(["p"] * 4, ["nan", "none", "bool", "fine"])
        metrics = runner.take_metrics()
        assert metrics["reward/r/error"] == 1
        assert metrics["reward/r/abstain"] == 1
        assert metrics["reward/r/mean"] == pytest.approx(0.75)
        assert metrics["reward/dropped"] == 2
        assert runner.take_metrics()["reward/r/error"] == 0


async def test_mistakes_in_a_call_are_named() -> None:
    async with RewardRunner(config("with_columns"), HERE) as runner:
        with pytest.raises(RewardError, match=r"needs the column .answer.; the columns are gold"):
            await runner.score(["p"], ["a"], {"gold": ["a"]})
        with pytest.raises(ValueError, match="'answer' has 2 values for 1 completions"):
            await runner.score(["p"], ["a"], {"answer": ["a", "b"]})
    renamed = await score("with_columns", ["a"], {"gold": ["a"]}, rename={"answer": "gold"})
    assert values(renamed) == [1.0]


async def test_a_reward_that_does_not_load_stops_the_start() -> None:
    with pytest.raises(RewardError, match=r"has no function or class 'lenght' \(did you mean 'length'"):
        await score("lenght", ["a"])


async def test_outcome_of_an_empty_call() -> None:
    assert await score("length", []) == []
    assert Outcome("correct") is Outcome.correct


@pytest.mark.parametrize("end", ["", "exit", "kill", "crash"])
async def test_a_daemon_of_a_reward_ends_with_its_worker(end: str) -> None:
    """Also where the worker was killed, or ended itself, before anybody could look for it."""
    async with RewardRunner(config("daemonises", workers=1), HERE) as runner:
        (reward,) = await runner.score(["p"], [end])
        assert reward.value == (None if end else 1.0)
        if not end:
            assert len(sleepers()) == 1
    deadline = time.monotonic() + 20
    while sleepers() and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    assert sleepers() == []


@pytest.mark.parametrize("where", ["worker", "child"])
async def test_a_worker_that_holds_too_much_memory_is_replaced_and_says_so(where: str) -> None:
    settings = config("holds_memory", workers=1, worker_memory_gib=0.5, timeout_s=50, batch_size=1)
    async with RewardRunner(settings, HERE) as runner:
        rewards = await runner.score(["p"] * 3, ["worker 1", f"{where} 700", "worker 1"])
    assert values(rewards) == [1.0, None, 1.0]
    assert "rewards.worker_memory_gib = 0.5" in rewards[1].scores["r"].detail
