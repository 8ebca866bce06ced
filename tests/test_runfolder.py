"""Claiming a run folder: what a resumed run may change, and what it is told."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from rft import checkpoint, run_dir
from rft.config.load import parse_config
from rft.config.schema import Config
from rft.errors import ConfigError


def config(folder: Path, **more: object) -> Config:
    return parse_config({"algorithm": "sft", "output_dir": str(folder), "name": "r", **more})


def begun(folder: Path) -> None:
    """A run with one checkpoint."""
    run = folder / "r"
    run_dir.write_config(run, config(folder))

    def write(into: Path) -> None:
        (into / "a").write_text("a")

    checkpoint.save(run / "checkpoints", 7, write, keep=1, meta={})


def test_differences_are_listed_or_refused(tmp_path: Path) -> None:
    begun(tmp_path)
    found = run_dir.claim(config(tmp_path, checkpoint={"every": 5}, train={"steps": 9}), "auto")
    assert found.resumed_at == 7
    assert set(found.notes) == {
        "checkpoint.every: 50 -> 5",
        "train.steps: 100 -> 9",
        "learning rate: constant, it stays at 1e-06",
    }
    with pytest.raises(ConfigError, match=r"(?s)which change the result, differ.*seed: was 1, now 2"):
        run_dir.claim(config(tmp_path, seed=2), "auto")


def test_a_run_older_than_a_setting_resumes_with_its_default(tmp_path: Path) -> None:
    begun(tmp_path)
    file = tmp_path / "r" / "config.yaml"
    written = yaml.safe_load(file.read_text())
    del written["rollout"]["health_every_s"], written["train"]["curriculum"]
    file.write_text(yaml.safe_dump(written))
    assert run_dir.claim(config(tmp_path), "auto").notes == ()


def test_other_library_versions_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = checkpoint.library_versions()
    with monkeypatch.context() as then:
        then.setattr(checkpoint, "library_versions", lambda: {**real, "torch": "1.0"})
        begun(tmp_path)
    (note,) = run_dir.claim(config(tmp_path), "auto").notes
    assert note.startswith("torch: version 1.0 -> 2") and note.endswith("since the checkpoint")


def extended(folder: Path, **more: object) -> tuple[str, ...]:
    """The notes of a finished run of 10 steps that is to take 20."""
    old = config(folder, train={"steps": 10}, **more)
    run = folder / "r"
    run_dir.write_config(run, old)
    checkpoint.save(run / "checkpoints", 10, write_one, keep=1, meta={})
    run_dir.write_result(run, {"steps": 10})
    assert run_dir.claim(old, "auto").finished is not None
    return run_dir.claim(config(folder, train={"steps": 20}, **more), "auto").notes


def write_one(into: Path) -> None:
    (into / "a").write_text("a")


def test_more_steps_say_what_the_learning_rate_does(tmp_path: Path) -> None:
    learner = {"learning_rate": 1.0, "schedule": "linear"}
    notes = extended(tmp_path / "linear", learner=learner)
    assert (
        "learning rate: the linear schedule now spans 20 steps instead of 10: step 11 is taken with 0.474 "
        "(by the old schedule 0), and the last one with 0"
    ) in notes
    notes = extended(tmp_path / "constant", learner={"learning_rate": 0.5})
    assert "learning rate: constant, it stays at 0.5" in notes
    weight = {"start": 1.0, "end": 0.0}
    notes = extended(tmp_path / "weights", algorithm="grpo", rewards=[{"function": "math", "weight": weight}])
    assert (
        "reward weights that follow the run's progress (math): the progress is now 50% instead of 100%"
        in notes
    )


def test_a_lock_alone_is_no_other_run(tmp_path: Path) -> None:
    """A process that was killed before it wrote its config leaves its lock file only."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / "run.lock").write_text("{}")
    assert run_dir.claim(config(tmp_path), "auto").resumed_at is None


def damaged_cases() -> dict[str, object]:
    """What may happen to a run folder, each by a function of the run's path."""

    def newest(run: Path) -> Path:
        return max((run / "checkpoints").glob("step-*"))

    def write(name: str, data: bytes) -> object:
        return lambda run: (run / name).write_bytes(data)

    def manifest(data: bytes) -> object:
        return lambda run: (newest(run) / "manifest.json").write_bytes(data)

    return {
        "config cut": write("config.yaml", b"a: [1, {"),
        "config empty": write("config.yaml", b""),
        "config is a list": write("config.yaml", b"- 1"),
        "config not UTF-8": write("config.yaml", b"name: \xff\xfe"),
        "config with a tag": write("config.yaml", b'a: !!python/object/apply:os.system ["false"]'),
        "config with itself inside": write("config.yaml", b"a: &a [*a]"),
        "config deep": write("config.yaml", b"[" * 20_000),
        "result cut": write("result.json", b'{"steps": '),
        "result is a list": write("result.json", b"[]"),
        "result without steps": write("result.json", b"{}"),
        "result deep": write("result.json", b"[" * 200_000),
        "manifest deep": manifest(b"[" * 200_000),
        "manifest empty": manifest(b""),
        "manifest is a list": manifest(b"[1, 2]"),
        "manifest binary": manifest(b"\xff\xfe\0\0"),
        "file cut": lambda run: (newest(run) / "a").write_text(""),
        "file gone": lambda run: (newest(run) / "a").unlink(),
        "file is a folder": lambda run: ((newest(run) / "a").unlink(), (newest(run) / "a").mkdir()),
    }


@pytest.mark.parametrize("case", damaged_cases())
def test_a_damaged_run_folder_is_one_message_or_an_older_checkpoint(tmp_path: Path, case: str) -> None:
    run = tmp_path / "r"
    run_dir.write_config(run, config(tmp_path))
    for step in (3, 7):
        checkpoint.save(run / "checkpoints", step, lambda into: (into / "a").write_text("a"), keep=2, meta={})
    damaged_cases()[case](run)  # type: ignore[operator]
    if case.startswith(("config", "result")):
        with pytest.raises(ConfigError, match=r"is damaged") as caught:
            run_dir.claim(config(tmp_path), "auto")
        assert case.split()[0] in str(caught.value)
    else:
        claimed = run_dir.claim(config(tmp_path), "auto")
        assert claimed.resumed_at == 3
        assert any("checkpoint skipped" in note for note in claimed.notes)


@pytest.mark.parametrize("name", [".", "..", "...", "", "a/b", "a b"])
def test_a_run_name_is_a_folder_of_its_own(name: str) -> None:
    with pytest.raises(ConfigError, match="name"):
        parse_config({"algorithm": "sft", "name": name})
