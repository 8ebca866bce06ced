"""Whole runs from the command line, with the real Ray actors and the real vLLM engine."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml

from rft.cli import main
from rft.metrics.names import is_documented
from tests.integration.conftest import ENV, ROOT, processes_of, rft

SUMS = ["data.options.min_operands=2", "data.options.max_operands=2", "data.options.largest=9"]
SMALL = [
    "data.limit=512",
    "train.steps=4",
    "train.batch_size=4",
    "train.num_generations=4",
    "eval.problems=8",
    "eval.samples=2",
    "eval.every=2",
    "rollout.sampling.max_completion_length=16",
    "checkpoint.every=2",
]


def rows(run: Path, name: str = "metrics.jsonl") -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text().splitlines()]


def command(tmp: Path, *args: str) -> list[str]:
    cache = f"warm_start.cache={tmp}/cache"
    return ["train", "examples/arithmetic.yaml", f"output_dir={tmp}", cache, *SUMS, *args]


LEARN = [
    "warm_start.steps=500",
    "warm_start.data.limit=16000",  # as many as it draws: a run makes all of them
    "data.limit=1024",
    "train.steps=16",
    "eval.every=16",
    "eval.problems=128",
    "data.options.min_operands=3",
    "data.options.max_operands=3",
    "rollout.kv_cache_gib=0.1",
    "name=learn",
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


@dataclass(frozen=True)
class Stopped:
    """A run that was asked to stop by SIGTERM."""

    code: int
    told: str
    rows: list[dict]
    checkpoints: list[str]
    left_behind: list[str]


@pytest.fixture(scope="module")
def stopped(home: Path) -> Stopped:
    """The demo with a short warm start, asked to stop after a few of its 16 steps."""
    run, marker = home / "learn", home.name
    with (home / "stderr").open("w+") as told:
        process = subprocess.Popen(
            [sys.executable, "-m", "rft.cli", *command(home, *LEARN)],
            cwd=ROOT,
            env={**ENV, "RFT_TEST_MARK": marker},
            stdout=subprocess.DEVNULL,
            stderr=told,
        )
        try:
            deadline = time.monotonic() + 480
            while not ((run / "metrics.jsonl").exists() and len(rows(run)) > 6):
                known = Path(told.name).read_text()[-4000:]
                assert process.poll() is None, f"ended with {process.returncode}:\n{known}"
                assert time.monotonic() < deadline, f"no seven steps within 480 s:\n{known}"
                time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            process.wait(120)
        finally:
            process.kill()  # where it has not ended by itself; a guardian ends its actors
        left_behind = processes_of(f"RFT_TEST_MARK={marker}")
        told.seek(0)
        saved = sorted(p.name for p in (run / "checkpoints").glob("step-*"))
        return Stopped(process.returncode, told.read(), rows(run), saved, left_behind)


@pytest.fixture(scope="module")
def learnt(home: Path, stopped: Stopped) -> subprocess.CompletedProcess[str]:
    """The same command again, which goes on to the end."""
    assert stopped.code == 75, stopped.told[-4000:]
    return rft(*command(home, *LEARN), timeout=850)


@pytest.mark.timeout(600)
def test_sigterm_saves_exits_75_and_leaves_nothing_behind(stopped: Stopped) -> None:
    assert stopped.code == 75, stopped.told[-4000:]
    reached = stopped.rows[-1]["step"]
    assert f"stopped at step {reached}" in stopped.told
    assert stopped.checkpoints[-1] == f"step-{reached:08d}"
    assert stopped.left_behind == []


@pytest.mark.timeout(900)
def test_a_short_run_learns_and_a_stop_on_its_way_does_not_show(
    home: Path, stopped: Stopped, learnt: subprocess.CompletedProcess[str]
) -> None:
    """Held-out accuracy rises; steps and versions go on where they stopped."""
    run, reached = home / "learn", stopped.rows[-1]["step"]
    assert 0 < reached < 16 and f"resumed at step {reached}" in learnt.stderr
    metrics = rows(run)
    assert metrics[: reached + 1] == stopped.rows
    assert [r["step"] for r in metrics] == list(range(17))
    first, last = metrics[0], metrics[-1]
    assert last["sync/version"] == 16
    assert last["eval/accuracy"] >= first["eval/accuracy"] + 0.08, (first, last)
    assert max(r["sync/logp_gap"] for r in metrics[1:]) < 1e-3
    undocumented = {name for r in metrics for name in r if not is_documented(name)}
    assert not undocumented
    assert yaml.safe_load((run / "config.yaml").read_text())["name"] == "learn"
    assert yaml.safe_load((run / "config.yaml").read_text())["learner"]["dtype"] == "float32"  # resolved
    assert {r["split"] for r in rows(run, "samples.jsonl")} == {"train", "eval"}
    assert list((run / "tensorboard").iterdir())


@pytest.mark.timeout(900)
def test_the_final_model_is_an_ordinary_folder(
    home: Path, learnt: subprocess.CompletedProcess[str], tmp_path: Path
) -> None:
    """`rft export` copies it, transformers loads it, `rft eval` finds the accuracy that the run found."""
    run, out = home / "learn", tmp_path / "exported"
    assert main(["export", str(run), str(out)]) == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(out)
    assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()
    assert AutoTokenizer.from_pretrained(out).eos_token_id is not None
    changes = ["rollout.engine=hf", "eval.samples=1", "--model", str(out)]
    shown = rft("eval", *command(home, *LEARN)[1:], *changes)
    accuracy = json.loads(shown.stdout)["eval/greedy_accuracy"]
    assert accuracy == pytest.approx(rows(run)[-1]["eval/greedy_accuracy"], abs=0.02)


@pytest.mark.timeout(900)
def test_a_step_that_vllm_sampled_is_computed_again(
    home: Path, stopped: Stopped, learnt: subprocess.CompletedProcess[str]
) -> None:
    """The learner alone decides the bits of a step, given what an engine sampled."""
    reached = stopped.rows[-1]["step"]
    shown = rft("replay", str(home / "learn"), "--step", str(reached + 1)).stdout
    assert f"from step-{reached:08d}\n" in shown and "promised: equal, to the bit\nverdict: kept" in shown


@pytest.mark.timeout(900)
def test_a_complete_run_is_left_alone(
    home: Path,
    learnt: subprocess.CompletedProcess[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(ROOT)
    before = {p: p.read_bytes() for p in (home / "learn").rglob("*") if p.is_file()}
    assert main(command(home, *LEARN)) == 0
    assert "is complete" in capsys.readouterr().err
    assert before == {p: p.read_bytes() for p in (home / "learn").rglob("*") if p.is_file()}


CURRICULUM = ("train.curriculum={rest: 2}",)  # the state that is hardest to bring back
MIXTURE = (
    "data={mixture: {add: {kind: arithmetic, rate: [[0, 0.75], [0.002, 0.25]]}, "
    "long: {kind: arithmetic_hard, rate: {start: 0.25, end: 1}, epochs: 2, rewards: [score], environment: "
    "{kind: function, path: 'FOLDER/digits.py:play', max_episode_tokens: 256}}}, limit: 16}",
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("order", [CURRICULUM, pytest.param(MIXTURE, marks=pytest.mark.slow)])
def test_a_run_killed_outright_resumes_to_the_same_bits(tmp_path: Path, order: tuple[str, ...]) -> None:
    """`rft verify-resume`, synchronous with the plain engine: sample order, completions, metrics, weights,
    optimizer, random states and the run's own state are those of a run that was never killed."""
    (tmp_path / "digits.py").write_text(
        "def score(prompts, completions, **columns):\n"
        "    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]\n"
        "async def play(row, session):\n"
        "    messages = [{'role': 'user', 'content': row['prompt']}]\n"
        "    for _ in range(2):\n"
        "        reply = await session.chat(messages)\n"
        "        messages += [reply.message(), {'role': 'user', 'content': 'again'}]\n"
        "    return 0.0\n"
    )
    order = tuple(override.replace("FOLDER", str(tmp_path)) for override in order)
    reward = f"rewards=[{{function: '{tmp_path}/digits.py:score'}}]"
    common = [*SMALL, "warm_start=null", "rollout.engine=hf", "learner.threads=1", reward]
    config, *overrides = command(tmp_path, *common, "train.steps=1000", *order)[1:]  # a part of a long run
    out = f"--out={tmp_path}/verify"
    args = ["verify-resume", config, *overrides, "--steps", "6", "--kill-at", "3", out]
    done = rft(*args, check=False, mark=tmp_path.name)
    assert done.returncode == 0 and "verdict: kept" in done.stdout, done.stdout + done.stderr
    assert done.stdout.count("  equal  ") == 10 and "differs" not in done.stdout.lower()
    assert processes_of(f"RFT_TEST_MARK={tmp_path.name}") == [], "the killed run left processes behind"


HANGS = '''
import os, time
SEEN = os.path.join(os.path.dirname(__file__), "seen")
def first_time(name, text=""):
    try:
        with open(f"{SEEN}-{name}", "x") as file:
            file.write(text)
        return True
    except FileExistsError:
        return False
def is_prompt(name, text):
    return os.path.exists(f"{SEEN}-{name}") and open(f"{SEEN}-{name}").read() == text
def score(prompts, completions, **columns):
    """Digits pay. The first prompt of all is not judged the first two times, and the first one after that,
    the fifth of the others, is not judged the first time."""
    prompt = prompts[0]
    if first_time("twice", prompt) or is_prompt("twice", prompt):
        first_time("tries-1") or first_time("tries-2")
        time.sleep(10_000)
    if is_prompt("once", prompt):
        first_time("judged")
    elif first_time(f"other-{prompt}"):
        number = next(i for i in range(100) if first_time(f"number-{i}"))
        if number == 4:
            first_time("once", prompt)
            time.sleep(10_000)
        if number > 7:  # the second try may not be overtaken by two others, or it would be late again
            while not os.path.exists(f"{SEEN}-judged"):
                time.sleep(0.01)
            time.sleep(1)
    return [sum(c.isdigit() for c in text) / (1 + len(text)) for text in completions]
'''


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_group_that_comes_too_late_is_dropped_and_its_prompt_gets_a_second_try(tmp_path: Path) -> None:
    """`rollout.late: drop`: a reward that hangs on a group holds nobody up. (With `wait` it would until its
    deadline, here far beyond this test's.) One prompt comes too late twice and is given up, another one once.

    With one prompt per step, the only other group in flight is the one that the step waits for, so no other
    group can be late, however busy the machine is.
    """
    (tmp_path / "hangs.py").write_text(HANGS)
    reward = {
        "function": f"{tmp_path}/hangs.py:score",
        "timeout_s": 10_000,
        "batch_size": 4,  # a group is one call
    }
    steps = 8
    rft(
        *command(tmp_path, *SMALL, "warm_start=null", "rollout.engine=hf", "eval.every=0"),
        f"train.steps={steps}",
        "train.batch_size=1",
        "rollout.staleness=1",
        "rollout.late=drop",
        f"rewards={json.dumps({'functions': [reward], 'workers': 4})}",
    )
    run = tmp_path / "arithmetic"
    events = rows(run, "events.jsonl")
    dropped = [e for e in events if e["kind"] == "group/dropped"]
    assert [e["again"] for e in dropped] == [True, False, True]
    assert {e["reason"] for e in dropped} == {"too_old"}
    twice, again, once = (tuple(e["prompt"]) for e in dropped)
    assert twice == again != once
    trained = [tuple(p) for e in events if e["kind"] == "group/trained" for p in e["prompts"]]
    assert len(trained) == len(set(trained)) == steps
    assert once in trained and twice not in trained
    assert all(age <= 1 for e in events if e["kind"] == "group/trained" for age in e["ages"])
    assert rows(run)[-1]["data/dropped/too_old"] == 3
    manifest = json.loads((run / "checkpoints" / f"step-{steps:08d}" / "manifest.json").read_text())
    assert [d[2] for d in manifest["meta"]["dropped"]] == ["too_old"]


@pytest.mark.timeout(300)
def test_a_reward_that_raises_stops_the_run_with_its_traceback(
    tmp_path: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "broken.py").write_text("def score(prompts, completions, **columns):\n    return 1 / 0\n")
    changes = ["warm_start=null", "rollout.engine=hf", "eval.every=0"]
    reward = f"rewards=[{{function: '{tmp_path}/broken.py:score'}}]"
    assert main(command(tmp_path, *SMALL, *changes, reward)) == 1
    told = capsys.readouterr().err
    assert "ZeroDivisionError" in told and "broken.py" in told
    metrics = tmp_path / "arithmetic" / "metrics.jsonl"
    assert all("reward/mean" not in r for r in map(json.loads, metrics.read_text().splitlines()))
