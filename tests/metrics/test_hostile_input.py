# ruff: noqa: E501 (rows on one line each)
"""What the report and the live view make of texts and rows that are out to harm them."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from rft.report.history import Run
from rft.report.report import write_report
from rft.report.watch import watch
from rft.utils.terminal import printable

ESCAPES = (
    "\x1b]0;PWNED\x07\x1b[2J\x1b[31mred\x1b[0m\x9b31m\x1b]52;c;ZXZpbA==\x07\x1b]8;;http://evil\x07link\x1b]8;;\x07"
    "\u202eevil\u2066\x08\x08\r\x00\x7f\u2028\U000e0041\ud800"
)
MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'></pre></style></svg>{{7*7}}{% raw %}[bold]"
STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\u2028\u2029\ud800-\udfff]")


@pytest.fixture
def evil(run_dir: Path, tmp_path: Path) -> Path:
    """A run of which every text is hostile."""
    folder = tmp_path / "evil"
    shutil.copytree(run_dir, folder)
    text = MARKUP + ESCAPES

    def rewrite(name: str, change: Any) -> list[dict[str, Any]]:
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        rows = change(rows)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return rows

    def samples(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        for row in rows:
            row |= {"prompt": text, "completion": [{"role": text, "content": text}], "finish": text}
            row["outcome"] = {text: text}
        return rows

    def events(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        common = {"time": rows[-1]["time"], "step": 2, "message": text, "engine": text, text: text}
        return [*rows, *({**common, "kind": kind} for kind in ("fault/" + text, "run/failed", "engine/lost"))]

    def metrics(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{**row, f"reward/{text}/mean": 1.0, f"eval/pass@$\\bad{text}": 0.5} for row in rows]

    rewrite("samples.jsonl", samples)
    rewrite("events.jsonl", events)
    rewrite("metrics.jsonl", metrics)
    config = f"name: {json.dumps(MARKUP)}\nalgorithm: {{name: {json.dumps(MARKUP)}}}\nmodel: {{path: 'a\x1b[2J'}}\n"
    (folder / "config.yaml").write_text(config)
    return folder


def frame_of(run: Path) -> str:
    out = io.StringIO()
    watch(run, once=True, console=Console(file=out, width=120, force_terminal=True, color_system="truecolor"))
    return out.getvalue()


def test_the_live_view_passes_nothing_on_that_steers_the_terminal(evil: Path) -> None:
    text = frame_of(evil)
    assert "PWNED" in text, "the text itself is shown"
    plain = re.sub(r"\x1b\[[\d;]*m", "", text)  # rich's own colours
    assert not STEERS.search(plain.replace("\n", ""))


def test_the_report_shows_texts_and_runs_none(evil: Path) -> None:
    html = write_report(evil).read_text(encoding="utf-8")
    assert "PWNED" in html
    assert not STEERS.search(html.replace("\n", "").replace("\t", ""))
    body = re.sub(r"<style>.*?</style>", "", html, flags=re.DOTALL)
    assert "<script" not in body and "onerror=alert" not in re.sub(r"&lt;.*?&gt;", "", body)
    assert "{{7*7}}" in html and "49" not in re.findall(r"alert\(2\)&gt;(.{0,60})", html)[0]


ODD = {
    "metrics.jsonl": [
        {}, {"step": "x", "time/wall": 1.0}, {"step": 3}, {"step": True, "time/wall": 1.0},
        {"step": 5, "time/wall": "now"}, {"step": 5, "time/wall": float("nan")}, [1], "x", None,
        {"step": 5, "time/wall": float("inf")},
    ],
    "events.jsonl": [
        {}, {"kind": 3, "time": 1.0}, {"kind": "run/opened", "time": 1.0}, {"kind": "run/closed", "time": None},
        {"kind": "run/opened", "time": 1.0, "pid": "x", "total_steps": 3}, {"kind": "guard/x", "time": [1]}, 7,
    ],
    "samples.jsonl": [
        {}, {"step": 1}, {"step": 1, "split": "eval", "reward": "high"}, {"step": None, "split": "eval"},
        {"step": 1, "split": 3}, ["x"],
    ],
}  # fmt: skip
USABLE = {
    "metrics.jsonl": [
        {"step": 121, "time/wall": 1e9, "reward/mean": "high", "time/rollout": None, "reward/std": True},
        {"step": 121, "time/wall": 1e9, "reward/mean": 0.5},
    ],
    "events.jsonl": [
        {"kind": "note", "time": 1e9, "text": {"a": [1]}}, {"kind": "run/closed", "time": 1e9, "reason": ["x"]},
        {"kind": "engine/lost", "time": 1e9, "engine": {"x": 1}, "version": []}, {"kind": "fault/", "time": 0},
    ],
    "samples.jsonl": [
        {"step": 1, "split": "eval", "completion": [1, {"role": 2}], "prompt": {"a": 1}, "outcome": [1]},
        {"step": 1, "split": "eval", "completion": [{"role": None, "content": [{"text": 1}]}], "reward": None},
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_an_odd_row_is_left_out_and_counted(run_dir: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / "odd"
    shutil.copytree(run_dir, folder)
    with (folder / name).open("a") as file:
        for row in [*ODD[name], *USABLE[name]]:
            file.write(json.dumps(row) + "\n")
        file.write(
            "[" * 100_000
            + "\n"
            + '{"step": '
            + "9" * 5000
            + "}\n"
            + "\udcff{\n".encode("utf-8", "replace").decode()
        )
    said = f"{len(ODD[name]) + 3} of {name}"
    assert said in Run(folder).damaged_lines()
    assert said in frame_of(folder)
    assert said in write_report(folder).read_text(encoding="utf-8")


def test_a_damaged_config_does_not_hide_the_run(run_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(run_dir, folder)
    for data in (b"a: [1, {", b"\xff\xfe\x00", b"", b"- 1", b"a: &a [*a]"):
        (folder / "config.yaml").write_bytes(data)
        assert "step" in frame_of(folder)
        write_report(folder)


def test_printable_keeps_text_and_escapes_the_rest() -> None:
    assert printable("naïve 漢字 עברית 🙂 a\tb\nc") == "naïve 漢字 עברית 🙂 a\tb\nc"
    assert printable("\x1b[2J\x9b\u202e\ud800") == "\\x1b[2J\\x9b\\u202e\\ud800"
    assert not STEERS.search(printable(ESCAPES))
