"""Environments and tools of the tests, well-behaved and hostile."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from typing import Any

# -- tools -----------------------------------------------------------------------------------------------


def add(a: int, b: int) -> int:
    """Add two numbers.

    Args:
        a: the first
        b: the second
    """
    return a + b


async def slow_double(x: int) -> dict[str, int]:
    """Double a number, after a pause.

    Args:
        x: the number
    """
    await asyncio.sleep(0.01)
    return {"double": 2 * x}


counter = 0


def count() -> int:
    """Count the calls in this process."""
    global counter
    counter += 1
    return counter


def hang() -> str:
    """Never return."""
    while True:
        time.sleep(1)


def hang_with_child(path: str) -> str:
    """Start a process in a session apart, then never return.

    Args:
        path: where to write its process id
    """
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    with open(path, "w") as file:
        file.write(str(child.pid))
    return hang()


def leave_child(path: str) -> str:
    """Leave a daemon behind.

    Args:
        path: where to write its process id
    """
    child = subprocess.Popen(["sleep", "1000"], start_new_session=True)
    with open(path, "w") as file:
        file.write(str(child.pid))
    return "started"


def fork() -> str:
    """Return twice."""
    os.fork()
    return f"forked in {os.getpid()}"


def fork_bomb() -> str:
    """Start many processes, then hang."""
    for _ in range(20):
        if os.fork() == 0:
            time.sleep(1000)
    return hang()


def eat_memory() -> str:
    """Hold ever more memory."""
    held = []
    while True:
        held.append(bytearray(8 << 20))
        time.sleep(0.01)


def print_much() -> str:
    """Write to stdout, by Python and by descriptor."""
    print("noise" * 1000)
    os.write(1, b"more noise")
    sys.stdout.close()
    return "printed"


def kill_itself() -> str:
    """End the process by a signal."""
    os.kill(os.getpid(), signal.SIGKILL)
    return "unreachable"


def kill_parent() -> str:
    """End the process that forked this one."""
    os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(100)
    return "unreachable"


def leave() -> str:
    """Exit Python."""
    sys.exit(3)


def leave_at_once() -> str:
    """Exit the process."""
    os._exit(4)


def leak_thread() -> str:
    """Start a thread that never ends."""
    threading.Thread(target=hang, daemon=True).start()
    return f"in {os.getpid()}"


def move_away() -> str:
    """Change working folder and environment."""
    os.chdir("/")
    os.environ["RFT_TEST_MOVED"] = "1"
    return f"{os.getcwd()} {os.getpid()}"


def where_am_i() -> str:
    """Return working folder and environment."""
    return f"{os.getcwd()} {os.environ.get('RFT_TEST_MOVED')} {os.getpid()}"


def write_garbage() -> str:
    """Write to every descriptor."""
    for fd in range(3, 1024):
        with contextlib.suppress(OSError):
            os.write(fd, b"garbage")
    return "written"


def huge() -> str:
    """Return more than a message may hold."""
    return "x" * (17 << 20)


def raises() -> str:
    """Raise an error."""
    raise LookupError("no such page")


def random_number() -> float:
    """Draw a number."""
    import random

    return random.random()


def no_annotations(a, b):  # type: ignore[no-untyped-def]
    """Add.

    Args:
        a: one
        b: other
    """
    return a + b


def undescribed(a: int) -> int:
    """Return a number."""
    return a


class other:
    @staticmethod
    def add(a: int) -> int:
        """Another tool of this name.

        Args:
            a: a number
        """
        return a


# -- TRL's environment class ---------------------------------------------------------------------------


class Guess:
    """A number to guess, in the shape of TRL's environment classes."""

    def __init__(self, largest: int = 100) -> None:
        self.largest = largest
        self.tries = 0

    def reset(self, **row: Any) -> str | None:
        self.answer = int(row["answer"])
        self.tries, self.solved = 0, False
        return f" It is between 1 and {self.largest}."

    def guess(self, number: int) -> str:
        """Guess the number.

        Args:
            number: the guess

        Returns:
            Whether the number is larger or smaller.
        """
        self.tries += 1
        self.solved = number == self.answer
        return "right" if self.solved else "larger" if self.answer > number else "smaller"

    async def hint(self) -> str:
        """Return whether the number is even."""
        await asyncio.sleep(0)
        return "even" if self.answer % 2 == 0 else "odd"

    def stuck(self) -> str:
        """Never return."""
        return hang()

    def crash(self) -> str:
        """End the process."""
        os._exit(5)

    def get_reward(self) -> float:
        return float(self.solved) / max(1, self.tries)

    def _private(self) -> None: ...


def solved(environments: list[Guess], **columns: Any) -> list[float]:
    """A reward of TRL that reads the environments."""
    return [float(environment.solved) for environment in environments]


async def tries(prompts: Any, completions: Any, environments: Any, answer: Any, **more: Any) -> list[float]:
    assert prompts == ["Guess my number."] and answer == ["7"]
    more["log_metric"]("tries", environments[0].tries)
    return [float(len(completion)) / e.tries for completion, e in zip(completions, environments, strict=True)]


def text_length(completions: list[str], **columns: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


def without_attribute(environments: Any, **columns: Any) -> list[float]:
    return [environment.score for environment in environments]


def stuck_reward(completions: Any, environments: Any) -> list[float]:
    return [float(environments[0].stuck())]


class NoReward:
    def reset(self, **row: Any) -> None: ...


class StringReward(NoReward):
    def get_reward(self) -> Any:
        return "good"


class NanReward(NoReward):
    def get_reward(self) -> float:
        return float("nan")


class AnnotatedText(NoReward):
    def get_reward(self) -> str:
        return "good"


async def annotated_text(row: dict[str, Any], session: Any) -> str:
    return "good"


class NamedRewards(NoReward):
    async def get_reward(self) -> dict[str, float]:
        return {"format": 0.5, "answer": 1.0}


class Abstains(NoReward):
    def get_reward(self) -> None:
        return None


class RaisesInReset(NoReward):
    def reset(self, **row: Any) -> None:
        raise ConnectionError("no server")


class HangsInReset(NoReward):
    def reset(self, **row: Any) -> None:
        hang()


class NoReset:
    def look(self) -> str:
        """Look."""
        return ""


def make_guess() -> Guess:
    return Guess(10)


# -- text ----------------------------------------------------------------------------------------------


class Countdown:
    """Gymnasium: say numbers down to zero."""

    def __init__(self, start: int = 2) -> None:
        self.start = start

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[str, dict]:
        self.left, self.seed = self.start, seed
        return f"Count down from {self.start}.", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
        right = action.strip() == str(self.left)
        self.left -= 1
        return "next", 0.5 * right, self.left < 0, False, {}


class NoStep:
    def reset(self, **row: Any) -> str:
        return ""


class OldGym:
    def reset(self, answer: str) -> str:
        self.answer = answer
        return "Say it."

    def step(self, action: str) -> tuple[str, float, bool, dict]:
        return "again", float(action == self.answer), action == self.answer, {}


class SkyRL:
    """SkyRL-Gym's spelling, with its own name for the policy's text."""

    def __init__(self, env_config: Any = None, extras: dict[str, Any] | None = None) -> None:
        self.extras = extras or {}
        self.turns = 0

    def init(self, prompt: list[dict[str, str]]) -> tuple[list[dict[str, str]], dict[str, Any]]:
        return [{"role": "system", "content": "Be brief."}, *prompt], {}

    def step(self, action: str) -> dict[str, Any]:
        self.turns += 1
        done = self.turns == self.extras["max_turns"]
        return {
            "observations": [] if done else [{"role": "user", "content": "more"}],
            "reward": 1.0,
            "done": done,
            "metadata": {},
            "postprocessed_action": action.upper(),
        }

    def get_metrics(self) -> dict[str, Any]:
        return {"steps": self.turns}

    def close(self) -> None: ...


class Arena:
    """TextArena's spelling: rewards come at the end."""

    def reset(self, num_players: int, seed: int | None = None) -> None:
        assert num_players == 1
        self.round = 0

    def get_observation(self) -> tuple[int, list[tuple[int, str, int]]]:
        return 0, [(0, "what the policy said", 2), (-1, f"round {self.round}", 5)]

    def step(self, action: str) -> tuple[bool, dict[str, Any]]:
        self.round += 1
        return self.round == 2, {}

    def close(self) -> tuple[dict[int, float], dict[int, Any]]:
        return {0: 0.75}, {0: {}}


class BadStep(Countdown):
    def step(self, action: str) -> Any:
        return "done"


class StringStep(Countdown):
    def step(self, action: str) -> Any:
        return "next", "good", True, False, {}


class RaisesInTurnTwo(Countdown):
    def step(self, action: str) -> Any:
        if self.left < self.start:
            raise RuntimeError("second turn")
        return super().step(action)


# -- functions -----------------------------------------------------------------------------------------


async def two_turns(row: dict[str, Any], session: Any, bonus: float = 0.0) -> float:
    messages = [{"role": "user", "content": row["prompt"]}]
    first = await session.chat(messages)
    messages += [first.message(), {"role": "user", "content": "sure?"}]
    second = await session.chat(messages)
    session.reward(0.25, call=second.call)
    session.reward(2.0, name="length")
    return float(second.content == row["answer"]) + bonus


async def turn_rewards(row: dict[str, Any], session: Any) -> None:
    while True:
        reply = await session.chat([{"role": "user", "content": row["prompt"]}])
        session.reward(0.5, call=reply.call)


async def in_parallel(row: dict[str, Any], session: Any) -> dict[str, float]:
    asked = [session.chat([{"role": "user", "content": str(i)}]) for i in range(4)]
    replies = await asyncio.gather(*asked)
    return {"answers": len({r.content for r in replies}), "reward": 0.5}


async def tokens(row: dict[str, Any], session: Any) -> float:
    call = await session.generate([1, 2, 3], max_tokens=4)
    assert (call.prompt, call.sampled, call.logps, call.finish) == ([1, 2, 3], [7], [-1.0], "stop")
    assert call.index == 0
    from rft.environments.types import ContextFull

    try:
        await session.generate(list(range(20)))
    except ContextFull as error:
        assert "fit" in str(error)
        return 1.0
    return 0.0


async def string_reward(row: dict[str, Any], session: Any) -> Any:
    return "good"


async def hangs(row: dict[str, Any], session: Any) -> float:
    await session.chat([{"role": "user", "content": "x"}])
    return float(len(hang()))


def not_async(row: dict[str, Any], session: Any) -> float:
    return 1.0


def make_gymnasium(id: str) -> Any:
    """An environment from Gymnasium's registry, with the wrappers that `gymnasium.make` puts around it."""
    import gymnasium

    class Echo(gymnasium.Env):
        action_space = gymnasium.spaces.Text(10)
        observation_space = gymnasium.spaces.Text(20)

        def reset(
            self, *, seed: int | None = None, options: dict[str, Any] | None = None
        ) -> tuple[str, dict]:
            super().reset(seed=seed)
            self.row = (options or {})["prompt"]
            self.turns = 0
            return f"seed {seed}", {}

        def step(self, action: str) -> tuple[str, float, bool, bool, dict]:
            self.turns += 1
            return action, 0.5, self.turns == 2, False, {}

    gymnasium.register(id, entry_point=lambda: Echo())
    return gymnasium.make(id)


class FewColumns:
    def reset(self, answer: str) -> None: ...

    def get_reward(self) -> float:
        return 1.0


async def areal(data, base_url, api_key, http_client):
    return 1.0
