"""Streamed datasets for offline training, exactly resumable.

Rows are read in blocks of `shuffle_buffer`; each block is shuffled by (seed, epoch, block). The state is the
start of the block and the position in it; a resume reads that block again. (The shuffle buffer of `datasets`
cannot be resumed exactly, since its state does not contain the buffered rows.)
"""

from __future__ import annotations

import codecs
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import islice
from pathlib import Path
from typing import Any

from rft.algorithms.base import DataKind
from rft.batch import Group
from rft.config.data import DataConfig
from rft.data.errors import DataError, FolderSource, StreamSource
from rft.data.files import TableRows, decode, parse_line, read_lines, unreadable
from rft.data.groups import GroupMaker
from rft.data.rows import Row, Split, data_source, find_files, load_hub, load_rows, map_columns


class Reader(ABC):
    """Iterator over raw rows that can be restored to any earlier `state`."""

    def __iter__(self) -> Reader:
        return self

    @abstractmethod
    def __next__(self) -> Any: ...

    @abstractmethod
    def state(self) -> dict[str, Any]: ...

    def place(self) -> tuple[str, int] | None:
        """Return the file of the last row and the row's number in it, counted from 1; None: unknown."""
        return None

    @abstractmethod
    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue at a state; None: from the start."""


class LineReader(Reader):
    """JSON lines of a list of files; the state is (file, byte, line, row)."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.restore(None)

    def restore(self, state: Mapping[str, Any] | None) -> None:
        at = state or {"file": 0, "byte": 0, "line": 0}
        self.file, self.byte, self.line = at["file"], at["byte"], at["line"]
        self.row = at.get("row", self.line)  # excludes blank lines; missing in older checkpoints

    def place(self) -> tuple[str, int]:
        return str(self.files[self.file]), self.row

    def state(self) -> dict[str, Any]:
        return {"file": self.file, "byte": self.byte, "line": self.line, "row": self.row}

    def __next__(self) -> Any:
        while self.file < len(self.files):
            source = str(self.files[self.file])
            for line in self._lines():
                self.byte += len(line)
                self.line += 1
                text = line.removeprefix(codecs.BOM_UTF8) if self.line == 1 else line
                if text.lstrip().startswith(b"[") and self.line == 1:
                    raise DataError("a JSON array cannot be streamed; set `streaming: false`", source=source)
                if text.strip():
                    self.row += 1
                    return parse_line(decode(text, self.line, source), self.line, source)
            self.file, self.byte, self.line, self.row = self.file + 1, 0, 0, 0
        raise StopIteration

    def _lines(self) -> Any:
        file = self.files[self.file]
        try:
            with file.open("rb") as f:
                f.seek(self.byte)
                yield from read_lines(f, str(file), self.line)
        except OSError as error:
            raise unreadable(file, error) from None


class TableReader(Reader):
    """Rows of Parquet and Arrow files, one row group or record batch in memory; the state is the row."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.rows = TableRows(files)
        self.source = FolderSource("", [str(file) for file in files], self.rows.file_ends)
        self.restore(None)

    def restore(self, state: Mapping[str, Any] | None) -> None:
        self.row = state["row"] if state else 0

    def place(self) -> tuple[str, int]:
        return self.source.locate(self.row)

    def state(self) -> dict[str, Any]:
        return {"row": self.row}

    def __next__(self) -> Any:
        if self.row >= len(self.rows):
            raise StopIteration
        self.row += 1
        return self.rows[self.row - 1]


class HubReader(Reader):
    """Rows of a `datasets.IterableDataset`, with its state. Raises DataError if a read fails."""

    def __init__(self, dataset: Any, source: str) -> None:
        self.dataset, self.source = dataset, source
        self.start = deepcopy(dataset.state_dict())
        self.restore(None)

    def restore(self, state: Mapping[str, Any] | None) -> None:
        # The dataset updates its state only after reading a row; until then the restored state is valid.
        self.unread: dict[str, Any] | None = deepcopy(state["dataset"] if state else self.start)
        self.dataset.load_state_dict(deepcopy(self.unread))
        self.rows = iter(self.dataset)

    def state(self) -> dict[str, Any]:
        return {"dataset": deepcopy(self.unread or self.dataset.state_dict())}

    def __next__(self) -> Any:
        try:
            row = next(self.rows)
        except (OSError, ValueError) as error:  # network error or damaged file
            raise DataError(f"cannot be read: {type(error).__name__}: {error}", source=self.source) from error
        self.unread = None
        return row


def open_reader(config: DataConfig, split: Split) -> tuple[Reader, str]:
    """Open the reader of a split; returns it with its name for messages. Raises DataError as `load_rows`."""
    path, name = data_source(config, split)
    if config.resolved_kind == "hub":
        source = f"{path} ({name})"
        return HubReader(load_hub(config, path, name, streaming=True), source), source
    files = find_files(path, name)
    if files[0].name.endswith(".jsonl"):
        return LineReader(files), path
    if not files[0].name.endswith((".parquet", ".arrow")):
        raise DataError(
            "only .jsonl, .parquet and .arrow files can be streamed; set `streaming: false`", source=path
        )
    return TableReader(files), path


def first_row(config: DataConfig) -> Row:
    """Return the first training row, with rft column names. Raises DataError."""
    raw, source, number = first_raw_row(config)
    return map_columns(raw, config, source, number)


def first_raw_row(config: DataConfig) -> tuple[Any, str, int]:
    """Return the first training row as the dataset has it, its source, and its number. Raises DataError."""
    if not config.streaming:
        if config.resolved_kind not in ("file", "hub"):  # a task generates its rows one after the other
            config = config.model_copy(update={"limit": 1})
        rows = load_rows(config)
        return rows.base[rows.numbers[0]], rows.source, rows.numbers[0]
    reader, source = open_reader(config, "train")
    for raw in reader:
        return raw, source, 0
    raise DataError("the dataset is empty; give at least one row", source=source)


class GroupStream:
    """`GroupSource` of streamed data: groups epoch after epoch, exactly resumable by `state_dict`.

    Raises DataError at the first invalid or overlong row, unless the config skips such rows.
    """

    def __init__(
        self,
        config: DataConfig,
        tokenizer: Any,
        kind: DataKind = "sft",
        split: Split = "train",
        max_length: int | None = None,
    ) -> None:
        self.config = config
        self.limit = config.limit if split == "train" else config.eval_limit
        self.reader, name = open_reader(config, split)
        self.source = StreamSource(name)
        self.maker = GroupMaker(config, tokenizer, kind, self.source, max_length)
        self.epoch = 0
        self._begin_epoch()

    def _begin_epoch(self) -> None:
        self.block, self.first, self.position = -1, 0, 0  # `first`: number of the block's first row
        self.rows: list[tuple[int, Any]] = []
        self.block_state: dict[str, Any] | None = None
        self.made = 0  # groups returned in this epoch
        self.reader.restore(None)

    @property
    def epochs(self) -> float:
        """Return the completed passes over the data, without fractions, since the length is unknown."""
        return float(self.epoch)

    def metrics(self) -> dict[str, float]:
        return {"data/epoch": self.epochs}

    def next(self, k: int) -> list[Group]:
        """Return the next k groups, continuing into the next epoch."""
        out: list[Group] = []
        while len(out) < k:
            if self.position == len(self.rows):
                self._read_block()
                continue
            number, raw = self.rows[self.position]
            self.position += 1
            group = self.maker.make(map_columns(raw, self.config, self.source, number), number)
            self.maker.check()
            if group is not None:
                self.made += 1
                out.append(group)
        return out

    def _read_block(self) -> None:
        """Read and shuffle the next block, or start the next epoch."""
        first = self.first + len(self.rows)
        state = self.reader.state()
        self._fill(first)
        self.block, self.block_state, self.position = self.block + 1, state, 0
        if self.rows:
            self._shuffle()
            return
        if not self.made:
            raise DataError("the dataset is empty, or none of its rows can be used", source=self.source)
        self.epoch += 1
        self._begin_epoch()

    def _fill(self, first: int) -> None:
        size = self.config.shuffle_buffer
        if self.limit is not None:
            size = min(size, self.limit - first)
        self.first, self.rows = first, []
        self.source.places.clear()
        for number, raw in enumerate(islice(self.reader, size), first):
            self.rows.append((number, raw))
            if place := self.reader.place():
                self.source.places[number + 1] = place

    def _shuffle(self) -> None:
        if self.config.shuffle:
            random.Random(f"{self.config.seed}/{self.epoch}/{self.block}").shuffle(self.rows)

    def state_dict(self) -> dict[str, Any]:
        return {
            "seed": self.config.seed,
            "shuffle_buffer": self.config.shuffle_buffer,
            "epoch": self.epoch,
            "block": self.block,
            "first": self.first,
            "position": self.position,
            "made": self.made,
            "reader": self.block_state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state. Raises DataError if the data settings differ."""
        for name in ("seed", "shuffle_buffer"):
            if state[name] != getattr(self.config, name):
                raise DataError(
                    f"cannot resume the stream: the checkpoint was made with {name}={state[name]}, this run "
                    f"has {name}={getattr(self.config, name)}; restore this setting, or start a new run"
                )
        self.epoch = state["epoch"]
        self._begin_epoch()
        if state["block"] < 0:
            return
        reader = state["reader"]
        if isinstance(self.reader, TableReader):
            # State at the start of the block; older checkpoints contain the state of the `datasets` library.
            reader = {"row": state["first"]}
        elif not set(reader) <= set(self.reader.state()):
            raise DataError(
                "cannot resume the stream: the checkpoint was made with another kind of data file. Restore "
                "`data.path`, or start a new run",
                source=self.source,
            )
        self.reader.restore(reader)
        self._fill(state["first"])
        self.block, self.block_state = state["block"], reader
        self._shuffle()
        self.position, self.made = state["position"], state["made"]
        if self.position > len(self.rows):
            raise DataError(
                "the data has fewer rows than when the checkpoint was made; restore it, or start a new run",
                source=self.source,
            )
