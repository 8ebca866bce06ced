"""Mistakes in the section `environment` are found before a run: one message each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rft.config.environment import EnvironmentConfig
from rft.config.load import parse_config
from rft.config.rewards import RewardsConfig
from rft.config.schema import Config
from rft.config.validate import problems
from rft.data import load_prompts
from rft.environments.runner import KINDS, EnvironmentRunner
from rft.errors import ConfigError
from rft.plan import make_plan
from rft.preflight.environment import check_environment
from rft.preflight.rewards import check_rewards
from rft.report.plan_text import plan_lines
from rft.rewards.load import SpecError
from tests.specs import facts

SAMPLES = str(Path(__file__).parent / "samples.py")
TOOLS = {"kind": "tools", "tools": ["calculator"]}
TEXT = {"kind": "text", "path": f"{SAMPLES}:Countdown"}


def config(environment: dict[str, Any], folder: Path | str = "tiny", **sections: Any) -> Config:
    raw = {
        "algorithm": "grpo",
        "model": {"path": str(folder)},
        "data": {"kind": "arithmetic", "limit": 8},
        "rewards": [{"function": "math"}],
        "train": {"batch_size": 4},
        "environment": environment,
    }
    return parse_config({**raw, **sections})


@pytest.mark.parametrize(
    ("environment", "sections", "message"),
    [
        (TEXT, {"algorithm": "sft"}, "environment: sft trains on rows of a dataset, without sampling"),
        ({**TOOLS, "path": "a.py:f"}, {}, "environment.path: kind tools loads no class or function"),
        ({"kind": "class"}, {}, "environment.path: kind class needs the class or function"),
        ({"kind": "tools"}, {}, "environment.tools: kind tools needs at least one"),
        ({**TEXT, "tools": ["python"]}, {}, "environment.tools: kind text takes no tools"),
        ({"kind": "verifiers", "path": "t"}, {}, "environment.python: kind verifiers needs the Python"),
        ({"kind": "verifiers", "python": "p"}, {}, "environment.path: kind verifiers needs a taskset"),
        ({**TEXT, "python": "p"}, {}, "environment.python: kind text runs in the Python of rft"),
        (
            {**TEXT, "max_episode_tokens": 30},
            {},
            "max_episode_tokens: 30, but the longest prompt has 50 tokens",
        ),
        (
            {**TEXT, "max_episode_tokens": 100, "max_tokens_per_turn": 200},
            {},
            "max_tokens_per_turn: 200 tokens do not fit into an episode of 100",
        ),
        (
            {**TEXT, "step_timeout_s": 700},
            {},
            "environment.step_timeout_s: 700 s exceed the episode's 600 s",
        ),
    ],
)
def test_settings(environment: dict[str, Any], sections: dict[str, Any], message: str) -> None:
    found = problems(config(environment, **sections), facts(longest_prompt={"": 50}))
    assert len([problem for problem in found if message in problem]) == 1, found


def test_a_missing_package_of_kind_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rft.config.validate_environment.find_spec", lambda name: None)
    found = problems(config({"kind": "command", "command": "true"}), facts(longest_prompt={"": 50}))
    assert found == [
        "environment: kind command needs aiohttp, which is not installed: pip install 'rft[agents]'"
    ]


@pytest.mark.parametrize(
    ("kind", "settings", "package"),
    [
        ("openenv", {"options": {"url": "http://127.0.0.1:1"}}, "aiohttp"),
        ("verifiers", {"path": "t", "python": "p"}, "aiohttp"),
        ("mcp", {"command": "true"}, "mcp"),
        ("function", {"path": f"{SAMPLES}:areal"}, "aiohttp"),
    ],
)
def test_a_missing_package(
    kind: str, settings: dict[str, Any], package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found when the environment is loaded, in one message with the command that installs it."""
    monkeypatch.setattr(f"{KINDS[kind]}.find_spec", lambda name: None)
    spec = EnvironmentRunner(EnvironmentConfig(kind=kind, **settings), ".").spec  # type: ignore[arg-type]
    words = f"{package}, which is not installed: pip install 'rft\\[agents\\]'"
    with pytest.raises(SpecError, match=words):
        spec.load()


def test_a_server_is_no_class_and_no_program_to_start() -> None:
    """Kinds that start a server or name one need neither a path nor, if they name one, a command."""
    for kind in ("openenv", "mcp"):
        for more in ({"command": "python server.py {port}"}, {"options": {"url": "http://localhost"}}):
            assert not problems(config({"kind": kind, **more}), facts())


def test_an_unknown_kind_and_an_unknown_key() -> None:
    with pytest.raises(ConfigError, match=r"environment.kind: input should be 'tools', 'class'"):
        config({"kind": "tool"})
    with pytest.raises(ConfigError, match=r"environment.max_turn: unknown key .did you mean 'max_turns'"):
        config({**TEXT, "max_turn": 3})


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_folder)


@pytest.mark.parametrize(
    ("environment", "sections", "message"),
    [
        ({"kind": "text", "path": "gone.py:f"}, {}, "environment: gone.py:f could not be loaded: no file"),
        ({"kind": "tools", "tools": [f"{SAMPLES}:no_annotations"]}, {}, "no_annotations needs an annotation"),
        ({"kind": "tools", "tools": [f"{SAMPLES}:add", f"{SAMPLES}:other.add"]}, {}, "two tools are called"),
        (
            {"kind": "tools", "tools": ["calculater"]},
            {},
            "no built-in tool 'calculater' (did you mean 'calculator'",
        ),
        (TOOLS, {"rewards": []}, "environment: kind tools gives no reward; name at least one"),
        ({"kind": "class", "path": f"{SAMPLES}:NoReward"}, {"rewards": []}, "without `get_reward` gives no"),
        (
            TEXT,
            {"data": {"kind": "arithmetic", "limit": 8, "chat_template": "never"}},
            "environment: kind text renders messages, and the tokenizer has no chat template, or data.chat",
        ),
        ({**TOOLS, "max_episode_tokens": 80}, {}, "max_episode_tokens: 80, but the prompt of row"),
        (
            {"kind": "reasoning_gym"},
            {},
            "kind reasoning_gym needs the column 'task', and the data has answer",
        ),
        (
            {"kind": "class", "path": f"{SAMPLES}:FewColumns"},
            {},
            "FewColumns.reset takes (answer), but is called with every column of the row, also completion,",
        ),
    ],
)
def test_what_must_be_loaded(
    tokenizer: Any, environment: dict[str, Any], sections: dict[str, Any], message: str
) -> None:
    made = config(environment, **sections)
    found = check_environment(made, tokenizer, load_prompts(made.data, tokenizer, "train", 512))
    assert len(found) == 1 and message in found[0], found


def test_a_prompt_that_is_already_rendered(tokenizer: Any, tmp_path: Path) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
    )
    (tmp_path / "rows.jsonl").write_text('{"prompt": "plain"}\n' + json.dumps({"prompt": text}) + "\n")
    made = config(TEXT, data={"path": str(tmp_path / "rows.jsonl")})
    (problem,) = check_environment(made, tokenizer, load_prompts(made.data, tokenizer, "train", 512))
    assert "the prompt of row 2 of" in problem and "is already rendered with the chat template" in problem


def test_a_template_without_tools(tokenizer: Any) -> None:
    old = tokenizer.chat_template
    tokenizer.chat_template = old[old.index("{%- for message in messages") :]
    try:
        (problem,) = check_environment(config(TOOLS), tokenizer, None)
    finally:
        tokenizer.chat_template = old
    assert "environment.tools: the chat template leaves out `tools`; use a model whose" in problem


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (None, "reads `environments`, the instances of an environment class, and this config has no env"),
        (
            "tools",
            "and this config has kind tools; write environment: {kind: class, path: file.py:Class}; or",
        ),
        ("class", ""),
    ],
)
def test_a_reward_that_reads_environments_needs_a_class(kind: str | None, message: str) -> None:
    rewards = RewardsConfig.model_validate({"functions": [{"function": f"{SAMPLES}:solved"}]})
    found = check_rewards(rewards, {}, {} if kind is None else {"": kind})
    assert len(found) == bool(message) and message in "".join(found)


def test_the_plan_checks_the_environment(tiny_folder: Path, tmp_path: Path) -> None:
    environment = {"kind": "class", "path": f"{SAMPLES}:Guess", "max_episode_tokens": 1200}
    good = config(environment, tiny_folder, rewards=[], output_dir=str(tmp_path), rollout={"engine": "hf"})
    plan = make_plan(good)
    assert plan.engine_spec().max_model_len == 1200
    assert min(vars(plan.step_size).values()) >= 1200  # a session has one bound, for prompt and answers
    shown = "\n".join(plan_lines(plan))
    assert f"environment  class: {SAMPLES}:Guess; up to 8 turns of 512 tokens in a context of 1200" in shown
    bad = good.model_copy(update={"environment": good.environment.model_copy(update={"path": "gone.py:f"})})
    with pytest.raises(ConfigError, match=r"gone.py:f could not be loaded: no file"):
        make_plan(bad)
