"""Offline training on data that is read as it goes: nothing is loaded whole, and a resume is exact.

Rows are read in blocks of `shuffle_buffer`, each block is shuffled by (seed, epoch, block), and the
state is where the block begins and how much of it was used. A resume reads that one block again.
(The shuffle buffer of `datasets` cannot be resumed exactly: it forgets the rows it held.)
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
    """Raw rows in order, from any place that `state` named. `next` raises StopIteration at the end."""

    def __iter__(self) -> Reader:
        return self

    @abstractmethod
    def __next__(self) -> Any: ...

    @abstractmethod
    def state(self) -> dict[str, Any]: ...

    def place(self) -> tuple[str, int] | None:
        """The file of the row that was read last, and its row in it, from 1; None where that is not known."""
        return None

    @abstractmethod
    def restore(self, state: Mapping[str, Any] | None) -> None:
        """Continue at a state; None is the beginning."""


class LineReader(Reader):
    """JSON lines from a list of files; the state is (file, byte, line, row)."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.restore(None)

    def restore(self, state: Mapping[str, Any] | None) -> None:
        at = state or {"file": 0, "byte": 0, "line": 0}
        self.file, self.byte, self.line = at["file"], at["byte"], at["line"]
        self.row = at.get("row", self.line)  # without blank lines; older checkpoints do not count it

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
    """Rows of Parquet and Arrow files, one part (row group, record batch) in memory; the state is the row."""

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
    """Rows of a `datasets.IterableDataset`, which keeps its own state. Raises DataError if a read fails."""

    def __init__(self, dataset: Any, source: str) -> None:
        self.dataset, self.source = dataset, source
        self.start = deepcopy(dataset.state_dict())
        self.restore(None)

    def restore(self, state: Mapping[str, Any] | None) -> None:
        # The dataset tells its new state only once a row was read: until then, this one counts.
        self.unread: dict[str, Any] | None = deepcopy(state["dataset"] if state else self.start)
        self.dataset.load_state_dict(deepcopy(self.unread))
        self.rows = iter(self.dataset)

    def state(self) -> dict[str, Any]:
        return {"dataset": deepcopy(self.unread or self.dataset.state_dict())}

    def __next__(self) -> Any:
        try:
            row = next(self.rows)
        except (OSError, ValueError) as error:  # the network, or a damaged file
            raise DataError(f"cannot be read: {type(error).__name__}: {error}", source=self.source) from error
        self.unread = None
        return row


def open_reader(config: DataConfig, split: Split) -> tuple[Reader, str]:
    """The reader of a split, and its name for messages. Raises DataError as `load_rows` does."""
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
    """The first training row, with rft's column names. Raises DataError."""
    if not config.streaming:
        row: Row = load_rows(config)[0]
        return row
    reader, source = open_reader(config, "train")
    for raw in reader:
        return map_columns(raw, config, source, 0)
    raise DataError("the dataset is empty", source=source)


class GroupStream:
    """Groups for ever, epoch after epoch. `next(k)` gives the next k; `state_dict` resumes exactly.

    Raises DataError at the first bad or too long row, unless the config says to skip such rows.
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
        self.made = 0  # groups that this epoch has given
        self.reader.restore(None)

    @property
    def epochs(self) -> float:
        """Whole passes over the data so far: how long one is, is not known."""
        return float(self.epoch)

    def next(self, k: int) -> list[Group]:
        """The next k groups; runs on into the next epoch."""
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
        """Read and shuffle the next block, or begin the next epoch."""
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
        """Continue where `state` was taken. Raises DataError if the settings are not the same."""
        for name in ("seed", "shuffle_buffer"):
            if state[name] != getattr(self.config, name):
                raise DataError(
                    f"cannot resume the stream: the checkpoint was made with {name}={state[name]}, this run "
                    f"has {name}={getattr(self.config, name)}"
                )
        self.epoch = state["epoch"]
        self._begin_epoch()
        if state["block"] < 0:
            return
        reader = state["reader"]
        if isinstance(self.reader, TableReader):
            # The block begins at this row; older checkpoints hold the state of the library `datasets`.
            reader = {"row": state["first"]}
        elif not set(reader) <= set(self.reader.state()):
            raise DataError(
                "cannot resume the stream: the checkpoint's place is in data of another kind. Set "
                "`data.path` to what the run began with, or start a new run",
                source=self.source,
            )
        self.reader.restore(reader)
        self._fill(state["first"])
        self.block, self.block_state = state["block"], reader
        self._shuffle()
        self.position, self.made = state["position"], state["made"]
        if self.position > len(self.rows):
            raise DataError("the data ends before the place to resume at: it has changed", source=self.source)
