"""Random faults in a row on one long tiny run: nothing is lost, nothing leaks. `pytest -m soak`;
RFT_SOAK_FAULTS (200) says how many, RFT_SOAK_ENGINE (hf) on which engine."""

from __future__ import annotations

import json
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from rft import checkpoint
from tests.integration.conftest import ROOT, pids_of, processes_of
from tests.integration.live import Live

FAULTS, ENGINE = int(os.environ.get("RFT_SOAK_FAULTS", "200")), os.environ.get("RFT_SOAK_ENGINE", "hf")
RESULT = ROOT / "benchmarks" / "results" / "soak.json"
WORST_S = 240  # from a fault to the next finished step


def injuries(live: Live, dice: random.Random) -> dict[str, tuple[int, Callable[[], object]]]:
    """name -> (how often, what it does). Restarts of the whole run are rarer: they take longest."""

    def one(name: str) -> psutil.Process:
        return dice.choice(live.children(name))

    return {
        "rollout actor killed": (5, lambda: one("ray::Replica").kill()),
        "rollout actor frozen": (5, lambda: one("ray::Replica").suspend()),
        "reward worker killed": (5, lambda: one("rft.rewards.worker").kill()),
        "reward worker hung": (3, lambda: (live.folder / "hang").touch()),
        "all rollout actors killed": (2, lambda: [p.kill() for p in live.children("ray::Replica")]),
        "learner killed": (1, lambda: one("ray::LearnerActor").kill()),
        "controller killed": (1, lambda: live.driver().kill()),
        "Ray head killed": (1, lambda: one("gcs_server").kill()),
    }


def shared_memory() -> int:
    """Files in shared memory."""
    return len(list(Path("/dev/shm").iterdir()))


@pytest.mark.soak
@pytest.mark.timeout(FAULTS * WORST_S)
def test_random_faults_in_a_row(tmp_path: Path) -> None:
    live, dice = Live(tmp_path, ENGINE), random.Random(0)
    shm = shared_memory()
    live.start(checkpoint__every=5)
    count, recovery, memory, alive = Counter[str](), dict[str, list[float]](), list[int](), list[int]()
    began = time.time()
    try:
        live.wait("the first checkpoint", lambda: live.events("checkpoint/saved"), WORST_S)
        while count.total() < FAULTS:
            table = injuries(live, dice)
            (name,) = dice.choices(list(table), [weight for weight, _ in table.values()])
            goal, start = live.step() + 3, time.monotonic()
            try:
                table[name][1]()
            except (psutil.NoSuchProcess, IndexError):
                time.sleep(0.1)  # what was to be hurt is being rebuilt at this moment
                continue
            count[name] += 1
            live.wait(f"step {goal} after {name}", lambda goal=goal: live.step() >= goal, WORST_S)
            recovery.setdefault(name, []).append(time.monotonic() - start)
            memory.append(live.driver().memory_info().rss)
            alive.append(len(pids_of(live.marker)))
        code, seconds = live.terminate()
        assert code == 75 and processes_of(live.marker) == []
        last = live.step()
        steps = {e["step"]: e["prompts"] for e in live.events("group/trained") if e["step"] <= last}
        keys = Counter(tuple(key) for prompts in steps.values() for key in prompts)
        assert sorted(steps) == list(range(1, live.step() + 1)) and max(keys.values()) == 1
        found = checkpoint.latest(live.run / "checkpoints")
        assert found is not None
        place = found.meta["sampler"]
        handed = place["epoch"] * place["size"] + place["position"]
        assert len(keys) + len(found.meta["outstanding"]) + len(found.meta["dropped"]) == handed
        third = max(1, len(memory) // 3)
        early, late = statistics.median(memory[:third]), statistics.median(memory[-third:])
        assert late < 1.2 * early + 50e6, "the driver's memory grows"
        assert max(alive[-third:]) <= max(alive[:third]) + 4, "processes are left behind"
        assert shared_memory() <= shm + 8, "shared memory is left behind"
    finally:
        live.clean_up()
    RESULT.write_text(
        json.dumps(
            {
                "engine": ENGINE,
                "faults": dict(count.most_common()),
                "total": count.total(),
                "minutes": round((time.time() - began) / 60, 1),
                "steps": live.step(),
                "prompts_trained_once": len(keys),
                "prompts_dropped": len(found.meta["dropped"]),
                "prompts_in_flight_at_the_end": len(found.meta["outstanding"]),
                "seconds_to_three_steps": {
                    k: {"median": round(statistics.median(v), 1), "worst": round(max(v), 1)}
                    for k, v in sorted(recovery.items())
                },
                "sigterm_seconds": round(seconds, 1),
                "driver_rss_mib": {"early": round(early / 2**20), "late": round(late / 2**20)},
                "processes": {"early": max(alive[:third]), "late": max(alive[-third:])},
                "shared_memory_files": {"before": shm, "after": shared_memory()},
            },
            indent=2,
        )
        + "\n"
    )
