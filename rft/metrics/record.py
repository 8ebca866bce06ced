"""The record of a step: the rollouts that it trained on, and the numbers that the learner got from them.

RUN/record/step-00000012.npz   `numpy.load` reads it: per-token arrays, and `meta.json` with the rest
           superseded/         records of steps that a resumed run repeats

From a record and a checkpoint before its step, `rft replay` computes the step again. A file appears complete,
by a rename, or not at all; a repeated step replaces its file.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rft.errors import RecordError
from rft.samples import Branch, Completion, Group, Origin, Prompt, TopTokens, Turn
from rft.utils.files import UNFINISHED, write_atomic

FOLDER, SUPERSEDED = "record", "superseded"
FORMAT = 1
META = "meta.json"
_NAME = re.compile(r"step-(\d+)\.npz")
_ARRAYS = {"tokens": np.int32, "logps": np.float32, "ref_logps": np.float32, "mask": np.bool_}
_TEACHER = {"ids": np.int32, "logps": np.float32}  # of each token, K numbers
_PLAIN = ("text", "finish", "demonstrated", "versions", "reward", "values", "branches", "turns", "messages")


class Source(NamedTuple):
    """Where a group came from: the epoch and row of its prompt, the policy version at dispatch, and the seed
    from which those of its samples are derived."""

    epoch: int
    row: int
    version: int
    seed: int


@dataclass(frozen=True)
class StepRecord:
    """One step.

    step: the number of finished steps with this one. groups: as the learner trained on them, in order, with
    prompts without their columns, and scores as dicts. sources: one for each group; None for a group of an
    earlier step. metrics: those of the learner; {} if the step failed. config: as the run resolved it.
    learner: facts that decide how numbers are rounded. versions: of rft and its libraries.
    """

    step: int
    groups: Sequence[Group]
    sources: Sequence[Source | None]
    metrics: Mapping[str, float]
    config: Mapping[str, Any]
    learner: Mapping[str, Any]
    versions: Mapping[str, str]


def path_of(folder: Path, step: int) -> Path:
    """Return the file of a step's record in a run's folder `record`."""
    return folder / f"step-{step:08d}.npz"


def steps(folder: Path) -> dict[int, Path]:
    """Return the files of the recorded steps, in order."""
    names = ((_NAME.fullmatch(path.name), path) for path in folder.iterdir()) if folder.is_dir() else ()
    return dict(sorted((int(match[1]), path) for match, path in names if match))


# -- writing -------------------------------------------------------------------------------------------


def write(folder: Path, record: StepRecord) -> int:
    """Write a record into a run's folder `record`, and return its size in bytes. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    completions = [c for group in record.groups for c in group.completions]
    arrays = {"prompt_tokens": _flat((g.prompt.tokens for g in record.groups), np.int32)}
    for name, dtype in _ARRAYS.items():
        arrays[name] = _flat((getattr(c, name) or () for c in completions), dtype)
    teachers = [c.teacher for c in completions if c.teacher is not None]
    for name, dtype in _TEACHER.items() if teachers else ():
        arrays[f"teacher_{name}"] = np.concatenate([getattr(t, name).ravel() for t in teachers], dtype=dtype)
    meta = {
        "format": FORMAT,
        "step": record.step,
        "metrics": dict(record.metrics),
        "learner": dict(record.learner),
        "versions": dict(record.versions),
        "config": dict(record.config),
        "groups": [
            {
                "prompt": group.prompt.id,
                "text": group.prompt.text,
                "length": len(group.prompt.tokens),
                "source": source,
                "completions": [_meta_of(c) for c in group.completions],
            }
            for group, source in zip(record.groups, record.sources, strict=True)
        ],
    }
    path = path_of(folder, record.step)
    # The fastest level: log-probs hardly compress, tokens and texts do at any.
    with (
        write_atomic(path) as part,
        zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file,
    ):
        file.writestr(META, json.dumps(meta, default=repr))  # NaN stays NaN; a lone surrogate stays one
        for name, array in arrays.items():
            with file.open(f"{name}.npy", "w") as stream:
                np.lib.format.write_array(stream, array, allow_pickle=False)
    return path.stat().st_size


def _flat(parts: Iterator[Sequence[Any]], dtype: Any) -> np.ndarray[Any, Any]:
    return np.fromiter(chain.from_iterable(parts), dtype)


def _meta_of(c: Completion) -> dict[str, Any]:
    """Return the part of a completion in a record's meta.json: all but its per-token values."""
    scores = {
        name: {"value": s.value, "outcome": str(s.outcome), "detail": s.detail}
        for name, s in c.scores.items()
    }
    return {
        "length": len(c.tokens),
        "teacher": 0 if c.teacher is None else c.teacher.ids.shape[1],
        "arrays": [name for name in _ARRAYS if getattr(c, name) is not None],
        **{name: getattr(c, name) for name in _PLAIN},
        "scores": scores,
        "origin": None if c.origin is None else c.origin._asdict(),
    }


def set_aside(folder: Path, after: int) -> list[int]:
    """Move the records of steps later than `after`, which are about to be repeated, into `superseded`, and
    remove the leftovers of a killed process; return the moved steps."""
    for path in folder.glob(f"*{UNFINISHED}"):
        path.unlink()
    moved = [(step, path) for step, path in steps(folder).items() if step > after]
    for _, path in moved:
        (folder / SUPERSEDED).mkdir(exist_ok=True)
        path.replace(folder / SUPERSEDED / path.name)
    return [step for step, _ in moved]


def prune(folder: Path, keep: int | None, max_bytes: int) -> None:
    """Remove all but the newest `keep` records (None: all stay), and the oldest ones above `max_bytes`. The
    newest one always stays."""
    size = 0
    for number, path in enumerate(reversed(steps(folder).values())):
        size += path.stat().st_size
        if number and (size > max_bytes or (keep is not None and number >= keep)):
            path.unlink()


# -- reading -------------------------------------------------------------------------------------------


def read(path: Path) -> StepRecord:
    """Read a record. Raises RecordError if the file is missing, damaged, or written by another version."""
    try:
        with zipfile.ZipFile(path) as file:
            meta = json.loads(file.read(META))
            if meta["format"] != FORMAT:
                raise RecordError(
                    f"{path} has format {meta['format']}, and this version of rft reads {FORMAT}: use the "
                    f"version that wrote it ({meta['versions'].get('rft', 'unknown')})"
                )
            arrays = {name: _array(file, name) for name in ("prompt_tokens", *_ARRAYS)}
            teacher = [f"teacher_{name}" for name in _TEACHER]
            arrays |= {name: _array(file, name) for name in teacher if f"{name}.npy" in file.namelist()}
        return _record(meta, arrays)
    except FileNotFoundError:
        raise RecordError(f"there is no record {path}") from None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def _array(file: zipfile.ZipFile, name: str) -> np.ndarray[Any, Any]:
    with file.open(f"{name}.npy") as stream:
        array: np.ndarray[Any, Any] = np.lib.format.read_array(stream, allow_pickle=False)
    return array


def _record(meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray[Any, Any]]) -> StepRecord:
    cursors = {name: iter(array.tolist()) for name, array in arrays.items()}

    def take(name: str, length: int) -> tuple[Any, ...]:
        values = tuple(islice(cursors[name], length))
        if len(values) != length:
            raise ValueError(f"{name} is too short")
        return values

    def completion(plain: Mapping[str, Any]) -> Completion:
        known: dict[str, Any] = {
            name: _frozen(plain[name]) for name in _PLAIN if name not in ("messages", "values")
        }
        known["branches"] = tuple(Branch(*branch) for branch in known["branches"])
        known["turns"] = tuple(Turn(*turn) for turn in known["turns"])
        origin = plain["origin"]
        if origin is not None:
            origin = Origin(**{**origin, "opening": tuple(origin["opening"])})
        known |= {name: take(name, plain["length"]) for name in plain["arrays"]}
        if width := plain.get("teacher", 0):  # of records of older versions, there is none
            parts = {}
            for name, dtype in _TEACHER.items():
                flat = np.array(take(f"teacher_{name}", plain["length"] * width), dtype)
                parts[name] = flat.reshape(-1, width)
            known["teacher"] = TopTokens(**parts)
        return Completion(
            **known,
            messages=tuple(plain["messages"]),
            values={name: _frozen(value) for name, value in plain["values"].items()},
            scores=plain["scores"],
            origin=origin,
        )

    groups = []
    for group in meta["groups"]:
        prompt = Prompt(group["prompt"], take("prompt_tokens", group["length"]), group["text"])
        groups.append(Group(prompt, tuple(completion(c) for c in group["completions"])))
    sources = [None if g["source"] is None else Source(*g["source"]) for g in meta["groups"]]
    rest = {f.name: meta[f.name] for f in fields(StepRecord) if f.name not in ("groups", "sources")}
    return StepRecord(groups=groups, sources=sources, **rest)


def _frozen(value: Any) -> Any:
    return tuple(_frozen(v) for v in value) if isinstance(value, list) else value
