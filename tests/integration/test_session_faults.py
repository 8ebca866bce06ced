"""Faults of sessions through a whole run: real engines and workers, hurt one after the other. The tests
depend on each other: each leaves a run behind that makes steps."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from typing import Any

import pytest

from rft.metrics.log import read_jsonl
from tests.integration.live import Live

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

GAME = '''
import os, random, signal, time
HERE = os.path.dirname(__file__)
def claimed(name):
    try:
        os.remove(os.path.join(HERE, name))
    except FileNotFoundError:
        return False
    return True
class Game:
    """Two turns that pay at least 1 each. Whoever finds a flag takes it away, and fails; not those that are
    doomed to fail, which are played more than once."""
    def reset(self, *, seed=None, options=None):
        self.turn = 0
        self.doomed = random.random() < 0.03  # follows the session's seed: the same each time it is played
        return "go on", {}
    def step(self, text):
        self.turn += 1
        if self.doomed:
            if self.turn == 2:
                raise ConnectionError("always away")
        elif self.turn == 2:
            if claimed("raise"):
                raise ConnectionError("the database is away")
        elif claimed("hang"):
            time.sleep(10_000)
        elif claimed("kill"):
            os.kill(os.getpid(), signal.SIGKILL)
        elif claimed("pause"):
            open(os.path.join(HERE, "paused"), "w").close()
            time.sleep(1)
        return "and now?", 1.0 + text.count("e"), self.turn == 2, False, {}
'''
SIZE = 16  # sessions of a step


@pytest.fixture(scope="module", params=["hf", "vllm"])
def live(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    folder = tmp_path_factory.mktemp(f"live-sessions-{request.param}")
    (folder / "runs").mkdir()
    (folder / "game.py").write_text(GAME)
    run = Live(folder, request.param)
    run.start(
        rewards=[],
        environment={
            "kind": "text",
            "path": f"{folder}/game.py:Game",
            "max_turns": 2,
            "max_tokens_per_turn": 6,
            "max_episode_tokens": 400,
            "step_timeout_s": 2,
        },
        tracking__sample_every=1,
        tracking__samples_kept=SIZE,
    )
    try:
        run.wait("the first checkpoint", lambda: run.events("checkpoint/saved"), 240)
        yield run
        print(f"\nseconds to detection: {run.measured}")
    finally:
        run.clean_up()


def fault(live: Live, flag: str, pattern: str) -> dict[str, Any]:
    """Raise a flag, and return the fault of an environment whose detail matches."""
    (live.folder / flag).touch()

    def seen() -> list[dict[str, Any]]:
        return [e for e in live.events("fault/environment") if re.search(pattern, e["what"])]

    event: dict[str, Any] = live.wait(f"the fault {flag}", seen, 60)[-1]
    assert event["attempt"] == 1 and event["action"] == "the episode is played again"
    live.makes_steps()
    return event


def test_a_step_that_hangs(live: Live) -> None:
    assert fault(live, "hang", r"step took longer than .*step_timeout_s = 2 s")["outcome"] == "timeout"


def test_a_worker_that_is_killed(live: Live) -> None:
    assert fault(live, "kill", r"SIGKILL|signal 9")["outcome"] == "environment_error"


def test_an_environment_that_raises_in_turn_two(live: Live) -> None:
    assert fault(live, "raise", "the database is away")["outcome"] == "environment_error"


def test_an_engine_killed_between_turns(live: Live) -> None:
    """The session's ids are in the controller: it goes on with another replica (of vLLM there is one: with
    the one that replaces it), without a fault."""
    known, faults = len(live.events("engine/rebuilt")), _faults(live)
    _pause(live)
    name = "ray::Replica" if live.engine == "hf" else "VLLM::EngineCore"
    live.hurt("engine killed between turns", live.child(name).kill, "engine/lost", 30)
    live.wait("a new engine", lambda: live.events("engine/rebuilt")[known:], 120)
    live.makes_steps()
    assert _faults(live) == faults


def test_the_learner_killed_with_sessions_in_flight(live: Live) -> None:
    """The run ends, and is started again from its last checkpoint: sessions that were in flight are played
    again from the first turn, and none of them counts as a fault of its environment."""
    faults, opened, step = _faults(live), len(live.events("run/opened")), live.step()

    def saved() -> bool:
        """Whether the rows of the faults so far are older than a checkpoint: later ones are set back."""
        return any(e["step"] >= step for e in live.events("checkpoint/saved"))

    live.wait("a checkpoint after the faults", saved, 240)
    _pause(live)
    event = live.hurt("learner killed", live.child("ray::LearnerActor").kill, "fault/learner", 30)
    assert "the learner died" in event["what"]
    live.wait("a restart", lambda: live.events("run/opened")[opened:], 120)
    live.resumes()
    assert _faults(live) == faults


def test_a_fault_never_counts_as_a_zero(live: Live) -> None:
    """Sessions that always fail are played three times, with growing pauses, and leave their groups; what was
    trained on earned at least 1 a turn. Meanwhile pushes fell into turns and between them."""
    live.wait("lost samples", lambda: _lost(live), 180)
    live.makes_steps(4)
    code, _ = live.terminate()
    assert code == 75
    times = defaultdict(list)
    for event in live.events("fault/environment"):
        if "always away" in event["what"]:
            times[event["request"].partition("-try-")[0], event["prompt"]].append(event["time"])
    played = [t for t in times.values() if len(t) == 3]
    assert played and all(b - a >= 0.5 and c - b >= 1.0 for a, b, c in played)
    rows = read_jsonl(live.run / "metrics.jsonl")
    assert sum(row.get("session/lost", 0.0) for row in rows) >= 1
    for ending in ("timeout", "environment_error", "finished"):
        assert any(row.get(f"session/ending/{ending}", 0.0) > 0 for row in rows)
    assert any(row.get("rollout/versions_mean", 0.0) > 1 for row in rows)
    samples = [s for s in read_jsonl(live.run / "samples.jsonl") if s["split"] == "train"]
    assert min(s["reward"] for s in samples) >= 2.0
    sizes = Counter(sample["step"] for sample in samples)
    live.accounts_for_every_prompt()  # none was trained on twice, or lost with the learner
    assert set(sizes.values()) > {SIZE} and max(sizes.values()) == SIZE  # some steps lack samples that failed


def _pause(live: Live) -> None:
    """Return while a session is between its turns."""
    (live.folder / "paused").unlink(missing_ok=True)
    (live.folder / "pause").touch()
    live.wait("a session between its turns", (live.folder / "paused").exists, 60)


def _faults(live: Live) -> int:
    """Count the faults of environments other than those of sessions that always fail."""
    return sum("always away" not in e["what"] for e in live.events("fault/environment"))


def _lost(live: Live) -> list[dict[str, Any]]:
    return [e for e in live.events("fault/environment") if "leaves the group" in e["action"]]
