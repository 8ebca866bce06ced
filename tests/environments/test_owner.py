"""If the controller is killed, workers, the process that forks them, and all their children end."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

from rft.config.environment import EnvironmentConfig
from rft.environments.runner import EnvironmentRunner
from rft.environments.types import ToolCall
from rft.utils.process import children, is_running
from tests.environments.scripted import ScriptedSession

HERE = Path(__file__).parent


async def hang(folder: Path) -> None:
    """Play two episodes whose tools hang with a child in another session, and print all process ids."""
    config = EnvironmentConfig(kind="tools", tools=["samples.py:hang_with_child"])
    files = [folder / "a", folder / "b"]
    async with EnvironmentRunner(config, HERE) as runner:
        calls = [ToolCall("hang_with_child", {"path": str(file)}) for file in files]
        playing = [asyncio.create_task(runner.run({"prompt": "x"}, ScriptedSession(call))) for call in calls]
        while not all(file.exists() and file.read_text() for file in files):
            await asyncio.sleep(0.02)
        forks = {child for pid in runner.pids for child in children(pid)}
        assert runner._zygote is not None
        print(*runner.pids, *forks, runner._zygote.process.pid, flush=True)
        await asyncio.gather(*playing)


def test_nothing_outlives_a_killed_controller(tmp_path: Path) -> None:
    assert_nothing_outlives("tests.environments.test_owner", tmp_path, 5)


def assert_nothing_outlives(module: str, folder: Path, count: int) -> None:
    """Run a module as a controller, which prints `count` process ids, and kill it: all of them end."""
    command = [sys.executable, "-m", module, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=HERE.parents[1]) as controller:
        assert controller.stdout is not None
        pids = [int(pid) for pid in controller.stdout.readline().split()]
        assert len(pids) == count and all(map(is_running, pids))
        controller.kill()
    deadline = time.monotonic() + 60
    while any(map(is_running, pids)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(map(is_running, pids))


if __name__ == "__main__":
    asyncio.run(hang(Path(sys.argv[1])))
