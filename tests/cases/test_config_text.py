"""Configs as people type them: keys given twice, malformed overrides, other encodings, bare on and off."""

from __future__ import annotations

from pathlib import Path

import pytest

from rft.cli import main
from rft.config.load import apply_overrides, load_config, parse_config
from rft.errors import ConfigError
from rft.utils import yaml_files

CASES = Path(__file__).parent
BASE = "algorithm: grpo\nrewards: [{function: math}, {function: format, weight: 0.1}]\n"


def problems(path: Path, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return "\n".join(caught.value.problems)


def test_a_key_given_twice_is_named_with_both_lines(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(CASES / "dup.yaml")]) == 2
    told = capsys.readouterr().err
    assert "key 'train' is given twice, in line 6 and in line 12" in told and "Traceback" not in told


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("algorithm: grpo\ntrain:\n  steps: 1\n  batch_size: 2\n  steps: 3\n", "in line 3 and in line 5"),
        ("algorithm: grpo\nrewards:\n- {function: math, weight: 1, weight: 2}\n", "twice, both in line 3"),
        ("algorithm: grpo\ntrain: [1\n", "line 3, column 1: expected ',' or ']'"),
        ('algorithm: grpo\nname: "\\ud83d"\n', "line 2: half of a surrogate pair"),
    ],
)
def test_a_config_that_is_malformed_names_the_line(tmp_path: Path, text: str, words: str) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    assert words in problems(file)


def test_merge_keys_may_be_overridden(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(BASE + "train: &t {steps: 3, batch_size: 2}\neval: {every: 0}\n", encoding="utf-8")
    assert yaml_files.parse("a: &a {x: 1, y: 2}\nb: {<<: *a, x: 3}")["b"] == {"x": 3, "y": 2}
    assert load_config(file).train.steps == 3


def test_a_latin_1_config_names_the_line_and_marks_of_utf_8_and_utf_16_are_read(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(b"algorithm: grpo\n# caf\xe9\n")
    assert "line 2 is not UTF-8 text (byte 0xe9); save the file as UTF-8" in problems(file)
    for encoding in ("utf-8-sig", "utf-16"):
        file.write_text(BASE, encoding=encoding)
        assert len(load_config(file).rewards.functions) == 2


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train=[1", "line 1, column 3: expected ',' or ']'"),
        ("train.steps=a: b: c", "mapping values are not allowed"),
        ("train.steps=*x", "undefined alias"),
        ("train={steps: 1, steps: 2}", "key 'steps' is given twice"),
        ("=3", "write key.sub=value"),
        ("train..steps=1", "write key.sub=value"),
        ("train.=1", "write key.sub=value"),
        ("train.steps", "write key.sub=value"),
        ("rewards.2.weight=2", "rewards.functions has no entry 2: its entries are 0 to 1"),
        ("rewards.functions.7=2", "rewards.functions has no entry 7"),
        ("rewards.functions.weight=2", "write the number of an entry after it"),
        ("data.numbers.0=x", "data.numbers is not set, so it has no entry 0"),
        ("name.sub=1", "name: input should be a valid string"),
    ],
)
def test_a_malformed_override_is_one_clear_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, words: str
) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(BASE, encoding="utf-8")
    assert main(["check", str(file), override, f"output_dir={tmp_path}"]) == 2
    told = capsys.readouterr().err
    assert words in told and "Traceback" not in told


@pytest.mark.parametrize("key", ["rewards.1.weight", "rewards.functions.1.weight"])
@pytest.mark.parametrize("short", [True, False])
def test_an_override_reaches_an_entry_of_a_list(key: str, short: bool) -> None:
    functions = [{"function": "math"}, {"function": "format"}]
    raw = {"algorithm": "grpo", "rewards": functions if short else {"functions": functions}}
    config = parse_config(apply_overrides(raw, [f"{key}=2", "rewards.workers=3"]))
    assert [f.weight for f in config.rewards.functions] == [1.0, 2]
    assert config.rewards.workers == 3
    assert functions == [{"function": "math"}, {"function": "format"}]  # the original is left alone


def test_plain_words_and_numbers_are_read_as_meant(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text(
        BASE + "name: 2026-11-29\nlearner: {self_check: off, prefix_sharing: on, learning_rate: 1e-6}\n"
        "data: {kind: arithmetic, options: {noise: 5e-2}}\n",
        encoding="utf-8",
    )
    config = load_config(file)
    assert (config.name, config.learner.self_check, config.learner.prefix_sharing) == (
        "2026-11-29",
        "off",
        "on",
    )
    assert config.learner.learning_rate == 1e-6 and config.data.options == {"noise": 0.05}
    assert yaml_files.parse("[010, 0o10, 0x10, -1_000, 1:30]") == [10, 8, 16, -1000, "1:30"]
    strings = {
        "octal": "010",
        "time": "1:30",
        "name": "1e5",
        "date": "2026-11-29",
        "word": "off",
        "text": "größer",
    }
    assert yaml_files.parse(yaml_files.dump(strings)) == strings


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "\n".join(
                ["a0: &a0 [x, x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 9))]
            ),
            r"aliases \(\*name\), written out, hold more than 1,000,000 values",
        ),
        ("a: &a [*a]", "line 1: the value contains itself"),
        ("a: &a {b: {c: *a}}", "line 1: the value contains itself"),
        ("[" * 20_000, "recursion"),
        ("a: {" * 20_000, "recursion"),
    ],
)
def test_yaml_that_grows_without_bound_is_refused(text: str, words: str) -> None:
    with pytest.raises(yaml_files.YamlError, match=words):
        yaml_files.parse(text)


def test_aliases_within_the_bound_are_read() -> None:
    assert yaml_files.parse("a: &a {x: 1}\nb: *a\nc: [*a, *a]") == {
        "a": {"x": 1},
        "b": {"x": 1},
        "c": [{"x": 1}] * 2,
    }
