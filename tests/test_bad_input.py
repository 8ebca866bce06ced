"""Every mistake of a user is found before anything expensive starts: one message, exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest

from rft.cli import main


def run(tmp_path: Path, *overrides: str, command: str = "check") -> list[str]:
    config = tmp_path / "config.yaml"
    if not config.exists():
        config.write_text(
            "algorithm: {name: grpo}\nrewards: [{function: math}]\ndata: {kind: arithmetic, limit: 64}\n"
        )
    return [command, str(config), f"output_dir={tmp_path}", "train.batch_size=4", *overrides]


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["trian.steps=3"], "trian: unknown key (did you mean 'train'?)"),
        (["train.steps=[1"], "override 'train.steps=[1': line 1"),
        (["data={path: nowhere.jsonl}"], "nowhere.jsonl"),
        (["model.path=./nowhere"], "'./nowhere' is not a model folder: it has no config.json"),
        (["rewards=[{function: 'nowhere.py:score'}]"], "nowhere.py"),
        (["rewards=[{function: mth}]"], "did you mean 'math'"),
        (["rewards=[]"], "needs a reward"),
        (["train.batch_size=30", "train.minibatches=4"], "cannot be split into 4 equal minibatches"),
        (["train.batch_size=500"], "500 rows a step, but the data has only 64"),
        (["train.num_generations=1"], "num_generations is 1"),
        (["rollout.sampling.max_completion_length=5000"], "2048 positions"),
        (["rollout.sampling.repetition_penalty=1.1"], "add the reward `repetition` instead"),
        (["model.options={hidden_size: 65}"], "must be a multiple of heads"),
        (["model.options={hiden_size: 64}"], "hiden_size"),
        (["algorithm=sft", "data={path: rows.jsonl, streaming: true}"], "rows.jsonl"),
        (["sync.transport=nccl"], "nccl needs GPUs"),
        (["sync.folder=/tmp"], "transport auto writes no files"),
        (
            ["sync.transport=file", "sync.folder=/nowhere"],
            "/nowhere is not a folder that",
        ),
        (["sync.transport=file", "ray.address=auto"], "shared memory reaches one machine only"),
        (["sync.full_every=0"], "sync.full_every"),
        (["sync.transport=adapter"], "learner.adapter is not set"),
        (["sync.transport=adapter", "learner.adapter={method: dora}"], "does not compute learner.adapter"),
        (["sync.transport=adapter", "learner.adapter={}"], "set rollout.update to wait or abort"),
        (
            ["learner.kernels.logprob=triton"],
            "triton needs a GPU, the learner is on cpu: write auto or chunked",
        ),
        (
            ["learner.kernels.logprob=liger"],
            "liger needs a GPU, the learner is on cpu: write auto or chunked",
        ),
        (["learner.cores='999'"], "this machine has no core 999"),
        (["rollout.late=drop"], "set rollout.staleness to 1 or more, or leave late out"),
    ],
)
def test_check_names_the_mistake(tmp_path: Path, capsys, overrides: list[str], words: str) -> None:
    assert main(run(tmp_path, *overrides)) == 2
    told = capsys.readouterr().err
    assert words in told
    assert "Traceback" not in told


def test_all_mistakes_come_at_once(tmp_path: Path, capsys) -> None:
    assert main(run(tmp_path, "model.path=./nowhere", "rewards=[]", "learner.cores='999'")) == 2
    told = capsys.readouterr().err
    assert "3 problems found" in told


def test_a_missing_column_is_named_with_those_that_exist(tmp_path: Path, capsys) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"questoin": "1+1?", "answer": "2"}\n' * 8)
    assert main(run(tmp_path, f"data={{path: {data}}}")) == 2
    told = capsys.readouterr().err
    assert "prompt" in told and "questoin" in told


def test_a_column_that_a_reward_needs_is_asked_for(tmp_path: Path, capsys) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text('{"prompt": "1+1?", "anwser": "2"}\n' * 8)
    assert main(run(tmp_path, f"data={{path: {data}}}", "eval.every=0")) == 2
    told = capsys.readouterr().err
    assert "'answer'" in told and "anwser" in told


def test_an_empty_dataset_is_refused(tmp_path: Path, capsys) -> None:
    data = tmp_path / "rows.jsonl"
    data.write_text("")
    assert main(run(tmp_path, f"data={{path: {data}}}")) == 2
    assert "rows.jsonl" in capsys.readouterr().err


def test_too_long_prompts_are_refused_never_cut(tmp_path: Path, capsys) -> None:
    assert main(run(tmp_path, "rollout.sampling.max_prompt_length=3")) == 2
    told = capsys.readouterr().err
    assert "longer than max_prompt_length=3" in told and "skip" in told


@pytest.mark.parametrize("command", ["check", "train"])
def test_a_folder_that_is_no_runs_is_not_touched(tmp_path: Path, capsys, command: str) -> None:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    assert main(run(tmp_path, "name=mine", command=command)) == 2
    assert "is not empty and not a run folder" in capsys.readouterr().err
    assert [p.name for p in folder.iterdir()] == ["thesis.txt"]


def test_a_folder_of_another_run_is_refused_with_what_differs(tmp_path: Path, capsys) -> None:
    from rft.config.load import load_config
    from rft.run_dir import write_config

    args = run(tmp_path, "name=old", command="train")
    write_config(tmp_path / "old", load_config(args[1], args[2:]))
    assert main([*args, "learner.learning_rate=0.5"]) == 2
    told = capsys.readouterr().err
    assert "belongs to another run" in told and "learner.learning_rate: was 1e-06, now 0.5" in told
    assert main([*args, "--resume", "never"]) == 2
    assert "choose another name, or --resume auto" in capsys.readouterr().err


def test_a_missing_checkpoint_is_named(tmp_path: Path, capsys) -> None:
    assert main([*run(tmp_path, command="train"), "--resume", str(tmp_path / "step-1")]) == 2
    assert "step-1" in capsys.readouterr().err


def test_a_sound_config_gives_a_plan(tmp_path: Path, capsys) -> None:
    assert main(run(tmp_path)) == 0
    told = capsys.readouterr().out
    for word in (
        "algorithm    grpo",
        "parameters",
        "4 prompts x 8 completions = 32",
        "rewards      math",
        "GiB",
    ):
        assert word in told


def test_export_without_a_model_and_into_a_full_folder(tmp_path: Path, capsys) -> None:
    assert main(["export", str(tmp_path), str(tmp_path / "out")]) == 2
    assert "neither a final model nor a checkpoint" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    assert main(["export", str(tmp_path), str(tmp_path / "full")]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_report_of_a_folder_that_is_no_run(tmp_path: Path, capsys) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_overrides_may_stand_on_both_sides_of_an_option(tmp_path: Path, capsys) -> None:
    arguments = run(tmp_path, "trian.steps=3", "--resume", "never", "modle.path=x", command="train")
    assert main(arguments) == 2
    told = capsys.readouterr().err
    assert "trian" in told and "modle" in told
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--resme"])
    assert stop.value.code == 2
    assert "--resme" in capsys.readouterr().err
