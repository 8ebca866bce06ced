"""Load rows of generated tasks, local files and the hub, as plain dicts with rft column names."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, Literal

from rft.config.data import SUFFIXES, DataConfig, DirectionsConfig
from rft.config.rewards import DIRECTION
from rft.data.errors import DataError, FolderSource, missing_column
from rft.data.files import LineRows, TableRows, has_json_lines, read_file, refuse_large
from rft.data.formats import with_known_names

Split = Literal["train", "test"]
Row = dict[str, Any]
GENERATED = {"train": 8192, "test": 512}


class Rows(Sequence[Row]):
    """Rows of a split, mapped to rft column names on access.

    numbers: row numbers in the source, counted from 0; ids that do not depend on the holdout.
    """

    def __init__(self, base: Sequence[Any], numbers: Sequence[int], config: DataConfig, source: str) -> None:
        self.base, self.numbers, self.config, self.source = base, numbers, config, source

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = self.numbers[index]
        return map_columns(self.base[number], self.config, self.source, number)

    def __iter__(self) -> Iterator[Row]:
        return (self[i] for i in range(len(self)))


def load_rows(config: DataConfig, split: Split = "train", *, in_order: bool = False) -> Rows:
    """Load the rows of a split, lazily if the format allows.

    in_order: the rows will be read in order, so that JSON lines need not be in memory; a malformed line is
    then found when it is read.

    Raises DataError for a missing file, folder or hub dataset, a malformed line (with its number), an empty
    dataset, or a mapped column that does not exist.
    """
    kind = config.resolved_kind
    limit = config.limit if split == "train" else config.eval_limit
    if kind not in ("file", "hub"):
        base, source = _generate(config, split, limit or GENERATED[split]), config.task or kind
    else:
        base, source = open_source(config, split, in_order=in_order)
    if not len(base):
        raise DataError("the dataset is empty; give at least one row", source=source)
    numbers: Sequence[int] = range(len(base))
    if kind in ("file", "hub"):
        numbers = hold_out(config, split, len(base), source)
    rows = Rows(base, numbers if limit is None else numbers[:limit], config, source)
    rows[0]  # fail early on a wrong column name
    return rows


def _generate(config: DataConfig, split: Split, n: int) -> Sequence[Any]:
    """Generate `n` rows of a task. For reasoning_gym, `options` are those of the task, plus `suffix`."""
    from rft.tasks import TASKS  # imported here: tasks need optional packages

    kind, options = config.resolved_kind, dict(config.options)
    if kind == "reasoning_gym":
        suffix = {"suffix": options.pop("suffix")} if "suffix" in options else {}
        options = {"task": config.task, "options": options, **suffix}
    try:
        rows: Sequence[Any] = TASKS[kind](**options).rows(split=split, n=n, seed=config.seed)
    except ValueError as error:  # includes pydantic's ValidationError
        raise DataError(f"the task rejects its options: {error}", source=config.task or kind) from error
    return rows


def map_columns(row: Mapping[str, Any], config: DataConfig, source: str, number: int) -> Row:
    """Rename the columns of a raw row by `columns` and extract the answer by `answer_pattern`.

    A column may be mapped to several names; unmapped columns keep their names, and rows of a known format
    (`rft.data.formats`) get the names that they lack. Raises DataError.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"a row must be an object, not {type(row).__name__}", source=source, row=number + 1)
    out = dict(row)
    for used in set(config.columns.values()):
        out.pop(used, None)
    if config.resolved_kind == "hub":
        refuse_large(row, number + 1, source)
    for name, given in config.columns.items():
        if given not in row:
            raise missing_column(given, row, source, number + 1)
        out[name] = row[given]
    out = with_known_names(out, row)
    if config.answer_pattern is not None:
        if "answer" not in out:
            raise missing_column("answer", out, source, number + 1)
        match = re.search(config.answer_pattern, str(out["answer"]))
        if match is None or match[1] is None:
            raise DataError(
                f"`answer_pattern` {config.answer_pattern!r} does not match {str(out['answer'])[-60:]!r}",
                source=source,
                row=number + 1,
                column="answer",
            )
        out["answer"] = match[1].strip()
    if config.directions is not None:
        drawn = draw_direction(config.directions, config.seed, number)
        for name in drawn:
            if name in out:
                raise DataError(
                    f"the data has a column {name!r} already; choose other `directions.names`, or rename it",
                    source=source,
                    row=number + 1,
                )
        out |= drawn
    return out


def draw_direction(config: DirectionsConfig, seed: int, number: int) -> Row:
    """Return the columns of the preference direction of row `number`: its two weights, and both of them."""
    angle = math.radians(random.Random(f"direction/{seed}/{number}").uniform(*config.degrees))
    weights = [round(100 * math.cos(angle)), round(100 * math.sin(angle))]
    return {**dict(zip(config.names, weights, strict=True)), DIRECTION: weights}


def hold_out(config: DataConfig, split: Split, size: int, source: str) -> Sequence[int]:
    """Return the row numbers of a split, with `holdout` rows selected by a seeded shuffle."""
    if not config.holdout or (split == "test" and config.eval_path):
        return range(size)
    if config.holdout >= size:
        raise DataError(
            f"`holdout: {config.holdout}` leaves none of the {size} rows to train on; lower it", source=source
        )
    order = list(range(size))
    random.Random(f"holdout/{config.seed}").shuffle(order)
    held = order[: config.holdout]
    return sorted(held) if split == "test" else sorted(order[config.holdout :])


def data_source(config: DataConfig, split: Split) -> tuple[str, str]:
    """Return the path and split name to read. Raises DataError if evaluation would read the training file."""
    assert config.path is not None  # ensured by DataConfig
    path = (config.eval_path if split == "test" else None) or config.path
    name = config.eval_split if split == "test" and not config.holdout else config.split
    if split == "test" and not config.eval_path and not config.holdout and Path(path).expanduser().is_file():
        raise DataError(
            "no evaluation rows: this one file holds the training rows; set `eval_path` (Python: eval_data), "
            "or `holdout: 64` to set rows aside, or give a folder with a file per split",
            source=path,
        )
    return path, name


def has_held_out(config: DataConfig) -> bool:
    """Return whether a dataset has evaluation rows.

    Generated tasks always have, files according to the config or the file names. Hub datasets are assumed to
    have them; loading a missing split raises an error that lists the existing ones.
    """
    if config.resolved_kind != "file" or config.holdout or config.eval_path:
        return True
    place = Path(str(config.path)).expanduser()
    return place.is_dir() and any(_of_split(p, config.eval_split, place) for p in place.rglob("*"))


def _of_split(file: Path, split: str, root: Path) -> bool:
    first = str(file.relative_to(root).parts[0])
    return re.match(rf"{re.escape(split)}([-_.]|$)", first) is not None


def open_source(config: DataConfig, split: Split, *, in_order: bool = False) -> tuple[Sequence[Any], str]:
    path, name = data_source(config, split)
    if config.resolved_kind == "hub":
        return load_hub(config, path, name), f"{path} ({name})"
    files = find_files(path, name)
    lines = in_order and all(map(has_json_lines, files))
    if len(files) == 1:
        return LineRows(files) if lines else read_file(files[0]), str(files[0])
    names = [str(file) for file in files]
    if lines or files[0].name.endswith((".parquet", ".arrow")):
        rows = LineRows(files) if lines else TableRows(files)
        return rows, FolderSource(f"{path} ({name})", names, rows.file_ends)
    parts = [read_file(file) for file in files]
    ends = list(accumulate(map(len, parts)))
    return list(chain.from_iterable(parts)), FolderSource(f"{path} ({name})", names, ends)


def find_files(path: str, split: str) -> list[Path]:
    """Return the data files of a split.

    That is the file itself, or the files of a folder that are named after the split (`train.jsonl`,
    `train-00000-of-00002.parquet`, `train/...`), or all files if no name contains a split.

    Raises DataError if the path does not exist, or on unsupported or mixed formats.
    """
    place = Path(path).expanduser()
    if place.is_file():
        if not place.name.endswith(SUFFIXES):
            raise DataError(f"unknown file type; supported are {', '.join(SUFFIXES)}", source=path)
        return [place]
    if not place.is_dir():
        near = place.parent if place.parent.is_dir() else None
        siblings = sorted(p.name for p in near.iterdir())[:8] if near else []
        there = f"; {near} contains {', '.join(siblings) or 'nothing'}" if near else ""
        raise DataError(f"no such file or folder{there}", source=path)
    files = sorted(p for p in place.rglob("*") if p.is_file() and p.name.endswith(SUFFIXES))
    data = [p for p in files if p.name not in ("dataset_info.json", "state.json", "dataset_dict.json")]
    data = [p for p in data if not p.name.startswith("cache-")]
    of_split = [p for p in data if _of_split(p, split, place)]
    chosen = of_split or ([] if any(_known_split(p, place) for p in data) else data)
    if not chosen:
        have = ", ".join(str(p.relative_to(place)) for p in data[:8]) or f"no {'/'.join(SUFFIXES)} file"
        raise DataError(f"no file of the split '{split}'; the folder contains {have}", source=path)
    kinds = {
        p.name.removesuffix(".gz").removesuffix(".zst").rsplit(".", 1)[1].replace("jsonl", "json")
        for p in chosen
    }
    if len(kinds) > 1:
        raise DataError(
            f"files of different formats ({', '.join(sorted(kinds))}) cannot be mixed; "
            "keep one format in the folder",
            source=path,
        )
    return chosen


def _known_split(file: Path, root: Path) -> bool:
    first = str(file.relative_to(root).parts[0])
    return re.match(r"(train|test|validation|valid|dev|eval)([-_.]|$)", first) is not None


def load_hub(config: DataConfig, path: str, split: str, *, streaming: bool = False) -> Any:
    """Load a dataset from the hub or its local cache.

    Raises DataError if it is not found or unreachable, or for an unknown subset or split (listing the known).
    """
    import datasets

    try:
        return datasets.load_dataset(
            path, config.subset, split=split, revision=config.revision, streaming=streaming
        )
    except datasets.exceptions.DatasetNotFoundError as error:
        raise DataError(
            f"no such dataset on the hub, or no permission to read it ({error}); for local data give a path "
            f"that exists, or set `kind: file`",
            source=path,
        ) from error
    except ValueError as error:  # unknown split or subset: the message lists the known ones
        raise DataError(str(error), source=path) from error
    except (ConnectionError, OSError) as error:
        raise DataError(
            f"the hub cannot be reached ({type(error).__name__}: {error}); where there is a network, "
            f"download the dataset, then give its folder as `path` with `kind: file`",
            source=path,
        ) from error
