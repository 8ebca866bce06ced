"""`rft bench`: what it runs, and what it says where it cannot."""

from __future__ import annotations

from pathlib import Path

import pytest

from rft import bench
from rft.cli import main
from rft.config import ConfigError


def test_every_part_names_scripts_that_exist() -> None:
    scripts = [s.name for part in bench.PARTS.values() for s in part]
    assert len(scripts) == len(set(scripts))
    assert [s for s in scripts if not (bench.FOLDER / s).is_file()] == []


def test_an_unknown_part_and_a_missing_checkout_are_refused(tmp_path: Path, capsys) -> None:
    assert main(["bench", "logprobs"]) == 2
    assert "no part 'logprobs'; choose of logprob, prefix" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=r"pip install -e .* run rft bench from it"):
        bench.run(["logprob"], folder=tmp_path)


def test_all_runs_every_part_briefly_and_peers_only_on_request(tmp_path: Path, capfd) -> None:
    """Scripts that print their arguments stand in for the long ones: what is tested is who is called how."""
    names = ["common.py", "performance.py", *(s.name for part in bench.PARTS.values() for s in part)]
    for name in names:
        (tmp_path / name).write_text("import sys; print('ran', *sys.argv[1:])")
    (tmp_path / "sync.py").write_text("raise SystemExit(3)")
    assert bench.run([], folder=tmp_path) == 1
    out, err = capfd.readouterr()
    assert "step_time.py left out: it compares with a peer" in out
    assert "FAILED: sync.py" in err and "--peers" not in out.replace("give --peers", "")
    assert bench.run(["logprob"], peers=True, folder=tmp_path) == 0
    out = capfd.readouterr().out
    assert "ran --peers\n" in out and "prefix.py" not in out
