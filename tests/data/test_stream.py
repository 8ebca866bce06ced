"""Streams: every row once an epoch, whatever the buffer, and a resume that no one could tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rft.config.data import DataConfig
from rft.data import DataError, GroupStream

ROWS = [{"prompt": f"{i}+1=", "completion": str(i + 1)} for i in range(11)]


def config(path: Path, form: str = "jsonl", rows: list[Any] = ROWS, **changes: Any) -> DataConfig:
    if form != "jsonl":
        datasets = pytest.importorskip("datasets")
        for i, part in enumerate((rows[:5], rows[5:])):
            data = datasets.Dataset.from_list(part)
            if form == "arrow":
                data.save_to_disk(str(path / f"part-{i}"))
                (written,) = (path / f"part-{i}").glob("*.arrow")
                written.rename(path / f"train-{i}.arrow")
            else:
                data.to_parquet(str(path / f"train-{i}.parquet"))
        kind = {"kind": "hub"} if form == "name" else {}  # `datasets` takes a folder for a dataset's name
        return DataConfig(path=str(path), streaming=True, **kind, **changes)
    for name, part in (("train-0.jsonl", rows[:5]), ("train-1.jsonl", rows[5:])):
        (path / name).write_text("\n\n".join(json.dumps(row) for row in part))
    return DataConfig(path=str(path), streaming=True, **changes)


def ids(stream: GroupStream, k: int) -> list[int]:
    return [group.prompt.id for group in stream.next(k)]


@pytest.mark.parametrize(
    ("form", "buffer"),
    [*(("jsonl", n) for n in (1, 4, 100)), *((form, 4) for form in ("parquet", "arrow", "name"))],
)
def test_every_row_once_an_epoch_and_resumed_anywhere(
    tmp_path: Path, plain: Any, form: str, buffer: int
) -> None:
    c = config(tmp_path, form, shuffle_buffer=buffer, seed=5)
    whole = ids(GroupStream(c, plain), 33)
    for epoch in range(3):
        assert sorted(whole[11 * epoch : 11 * (epoch + 1)]) == list(range(11))
    if buffer > 1:
        assert whole[:11] != whole[11:22]
    for cut in (0, 1, 4, 7, 11, 12, 23):
        before = GroupStream(c, plain)
        got = ids(before, cut)
        after = GroupStream(c, plain)
        after.load_state_dict(json.loads(json.dumps(before.state_dict())))
        assert got + ids(after, 33 - cut) == whole, cut


def test_in_order_and_limited(tmp_path: Path, plain: Any) -> None:
    assert ids(GroupStream(config(tmp_path, shuffle=False, limit=3), plain), 7) == [0, 1, 2, 0, 1, 2, 0]


def test_bad_rows_stop_or_are_counted(tmp_path: Path, plain: Any) -> None:
    rows = [*ROWS[:7], {"prompt": "x", "completion": ""}, *ROWS[7:]]
    with pytest.raises(DataError, match=r"1 row \(\S+train-1.jsonl 3\): a response is empty"):
        GroupStream(config(tmp_path, rows=rows, shuffle=False), plain).next(12)
    stream = GroupStream(config(tmp_path, rows=rows, shuffle=False, bad_rows="skip"), plain)
    assert len(stream.next(11)) == 11 and stream.maker.bad.counts == {"a response is empty": 1}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_bad_row_is_named_by_its_file_also_after_a_resume(tmp_path: Path, plain: Any, form: str) -> None:
    rows = [*ROWS[:7], {"prompt": "x", "completion": ""}, *ROWS[7:]]
    c = config(tmp_path, form, rows=rows, shuffle=False, shuffle_buffer=3)
    stream = GroupStream(c, plain)
    stream.next(6)
    resumed = GroupStream(c, plain)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    with pytest.raises(DataError, match=rf"1 row \(\S+train-1.{form} 3\): a response is empty"):
        resumed.next(2)


def test_a_checkpoint_from_before_tables_were_read_by_rft_itself_resumes(tmp_path: Path, plain: Any) -> None:
    """It holds a state of the library `datasets`; the number of the block's first row says the same."""
    c = config(tmp_path, "parquet", shuffle_buffer=4, seed=5)
    stream = GroupStream(c, plain)
    whole = ids(stream, 7)
    state = {**stream.state_dict(), "reader": {"dataset": {"examples_iterable": {"shard_idx": 0}}}}
    resumed = GroupStream(c, plain)
    resumed.load_state_dict(state)
    assert whole + ids(resumed, 26) == ids(GroupStream(c, plain), 33)
    again = GroupStream(c, plain)
    again.load_state_dict(resumed.state_dict())
    assert ids(again, 5) == ids(resumed, 5)


def test_a_place_in_another_kind_of_data_is_said(tmp_path: Path, plain: Any) -> None:
    c = config(tmp_path)
    stream = GroupStream(c, plain)
    stream.next(1)
    with pytest.raises(DataError, match=r"another kind of data file. Restore `data.path`"):
        GroupStream(c, plain).load_state_dict({**stream.state_dict(), "reader": {"dataset": {}}})


def test_no_usable_row_is_an_error_not_an_endless_loop(tmp_path: Path, plain: Any) -> None:
    rows = [{"prompt": "x", "completion": ""}] * 6
    with pytest.raises(DataError, match="none of its rows can be used"):
        GroupStream(config(tmp_path, rows=rows, bad_rows="skip"), plain).next(1)


def test_other_settings_cannot_resume(tmp_path: Path, plain: Any) -> None:
    c = config(tmp_path, seed=1)
    with pytest.raises(DataError, match="seed=1, this run has seed=2"):
        GroupStream(c.model_copy(update={"seed": 2}), plain).load_state_dict(
            GroupStream(c, plain).state_dict()
        )
