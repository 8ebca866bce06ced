"""`rft reward` reads what a run reads, and says in one message what it cannot."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from rft.tools.reward import main

HERE = Path(__file__).parent
ROWS = [{"prompt": "q", "completion": "#### 4", "answer": "4"}, {"completion": "5", "answer": "4"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def files(folder: Path) -> list[Path]:
    """The same rows in every format."""
    import datasets

    (folder / "many").mkdir()
    made = [folder / name for name in ("a.jsonl", "b.json", "c.jsonl.gz", "d.json.gz", "e.parquet", "many")]
    made[0].write_text(LINES)
    made[1].write_text(json.dumps(ROWS))
    made[2].write_bytes(gzip.compress(LINES.encode()))
    made[3].write_bytes(gzip.compress(json.dumps(ROWS).encode()))
    datasets.Dataset.from_list(ROWS).select_columns(["completion", "answer"]).to_parquet(str(made[4]))
    for i, row in enumerate(ROWS):
        (made[5] / f"part-{i}.jsonl").write_text(json.dumps(row) + "\n")
    return made


def test_every_format_gives_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path in files(tmp_path):
        assert main(["math", str(path)]) == 0, path
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[:2] for line in lines[1:3]] == [["correct", "1"], ["wrong", "1"]], path


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("bad.jsonl", b'{"completion": "a", "answer": "4"}\n{oops\n', "line 2"),
        ("latin.jsonl", '{"completion": "caf\u00e9", "answer": "4"}'.encode("latin-1"), "UTF-8"),
        ("null.jsonl", b'{"completion": null, "answer": "4"}', "row 1, column 'completion'"),
        ("number.jsonl", b'{"completion": "4", "prompt": 3, "answer": "4"}', "row 1, column 'prompt'"),
        ("list.jsonl", b"[1, 2]\n", "must be an object"),
        ("file.txt", b"text", "unknown file type"),
    ],
)
def test_mistakes_are_one_message(
    name: str, content: bytes, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / name).write_bytes(content)
    assert main(["math", str(tmp_path / name)]) == 2
    message = capsys.readouterr().err
    assert words in message
    assert message.startswith("rft reward: ")
    assert "Traceback" not in message


def test_a_missing_file_and_a_bad_option(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["math", str(tmp_path / "none.jsonl")]) == 2
    assert "no such file" in capsys.readouterr().err
