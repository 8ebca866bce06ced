"""The run folder: its owner, and the settings that a resumed run may change.

runs/NAME/config.yaml      the resolved config
         metrics.jsonl, samples.jsonl, events.jsonl, tensorboard/
         record/             rollouts that the last steps trained on, one file for each
         checkpoints/step-*/    model/   (the final policy, a Hugging Face folder)
         result.json        written last: the run is complete
         data/               rows that a Python program passed
         run.lock            while a process trains the run: which one
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rft import checkpoint
from rft.config.dtypes import dtypes_of, fill_in_dtypes
from rft.config.load import differences, parse_config
from rft.config.rewards import Schedule
from rft.config.schema import Config
from rft.errors import CheckpointError, ConfigError
from rft.learner.schedule import learning_rate
from rft.utils import yaml_files
from rft.utils.files import write_atomic, write_text_atomic
from rft.utils.run_lock import LOCK_FILE, RunLock

DATA_FOLDER = "data"

# Keys that a resumed run may change, because they do not change the training result.
FREE = (
    "train.steps", "train.stop_grace_s", "checkpoint.", "tracking.", "guards.", "ray.", "eval.", "output_dir",
    "rollout.replicas", "rollout.threads", "rollout.cores", "rollout.kv_cache_gib",
    "rollout.gpu_memory_utilization", "rollout.start_timeout_s", "rollout.control_timeout_s",
    "rollout.generate_timeout_s", "rollout.max_restarts", "rollout.max_num_seqs",
    "rollout.health_every_s", "rollout.health_timeout_s",
    "learner.threads", "learner.cores", "learner.tokens_per_micro_batch", "learner.step_timeout_s",
    "learner.parallel", "learner.ranks", "learner.cpu_offload", "learner.reshard_after_forward",
    "learner.deepspeed", "learner.gradient_checkpointing",
    "rewards.workers", "rewards.recycle_after", "sync.",
)  # fmt: skip


@dataclass(frozen=True)
class RunFolder:
    """A claimed run folder and where to go on from (None: the start)."""

    path: Path
    resume: checkpoint.Checkpoint | None
    notes: tuple[str, ...] = ()
    finished: dict[str, Any] | None = None
    interrupted: bool = False
    rejected: tuple[checkpoint.Rejected, ...] = ()  # checkpoints that were passed over

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def resumed_at(self) -> int | None:
        """The step that the run goes on from; None for a new run, -1 for one that starts over."""
        if self.resume is not None:
            return self.resume.step
        return -1 if self.interrupted else None


@contextmanager
def hold(config: Config) -> Iterator[str]:
    """Lock the run against other processes while the block lasts; yields a note for the user, or "".

    Raises ConfigError where another process trains it, where the folder is not a run's, or where it cannot be
    written. A complete run is not written to and needs no lock.
    """
    path = _folder_of(config)
    if _is_complete(config, read_result(path)):
        yield ""
        return
    lock = RunLock(path)
    try:
        yield lock.note
    finally:
        lock.release()


def _folder_of(config: Config) -> Path:
    """Return the run's folder. Raises ConfigError where something else is in its place."""
    path = config.run_dir.absolute()  # the learner, which writes into it, has another working folder
    if path.exists() and not path.is_dir():
        raise ConfigError(
            [f"output_dir/name: {path} is a file, not a folder; choose another name or output_dir"]
        )
    there = {p.name for p in path.iterdir()} if path.exists() else set()
    if there - {LOCK_FILE, DATA_FOLDER} and "config.yaml" not in there:
        raise ConfigError(
            [f"output folder {path} is not empty and not a run folder: choose another name or output_dir"]
        )
    return path


def _is_complete(config: Config, result: dict[str, Any] | None) -> bool:
    return result is not None and result["steps"] >= config.train.steps


def keep_dtypes(config: Config, resume: str) -> Config:
    """Return the config with `dtype: auto` filled in as the run began, on whatever machine that was; a new
    run keeps `auto`, for its plan to resolve. `resume`: as in `claim`."""
    folders = [config.run_dir]
    if resume not in ("auto", "never"):
        folders.append(Path(resume).absolute().parent.parent)  # of the run that wrote the checkpoint
    for file in (folder / "config.yaml" for folder in folders):
        if file.is_file():
            try:
                written = parse_config(yaml_files.read(file))
            except (yaml_files.YamlError, ConfigError):
                return config  # `claim` reports a damaged file
            return fill_in_dtypes(config, dtypes_of(written))
    return config


def claim(config: Config, resume: str) -> RunFolder:
    """Decide whether to start, resume or refuse. `resume`: auto, never, or a checkpoint's folder.

    Raises ConfigError where the folder belongs to another run, or a key differs that may not change.
    """
    path = _folder_of(config)
    existing = (path / "config.yaml").exists()
    if resume not in ("auto", "never"):
        return _resume_from(config, path, Path(resume))
    if not existing:
        return RunFolder(path, None)
    if resume == "never":
        raise ConfigError(
            [f"output folder {path} belongs to an earlier run: choose another name, or --resume auto"]
        )
    notes = _check_same(config, path)
    finished = read_result(path)
    if _is_complete(config, finished):
        return RunFolder(path, None, tuple(notes), finished)
    best, rejected = checkpoint.scan(path / "checkpoints")
    notes += [f"checkpoint skipped: {r}" for r in rejected]
    if best is not None:
        notes += [*_other_versions(best), *_other_length(config, path, best.step)]
    return RunFolder(path, best, tuple(notes), interrupted=True, rejected=tuple(rejected))


def _resume_from(config: Config, path: Path, folder: Path) -> RunFolder:
    notes = _check_same(config, path) if (path / "config.yaml").exists() else []
    try:
        loaded = checkpoint.load(folder)
    except CheckpointError as error:
        raise ConfigError([f"--resume {folder}: {error}"]) from error
    return RunFolder(path, loaded, tuple(notes), interrupted=(path / "config.yaml").exists())


def _check_same(config: Config, path: Path) -> list[str]:
    try:
        written = yaml_files.read(path / "config.yaml")
    except yaml_files.YamlError as error:
        raise ConfigError([f"{path / 'config.yaml'} is damaged: {error}; choose another name"]) from None
    if not isinstance(written, dict):
        raise ConfigError([f"{path / 'config.yaml'} is damaged: it has no settings; choose another name"])
    new = config.to_dict()
    try:
        old = parse_config(written).to_dict()  # settings that are newer than the run have their defaults
    except ConfigError:
        old = written
    else:
        if others := _other_objects(old, new):
            raise ConfigError(
                [f"output folder {path} belongs to a run with another reward or environment:", *others]
            )
    changed = differences(_in_place(old, path), _in_place(new, path))
    fatal = [
        f"{key}: was {a!r}, now {b!r}"
        for key, a, b in changed
        if not any(key == free or (free.endswith(".") and key.startswith(free)) for free in FREE)
    ]
    if fatal:
        raise ConfigError(
            [
                f"output folder {path} belongs to another run; these settings, which change the result, "
                "differ (choose another name, or set them back to resume):",
                *fatal,
            ]
        )
    return [f"{key}: {a!r} -> {b!r}" for key, a, b in changed]


def _other_objects(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Name each object that was passed from Python and differs from that of the run."""
    problems = []
    pairs = zip(old["rewards"]["functions"], new["rewards"]["functions"], strict=False)
    for i, (a, b) in enumerate(pairs):
        before, now = a.get("passed"), b.get("passed")
        if before is None or now is None or before["sha256"] == now["sha256"]:
            continue
        name = a["name"] or a["function"].rpartition(":")[2]
        problems.append(_other_object(f"rewards.functions[{i}] ({name})", "function", before, now))
    earlier, later = ((config.get("environment") or {}).get("passed", {}) for config in (old, new))
    for name in earlier.keys() & later.keys():
        if earlier[name]["sha256"] != later[name]["sha256"]:
            shown = name.rpartition(":")[2]
            problems.append(_other_object(f"environment ({shown})", "object", earlier[name], later[name]))
    return problems


def _other_object(where: str, what: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    parts = [f"{key} was {x}, now {y}" for key, x, y in differences(before["values"], now["values"])]
    parts += ["its source differs"] if before["source"] != now["source"] else []
    why = "; ".join(parts) or "a value that it uses differs"
    return (
        f"{where}: the run was trained with another {what} of this name: {why}. Pass that one again, or give "
        "this run another name"
    )


def _in_place(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a config whose paths of data in the run folder do not depend on where that folder is."""
    data = dict(config.get("data") or {})
    for key in ("path", "eval_path"):
        if (file := data.get(key)) and Path(file).parent.parts[-2:] == (path.name, DATA_FOLDER):
            data[key] = f"{DATA_FOLDER}/{Path(file).name}"
    return {**config, "data": data}


@contextmanager
def with_files(files: Mapping[Path, bytes], *, keep: bool) -> Iterator[None]:
    """Provide files in a run folder, each written once. They are removed again if the block raises, and at
    its end unless `keep`."""
    made = [path for path in files if not path.exists()]
    folders = {p for path in made for p in path.parents if not p.exists()}
    stay = False
    try:
        for path in made:
            path.parent.mkdir(parents=True, exist_ok=True)
            with write_atomic(path) as temporary:
                temporary.write_bytes(files[path])
        yield
        stay = keep
    finally:
        for path in () if stay else made:
            path.unlink(missing_ok=True)
        for folder in sorted(folders, key=lambda p: len(p.parts), reverse=True):
            with suppress(OSError):  # not empty
                folder.rmdir()


def _other_length(config: Config, path: Path, step: int) -> list[str]:
    """List the schedules that change with the number of steps: those that span the whole run."""
    old = yaml_files.read(path / "config.yaml")["train"]["steps"]
    if old == config.train.steps or step >= config.train.steps:
        return []
    learner, new = config.learner, config.train.steps
    now = learning_rate(learner, step, new)
    if learner.schedule == "constant":
        notes = [f"learning rate: constant, it stays at {now:.3g}"]
    else:
        before = learning_rate(learner, min(step, old - 1), old)
        notes = [
            f"learning rate: the {learner.schedule} schedule now spans {new} steps instead of {old}: step "
            f"{step + 1} is taken with {now:.3g} (by the old schedule {before:.3g}), and the last one with "
            f"{learning_rate(learner, new - 1, new):.3g}"
        ]
    moving = [c.label for c in config.rewards.functions if isinstance(c.weight, Schedule)]
    if moving:
        notes.append(
            f"reward weights that follow the run's progress ({', '.join(moving)}): the progress is now "
            f"{step / new:.0%} instead of {min(step / old, 1):.0%}"
        )
    return notes


def _other_versions(loaded: checkpoint.Checkpoint) -> list[str]:
    """Note libraries updated since the checkpoint was written: allowed, but numbers may differ."""
    now = checkpoint.library_versions()
    names = sorted(n for n in {*now, *loaded.versions} if now.get(n) != loaded.versions.get(n))
    return [f"{n}: version {loaded.versions.get(n)} -> {now.get(n)} since the checkpoint" for n in names]


def write_config(path: Path, config: Config) -> None:
    """Write the resolved config, atomically."""
    path.mkdir(parents=True, exist_ok=True)
    write_text_atomic(path / "config.yaml", yaml_files.dump(config.to_dict()))


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Mark the run as complete."""
    write_text_atomic(path / "result.json", json.dumps(result, indent=2) + "\n")


def final_model(path: Path) -> Path | None:
    """Return the folder of a run's final model. None if it has none, or if the run goes on from it: a
    checkpoint is newer. Raises ConfigError where result.json is damaged."""
    folder = path / "model"
    if not (folder / "config.json").exists():
        return None
    result, newest = read_result(path), checkpoint.newest_step(path / "checkpoints")
    return None if result is not None and newest is not None and newest > result["steps"] else folder


def read_result(path: Path) -> dict[str, Any] | None:
    """Return the result of a complete run, or None. Raises ConfigError where the file is damaged."""
    file = path / "result.json"
    if not file.exists():
        return None
    try:
        result = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        result = error
    if not isinstance(result, dict) or not isinstance(result.get("steps"), int):
        why = f": {result}" if isinstance(result, Exception) else ""
        raise ConfigError(
            [f"{file} is damaged{why}; delete it, and the run resumes from its last checkpoint"]
        )
    return result
