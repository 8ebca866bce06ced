"""`rft collect` with an engine and an environment, `rft train` on its sessions, `rft eval` in there."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

import rft.tools.collect as collecting
from rft.batch import Batch
from rft.cli import main
from rft.config.data import DataConfig
from rft.config.load import load_config
from rft.data import load_groups
from rft.errors import RunStopped
from rft.learner.load import load_tokenizer
from rft.plan import Plan
from rft.rollout.engine import Generated, Request
from rft.rollout.pool import RolloutPool
from rft.utils.signals import StopRequests
from tests.integration.conftest import ROOT
from tests.specs import needs_vllm

# Answers twice; the second call has another history, so that it is a branch. Half of the sessions succeed.
ENVIRONMENT = """
async def twice(row, session):
    first = await session.chat([{"role": "user", "content": row["prompt"]}])
    again = [{"role": "user", "content": "Again: " + row["prompt"]}]
    await session.chat([*again, first.message(), {"role": "user", "content": "Sure?"}])
    session.reward(0.25, call=0)
    return float(session.seed % 2)
"""
CONFIG = """
name: twice
output_dir: {here}
seed: 3
model: {{path: {model}}}
data: {{kind: arithmetic, limit: 6}}
environment:
  {{kind: function, path: "{here}/environment.py:twice", max_turns: 2, max_tokens_per_turn: 6,
  max_episode_tokens: 300}}
algorithm: grpo
train: {{steps: 1, batch_size: 2, num_generations: 4}}
rollout: {{engine: hf, threads: 1, max_num_seqs: 4}}
learner: {{threads: 1}}
eval: {{every: 1, problems: 3, samples: 2, greedy: false}}
tracking: {{display: "off"}}
"""


@pytest.fixture
def config(tmp_path: Path, tiny_folder: Path) -> Path:
    (tmp_path / "environment.py").write_text(ENVIRONMENT)
    (tmp_path / "twice.yaml").write_text(CONFIG.format(here=tmp_path, model=tiny_folder))
    return tmp_path / "twice.yaml"


class SharedPool(RolloutPool):
    """Engines that several commands of a test use: they start once, and record what they sampled."""

    seen: ClassVar[set[tuple[int, ...]]] = set()

    async def start(self) -> None:
        if not self.members:
            await super().start()

    async def generate(self, request: Request) -> list[Generated]:
        answers = await super().generate(request)
        self.seen.update(request.tokens + answer.tokens for answer in answers)
        return answers

    async def close(self) -> None: ...


@pytest.fixture
def shared_pool(ray_here: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    pools: list[SharedPool] = []

    def make(plan: Plan) -> SharedPool:
        pools.extend([SharedPool(plan.engine_spec())] if not pools else [])
        return pools[0]

    monkeypatch.setattr(collecting, "make_pool", make)
    yield
    asyncio.run(RolloutPool.close(pools[0]))


def stopped_after(count: int, config: Path, out: Path, arguments: collecting.Arguments) -> list[int]:
    """Collect until a stop that is asked for when `count` groups are written; return the prompts of all."""
    append, written, signals = collecting._File.append, list[int](), StopRequests()

    def stops(file: Any, lines: Any) -> None:
        append(file, lines)
        written.append(lines[0]["prompt_id"])
        if len(written) == count:
            signals.stop("asked")

    with pytest.MonkeyPatch.context() as patch, pytest.raises(RunStopped):
        patch.setattr(collecting._File, "append", stops)
        collecting.collect(load_config(config), out, arguments, signals, print)
    return written


def sessions(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "sessions.jsonl").read_text().splitlines()]


def sampled_in(batch: Batch) -> set[tuple[int, ...]]:
    """Each run of trained tokens with all tokens before it."""
    found, mask = set(), batch.mask.tolist()
    source, tokens = batch.source.tolist(), batch.tokens.tolist()
    followed = {s for i, s in enumerate(source) if mask[i] and s >= 0 and mask[s]}
    for end in (i for i, trained in enumerate(mask) if trained and i not in followed):
        path, at = [], end
        while at >= 0:
            path.append(tokens[at])
            at = source[at]
        found.add(tuple(reversed(path)))
    return found


def test_sessions_are_collected(
    config: Path,
    tiny_folder: Path,
    tmp_path: Path,
    shared_pool: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    seen = SharedPool.seen
    seen.clear()

    # Stopped after two groups or a few more; the same command goes on, and nothing is played twice.
    command = ["collect", str(config), "--out", str(tmp_path / "out")]
    written = stopped_after(2, config, tmp_path / "out", collecting.Arguments())
    assert 2 <= len(written) < 6
    part = tmp_path / "out" / "sessions.part.jsonl"
    with part.open("a") as file:  # a killed process leaves a part of a group
        file.write(part.read_text().splitlines()[0].replace(f'"prompt_id": {written[0]}', '"prompt_id": 99'))
    seen.clear()
    assert main(command) == 0
    rows = sessions(tmp_path / "out")
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [(p, k) for p in range(6) for k in range(4)]
    assert not part.exists() and len(seen) <= (6 - len(written)) * 4 * 2

    # A finished collection is left alone, and other settings do not overwrite it.
    before = (tmp_path / "out" / "sessions.jsonl").read_bytes()
    assert main(command) == 0
    assert main([*command, "seed=4"]) == 2
    assert "config.seed: was 3, now 4" in capsys.readouterr().err
    assert main([*command[:3], str(tmp_path)]) == 2
    assert (tmp_path / "out" / "sessions.jsonl").read_bytes() == before

    # What an uninterrupted command collects is the same, to the byte.
    seen.clear()
    assert main([*command[:3], str(tmp_path / "whole")]) == 0
    assert (tmp_path / "whole" / "sessions.jsonl").read_bytes() == before

    # Every token that an engine sampled is trained once, after exactly the tokens that the engine was given.
    data = DataConfig(path=str(tmp_path / "whole" / "sessions.jsonl"), sessions={"keep": "all"})  # type: ignore[arg-type]
    groups = load_groups(data, load_tokenizer(str(tiny_folder)))
    batch = Batch.build(groups.groups)
    assert sampled_in(batch) == seen
    assert int(batch.mask.sum()) == sum(
        sum(p is not None for p in row["logprobs"]) for row in rows if row["reward"] is not None
    )
    assert {row["reward"] for row in rows} == {0.0, 1.0} and all(row["branches"] for row in rows)
    assert all(row["success"] is (row["reward"] == 1.0) for row in rows)
    assert rows[0]["turns"][0]["reward"] == 0.25 and rows[0]["messages"][0]["role"] == "user"


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_they_are_trained_on_and_evaluated(
    config: Path, tiny_folder: Path, tmp_path: Path, ray_here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["collect", str(config), "--out", str(tmp_path / "out")]) == 0

    # Supervised on the successes, and on pairs.
    for name, more in (("sft", ["data.sessions={keep: best}"]), ("dpo", [])):
        path = tmp_path / f"{name}.yaml"
        path.write_text(
            f"name: {name}\noutput_dir: {tmp_path}\nalgorithm: {name}\nmodel: {{path: {tiny_folder}}}\n"
            f"data: {{path: {tmp_path}/out/sessions.jsonl, sessions: {{}}}}\n"
            "train: {steps: 1, batch_size: 2}\nlearner: {threads: 1}\neval: {every: 0}\n"
            'tracking: {display: "off"}\n'
        )
        assert main(["train", str(path), *more]) == 0
        (metrics,) = [json.loads(x) for x in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        assert math.isfinite(metrics["train/loss"])

    # A run's own evaluation in the environment is repeated by the command.
    assert main(["train", str(config)]) == 0
    rows = [json.loads(x) for x in (tmp_path / "twice" / "metrics.jsonl").read_text().splitlines()]
    trained = {k: v for row in rows if row["step"] == 1 for k, v in row.items() if k.startswith("eval/")}
    capsys.readouterr()
    assert main(["eval", str(config), "--model", str(tmp_path / "twice")]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["eval/problems"] == 3 and evaluated["eval/session/turns"] == 2
    timed = {"eval/session/seconds", "eval/session/model_seconds"}
    since_start = {"eval/forgetting", "eval/negative_flips", "eval/positive_flips"}  # the run has a step 0
    assert since_start <= trained.keys()
    assert {k: v for k, v in evaluated.items() if k not in timed} == {
        k: v for k, v in trained.items() if k not in timed | since_start
    }


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=needs_vllm)])
def test_agents_in_programs_are_collected(
    engine: str, tiny_folder: Path, tmp_path: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    command = ["collect", "examples/agents/openai.yaml", "--prompts", "2", "--samples", "2"]
    changes = [f"model.path={tiny_folder}", f"rollout.engine={engine}", "rollout.threads=1", "eval.every=0"]
    assert main([*command, "--out", str(tmp_path / "out"), *changes]) == 0
    rows = sessions(tmp_path / "out")
    assert [(row["prompt_id"], row["sample"]) for row in rows] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert all(row["ending"] == "finished" and row["reward"] in (0, 0.75, 1) for row in rows)
    assert all(
        len(row["logprobs"]) == len(row["ids"])
        and sum(p is not None for p in row["logprobs"])
        == sum(t["end"] - t["start"] for t in row["turns"])
        > 0
        for row in rows
    )


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_program_samples_what_the_loop_in_process_does(
    tmp_path: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calculator of the examples, offered by a program: the same prompts and seeds."""
    monkeypatch.chdir(ROOT)
    changes = [
        "warm_start=null",
        "rollout.engine=hf",
        "rollout.threads=1",
        "--prompts",
        "3",
        "--samples",
        "2",
    ]
    first = []
    for name in ("calculator", "agents/calculator"):
        out = tmp_path / name.replace("/", "-")
        assert main(["collect", f"examples/{name}.yaml", "--out", str(out), *changes]) == 0
        rows = sessions(out)
        ends = [row["turns"][0]["end"] for row in rows]
        first.append(
            [(r["prompt_ids"], r["ids"][:n], r["logprobs"][:n]) for r, n in zip(rows, ends, strict=True)]
        )
    assert first[0] == first[1] and len(first[0]) == 6


def test_a_warm_start_must_have_been_trained(config: Path, tmp_path: Path, capsys: Any) -> None:
    stage = (
        f"warm_start={{steps: 1, batch_size: 2, data: {{kind: arithmetic, limit: 8}}, cache: {tmp_path}/w}}"
    )
    assert main(["collect", str(config), "--out", str(tmp_path / "out"), stage]) == 2
    assert "the config's warm start was not trained yet" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


SOLVABLE = """
import zlib

def solvable(prompts, completions):
    # The first prompts are solved at once, the last one never, the others by some completions.
    numbers = [zlib.crc32(prompt.encode()) % 4 for prompt in prompts]
    return [float(n == 0 or (n < 3 and zlib.crc32(text.encode()) % 4 == 0))
            for n, text in zip(numbers, completions)]
"""


def test_a_budget_goes_to_prompts_without_a_right_completion(
    tiny_folder: Path,
    tmp_path: Path,
    shared_pool: None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "reward.py").write_text(SOLVABLE)
    lines = CONFIG.format(here=tmp_path, model=tiny_folder).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("environment:"))
    lines[start : start + 3] = [f'rewards: [{{function: "{tmp_path}/reward.py:solvable"}}]']
    lines = [
        line.replace("max_num_seqs: 4", "max_num_seqs: 4, sampling: {max_completion_length: 4}")
        for line in lines
    ]
    config = tmp_path / "solvable.yaml"
    config.write_text("\n".join(lines).replace("limit: 6", "limit: 8"))
    command = ["sample", str(config), "--samples", "3", "--up-to", "9", "--keep", "success"]

    # Stopped in the second round; the same command ends as one that was not stopped.
    stopped_after(10, config, tmp_path / "out" / "sessions", collecting.Arguments(samples=3, up_to=9))
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert main([*command, "--out", str(tmp_path / "whole")]) == 0
    rows = sessions(tmp_path / "out" / "sessions")
    assert rows == sessions(tmp_path / "whole" / "sessions")

    # Prompts that are solved stop at their first success, the others share what is left of 3 x 8.
    tries = {p: [r["success"] for r in rows if r["prompt_id"] == p] for p in range(8)}
    solved = {p for p, t in tries.items() if any(t)}
    assert len(rows) == 24 and 0 < len(solved) < 8
    assert all(tries[p].index(True) == len(tries[p]) - 1 for p in solved)
    unsolved = [len(tries[p]) for p in range(8) if p not in solved]
    assert unsolved == sorted(unsolved, reverse=True) and max(unsolved) - min(unsolved) <= 1
    assert max(unsolved) > 3 and [r["sample"] for r in rows if r["prompt_id"] == 0] == list(
        range(len(tries[0]))
    )
    written_down = [json.loads(x) for x in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert len(written_down) == len(solved)
    assert f"{len(solved)} of 8 prompts solved" in capsys.readouterr().err

    # Nobody gets more than --up-to, and a budget that nobody needs is left.
    assert (
        main(["sample", str(config), "--samples", "6", "--up-to", "7", "--out", str(tmp_path / "few")]) == 0
    )
    assert max(r["sample"] for r in sessions(tmp_path / "few" / "sessions")) == 6
    assert main(["sample", str(config), "--samples", "6", "--up-to", "5", "--out", str(tmp_path / "no")]) == 2
    assert (
        "--up-to: 5 is below --samples 6, what a prompt has on average; write --up-to 24"
        in capsys.readouterr().err
    )
