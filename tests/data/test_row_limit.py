"""A row of any size or depth is refused by its file and line before it fills the memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rft.data.errors import DataError
from rft.data.files import ROW_BYTES, ROW_DEPTH, read_file, read_json, refuse_large
from rft.data.stream import LineReader

ROWS = {"long": json.dumps({"text": "x" * (30 << 20)}), "deep": "[" * 100_000 + "]" * 100_000}


@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("streamed", [False, True])
def test_an_outsized_row_is_named(tmp_path: Path, name: str, streamed: bool) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"text": "fine"}\n' + ROWS[name] + "\n")
    with pytest.raises(DataError, match="line 2") as raised:
        list(LineReader([file]) if streamed else read_json(file))
    assert "rows.jsonl" in str(raised.value)


def test_a_long_array_in_one_line_is_read(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps([{"text": "x" * (1 << 20)}] * 20))
    assert len(read_json(file)) == 20


def nested(levels: int) -> Any:
    """A row with lists inside one another."""
    value: Any = "x"
    for _ in range(levels - 1):
        value = [value]
    return {"text": value}


FINE: dict[str, Any] = {"text": "fine"}
OUTSIZED = {"larger": {"text": "x" * (ROW_BYTES + 1)}, "deep": nested(ROW_DEPTH + 1)}


@pytest.mark.parametrize("name", OUTSIZED)
@pytest.mark.parametrize("layout", ["one line", "a line for each row", "not an array"])
def test_an_outsized_row_of_a_json_file_is_named(tmp_path: Path, name: str, layout: str) -> None:
    rows = [json.dumps(row) for row in (FINE, OUTSIZED[name], FINE)]
    joint = ", " if layout == "one line" else "\n" if layout == "not an array" else ",\n"
    file = tmp_path / "rows.json"
    file.write_text(joint.join(rows) if layout == "not an array" else f"[{joint.join(rows)}]")
    with pytest.raises(DataError, match=rf"rows.json, row 2: .*{name}"):
        read_json(file)


def test_an_array_too_deep_to_be_parsed_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text("[" * 100_000 + "]" * 100_000)
    with pytest.raises(DataError, match=f"rows.json.*more than {ROW_DEPTH} levels"):
        read_json(file)


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_an_outsized_row_of_a_table_is_named(tmp_path: Path, ending: str) -> None:
    table = pa.Table.from_pylist([FINE, OUTSIZED["larger"]])
    file = tmp_path / f"rows.{ending}"
    if ending == "parquet":
        pq.write_table(table, file)
    else:
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    with pytest.raises(DataError, match=rf"rows.{ending}, row 2: .*larger"):
        list(read_file(file))


def test_a_table_too_deep_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "rows.parquet"  # Arrow files are bounded by Arrow itself, at 64 levels
    pq.write_table(pa.Table.from_pylist([OUTSIZED["deep"]]), file)
    with pytest.raises(DataError, match=r"rows.parquet.*too deeply nested"):
        list(read_file(file))


def test_rows_up_to_the_limit_are_read(tmp_path: Path) -> None:
    rows = [nested(ROW_DEPTH), {"text": "x" * (ROW_BYTES - 100)}]
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    assert read_json(file) == rows
    refuse_large({"text": "é" * (ROW_BYTES // 2 - 10)}, 1, "hub")
    with pytest.raises(DataError, match="hub, row 1"):
        refuse_large({"text": "é" * (ROW_BYTES // 2 + 10)}, 1, "hub")
