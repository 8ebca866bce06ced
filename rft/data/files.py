"""Read rows of JSON and JSON lines (plain, gzip or zstd), CSV, Parquet and Arrow, without a cache on disk.

Invalid files raise DataError with the file and, if known, the row.
"""

from __future__ import annotations

import bisect
import codecs
import csv
import gzip
import io
import json
import re
import zlib
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from itertools import accumulate, islice
from pathlib import Path
from typing import Any

from rft.data.errors import DataError

_BLOCK = 1000  # rows of a table converted to Python objects at a time
# Limits of a row in every format: a larger row would exhaust memory, a deeper one overflow the stack.
ROW_BYTES = 16 << 20
ROW_DEPTH = 100  # nesting depth of lists and objects, including the row
_GZIP, _ZSTD = b"\x1f\x8b", b"\x28\xb5\x2f\xfd"
# Magic bytes of unsupported files, with the remedy.
_OTHER_FORMATS = (
    (b"PK\x03\x04", "a zip archive; unpack it"),
    (b"BZh", "compressed with bzip2; unpack it, or use gzip"),
    (b"\xfd7zXZ\x00", "compressed with xz; unpack it, or use gzip"),
    (b"PAR1", "a Parquet file; name it .parquet"),
    (b"ARROW1", "an Arrow file; name it .arrow"),
    (b"\xff\xfe", "UTF-16 text; save the file as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; save the file as UTF-8"),
    (b"version https://git-lfs", "a pointer of Git LFS; get the file itself by `git lfs pull`"),
)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def read_file(file: Path) -> Sequence[Any]:
    """Return the rows of a data file, by file extension: JSON loaded at once, tables read lazily."""
    if file.name.endswith((".parquet", ".arrow")):
        return TableRows([file])
    return read_csv(file) if file.name.endswith(".csv") else read_json(file)


def read_json(file: Path) -> list[Any]:
    """Return the rows of a JSON array or of JSON lines, compressed or not, regardless of the file name.

    Blank lines are skipped. Raises DataError with the malformed line.
    """
    source = str(file)
    rows: list[Any] = []
    for number, line in _json_lines(file):
        if not rows and _may_be_one_value(line, file):
            return _parse_all(line, number, source)
        rows.append(parse_line(decode(line, number, source), number, source))
    return rows


def has_json_lines(file: Path) -> bool:
    """Whether a file is named .jsonl and does not begin with an array. Raises DataError."""
    if ".jsonl" not in file.name:
        return False
    first = next(_json_lines(file, together=False), None)
    return first is None or not _may_be_one_value(first[1], file)


def _may_be_one_value(line: bytes, file: Path) -> bool:
    """Whether a file with this first line has its rows in one JSON value, over any number of lines."""
    return line.lstrip().startswith(b"[") or ".jsonl" not in file.name


def _json_lines(file: Path, *, together: bool = True) -> Iterator[tuple[int, bytes]]:
    """Yield the lines of a file that are not blank, decompressed, with their numbers from 1 on.

    together: where the rows are in one JSON value, yield the rest of the file with its first line. Raises
    DataError for a file that cannot be read.
    """
    source, number, first, beginning = str(file), 0, True, b""
    try:
        with file.open("rb") as raw:
            beginning = raw.read(32)
        _refuse_other_formats(beginning, source)
        with _open_compressed(file, beginning) as stream:
            for number, line in enumerate(read_lines(stream, source), 1):
                line = line.removeprefix(codecs.BOM_UTF8) if number == 1 else line
                if not line.strip():
                    continue
                if first and together and _may_be_one_value(line, file):
                    yield number, line + stream.read()
                    return
                first = False
                yield number, line
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise _damaged(error, number, source) from None
    except OSError as error:
        if not error.errno and beginning.startswith(_ZSTD):  # pyarrow's error, not the system's
            raise _damaged(error, number, source) from None
        raise unreadable(file, error) from None


class FileRows(Sequence[Any]):
    """Base of the rows of files that are read when they are asked for."""

    file_ends: list[int]  # cumulative number of rows by file

    def __len__(self) -> int:
        return self.file_ends[-1] if self.file_ends else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return self.row(index % len(self))

    @abstractmethod
    def row(self, index: int) -> Any:
        """Read the row with this number, from 0 on."""


class LineRows(FileRows):
    """Rows of files of JSON lines, plain or compressed, of which one is in memory at a time.

    They are meant to be read in order: to go back, the files are read again from the start. Raises DataError
    with the file and line when a malformed one is read.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        counts = (sum(1 for _ in _json_lines(file, together=False)) for file in files)
        self.file_ends = list(accumulate(counts))
        self._lines, self._next = iter(self._all_lines()), 0

    def _all_lines(self) -> Iterator[tuple[str, int, bytes]]:
        for file in self.files:
            for number, line in _json_lines(file, together=False):
                yield str(file), number, line

    def row(self, index: int) -> Any:
        if index < self._next:
            self._lines, self._next = iter(self._all_lines()), 0
        item = next(islice(self._lines, index - self._next, None), None)
        if item is None:
            raise DataError("the file became shorter while it was read", source=str(self.files[-1]))
        self._next = index + 1
        source, number, line = item
        return parse_line(decode(line, number, source), number, source)


def _refuse_other_formats(beginning: bytes, source: str) -> None:
    for signature, what in _OTHER_FORMATS:
        if beginning.startswith(signature):
            raise DataError(f"it is {what}", source=source)


def _open_compressed(file: Path, beginning: bytes) -> io.BufferedIOBase:
    """Open a file for reading, decompressed if it begins like gzip or zstd, or is named so."""
    if beginning.startswith(_ZSTD) or (beginning and file.suffix == ".zst"):
        import pyarrow as pa

        return io.BufferedReader(pa.input_stream(str(file), compression="zstd"))
    if beginning.startswith(_GZIP) or (beginning and file.suffix == ".gz"):
        return gzip.open(file, "rb")
    return file.open("rb")


def _damaged(error: Exception, number: int, source: str) -> DataError:
    """Return the error for compressed data that cannot be read after line `number`."""
    kind = "gzip" if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile) else "zstd"
    cut = isinstance(error, EOFError) or "Truncated" in str(error)
    what = "is cut off" if cut else f"is damaged ({error})"
    return DataError(
        f"the {kind} data {what} after line {number}; copy the file again", source=source, row=number + 1
    )


_NUMBER = re.compile(r"-?(0|[1-9]\d{0,14})(\.\d*[1-9]|\.0)?")  # canonical: as JSON would write it again


def read_csv(file: Path) -> list[Any]:
    """Return the rows of a CSV file: comma-separated, quoted by `"`, with column names in the first line.

    A column whose cells are all numbers as JSON writes them (not `007`, `1,000`) or empty becomes numbers,
    empty cells null; all other cells stay text. Raises DataError with the row.
    """
    source, number = str(file), 0
    csv.field_size_limit(ROW_BYTES)
    rows: list[list[str]] = []
    try:
        with file.open("rb") as raw:
            _refuse_other_formats(raw.read(32), source)
        with file.open(encoding="utf-8-sig", newline="") as text:
            reader = csv.reader(text, strict=True)
            names = next(reader, [])
            _check_names(names, source)
            for number, cells in enumerate((cells for cells in reader if cells), 1):
                if len(cells) != len(names):
                    raise DataError(
                        f"{len(cells)} cells, but the first line names {len(names)} columns; put cells that "
                        'contain a comma or a line break into quotes "..."',
                        source=source,
                        row=number,
                    )
                rows.append(cells)
    except csv.Error as error:
        raise DataError(f"malformed CSV: {error}", source=source, row=number + 1) from None
    except UnicodeDecodeError as error:
        raise DataError(f"not UTF-8 text ({error.reason}); save the file as UTF-8", source=source) from None
    except OSError as error:
        raise unreadable(file, error) from None
    columns = [_csv_column([cells[i] for cells in rows]) for i in range(len(names))]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _check_names(names: Sequence[str], source: str) -> None:
    """Check the column names of a CSV file. Raises DataError."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"the first line names the column {twice!r} twice", source=source)
    if any(not name.strip() for name in names):
        raise DataError("the first line must name every column; one name is empty", source=source)
    if len(names) == 1 and any(mark in names[0] for mark in ";\t"):
        raise DataError("the columns are not separated by commas; save the file with commas", source=source)


def _csv_column(cells: Sequence[str]) -> list[Any]:
    given = [cell for cell in cells if cell]
    if not given or not all(_NUMBER.fullmatch(cell) for cell in given):
        return list(cells)
    return [json.loads(cell) if cell else None for cell in cells]


def read_lines(stream: io.BufferedIOBase, source: str, number: int = 0) -> Iterator[bytes]:
    """Yield the lines after line `number`; a first line that starts a JSON array may be truncated.

    Raises DataError at a line longer than `ROW_BYTES`, without reading the rest of it.
    """
    while line := stream.readline(ROW_BYTES + 1):
        number += 1
        if len(line) > ROW_BYTES and not (number == 1 and line.lstrip().startswith(b"[")):
            raise DataError(
                f"line {number} is longer than {ROW_BYTES >> 20} MiB, the most that a row may have",
                source=source,
                row=number,
            )
        yield line


def unreadable(file: Path, error: OSError) -> DataError:
    """Return the error for a file that cannot be opened or read."""
    return DataError(f"cannot be read: {error.strerror or error}", source=str(file))


def _parse_all(raw: bytes, first: int, source: str) -> list[Any]:
    """Return the rows of a JSON array, or else of JSON lines, starting at line `first`."""
    lines = [decode(line, n, source) for n, line in enumerate(raw.splitlines(keepends=True), first)]
    text = "".join(lines)
    try:
        rows = json.loads(text, object_pairs_hook=_object)
    except RecursionError:  # the position of the row is unknown
        raise DataError(_TOO_DEEP, source=source, row=first) from None
    except ValueError as error:
        if getattr(error, "msg", "") == "Extra data" and not text.lstrip().startswith("["):
            return [parse_line(line, n, source) for n, line in enumerate(lines, first) if line.strip()]
        number = first - 1 + getattr(error, "lineno", 1)
        what = getattr(error, "msg", error)
        raise DataError(f"malformed JSON in line {number}: {what}", source=source, row=number) from None
    if not isinstance(rows, list):
        raise DataError("a .json file must hold a list of rows; else name it .jsonl", source=source)
    if len(raw) > ROW_BYTES or _may_be_deep(text):
        for number, row in enumerate(rows, 1):
            refuse_large(row, number, source)
    if _SURROGATE.search(text):
        for number, row in enumerate(rows, 1):
            _refuse_surrogates(row, number, source)
    return rows


def decode(raw: bytes, number: int, source: str) -> str:
    """Decode a line; `number` is counted from 1. Raises DataError if it is not UTF-8."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"line {number} is not UTF-8 text (byte 0x{raw[error.start]:02x}); save the file as UTF-8",
            source=source,
            row=number,
        ) from None


def parse_line(line: str, number: int, source: str) -> Any:
    """Parse a JSON line; `number` is counted from 1. Raises DataError."""
    try:
        value = json.loads(line, object_pairs_hook=_object)
    except RecursionError:
        raise DataError(f"malformed JSON in line {number}: {_TOO_DEEP}", source=source, row=number) from None
    except ValueError as error:
        at = f", at character {error.pos + 1}" if isinstance(error, json.JSONDecodeError) else ""
        what = getattr(error, "msg", error)
        raise DataError(f"malformed JSON in line {number}{at}: {what}", source=source, row=number) from None
    if len(line) > ROW_BYTES or _may_be_deep(line):
        refuse_large(value, number, source)
    if _SURROGATE.search(line):
        _refuse_surrogates(value, number, source)
    return value


_TOO_DEEP = f"the row is nested more than {ROW_DEPTH} levels deep, the most that a row may have"


def _may_be_deep(text: str) -> bool:
    return text.count("[") + text.count("{") > ROW_DEPTH


def refuse_large(row: Any, number: int, source: str) -> None:
    """Raise DataError for a row that exceeds `ROW_BYTES` or `ROW_DEPTH`.

    The size is the bytes of all strings plus one per other value, a lower bound of the size as JSON.
    """
    size, level = 0, [row]
    for _ in range(ROW_DEPTH + 1):
        below: list[Any] = []
        for value in level:
            if isinstance(value, str):
                size += len(value) if value.isascii() else len(value.encode("utf-8", "surrogatepass"))
            elif isinstance(value, bytes):
                size += len(value)
            elif isinstance(value, dict):
                below += [*value, *value.values()]
            elif isinstance(value, list | tuple):
                below += value
            else:
                size += 1
        if size > ROW_BYTES:
            raise DataError(
                f"the row is larger than {ROW_BYTES >> 20} MiB, the most that a row may have",
                source=source,
                row=number,
            )
        if not below:
            return
        level = below
    raise DataError(_TOO_DEEP, source=source, row=number)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object. Raises ValueError for a duplicate key, which `json` would silently overwrite."""
    out = dict(pairs)
    if len(out) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} is given twice")
    return out


def _refuse_surrogates(value: Any, number: int, source: str) -> None:
    """Raise DataError for a lone surrogate: valid in JSON, but tokenizers fail on it."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        half = ascii(error.object[error.start])[1:-1]
        raise DataError(
            f"contains half of a surrogate pair ({half}), which is not a character; remove it",
            source=source,
            row=number,
        ) from None


class TableRows(FileRows):
    """Rows of Parquet and Arrow files as plain dicts, read lazily, one part at a time.

    Raises DataError with the file and row when a damaged part is read.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self._parts: list[tuple[Path, int, int]] = []  # (file, row group or record batch, rows before it)
        self._ends: list[int] = []  # cumulative number of rows by part
        self.file_ends = []
        total = 0
        for file in files:
            before = 0
            for index, rows in enumerate(_guarded(file, 1, lambda f=file: _Table(f).sizes())):
                self._parts.append((file, index, before))
                before += rows
                total += rows
                self._ends.append(total)
            self.file_ends.append(total)
        self._opened: tuple[Path | None, Any] = (None, None)
        self._loaded: tuple[int, Any] = (-1, None)
        self._block: tuple[int, list[Any]] = (-1, [])

    def row(self, index: int) -> Any:
        part = bisect.bisect_right(self._ends, index)
        begin = self._ends[part - 1] if part else 0
        block = begin + (index - begin) // _BLOCK * _BLOCK
        if self._block[0] != block:
            file, number, before = self._parts[part]
            if self._loaded[0] != part:
                self._loaded = part, _guarded(file, before + 1, lambda: self._table(file).part(number))
            table, first = self._loaded[1], block - begin
            part_rows = table.slice(first, _BLOCK)
            rows = _guarded(file, before + first + 1, part_rows.to_pylist)
            if part_rows.nbytes > ROW_BYTES:  # pyarrow rejects rows deeper than `ROW_DEPTH`
                for row_number, row in enumerate(rows, before + first + 1):
                    refuse_large(row, row_number, str(file))
            self._block = block, rows
        return self._block[1][index - block]

    def _table(self, file: Path) -> _Table:
        """Open a file and close the previous one."""
        if self._opened[0] != file:
            self._opened = file, _Table(file)
        table: _Table = self._opened[1]
        return table


def _guarded(file: Path, row: int, read: Any) -> Any:
    """Return `read()`. Raises DataError with the file and the first row of the part."""
    import pyarrow as pa

    try:
        return read()
    except (pa.ArrowException, OSError, ValueError) as error:  # also text that is not UTF-8
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise DataError(
            f"cannot be read, the file is damaged or cut off: {why}", source=str(file), row=row
        ) from None


class _Table:
    """Open Parquet or Arrow file, read in parts. Raises ArrowException, OSError or ValueError."""

    def __init__(self, file: Path) -> None:
        self.parquet, self.batches = None, []
        if file.name.endswith(".parquet"):
            import pyarrow.parquet as pq

            self.parquet = pq.ParquetFile(file)
        else:
            self.batches = _batches(file)

    def sizes(self) -> list[int]:
        """Return the number of rows of each part (row group or record batch)."""
        if self.parquet is None:
            return [batch.num_rows for batch in self.batches]
        metadata = self.parquet.metadata
        return [metadata.row_group(g).num_rows for g in range(self.parquet.num_row_groups)]

    def part(self, number: int) -> Any:
        if self.parquet is not None:
            return self.parquet.read_row_group(number)
        batch = self.batches[number]
        batch.validate(full=True)  # a damaged offset would read memory outside the file
        return batch


def _batches(file: Path) -> list[Any]:
    """Return the memory-mapped record batches of an Arrow file or stream (as by `Dataset.save_to_disk`)."""
    import pyarrow as pa

    source = pa.memory_map(str(file))
    if source.read(6) == b"ARROW1":
        reader = pa.ipc.open_file(source)
        return [reader.get_batch(i) for i in range(reader.num_record_batches)]
    source.seek(0)
    return list(pa.ipc.open_stream(source))
