"""Data files as they are found: damaged, in other encodings and forms, in read-only places."""

from __future__ import annotations

import ast
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rft.cli import main
from rft.config.data import DataConfig
from rft.config.load import parse_config
from rft.config.rewards import RewardConfig
from rft.data import DataError, GroupStream, load_rows
from rft.utils.paths import expand
from tests.cases.families import make_tokenizer

CASES = Path(__file__).parent
ROW = {"prompt": "2+2?", "answer": "4"}


def rows(file: Path, content: bytes | str | None = None) -> list[Any]:
    if content is not None:
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    return list(load_rows(DataConfig(path=str(file), kind="file")))


@pytest.mark.parametrize("case", ["array.jsonl", "bom.jsonl"])
def test_an_array_and_a_byte_order_mark_are_read(case: str) -> None:
    assert rows(CASES / case)[0] == ROW


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("lines.json", f"{json.dumps(ROW)}\n{json.dumps(ROW)}\n"),
        ("array.json", "\ufeff" + json.dumps([ROW, ROW], indent=1)),
        ("blank.jsonl", f"\n\n{json.dumps(ROW)}\r\n\n{json.dumps(ROW)}"),
        ("one_line.jsonl", json.dumps([ROW, ROW])),
    ],
)
def test_json_is_read_whatever_the_name_says(name: str, text: str, tmp_path: Path) -> None:
    assert rows(tmp_path / name, text) == [ROW, ROW]
    assert rows(tmp_path / f"{name}.gz", gzip.compress(text.encode())) == [ROW, ROW]


LINE = json.dumps(ROW).encode() + b"\n"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.jsonl", LINE + b'{"prompt": "caf\xe9"}\n', "line 2 is not UTF-8 text (byte 0xe9)"),
        ("a.json", b"[" + LINE + b',\n{"prompt": "caf\xe9"}]', "line 3 is not UTF-8 text (byte 0xe9)"),
        ("a.jsonl", LINE + b'{"prompt": "\\ud83d"}\n', r"row 2: contains half of a surrogate pair (\ud83d)"),
        ("a.json", b'[{"prompt": ["\\udc00"]}]', r"row 1: contains half of a surrogate pair (\udc00)"),
        ("a.jsonl", LINE + b'{"prompt": \n', "malformed JSON in line 2"),
        ("a.jsonl", b"[1]\n[2]\n", "malformed JSON in line 2: Extra data"),
        ("a.jsonl", LINE + b"[" * 100_000, "malformed JSON in line 2"),
        ("a.jsonl", LINE + b'{"n": ' + b"9" * 5000 + b"}", "malformed JSON in line 2"),
        ("a.jsonl.gz", LINE, "the gzip data is damaged"),
        ("a.jsonl", LINE + b'{"prompt": "1", "prompt": "2"}\n', "line 2: key 'prompt' is given twice"),
        (
            "a.json",
            b'[{"prompt": [{"role": "user", "content": "1", "content": "2"}]}]',
            "'content' is given twice",
        ),
        ("a.jsonl", b"PK\x03\x04\x14\x00", "it is a zip archive"),
        ("a.jsonl", b"\x28\xb5\x2f\xfd\x00", "the zstd data is"),
        ("a.jsonl.gz", b"\xfd7zXZ\x00", "it is compressed with xz"),
        ("a.json", b"PAR1\x15\x04", "it is a Parquet file"),
        ("a.jsonl", LINE.decode().encode("utf-16"), "it is UTF-16 text"),
        ("a.jsonl", b"version https://git-lfs.github.com/spec/v1\n", "it is a pointer of Git LFS"),
        ("a.jsonl", b"", "the dataset is empty"),
        ("a.json", b"", "the dataset is empty"),
        ("a.jsonl.gz", b"", "the dataset is empty"),
        ("a.parquet", b"", "a.parquet, row 1: cannot be read"),
        ("a.parquet", b"PAR1 nonsense PAR1", "a.parquet, row 1: cannot be read"),
        ("a.arrow", b"", "a.arrow, row 1: cannot be read"),
        ("a.arrow", b"ARROW1 nonsense", "a.arrow, row 1: cannot be read"),
    ],
)
def test_a_damaged_file_is_one_message_with_its_row(
    name: str, content: bytes, words: str, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        rows(tmp_path / name, content)
    assert words in str(caught.value) and name in str(caught.value)


@pytest.mark.parametrize(("case", "words"), [("cut", "is cut off after line"), ("damaged", "after line")])
def test_a_cut_or_damaged_gzip_names_the_last_good_line(
    case: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = CASES / f"{case}.jsonl.gz"
    config = tmp_path / "run.yaml"
    config.write_text(
        f"algorithm: grpo\nrewards: [{{function: math}}]\ndata: {{path: {file}}}\n", encoding="utf-8"
    )
    assert main(["check", str(config), f"output_dir={tmp_path}", "eval.every=0"]) == 2
    told = capsys.readouterr().err
    assert words in told and file.name in told and "Traceback" not in told
    assert main(["reward", "math", str(file)]) == 2
    assert words in capsys.readouterr().err


def test_tables_are_read_without_the_cache_and_damage_names_the_row(tmp_path: Path) -> None:
    datasets, pq = pytest.importorskip("datasets"), pytest.importorskip("pyarrow.parquet")
    data = datasets.Dataset.from_list([{"prompt": f"{i:04d}" * 20} for i in range(2500)])
    table = data.data.table.combine_chunks()
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=1100, compression="none")
    data.save_to_disk(str(tmp_path / "saved"))
    for place in (tmp_path / "t.parquet", tmp_path / "saved"):
        read = load_rows(DataConfig(path=str(place)))
        assert [read[i] for i in (2499, 0, 1100, 1099)] == [data[i] for i in (2499, 0, 1100, 1099)]
        assert len(list(read)) == 2500
    raw = bytearray((tmp_path / "t.parquet").read_bytes())
    begin = pq.ParquetFile(tmp_path / "t.parquet").metadata.row_group(1).column(0).dictionary_page_offset
    raw[begin : begin + 40] = b"\xff" * 40
    (tmp_path / "t.parquet").write_bytes(raw)
    with pytest.raises(DataError, match=r"t\.parquet, row 1101: cannot be read"):
        list(load_rows(DataConfig(path=str(tmp_path / "t.parquet"))))


def test_a_stream_refuses_and_reads_the_same(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(b"\xef\xbb\xbf" + b'{"prompt": "a", "completion": "b"}\n' + b'{"prompt": "\xe9"}\n')
    config = DataConfig(path=str(file), streaming=True, shuffle_buffer=1)
    with pytest.raises(DataError, match=r"row 2: line 2 is not UTF-8 text"):
        GroupStream(config, make_tokenizer()).next(2)
    file.write_text(json.dumps([ROW]), encoding="utf-8")
    with pytest.raises(DataError, match="a JSON array cannot be streamed"):
        GroupStream(config, make_tokenizer()).next(1)


def test_streamed_tables_need_no_cache_and_damage_names_file_and_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets, pq = pytest.importorskip("datasets"), pytest.importorskip("pyarrow.parquet")
    data = datasets.Dataset.from_list([{"prompt": f"{i:04d}" * 20, "completion": "b"} for i in range(120)])
    table = data.data.table.combine_chunks()
    for name in ("train-0.parquet", "train-1.parquet"):
        pq.write_table(table, tmp_path / name, row_group_size=50, compression="none")
    (tmp_path / "no-folder").write_text("a file, under which nothing can be made", encoding="utf-8")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "no-folder" / "hf"))
    config = DataConfig(path=str(tmp_path), kind="file", streaming=True, shuffle=False, shuffle_buffer=7)
    assert [g.prompt.id for g in GroupStream(config, make_tokenizer()).next(250)] == [*range(240), *range(10)]
    raw = bytearray((tmp_path / "train-1.parquet").read_bytes())
    begin = (
        pq.ParquetFile(tmp_path / "train-1.parquet").metadata.row_group(1).column(0).dictionary_page_offset
    )
    raw[begin : begin + 40] = b"\xff" * 40
    (tmp_path / "train-1.parquet").write_bytes(raw)
    stream = GroupStream(config, make_tokenizer())
    assert len(stream.next(160)) == 160
    with pytest.raises(DataError, match=r"train-1\.parquet, row 51: cannot be read"):
        stream.next(40)
    (tmp_path / "train-1.parquet").write_bytes(raw[:-20])
    with pytest.raises(DataError, match=r"train-1\.parquet, row 1: cannot be read"):
        GroupStream(config, make_tokenizer())


def test_rewards_are_tried_on_any_data_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scored = [{**ROW, "completion": "4"}] * 2
    (tmp_path / "f.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, scored)).encode()))
    assert main(["reward", "math", str(tmp_path / "f.jsonl.gz")]) == 0
    assert "2 calls" in capsys.readouterr().out


# -- paths and locales -----------------------------------------------------------------------------


def test_every_path_takes_the_home_folder_and_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("DATA", "/data")
    config = parse_config(
        {
            "algorithm": "grpo",
            "output_dir": "~/runs",
            "model": {"path": "~/m", "tokenizer": "$DATA/tok", "reference": "${DATA}/ref"},
            "data": {"path": "$DATA/a.jsonl", "eval_path": "~/b.jsonl"},
            "warm_start": {"cache": "~/cache"},
            "sync": {"folder": "$DATA/sync"},
            "rewards": [
                {"function": "~/r.py:score"},
                {"function": "reward_model", "options": {"model": "$DATA/rm"}},
            ],
        }
    )
    assert (config.output_dir, config.model.path, config.model.tokenizer) == (
        "/home/me/runs",
        "/home/me/m",
        "/data/tok",
    )
    assert (config.model.reference, config.data.path, config.data.eval_path) == (
        "/data/ref",
        "/data/a.jsonl",
        "/home/me/b.jsonl",
    )
    assert config.warm_start is not None and config.warm_start.cache == "/home/me/cache"
    assert config.sync.folder == "/data/sync" and config.data.resolved_kind == "file"
    assert [f.function for f in config.rewards.functions] == ["/home/me/r.py:score", "reward_model"]
    assert config.rewards.functions[1].options == {"model": "/data/rm"}
    assert RewardConfig(function="r.py:f", options={"model": "$x"}).options == {"model": "$x"}
    assert expand("org/name") == "org/name"


def test_a_variable_that_is_not_set_is_a_clear_mistake(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("NOT_SET", raising=False)
    file = tmp_path / "run.yaml"
    file.write_text("algorithm: grpo\ndata: {path: $NOT_SET/a.jsonl}\n", encoding="utf-8")
    assert main(["check", str(file)]) == 2
    assert (
        "data.path: the environment variable NOT_SET in '$NOT_SET/a.jsonl' is not set"
        in capsys.readouterr().err
    )
    with pytest.raises(SystemExit) as exit_:
        main(["check", "$NOT_SET/run.yaml"])
    assert exit_.value.code == 2 and "NOT_SET" in capsys.readouterr().err


def test_check_works_in_a_locale_that_is_not_utf_8_with_a_cache_that_cannot_be_written(
    tmp_path: Path,
) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list([{"prompt": "größer als π?", "answer": "да"}] * 40)
    data.to_parquet(str(tmp_path / "train.parquet"))
    (tmp_path / "no-folder").write_text("a file, under which nothing can be made", encoding="utf-8")
    config = tmp_path / "run.yaml"
    config.write_text(
        "# größer\nalgorithm: grpo\nrewards: [{function: math}]\neval: {every: 0}\n"
        f"data: {{path: {tmp_path / 'train.parquet'}, template: 'Frage: {{prompt}} é'}}\n"
        f"output_dir: {tmp_path}\nnäme: 3\n",
        encoding="utf-8",
    )
    env = {
        **os.environ,
        "LC_ALL": "C",
        "PYTHONUTF8": "0",
        "PYTHONCOERCECLOCALE": "0",
        "HF_HOME": str(tmp_path / "no-folder" / "hf"),
    }
    command = [sys.executable, "-m", "rft.cli", "check", str(config)]
    wrong = subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8")
    assert wrong.returncode == 2 and "n\\xe4me: unknown key" in wrong.stderr, wrong.stderr
    text = config.read_text(encoding="utf-8").replace("näme: 3\n", "")
    config.write_text(text, encoding="utf-8")
    done = subprocess.run(command, env=env, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode == 0 and "40 prompts" in done.stdout, done.stderr


def test_every_file_is_opened_with_an_encoding() -> None:
    import rft

    without = []
    for file in Path(rft.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and _is_text(node):
                without.append(f"{file.name}:{node.lineno}")
    assert not without


def _is_text(call: ast.Call) -> bool:
    """Whether a call opens, reads or writes text without naming an encoding."""
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if any(k.arg == "encoding" for k in call.keywords):
        return False
    if name in ("read_text", "write_text"):
        return isinstance(call.func, ast.Attribute)
    words = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
    modes = [w for w in words if w and set(w) <= set("rwabx+t")]
    if name != "open" or any("b" in mode for mode in modes):
        return False
    return isinstance(call.func, ast.Name) or (bool(modes) and not call.args[1:])
