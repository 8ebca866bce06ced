"""The error that every problem with a dataset is raised as, and the collector that gathers bad rows."""

from __future__ import annotations

from collections.abc import Iterable

from rft.utils.did_you_mean import closest_match


class DataError(ValueError):
    """A dataset cannot be used. The message names the source, the row (counted from 1) and the column."""

    def __init__(
        self, problem: str, *, source: str | None = None, row: int | None = None, column: str | None = None
    ) -> None:
        self.problem, self.source, self.row, self.column = problem, source, row, column
        where = [source] if source else []
        where += [f"row {row}"] if row is not None else []
        where += [f"column '{column}'"] if column else []
        super().__init__(f"{', '.join(where)}: {problem}" if where else problem)


class RowProblem(ValueError):
    """A row that cannot be used, and why."""


def missing_column(column: str, existing: Iterable[str], source: str, row: int | None = None) -> DataError:
    """The error for a column that a row lacks: names the columns that exist, and the nearest."""
    names = [str(name) for name in existing]
    near = closest_match(column, names)
    hint = f" Did you mean '{near}'?" if near else ""
    have = ", ".join(f"'{name}'" for name in names) or "none"
    return DataError(
        f"no such column; the columns are {have}.{hint}"
        f" Map it in the config: `columns: {{{column}: {near or 'NAME_IN_YOUR_DATA'}}}`",
        source=source,
        row=row,
        column=column,
    )


class BadRows:
    """Gathers bad rows by reason, so that the user reads one message instead of one row at a time."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.rows: dict[str, list[int]] = {}

    def add(self, reason: str, row: int) -> None:
        """Note a bad row; `row` is its number counted from 1."""
        self.rows.setdefault(reason, []).append(row)

    @property
    def counts(self) -> dict[str, int]:
        """Reason -> number of rows."""
        return {reason: len(rows) for reason, rows in self.rows.items()}

    def __bool__(self) -> bool:
        return bool(self.rows)

    def lines(self) -> list[str]:
        """Each reason with the numbers of its rows (the first eight)."""
        lines = []
        for reason, rows in self.rows.items():
            shown = ", ".join(map(str, rows[:8])) + (", ..." if len(rows) > 8 else "")
            lines.append(f"{len(rows)} row{'s' * (len(rows) > 1)} ({shown}): {reason}")
        return lines

    def error(self, remedy: str) -> DataError:
        """One error that lists each reason with its row numbers (the first eight) and the remedy."""
        lines = [f"  {line}" for line in self.lines()]
        total = sum(self.counts.values())
        first = min(min(rows) for rows in self.rows.values())
        text = f"{total} bad row{'s' * (total > 1)}\n" + "\n".join(lines) + f"\n{remedy}"
        error = DataError(text, source=self.source)
        error.row = first
        return error
