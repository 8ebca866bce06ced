"""`rft bench`: what it runs, how an interrupted run goes on, and what it says where it cannot."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from rft.cli import main
from rft.errors import ConfigError
from rft.tools import bench
from rft.tools.bench import Script

SCRIPTS = [s for part in bench.PARTS.values() for s in part]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Scripts that print their arguments stand in for the long ones: what is tested is who is called how."""
    for name in ("common.py", "performance.py", *(s.name for s in SCRIPTS)):
        (tmp_path / name).write_text("import sys; print('ran', *sys.argv)")
    return tmp_path


def test_every_part_names_scripts_that_exist_and_a_budget_of_half_an_hour() -> None:
    assert len(SCRIPTS) == len({(s.name, s.arguments) for s in SCRIPTS})
    assert [s for s in SCRIPTS if not (bench.FOLDER / s.name).is_file()] == []
    together = [s.minutes for s in SCRIPTS if not s.alone]
    assert all(together) and sum(together) <= 30


def test_an_unknown_part_and_a_missing_checkout_are_refused(tmp_path: Path, capsys) -> None:
    assert main(["bench", "logprobs"]) == 2
    assert "no part 'logprobs'; choose from logprob, prefix" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"pip install -e .* run rft bench from it"):
        bench.run(["logprob"], folder=tmp_path)


def test_all_runs_every_part_briefly_and_peers_only_on_request(folder: Path, capfd) -> None:
    assert bench.run([], folder=folder) == 0
    out = capfd.readouterr().out
    assert "prefix.py --rounds 2\n" in out and "step_time.py" not in out and "--peers" not in out
    assert bench.run(["packing", "step"], folder=folder) == 0
    out = capfd.readouterr().out
    assert f"ran {folder / 'packing.py'}\n" in out
    assert "step_time.py left out: it compares with a peer, give --peers" in out
    assert bench.run(["logprob"], peers=True, folder=folder) == 0
    out = capfd.readouterr().out
    assert "--cases main --dtypes float32 --peers\n" in out and "prefix.py" not in out


def test_a_failed_or_interrupted_run_goes_on_where_it_stopped(folder: Path, capfd) -> None:
    (folder / "sync.py").write_text("raise SystemExit(3)")
    assert bench.run([], peers=True, folder=folder) == 1
    err = capfd.readouterr().err
    assert "FAILED: sync.py --steps 6 --transports gloo sparse. See the messages above" in err
    (folder / "sync.py").write_text("print('synced')")
    assert bench.run(["all"], peers=True, folder=folder) == 0
    out = capfd.readouterr().out
    assert "synced" in out and out.count("\nran ") == 1 and "workspace.py: done before" in out
    results = folder / "results"
    whole = json.loads((results / "bench-all.json").read_text())
    assert whole["peers"] and len(whole["seconds"]) == len([s for s in SCRIPTS if not s.alone])
    assert not (results / "unfinished.json").exists()

    (folder / "sync.py").write_text("raise SystemExit(3)")
    assert bench.run(["reward", "sync"], folder=folder) == 1
    for arguments in ({"fresh": True}, {"peers": True}):  # all anew, and: not the same call
        capfd.readouterr()
        assert bench.run(["reward", "sync"], folder=folder, **arguments) == 1
        assert f"ran {folder / 'rewards.py'}" in capfd.readouterr().out


def test_a_script_that_takes_twice_its_time_is_stopped_with_its_children(
    folder: Path, capfd, monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "sync.py").write_text(
        "import subprocess, sys\n"
        f"late = \"import time; time.sleep(2); open({str(folder / 'alive')!r}, 'w')\"\n"
        "subprocess.run([sys.executable, '-c', late])"
    )
    monkeypatch.setattr(bench, "PARTS", {"sync": (Script("sync.py", minutes=0.4 / 60),)})
    began = time.monotonic()
    assert bench.run([], folder=folder) == 1
    assert "stopped: twice its time" in capfd.readouterr().out
    time.sleep(max(0.0, began + 3 - time.monotonic()))
    assert not (folder / "alive").exists()
