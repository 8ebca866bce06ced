"""Stop tokens: the same for a folder and a hub name, for both engines, the training data and the export."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from rft.cli import main
from rft.config.data import DataConfig
from rft.config.load import parse_config
from rft.config.schema import Config
from rft.data import load_groups
from rft.data.chat import Renderer
from rft.data.stops import end_tokens, stop_ids
from rft.errors import ConfigError
from rft.learner.learner import Learner
from rft.plan import Plan, make_plan
from rft.report.plan_text import plan_lines
from tests.cases.families import (
    CHATML,
    END,
    QWEN3,
    R1,
    gemma_tokenizer,
    glm_tokenizer,
    hub_layout,
    make_model,
    make_tokenizer,
)

ROWS = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "4"}]}] * 2


def config(tmp_path: Path, folder: str, rows: list[Any] | None = None, **more: Any) -> Config:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows or ROWS), encoding="utf-8")
    raw = {
        "output_dir": str(tmp_path / "runs"),
        "model": {"path": folder},
        "data": {"path": str(file)},
        "algorithm": "sft",
        "train": {"steps": 1, "batch_size": 1},
        "learner": {"threads": 1},
        "eval": {"every": 0},
    }
    return parse_config({**raw, **more})


def plan_of(tmp_path: Path, tokenizer: Any, rows: list[Any] | None = None, **model: Any) -> Plan:
    return make_plan(config(tmp_path, str(make_model(tmp_path / "model", tokenizer, **model)), rows))


@pytest.mark.parametrize(
    ("tokenizer", "model", "stops"),
    [
        (make_tokenizer(CHATML), {}, (2,)),
        (make_tokenizer(CHATML, eos=END), {}, (0, 2)),  # a base model with a chat template
        (make_tokenizer(None, eos=END), {}, (0,)),
        (make_tokenizer(None, eos=END), {"generation_eos": [0, 2]}, (0, 2)),
        (make_tokenizer(None, eos=END), {"config_eos": [0, 2]}, (0, 2)),
        (make_tokenizer(None, eos=END), {"config_eos": 40}, (0,)),  # an ordinary word: a class's default
        (make_tokenizer(None, eos=END), {"config_eos": 50256}, (0,)),  # the same, outside the vocabulary
        (make_tokenizer(QWEN3), {}, (2,)),
        (make_tokenizer(R1), {}, (2,)),
        (gemma_tokenizer(), {}, (0, 4)),  # <eot>
        (glm_tokenizer(), {}, (0, 3)),  # <|user|>, which opens the next turn
    ],
)
def test_every_source_of_stop_tokens_counts(
    tokenizer: Any, model: dict[str, Any], stops: tuple[int, ...], tmp_path: Path
) -> None:
    folder = make_model(tmp_path / "model", tokenizer, **model)
    turn_end = Renderer(DataConfig(), tokenizer).turn_end
    of_config, size = end_tokens(AutoConfig.from_pretrained(folder)), len(tokenizer)
    assert stop_ids(str(folder), tokenizer, turn_end, of_config=of_config, vocabulary=size) == stops


@pytest.mark.parametrize(
    "tokenizer", [make_tokenizer(CHATML, eos=END), gemma_tokenizer(), glm_tokenizer(), make_tokenizer(R1)]
)
def test_what_ends_a_trained_turn_stops_engines_and_the_exported_model(
    tokenizer: Any, tmp_path: Path
) -> None:
    row = {"prompt": "q", "completion": "a</think>4"}
    plan = plan_of(tmp_path, tokenizer, [row] * 2)
    group = load_groups(plan.config.data, plan.tokenizer)[0]
    assert group.completions[0].tokens[-1] in plan.stop_ids
    assert plan.engine_spec().stop_token_ids == plan.stop_ids
    assert any(line.startswith("stop tokens") for line in plan_lines(plan))
    Learner(plan.learner_spec()).export(str(tmp_path / "out"))
    exported = json.loads((tmp_path / "out" / "generation_config.json").read_text(encoding="utf-8"))
    assert exported["eos_token_id"] == list(plan.stop_ids)


def test_a_checkpoint_and_a_merged_adapter_carry_the_stop_tokens_too(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", make_tokenizer(CHATML, eos=END))
    adapted = {"threads": 1, "adapter": {"method": "lora", "r": 2}}
    for name, learner in (("full", {"threads": 1}), ("lora", adapted)):
        made = Learner(make_plan(config(tmp_path, str(folder), learner=learner)).learner_spec())
        made.export(str(tmp_path / name))
        if name == "full":
            made.capture_state()(tmp_path)
    for out in (tmp_path / "full", tmp_path / "lora", tmp_path / "model"):
        assert out.is_dir()
        assert json.loads((out / "generation_config.json").read_text())["eos_token_id"] == [0, 2]


def test_a_turn_that_ends_with_no_stop_token_is_found_by_check(tmp_path: Path) -> None:
    talk = [{"role": "user", "content": "q"}, *[{"role": "assistant", "content": "4"}] * 2]
    with pytest.raises(ConfigError, match=r"ends with '<\|assistant\|>' \(token 4\), which is not a stop"):
        plan_of(tmp_path, glm_tokenizer(), [{"messages": talk}] * 2)
    named = {"sampling": {"stop_token_ids": [4]}}
    plan = make_plan(config(tmp_path, str(tmp_path / "model"), [{"messages": talk}] * 2, rollout=named))
    assert plan.stop_ids == (0, 3, 4)


def test_a_hub_name_a_folder_and_an_overridden_tokenizer_agree(tmp_path: Path) -> None:
    base = make_tokenizer(CHATML, eos=END)
    folder = make_model(tmp_path / "model", make_tokenizer(None, eos=END), generation_eos=[0, 5])
    make_model(tmp_path / "chat", base)
    hub_layout(tmp_path / "hub", "some/model", folder)
    hub_layout(tmp_path / "hub", "some/chat", tmp_path / "chat")
    code = (
        "from tests.cases.test_stops import *\n"
        "out = []\n"
        f"for model in ('some/model', {str(folder)!r}):\n"
        f"    for tokenizer in ('some/chat', {str(tmp_path / 'chat')!r}):\n"
        "        named = {'path': model, 'tokenizer': tokenizer}\n"
        f"        c = config(Path({str(tmp_path)!r}), model, model=named)\n"
        "        plan = make_plan(c)\n"
        "        out.append([plan.stop_ids, plan.engine_spec().tokenizer == tokenizer])\n"
        "print(json.dumps(out))\n"
    )
    env = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [[[0, 2, 5], True]] * 4


def test_a_damaged_generation_config_is_a_listed_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_model(tmp_path / "model", make_tokenizer(CHATML))
    file = tmp_path / "run.yaml"
    (folder / "generation_config.json").write_text("{", encoding="utf-8")  # damaged
    file.write_text(f"algorithm: sft\nmodel: {{path: {folder}}}\ndata: {{limit: 64}}\n", encoding="utf-8")
    assert main(["check", str(file), f"output_dir={tmp_path}"]) == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told and "generation_config.json" in told


def test_the_plain_engine_stops_at_what_ends_a_turn(tmp_path: Path) -> None:
    import asyncio

    from rft.rollout.engine import Request, Sampling
    from rft.rollout.hf import HFEngine

    tokenizer = make_tokenizer(CHATML, eos=END)
    plan = plan_of(tmp_path, tokenizer)

    async def sample() -> Any:
        engine = HFEngine(plan.engine_spec())
        await engine.start()
        weight = engine.model.get_output_embeddings().weight
        weight.data.zero_()  # every token alike, so that the turn's end comes up soon
        return await engine.generate(Request("r", (5, 6), Sampling(16, 400, seed=0)))

    generated = asyncio.run(sample())
    ended = [g for g in generated if g.finish == "stop"]
    assert {g.tokens[-1] for g in ended} == {0, 2}
    assert all(not {0, 2} & set(g.tokens[:-1]) for g in generated)
