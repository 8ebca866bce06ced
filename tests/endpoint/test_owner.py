"""If the controller is killed, programs of kind command end with all that they started."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

from rft.config.environment import EnvironmentConfig
from rft.environments.runner import EnvironmentRunner, Remote
from tests.environments.scripted import ScriptedSession
from tests.environments.test_owner import assert_nothing_outlives

ROOT = Path(__file__).parents[2]
HANG = "echo $$ >> pids; sleep 1000 & echo $! >> pids; setsid sleep 1000 & echo $! >> pids; wait"


async def hang(folder: Path) -> None:
    """Run a program that hangs with a child in its group and one outside, and print all process ids."""
    config = EnvironmentConfig(kind="command", command=["bash", "-c", HANG])
    async with EnvironmentRunner(config, ROOT) as runner:
        remote = Remote(runner, ScriptedSession())
        playing = asyncio.create_task(remote.call("run", {"prompt": "x"}, {}, str(folder)))
        file = folder / "pids"
        while not file.exists() or len(file.read_text().split()) < 3:
            await asyncio.sleep(0.02)
        print(*file.read_text().split(), *runner.pids, flush=True)
        await playing


def test_nothing_outlives_a_killed_controller(tmp_path: Path) -> None:
    assert_nothing_outlives("tests.endpoint.test_owner", tmp_path, 4)


if __name__ == "__main__":
    asyncio.run(hang(Path(sys.argv[1])))
