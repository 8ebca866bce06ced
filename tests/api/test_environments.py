"""Environments and tools that a program passes as objects: pickled, trained with, refused, resumed."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest

import rft
from rft.api.inputs import Arguments, resolve
from rft.cli import main
from rft.metrics.log import read_jsonl
from tests.specs import needs_vllm

SMALL: dict[str, Any] = {
    "model": {"path": "tiny", "options": {"layers": 1}},
    "data": [{"prompt": f"What is {i % 10}?", "answer": str(i % 10)} for i in range(16)],
    "algorithm": "grpo",
    "steps": 2,
    "batch_size": 2,
    "num_generations": 2,
    "eval": {"every": 0},
    "rollout": {"sampling": {"max_prompt_length": 400, "max_completion_length": 8}},
}


def echo(text: str) -> str:
    """Repeat a text.

    Args:
        text: the text
    """
    return text


class Length:
    """Rewards long answers; never right, so that every session has three turns."""

    def reset(self, answer: str, **row: Any) -> str:
        self.answer = answer
        return " Answer at length."

    def step(self, text: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        return "again", len(text) % 5 / 5, False, False, {}


class Desk:
    """In the shape of TRL's environment classes."""

    def reset(self, **row: Any) -> None:
        self.read = 0

    def look(self) -> str:
        """Look at the desk."""
        self.read += 1
        return "nothing"

    def get_reward(self) -> float:
        return float(self.read)


async def ask(row: dict[str, Any], session: Any) -> float:
    reply = await session.chat([{"role": "user", "content": row["prompt"]}])
    return len(reply.content) % 3


def config_of(**arguments: Any) -> Any:
    return resolve(
        {"algorithm": "grpo", "environment": arguments.pop("section", None)}, Arguments(**arguments)
    )


@pytest.mark.parametrize(("target", "kind"), [(Length, "text"), (Desk, "class"), (ask, "function")])
def test_kinds_follow_from_the_object(target: Any, kind: str) -> None:
    environment = config_of(environment=target).config.environment
    assert (environment.kind, environment.path) == (kind, f"python:{target.__name__}")
    assert list(environment.payloads) == list(environment.passed) == [environment.path]
    explicit = rft.config.EnvironmentConfig(kind=kind, path=target, max_turns=3)
    again = config_of(environment=explicit).config.environment
    assert again.max_turns == 3 and again.payloads.keys() == environment.payloads.keys()


def test_tools_lie_over_the_section() -> None:
    environment = config_of(
        tools=[echo, "calculator"], section={"kind": "tools", "max_turns": 2}
    ).config.environment
    assert environment.tools == ["python:echo", "calculator"] and environment.max_turns == 2
    assert config_of(tools=[echo]).config.environment.kind == "tools"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"environment": threading.Lock}, "neither an async function nor a class"),
        ({"environment": "mine.py:Env"}, "pass the class or function"),
        ({"tools": echo}, "tools: pass a list of functions"),
        ({"section": {"kind": "class", "path": "python:Desk"}}, "refers to an object passed from Python"),
    ],
)
def test_what_cannot_be_passed(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(rft.ConfigError, match=message):
        config_of(**arguments)


def test_what_cannot_be_pickled() -> None:
    lock = threading.Lock()

    def locked(text: str) -> str:
        """Repeat. Args: text: a text."""
        with lock:
            return text

    with pytest.raises(rft.ConfigError, match=r"the tool locked cannot be sent to the environment's workers"):
        config_of(tools=[locked])


@needs_vllm
@pytest.mark.slow
@pytest.mark.timeout(280)
def test_a_run_in_a_passed_environment_is_stopped_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Stop(rft.Callback):
        def on_step_end(self, run: rft.Run, metrics: Any) -> None:
            run.stop("enough")

    here = {**SMALL, "output_dir": str(tmp_path), "name": "x"}
    run = rft.train(environment={"path": Length, "max_turns": 3}, callbacks=[Stop()], **here)
    assert run.step == 1
    first = run.metrics[-1]
    assert first["session/turns"] == 3 and first["session/ending/turn_limit"] == 1
    assert first["environment/episodes"] == 4 and first["session/branches"] == 1

    assert main(["train", str(run.path / "config.yaml")]) == 2
    assert "environment: Length was passed from Python as an object" in capsys.readouterr().err
    with pytest.raises(rft.ConfigError, match="Desk was not passed to the run; its objects are Length"):
        run.resume(environment=Desk)
    run = run.resume(environment=Length)
    assert run.step == 2 and run.result is not None
    (sample, *_) = read_jsonl(run.path / "samples.jsonl")
    assert "again" in str(sample)
