"""`rft eval --tasks`: task files of lm-eval with local data, and the refusal of those that need the hub."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rft.cli import main
from rft.config.load import parse_config
from rft.plan import make_plan
from rft.tools.tasks import metrics_of, run_tasks, task_problems
from rft.utils.signals import StopRequests
from tests.venvs import python_with

LM_EVAL = ("lm-eval[api]==0.4.13", "transformers>=5,<6")  # of these, the API's models need no torch


def task_file(folder: Path) -> Path:
    """Write the task file of the docs, on two rows."""
    page = (Path(__file__).parents[1] / "docs" / "evaluation.md").read_text()
    (text,) = re.findall(r"```yaml shown\n(task: .*?)```", page, re.DOTALL)
    sums = ((1, 2), (3, 5))
    rows = [{"question": f"{a}+{b}=?", "answer": f"{a}+{b}={a + b}\n#### {a + b}"} for a, b in sums]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    file = folder / "my_gsm8k.yaml"
    file.write_text(text.replace("gsm8k-test.jsonl", str(folder / "rows.jsonl")))
    return file


def refused(folder: Path, text: str) -> str:
    (folder / "task.yaml").write_text(text)
    return "\n".join(task_problems([folder / "task.yaml"]))


def test_tasks_that_need_the_hub_are_refused_by_name(tmp_path: Path) -> None:
    assert task_problems([task_file(tmp_path)]) == []
    hub = refused(tmp_path, "task: gsm8k\ndataset_path: openai/gsm8k\ndataset_name: main\n")
    assert "task gsm8k needs the hub dataset openai/gsm8k" in hub
    url = "https://example.com/rows.jsonl"
    web = refused(tmp_path, f"task: a\ndataset_path: json\ndataset_kwargs: {{data_files: [{url}]}}\n")
    assert f"task a: {url} is not on this machine" in web
    gone = refused(tmp_path, "task: a\ndataset_path: csv\ndataset_kwargs: {data_files: {test: gone.csv}}\n")
    assert "task a: gone.csv does not exist" in gone
    assert "it is a group" in refused(tmp_path, "group: mmlu\ntask: [mmlu_stem]\n")
    assert "names none" in refused(tmp_path, "task: a\ndataset_path: json\n")
    assert "not a task file of lm-eval" in refused(tmp_path, "- a\n")
    assert "not a task file of lm-eval" in "".join(task_problems([tmp_path / "missing.yaml"]))
    # What a file includes counts, also behind a tag that names a function.
    (tmp_path / "base.yaml").write_text("dataset_path: hellaswag\nprocess_docs: !function utils.process\n")
    assert "needs the hub dataset hellaswag" in refused(tmp_path, "include: base.yaml\ntask: b\n")


def test_results_become_metrics() -> None:
    values = {"alias": "sums", "acc,none": 0.5, "acc_stderr,none": "N/A", "exact_match,last-number": 1}
    metrics = metrics_of({"results": {"sums": values}})
    assert metrics == {"eval/sums/acc": 0.5, "eval/sums/exact_match/last-number": 1.0}


def config(tiny_folder: Path, where: Path) -> dict[str, Any]:
    return {
        "output_dir": str(where),
        "algorithm": "grpo",
        "model": {"path": str(tiny_folder)},
        "data": {"kind": "arithmetic", "limit": 64, "eval_limit": 2},
        "rewards": ["math"],
        "rollout": {"engine": "hf", "threads": 1, "sampling": {"max_completion_length": 32}},
    }


def test_the_command_names_its_mistakes(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(json.dumps(config(tiny_folder, tmp_path)))
    (tmp_path / "hub.yaml").write_text("task: gsm8k\ndataset_path: openai/gsm8k\n")
    assert main(["eval", str(tmp_path / "run.yaml"), "--tasks", str(tmp_path / "hub.yaml")]) == 2
    assert "task gsm8k needs the hub dataset openai/gsm8k" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_task_file_runs_on_the_engine(tiny_folder: Path, tmp_path: Path) -> None:
    python = python_with("RFT_LM_EVAL_PYTHON", *LM_EVAL)
    plan = make_plan(parse_config(config(tiny_folder, tmp_path)), evaluate=True)
    out = tmp_path / "out"
    metrics = run_tasks(plan, [task_file(tmp_path)], out, StopRequests(), python=python)
    (samples,) = out.rglob("samples_*.jsonl")
    lines = [json.loads(line) for line in samples.read_text().splitlines()]
    assert [line["target"] for line in lines] == ["3", "8"]
    right = [line["filtered_resps"][0] == line["target"] for line in lines]
    assert metrics["eval/my_gsm8k/exact_match/last-number"] == sum(right) / 2
