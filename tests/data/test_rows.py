"""Rows and prompts in: formats, column mapping, splits, limits, and what each mistake is answered with."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from rft.config.data import DataConfig, DirectionsConfig
from rft.data import DataError, first_row, load_prompts, load_rows

ROWS = [{"question": f"{i}+{i}?", "answer": f"think\n#### {2 * i}"} for i in range(10)]


def write(path: Path, rows: list[Any], name: str = "train.jsonl") -> Path:
    file = path / name
    text = "\n".join(json.dumps(row) for row in rows)
    if name.endswith(".gz"):
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(json.dumps(rows) if name.endswith(".json") else text)
    return file


def config(path: Path, **changes: Any) -> DataConfig:
    return DataConfig(
        path=str(path),
        **{"columns": {"prompt": "question"}, "answer_pattern": r"####\s*(.+)", **changes},
    )


@pytest.mark.parametrize("name", ["train.jsonl", "train.json", "train.jsonl.gz"])
def test_reads_json_in_all_its_forms(tmp_path: Path, name: str) -> None:
    rows = load_rows(config(write(tmp_path, ROWS, name)))
    assert len(rows) == 10
    assert rows[3] == {"prompt": "3+3?", "answer": "6"}


def test_reads_parquet_arrow_and_saved_folders(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_list(ROWS)
    data.to_parquet(str(tmp_path / "p" / "train-00000-of-00001.parquet"))
    data.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": data, "test": data.select(range(2))}).save_to_disk(str(tmp_path / "d"))
    for folder in ("p", "saved", "d"):
        rows = load_rows(config(tmp_path / folder))
        assert [r["prompt"] for r in rows] == [r["question"] for r in ROWS]
    assert len(load_rows(config(tmp_path / "d"), "test")) == 2


def test_a_folder_is_read_by_split(tmp_path: Path) -> None:
    write(tmp_path, ROWS, "train.jsonl")
    write(tmp_path, ROWS[:3], "test.jsonl")
    assert len(load_rows(config(tmp_path))) == 10
    assert len(load_rows(config(tmp_path), "test")) == 3
    with pytest.raises(DataError, match=r"no file of the split 'validation'.*test\.jsonl, train\.jsonl"):
        load_rows(config(tmp_path, split="validation"))


def test_holdout_splits_once_and_for_all(tmp_path: Path) -> None:
    c = config(write(tmp_path, ROWS), holdout=4, seed=3)
    train, test = load_rows(c), load_rows(c, "test")
    assert sorted([*train.numbers, *test.numbers]) == list(range(10))
    assert len(test) == 4
    assert list(load_rows(c).numbers) == list(train.numbers)
    assert list(load_rows(config(write(tmp_path, ROWS), holdout=4, seed=4), "test").numbers) != list(
        test.numbers
    )


def test_one_column_may_serve_twice(tmp_path: Path) -> None:
    c = config(
        write(tmp_path, ROWS), columns={"prompt": "question", "answer": "answer", "completion": "answer"}
    )
    assert load_rows(c)[1] == {"prompt": "1+1?", "answer": "2", "completion": "think\n#### 2"}


def test_a_missing_file_is_answered_with_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, ROWS)
    with pytest.raises(DataError, match=r"trane\.jsonl: no such file or folder; .* contains train\.jsonl"):
        load_rows(config(tmp_path / "trane.jsonl"))


def test_a_missing_column_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"row 1, column 'questoin'.*mean 'question'.*'question', 'answer'"):
        load_rows(config(write(tmp_path, ROWS), columns={"prompt": "questoin"}))
    late = [*ROWS, {"answer": "#### 1"}]
    with pytest.raises(DataError, match="row 11, column 'question'"):
        list(load_rows(config(write(tmp_path, late))))


def test_a_malformed_line_is_named(tmp_path: Path) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text('{"question": "a", "answer": "#### 1"}\n\n{"question": "b"\n')
    with pytest.raises(DataError, match="malformed JSON in line 3") as caught:
        load_rows(config(file))
    assert caught.value.row == 3


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
def test_a_bad_row_of_a_folder_is_named_by_its_file(tmp_path: Path, plain: Any, form: str) -> None:
    good, late, bad = ({"prompt": p, "answer": a} for p, a in (("1+1=", "2"), ("2+3=", "5"), ("", "5")))
    for i, rows in enumerate(([good] * 3, [late, bad, late, bad])):
        file = tmp_path / f"train-{i}.{form}"
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(rows), file)
        elif form == "json":
            file.write_text(json.dumps(rows))
        else:
            file.write_text("\n\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=rf"2 rows \(\S+train-1.{form} 2, 4\): ") as raised:
        load_prompts(DataConfig(path=str(tmp_path)), plain)
    assert raised.value.row == 2
    with pytest.raises(DataError, match=rf"train-1.{form}, row 1, column 'answer': `answer_pattern`"):
        list(load_rows(DataConfig(path=str(tmp_path), answer_pattern="(2)")))


def test_hints_name_only_what_looks_alike(tmp_path: Path) -> None:
    file = write(tmp_path, [{"completion": "a", "question": "b"}])
    with pytest.raises(DataError) as raised:
        load_rows(config(file, columns={"prompt": "prompt"}))
    assert "did you mean" not in str(raised.value)


def test_an_answer_without_the_pattern_is_named(tmp_path: Path) -> None:
    rows = load_rows(config(write(tmp_path, [*ROWS, {"question": "x", "answer": "none"}])))
    with pytest.raises(DataError, match="row 11, column 'answer': `answer_pattern`"):
        list(rows)


@pytest.mark.parametrize(
    ("content", "words"),
    [("", "empty"), ("[1, 2]", "must be an object"), ('"x"\n"y"', "must be an object")],
)
def test_files_that_hold_no_rows(tmp_path: Path, content: str, words: str) -> None:
    file = tmp_path / "train.jsonl"
    file.write_text(content)
    with pytest.raises(DataError, match=words):
        load_rows(config(file))


def test_no_evaluation_rows_in_a_single_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"set `eval_path` .*, or `holdout: 64`"):
        load_rows(config(write(tmp_path, ROWS)), "test")


def test_the_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match=r"some/data: the hub cannot be reached .*no route.*`kind: file`"):
        load_rows(DataConfig(path="some/data"))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kind": "file"}, "needs `path`"),
        ({"kind": "reasoning_gym"}, "needs `task`"),
        ({"subset": "main"}, "`subset` does not apply to `kind: arithmetic`"),
        ({"path": "a/b", "answer_pattern": "####"}, "needs a group"),
        ({"path": "a/b", "answer_pattern": "("}, "not a valid regular expression"),
        ({"pat": "a"}, "pat"),
    ],
)
def test_config_mistakes(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DataConfig(**fields)


def test_the_kind_is_inferred(tmp_path: Path) -> None:
    assert DataConfig().resolved_kind == "arithmetic"
    assert DataConfig(task="chain_sum").resolved_kind == "reasoning_gym"
    assert DataConfig(path="openai/gsm8k", subset="main").resolved_kind == "hub"
    assert DataConfig(path="not/there.jsonl").resolved_kind == "file"
    assert DataConfig(path=str(tmp_path)).resolved_kind == "file"


def test_generated_tasks(plain: Any) -> None:
    train = load_prompts(DataConfig(limit=20), plain)
    assert len(train) == 20
    assert {"answer", "completion"} <= set(train.prompts[0].columns)
    again = load_prompts(DataConfig(limit=20), plain)
    assert [p.tokens for p in again.prompts] == [p.tokens for p in train.prompts]
    gym = load_rows(DataConfig(task="chain_sum", limit=2, options={"min_terms": 2, "max_terms": 2}))
    assert {"prompt", "answer", "metadata"} <= set(gym[0])
    with pytest.raises(DataError, match="rejects its options"):
        load_rows(DataConfig(task="chain_sun"))


# -- prompts ---------------------------------------------------------------------------------------


def test_prompts_carry_ids_text_and_columns(tmp_path: Path, plain: Any) -> None:
    c = config(write(tmp_path, ROWS), template="Q: {prompt}\nA:", limit=3)
    prompts = load_prompts(c, plain).prompts
    assert [p.id for p in prompts] == [0, 1, 2]
    assert prompts[2].text == "Q: 2+2?\nA:"
    assert plain.decode(prompts[2].tokens) == "Q: 2+2?\nA:"
    assert prompts[2].columns == {"answer": "4"}


def test_prompts_use_the_chat_template(tmp_path: Path, chat: Any, plain: Any) -> None:
    c = config(write(tmp_path, ROWS), system="Add.")
    assert chat.decode(load_prompts(c, chat).prompts[1].tokens) == (
        "<|system|>\nAdd.<|end|>\n<|user|>\n1+1?<|end|>\n<|assistant|>\n"
    )
    never = load_prompts(config(write(tmp_path, ROWS), system="Add.", chat_template="never"), chat)
    assert chat.decode(never.prompts[1].tokens) == "Add.\n\n1+1?"
    with pytest.raises(DataError, match="the tokenizer has none"):
        load_prompts(config(write(tmp_path, ROWS), chat_template="always"), plain)


def test_messages_need_a_chat_template(tmp_path: Path, chat: Any, plain: Any) -> None:
    rows = [{"prompt": [{"role": "user", "content": "hi"}]}]
    c = DataConfig(path=str(write(tmp_path, rows)))
    assert load_prompts(c, chat).prompts[0].text == rows[0]["prompt"]
    with pytest.raises(
        DataError, match=r"(?s)1 row \(1\).*list of messages, but the tokenizer has no chat template"
    ):
        load_prompts(c, plain)


def test_too_long_prompts_are_rejected_or_skipped_never_cut(tmp_path: Path, plain: Any) -> None:
    file = write(tmp_path, [*ROWS, {"question": "long " * 50, "answer": "#### 1"}])
    with pytest.raises(DataError, match=r"(?s)1 row \(11\): the prompt is longer than max_prompt_length=20"):
        load_prompts(config(file), plain, max_prompt_length=20)
    kept = load_prompts(config(file, overlong="skip", max_prompt_length=20), plain)
    assert len(kept) == 10
    assert kept.skipped == {"the prompt is longer than max_prompt_length=20 tokens": 1}
    assert "1 skipped" in str(kept)
    with pytest.raises(DataError, match="every row is too long"):
        load_prompts(config(file, overlong="skip"), plain, max_prompt_length=1)


@pytest.mark.parametrize("value", ["", None, 3, [], [{"content": "no role"}]])
def test_prompts_that_are_none(tmp_path: Path, plain: Any, value: Any) -> None:
    with pytest.raises(DataError, match="row"):
        load_prompts(DataConfig(path=str(write(tmp_path, [{"prompt": value}]))), plain)


def test_a_template_that_names_a_missing_column(tmp_path: Path, plain: Any) -> None:
    with pytest.raises(DataError, match=r"column 'promt'.*mean 'prompt'"):
        load_prompts(config(write(tmp_path, ROWS), template="{promt}"), plain)


@pytest.mark.parametrize("kind", ["arithmetic", "arithmetic_hard", "arithmetic_pairs"])
def test_the_first_row_of_a_task_is_the_first_of_many(kind: str) -> None:
    """`first_row` generates it alone."""
    config = DataConfig.model_validate({"kind": kind, "limit": 5})
    assert first_row(config) == load_rows(config)[0]


def test_of_several_templates_each_row_gets_one_by_the_seed(tmp_path: Path, plain: Any) -> None:
    file = write(tmp_path, [{"question": str(i), "answer": f"#### {i}"} for i in range(40)])
    templates = ["Q: {prompt}", "{prompt}? =", "Answer {prompt}."]
    first = config(file, template=templates, chat_template="never")
    texts = [p.text for p in load_prompts(first, plain).prompts]
    chosen = [next(t for t in templates if t.format(prompt=i) == text) for i, text in enumerate(texts)]
    assert all(chosen.count(t) >= 5 for t in templates)
    assert [p.text for p in load_prompts(first, plain).prompts] == texts
    other = [p.text for p in load_prompts(first.model_copy(update={"seed": 1}), plain).prompts]
    assert other != texts
    half = [p.text for p in load_prompts(first.model_copy(update={"holdout": 20}), plain).prompts]
    assert set(half) < set(texts)  # a row keeps its template, whatever rows are left out


@pytest.mark.parametrize("template", [[], ["a", 1], 3])
def test_templates_are_texts(tmp_path: Path, template: Any) -> None:
    with pytest.raises(ValueError, match="write a text, or a list of at least one text"):
        DataConfig(path="x.jsonl", template=template)


def test_each_row_gets_a_preference_direction_that_its_prompt_shows(tmp_path: Path, plain: Any) -> None:
    directions = {"names": ["right", "brief"], "degrees": [-90, 60]}
    c = config(
        write(tmp_path, ROWS), template="right * {right} + brief * {brief}: {prompt}", directions=directions
    )
    prompts = load_prompts(c, plain).prompts
    drawn = [p.columns["direction"] for p in prompts]
    for prompt, (right, brief) in zip(prompts, drawn, strict=True):
        assert prompt.text.startswith(f"right * {right} + brief * {brief}: ")
        assert math.hypot(right, brief) == pytest.approx(100, abs=1) and right >= 0 and -100 <= brief <= 87
    assert len(set(map(tuple, drawn))) > 5 and {brief > 0 for _, brief in drawn} == {True, False}
    assert [p.columns["direction"] for p in load_prompts(c, plain).prompts] == drawn
    straight = c.model_copy(
        update={"directions": DirectionsConfig(names=("right", "brief"), degrees=(60, 60))}
    )
    assert load_prompts(straight, plain).prompts[0].columns["direction"] == [50, 87]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"template": "{prompt} {right}"}, r"write {brief} in it"),
        ({"directions": {"names": ["right", "right"]}}, "two different words"),
        ({"directions": {"names": ["a", "b"], "degrees": [40, 10]}}, "the smaller one first"),
    ],
)
def test_directions_that_the_prompt_does_not_show(
    tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValidationError, match=words):
        config(write(tmp_path, ROWS), **{"directions": {"names": ["right", "brief"]}, **changes})


def test_a_column_that_a_direction_would_replace(tmp_path: Path) -> None:
    c = config(
        write(tmp_path, [{"question": "a", "answer": "#### 1", "brief": 1}]),
        template="{right} {brief} {prompt}",
        directions={"names": ["right", "brief"]},
    )
    with pytest.raises(DataError, match=r"row 1.*'brief' already"):
        load_rows(c)
