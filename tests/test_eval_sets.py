"""Named held-out sets: config, loading, metrics of online and offline runs, flips against step 0."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from rft.config.load import parse_config
from rft.config.metrics import TrackingConfig
from rft.data.chat import Renderer
from rft.errors import ConfigError
from rft.loops.evaluate import SampledEvaluation, evaluate
from rft.metrics import RunLog
from rft.metrics.evaluation import Evaluation, Problem, Sampled, read_evaluation, write_evaluation
from rft.metrics.log import read_jsonl
from rft.metrics.names import is_documented
from rft.plan import Plan, make_plan
from rft.report.report import write_report
from rft.rewards.runner import RewardRunner
from rft.rollout.engine import Generated, Request
from rft.utils import yaml_files
from tests.test_offline import ROWS, Run


def plan_of(tiny_folder: Path, where: Path, **changes: Any) -> Plan:
    facts = [{"question": f"capital {i}?", "answer": str(i)} for i in range(5)]
    (where / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)))
    raw: dict[str, Any] = {
        "output_dir": str(where),
        "algorithm": "grpo",
        "model": {"path": str(tiny_folder)},
        "data": {"kind": "arithmetic", "limit": 64, "eval_limit": 6},
        "rewards": ["math"],
        "train": {"batch_size": 4},
        "rollout": {"engine": "hf", "sampling": {"max_completion_length": 8}},
        "eval": {
            "samples": 4,
            "sets": {
                "facts": {
                    "data": {"path": str(where / "facts.jsonl"), "columns": {"prompt": "question"}},
                    "rewards": ["exact_match"],
                    "samples": 3,
                    "greedy": False,
                    "max_completion_length": 4,
                },
                "hard": {"data": {"kind": "arithmetic_hard"}, "problems": 2},
            },
        },
    }
    return make_plan(parse_config({**raw, **changes}))


def refused(tiny_folder: Path, where: Path, **changes: Any) -> str:
    with pytest.raises(ConfigError) as error:
        plan_of(tiny_folder, where, **changes)
    return "\n".join(error.value.problems)


def test_sets_have_their_rows_rewards_and_sampling(tiny_folder: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny_folder, tmp_path)
    unnamed, facts, hard = plan.eval_sets
    assert [s.name for s in plan.eval_sets] == ["", "facts", "hard"]
    assert [len(s.prompts) for s in plan.eval_sets] == [6, 5, 2], "a file's rows are all held out"
    assert (facts.settings.samples, hard.settings.samples, facts.max_tokens, hard.max_tokens) == (3, 4, 4, 8)
    assert facts.rewards is not None and facts.rewards.primary == "exact_match"
    assert unnamed.rewards is None and hard.rewards is None
    assert "evaluation   facts: 5 held-out prompts, 3 samples each, every 20 steps" in plan.text


def test_a_set_with_rewards_does_not_inherit_the_reward_that_ranks(tiny_folder: Path, tmp_path: Path) -> None:
    sets = {
        "own": {"data": {"kind": "sums"}, "rewards": ["exact_match"]},
        "shared": {"data": {"kind": "sums"}},
        "ranked": {"data": {"kind": "sums"}, "rewards": ["exact_match", "format"], "rerank": "format"},
    }
    plan = plan_of(tiny_folder, tmp_path, eval={"rerank": "math", "sets": sets})
    assert [s.settings.rerank for s in plan.eval_sets] == ["math", None, "math", "format"]


def test_data_without_held_out_rows_has_no_unnamed_set(tiny_folder: Path, tmp_path: Path) -> None:
    data = {"path": str(tmp_path / "facts.jsonl"), "columns": {"prompt": "question"}}
    assert [s.name for s in plan_of(tiny_folder, tmp_path, data=data).eval_sets] == ["facts", "hard"]


def test_mistakes_in_sets_are_named(tiny_folder: Path, tmp_path: Path) -> None:
    math = {"data": {"kind": "arithmetic"}}
    told = refused(tiny_folder, tmp_path, eval={"sets": {"a": {**math, "rewards": ["choise"]}}})
    assert "eval.sets.a.rewards: rewards.functions[0] (choise)" in told
    told = refused(tiny_folder, tmp_path, eval={"sets": {"a": {"data": {"path": "missing.jsonl"}}}})
    assert "eval.sets.a.data:" in told and "missing.jsonl" in told
    told = refused(tiny_folder, tmp_path, eval={"sets": {"a": {**math, "max_completion_length": 99}}})
    assert "eval.sets.a.max_completion_length: 99 exceeds the engines' 8" in told
    assert "eval.rerank: no reward is called 'x'" in refused(tiny_folder, tmp_path, eval={"rerank": "x"})
    told = refused(tiny_folder, tmp_path, eval={"sets": {"outcome": math}})
    assert "sets.outcome: write a name" in told
    streamed = {"data": {"path": str(tmp_path / "facts.jsonl"), "streaming": True}}
    assert "eval.sets.a.data.streaming" in refused(tiny_folder, tmp_path, eval={"sets": {"a": streamed}})


def test_offline_sets_are_losses_unless_they_have_rewards(tiny_folder: Path, tmp_path: Path) -> None:
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    data = {"path": str(rows), "chat_template": "never"}
    offline: dict[str, Any] = {"algorithm": "dpo", "data": data, "rewards": {"functions": []}, "rollout": {}}
    pairs = {"data": data, "problems": 3}
    sampled = {"data": {"kind": "arithmetic"}, "rewards": ["math"], "problems": 2}
    plan = plan_of(tiny_folder, tmp_path, **offline, eval={"sets": {"pairs": pairs, "math": sampled}})
    assert [s.name for s in plan.eval_sets] == ["math"]
    assert {name: len(groups) for name, groups in plan.data.sets.items()} == {"pairs": 3}
    told = refused(tiny_folder, tmp_path, **offline, eval={"sets": {"pairs": {**pairs, "samples": 2}}})
    assert "eval.sets.pairs.samples: dpo measures the loss on the rows of a set without rewards" in told
    model = {**offline, "algorithm": "reward_model"}
    told = refused(tiny_folder, tmp_path, **model, eval={"sets": {"math": sampled}})
    assert "eval.sets.math.rewards: reward_model trains a reward model, which generates nothing" in told


@pytest.mark.parametrize("algorithm", ["dpo", "reward_model"])
def test_an_offline_run_measures_its_sets(tiny_folder: Path, tmp_path: Path, algorithm: str) -> None:
    rows = tmp_path / "pairs.jsonl"
    rows.write_text("\n".join(map(json.dumps, ROWS)))
    data = {"path": str(rows), "chat_template": "never"}
    plan = plan_of(
        tiny_folder,
        tmp_path,
        algorithm=algorithm,
        data=data,
        rewards={"functions": []},
        rollout={},
        train={"steps": 2, "batch_size": 4},
        learner={"threads": 1},
        eval={"every": 1, "sets": {"pairs": {"data": data, "problems": 6}}},
    )
    run = Run(plan, "sets")
    result = run.carry_out()
    assert {"eval/pairs/loss", "eval/pairs/preference_accuracy", "eval/pairs/examples"} <= set(result)
    assert result["eval/pairs/examples"] == 6 and "eval/loss" not in result
    assert ["eval/pairs/loss" in line for line in run.lines] == [True, True, True]
    assert not {n for line in run.lines for n in line if not is_documented(n)}


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_sets_with_vllm(tiny_folder: Path, tmp_path: Path) -> None:
    """A run with vLLM measures the unnamed set and both named ones, before and after training."""
    plan = plan_of(
        tiny_folder,
        tmp_path,
        name="vllm",
        train={"steps": 1, "batch_size": 4, "num_generations": 4},
        rollout={
            "engine": "vllm",
            "threads": 1,
            "kv_cache_gib": 0.1,
            "sampling": {"max_completion_length": 8},
        },
        learner={"threads": 1},
    )
    file = tmp_path / "run.yaml"
    file.write_text(yaml_files.dump(plan.config.to_dict()))
    ended = subprocess.run(
        [sys.executable, "-m", "rft.cli", "train", str(file)], capture_output=True, text=True
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    metrics = {row["step"]: row for row in read_jsonl(tmp_path / "vllm" / "metrics.jsonl")}
    for step, name in product((0, 1), ("", "facts/", "hard/")):
        assert f"eval/{name}accuracy" in metrics[step], (step, name)
    assert "eval/hard/greedy_accuracy" in metrics[1] and "eval/facts/greedy_accuracy" not in metrics[1]
    assert metrics[1]["eval/facts/length_mean"] <= 4 < metrics[1]["eval/length_mean"] <= 8
    evaluation = read_evaluation(tmp_path / "vllm", 1)
    assert evaluation is not None
    assert {name: len(problems) for name, problems in evaluation.sets.items()} == {
        "": 6,
        "facts": 5,
        "hard": 2,
    }


def test_a_pattern_of_refusals_is_checked_and_inherited() -> None:
    base = {"algorithm": "grpo", "data": {"kind": "arithmetic"}, "rewards": ["math"]}
    with pytest.raises(ConfigError, match=r"eval\.decline: not a valid regular expression: missing"):
        parse_config({**base, "eval": {"decline": "("}})
    sets = {"a": {"data": {"kind": "arithmetic"}}, "b": {"data": {"kind": "arithmetic"}, "decline": "no"}}
    with pytest.raises(ConfigError, match=r"eval\.sets\.a\.decline: not a valid"):
        parse_config({**base, "eval": {"sets": {"a": {**sets["a"], "decline": "*"}}}})
    settings = parse_config({**base, "eval": {"decline": "unsure", "sets": sets}}).eval
    assert [settings.of_set(name).decline for name in ("", "a", "b")] == ["unsure", "unsure", "no"]


class Scripted:
    """An engine that answers every prompt of arithmetic with the given texts, sample by sample."""

    def __init__(self, tokenizer: Any, answers: list[str]) -> None:
        self.tokenizer, self.answers = tokenizer, answers
        self.asked: list[Request] = []

    async def __call__(self, request: Request) -> list[Generated]:
        self.asked.append(request)
        texts = self.answers[: request.sampling.n]
        return [self._generated(text) for text in texts]

    def _generated(self, text: str) -> Generated:
        tokens = tuple(self.tokenizer.encode(text, add_special_tokens=False))
        return Generated(tokens, tuple(0.0 for _ in tokens), "stop", ((0, 0, len(tokens)),))


def test_metrics_flips_and_rows_of_two_evaluations(tiny_folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}+{i}=", "answer": str(2 * i)} for i in range(4)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    section = {"data": {"path": str(tmp_path / "sums.jsonl"), "chat_template": "never"}, "rewards": ["math"]}
    section |= {"decline": "^6$"}  # any text may be the one of a refusal
    plan = plan_of(
        tiny_folder,
        tmp_path,
        eval={"samples": 3, "sets": {"sums": section}},
        train={"steps": 5, "batch_size": 4},
    )
    sums = [s for s in plan.eval_sets if s.name == "sums"]
    config = plan.config

    async def body() -> tuple[dict[str, float], dict[str, float]]:
        log = RunLog(tmp_path / "run", 5, config.tracking)
        async with RewardRunner(config.rewards) as rewards:
            both = []
            for step, answers in ((0, ["4", "4", "6"]), (5, ["6", "6", "0"])):
                engine = Scripted(plan.tokenizer, answers)
                evaluation = SampledEvaluation(engine, rewards, plan.tokenizer, sums, config, log)
                both.append(await evaluation.run(step))
        log.close()
        return both[0], both[1]

    before, after = asyncio.run(body())
    # answers 4, 4, 6 to the sums 0, 2, 4, 6: right are two of three for row 2, one for row 3
    assert before["eval/sums/accuracy"] == pytest.approx((2 / 3 + 1 / 3) / 4)
    assert before["eval/sums/maj@3"] == 0.25 and before["eval/sums/greedy_accuracy"] == 0.25
    assert before["eval/sums/distinct_answers"] == 2.0 and "eval/sums/negative_flips" not in before
    assert before["eval/sums/declined"] == pytest.approx(1 / 3) and after["eval/sums/declined"] == 2 / 3
    assert before["eval/sums/accuracy_answered"] == 2 / 8 and after["eval/sums/accuracy_answered"] == 1 / 4
    # now 6, 6, 0, greedily 6: row 2 is broken, row 3 solved, row 0 right in one sample
    assert after["eval/sums/negative_flips"] == after["eval/sums/positive_flips"] == 0.25
    assert after["eval/sums/forgetting"] == pytest.approx((2 / 3 + 1 / 3) / 4 - (2 / 3 + 1 / 3) / 4)
    assert not {name for name in (*before, *after) if not is_documented(name)}
    last = read_evaluation(tmp_path / "run")
    assert last is not None and last.step == 5
    broken = [p for p in last.sets["sums"] if p.text]
    assert [(p.id, p.text, p.prompt) for p in broken] == [(2, "6", "2+2=")]


def test_the_seeds_of_a_set_depend_on_its_name_only(tiny_folder: Path, tmp_path: Path) -> None:
    plan = plan_of(tiny_folder, tmp_path)

    async def seeds(names: list[str]) -> dict[str, list[int | None]]:
        engine = Scripted(plan.tokenizer, ["1"] * 4)
        sets = [s for s in plan.eval_sets if s.name in names]
        async with RewardRunner(plan.config.rewards) as rewards:
            await evaluate(engine, rewards, plan.tokenizer, sets, plan.config, label="x")
        assert isinstance(Renderer(plan.config.data, plan.tokenizer), Renderer)
        return {r.id: r.sampling.seed for r in engine.asked}

    together, alone = asyncio.run(seeds(["", "facts", "hard"])), asyncio.run(seeds(["hard"]))
    assert alone and alone.items() <= together.items()
    assert len({s for s in together.values() if s is not None}) == 6 + 5 + 2


def test_the_report_shows_what_was_broken(tmp_path: Path) -> None:
    def problems(texts: list[str], marks: list[bool]) -> list[Problem]:
        return [
            Problem(i, [Sampled(mark)], Sampled(mark), f"prompt {i}", text)
            for i, (text, mark) in enumerate(zip(texts, marks, strict=True))
        ]

    run = tmp_path / "run"
    log = RunLog(run, 4, TrackingConfig())
    log.log(0, {"eval/sums/accuracy": 0.5, "eval/negative_flips": 0.0})
    log.log(4, {"eval/sums/accuracy": 0.25, "eval/negative_flips": 0.25, "eval/distinct_2": 0.5})
    log.close()
    for step, texts, marks in (
        (0, ["right", "no"], [True, False]),
        (4, ["broken <b>", "no"], [False, False]),
    ):
        write_evaluation(run, Evaluation(step, {"": problems(texts, marks)}, {"": "same"}))
    page = write_report(run).read_text()
    assert "sums: accuracy" in page and "25.0%" in page and "broken problems" in page
    assert "solved at step 0, failed now" in page and "broken &lt;b&gt;" in page and "prompt 0" in page
    assert all(title in page for title in ("Named held-out sets", "Broken problems", "Held-out diversity"))
    other = Evaluation(4, {"": problems(["broken", "no"], [False, False])}, {"": "other prompts"})
    write_evaluation(run, other)
    assert "solved at step 0, failed now" not in write_report(run).read_text()
