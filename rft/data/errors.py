"""Dataset errors with file, row and column, and a collector of bad rows."""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Sequence

from rft.utils.did_you_mean import closest_match, did_you_mean


class Source(str):
    """Name of a dataset, as the prefix of messages."""

    def locate(self, row: int) -> tuple[str, int]:
        """Return the file of row `row` and the row's number in that file; rows are counted from 1."""
        return str(self), row


class FolderSource(Source):
    """Dataset of several files; `ends[i]`: cumulative number of rows up to and including file i."""

    def __new__(cls, name: str, files: Sequence[str], ends: Sequence[int]) -> FolderSource:
        source = super().__new__(cls, name)
        source.files, source.ends = files, ends
        return source

    files: Sequence[str]
    ends: Sequence[int]

    def __getnewargs__(self) -> tuple[str, Sequence[str], Sequence[int]]:  # type: ignore[override]
        return str(self), self.files, self.ends

    def locate(self, row: int) -> tuple[str, int]:
        index = bisect.bisect_left(self.ends, row)
        return self.files[index], row - (self.ends[index - 1] if index else 0)


class StreamSource(Source):
    """Streamed dataset; `places` maps the buffered rows to the results of `locate`."""

    def __new__(cls, name: str) -> StreamSource:
        source = super().__new__(cls, name)
        source.places = {}
        return source

    places: dict[int, tuple[str, int]]

    def locate(self, row: int) -> tuple[str, int]:
        return self.places.get(row, (str(self), row))


class JoinedSource(Source):
    """Several datasets as one; `starts[i]` is added to the row numbers of part i."""

    def __new__(cls, name: str, parts: Sequence[str], starts: Sequence[int]) -> JoinedSource:
        source = super().__new__(cls, name)
        source.parts, source.starts = parts, starts
        return source

    parts: Sequence[str]
    starts: Sequence[int]

    def __getnewargs__(self) -> tuple[str, Sequence[str], Sequence[int]]:  # type: ignore[override]
        return str(self), self.parts, self.starts

    def locate(self, row: int) -> tuple[str, int]:
        index = bisect.bisect_left(self.starts, row) - 1
        return locate(self.parts[index], row - self.starts[index])


def locate(source: str, row: int) -> tuple[str, int]:
    """Return the file of a dataset's row and the row's number in that file."""
    return source.locate(row) if isinstance(source, Source) else (source, row)


class DataError(ValueError):
    """Unusable dataset. The message names the file, the row in it (counted from 1) and the column."""

    def __init__(
        self, problem: str, *, source: str | None = None, row: int | None = None, column: str | None = None
    ) -> None:
        if source is not None and row is not None:
            source, row = locate(source, row)
        self.problem, self.source, self.row, self.column = problem, source, row, column
        where = [source] if source else []
        where += [f"row {row}"] if row is not None else []
        where += [f"column '{column}'"] if column else []
        super().__init__(f"{', '.join(where)}: {problem}" if where else problem)


class RowProblem(ValueError):
    """Unusable row, with the reason."""


def missing_column(column: str, existing: Iterable[str], source: str, row: int | None = None) -> DataError:
    """Return the error for a missing column, with the existing columns and the closest name."""
    names = [str(name) for name in existing]
    near = closest_match(column, names)
    have = ", ".join(f"'{name}'" for name in names) or "none"
    return DataError(
        f"no such column{did_you_mean(column, names)}; the columns are {have}. "
        f"Map it in the config: `columns: {{{column}: {near or 'NAME_IN_YOUR_DATA'}}}`",
        source=source,
        row=row,
        column=column,
    )


SHOWN = 8
"""Number of rows per reason that a message lists."""


class BadRows:
    """Collector of bad rows by reason, to report all of them in one message."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.rows: dict[str, list[int]] = {}
        self.places: dict[str, list[tuple[str, int]]] = {}  # (file, row in it) of the first rows

    def add(self, reason: str, row: int) -> None:
        """Record a bad row; `row` is counted from 1."""
        self.rows.setdefault(reason, []).append(row)
        places = self.places.setdefault(reason, [])
        if len(places) < SHOWN:
            places.append(locate(self.source, row))

    @property
    def counts(self) -> dict[str, int]:
        """Return the number of rows by reason."""
        return {reason: len(rows) for reason, rows in self.rows.items()}

    def __bool__(self) -> bool:
        return bool(self.rows)

    def lines(self) -> list[str]:
        """Return one line per reason, with the numbers of its first eight rows."""
        lines = []
        for reason, rows in self.rows.items():
            shown = self._shown(self.places[reason]) + (", ..." if len(rows) > SHOWN else "")
            lines.append(f"{len(rows)} row{'s' * (len(rows) > 1)} ({shown}): {reason}")
        return lines

    def _shown(self, places: list[tuple[str, int]]) -> str:
        """Format row numbers, prefixed by the file name if the dataset has several files."""
        by_file: dict[str, list[int]] = {}
        for file, row in places:
            by_file.setdefault(file, []).append(row)
        return "; ".join(
            ("" if file == self.source else f"{file} ") + ", ".join(map(str, rows))
            for file, rows in by_file.items()
        )

    def error(self, remedy: str) -> DataError:
        """Return an error that lists each reason with its first eight row numbers, and the remedy."""
        lines = [f"  {line}" for line in self.lines()]
        total = sum(self.counts.values())
        first = min(row for places in self.places.values() for _, row in places)
        text = f"{total} bad row{'s' * (total > 1)}\n" + "\n".join(lines) + f"\n{remedy}"
        error = DataError(text, source=self.source)
        error.row = first
        return error
