"""A row of any size or depth is refused by its file and line before it fills the memory."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rft.data.errors import DataError
from rft.data.files import read_json
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
