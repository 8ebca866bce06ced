"""Known formats of files and rows: CSV, zstd, Alpaca, verl, and what each mistake is answered with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rft.config.data import DataConfig
from rft.data import DataError, load_groups, load_prompts, load_rows
from rft.preflight.first_row import describe_format

ALPACA = [
    {"instruction": "Add.", "input": "2 and 2", "output": "4"},
    {"instruction": "Say hello.", "input": "", "output": "Hello."},
]


def read(path: Path, **changes: Any) -> list[Any]:
    return list(load_rows(DataConfig(path=str(path), **changes)))


def test_csv_numbers_are_numbers_and_everything_else_stays_text(tmp_path: Path) -> None:
    file = tmp_path / "rows.csv"
    file.write_text(
        'prompt,answer,code,score\n"2+2?\nBriefly, please",4,007,0.5\n\n"He said ""no""",5,12,\n', "utf-8-sig"
    )
    assert read(file) == [
        {"prompt": "2+2?\nBriefly, please", "answer": 4, "code": "007", "score": 0.5},
        {"prompt": 'He said "no"', "answer": 5, "code": "12", "score": None},
    ]
    assert describe_format(DataConfig(path=str(file))) == "CSV (rows.csv)"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("a,b\n1,2\n3\n", r"rows.csv, row 2: 1 cells, but the first line names 2 columns"),
        ("a,a\n1,2\n", "names the column 'a' twice"),
        ("a,\n1,2\n", "one name is empty"),
        ("prompt;answer\n1;2\n", "not separated by commas"),
        ('a,b\n"1,2\n', "row 1: malformed CSV: unexpected end of data"),
        ("a,b\n", "the dataset is empty"),
        ("", "the dataset is empty"),
    ],
)
def test_bad_csv(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "rows.csv").write_text(content)
    with pytest.raises(DataError, match=message):
        read(tmp_path / "rows.csv")


def test_csv_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "rows.csv").write_bytes(b"prompt,answer\n\xe9,1\n")
    with pytest.raises(DataError, match="not UTF-8 text"):
        read(tmp_path / "rows.csv")


def zstd(path: Path, data: bytes) -> Path:
    with pa.CompressedOutputStream(str(path), "zstd") as stream:
        stream.write(data)
    return path


def test_zstd_json_lines(tmp_path: Path) -> None:
    lines = "\n".join(map(json.dumps, ALPACA)).encode()
    file = zstd(tmp_path / "train.jsonl.zst", lines)
    assert [row["completion"] for row in read(file)] == ["4", "Hello."]
    assert read(zstd(tmp_path / "array.json.zst", json.dumps(ALPACA).encode())) == read(file)
    assert describe_format(DataConfig(path=str(file))).startswith(
        "JSON lines in zstd (train.jsonl.zst), rows of"
    )
    file.write_bytes(file.read_bytes()[:-6])
    with pytest.raises(DataError, match="the zstd data is cut off after line"):
        read(file)
    with pytest.raises(DataError, match="can be streamed; set `streaming: false`"):
        describe_format(DataConfig(path=str(file), streaming=True))


def test_alpaca_rows(tmp_path: Path, chat: Any) -> None:
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(ALPACA))
    config = DataConfig(path=str(file))
    assert [row["prompt"] for row in load_rows(config)] == ["Add.\n\n2 and 2", "Say hello."]
    texts = [group.completions[0].text for group in load_groups(config, chat)]
    assert [text.startswith(row["output"]) for text, row in zip(texts, ALPACA, strict=True)] == [True, True]
    assert "Alpaca (prompt: instruction, then input; completion: output)" in describe_format(config)
    template = config.model_copy(update={"template": "Task: {instruction}|{input}"})
    assert load_prompts(template, chat).prompts[0].text == "Task: Add.|2 and 2"
    mapped = config.model_copy(update={"columns": {"completion": "instruction"}})
    assert next(iter(load_rows(mapped)))["completion"] == "Add."  # the config goes first


def test_verl_parquet(tmp_path: Path, chat: Any) -> None:
    row = {
        "data_source": "gsm8k",
        "prompt": [{"role": "user", "content": "2+2?"}],
        "ability": "math",
        "reward_model": {"style": "rule", "ground_truth": "4"},
        "extra_info": {"split": "train", "index": 0},
    }
    file = tmp_path / "train.parquet"
    pq.write_table(pa.Table.from_pylist([row, row]), file)
    config = DataConfig(path=str(file))
    prompt = load_prompts(config, chat).prompts[0]
    assert prompt.text == row["prompt"]
    assert prompt.columns["answer"] == "4"
    assert prompt.columns["extra_info"] == row["extra_info"]
    assert describe_format(config).endswith("verl (prompt: messages; answer: reward_model.ground_truth)")
