"""Programs as environments, through the real actor: OpenAI's client, curl, and programs that fail."""

from __future__ import annotations

import asyncio
import shutil
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from rft.algorithms.base import Rollout
from rft.batch import Batch, Prompt
from rft.config.data import DataConfig
from rft.config.environment import EnvironmentConfig
from rft.config.metrics import TrackingConfig
from rft.config.rollout import SamplingConfig
from rft.data.chat import Renderer
from rft.endpoint.handle import Endpoint
from rft.endpoint.types import Answer, Ask, SetReward
from rft.environments.runner import EnvironmentRunner
from rft.environments.types import EnvironmentFault
from rft.metrics import RunLog
from rft.metrics.log import read_jsonl
from rft.metrics.names import is_documented
from rft.rollout.engine import Sampling
from rft.rollout.episodes import EpisodeSampler, Played, check_batch
from rft.rollout.sample import scored_group
from rft.rollout.session import Budget
from tests.cases.families import HERMES, make_tokenizer
from tests.endpoint.served import END, Policy
from tests.specs import session_metrics

ROOT = Path(__file__).parent.parent.parent
PYTHON = sys.executable
CURL = """
post() {{ curl -sS "$OPENAI_BASE_URL/$1" -H "Authorization: Bearer $OPENAI_API_KEY" --json "$2"; }}
post chat/completions '{{"messages": [{{"role": "user", "content": "hi"}}]}}' > answer
{then}
"""
SAMPLING = Sampling(4, 64, seed=5)
pytestmark = pytest.mark.timeout(120)


def _programs() -> list[psutil.Process]:
    return [p for p in psutil.Process().children(recursive=True) if p.name() in ("bash", "sleep", "curl")]


@asynccontextmanager
async def sampler(
    folder: Path, command: list[str], *says: str, **config: Any
) -> AsyncIterator[EpisodeSampler]:
    settings = EnvironmentConfig(
        **{"kind": "command", "command": command or None, "max_retries": 0, **config}
    )
    tokenizer = make_tokenizer(HERMES)
    render, policy = Renderer(DataConfig(), tokenizer), Policy(tokenizer, says or (f"four{END}",))
    log = RunLog(folder, 1, TrackingConfig(trackers=()))
    budget = Budget.of(settings, SamplingConfig())
    async with EnvironmentRunner(settings, ROOT) as runner:
        yield EpisodeSampler(runner, policy, render, settings, budget, "json", log)
        deadline = time.monotonic() + 30  # a killed process still runs for a moment
        while left := _programs():
            assert time.monotonic() < deadline, left
            await asyncio.sleep(0.1)
    log.close()


async def play(episodes: EpisodeSampler, size: int = 2) -> tuple[Played, dict[str, float]]:
    tokens = tuple(episodes.render.prompt("hi")[1])
    prompt = Prompt(0, tokens, "hi", {"answer": "4"})
    played = await episodes.sample("t", prompt, [Rollout()] * size, SAMPLING)
    return played, session_metrics(episodes)


async def group(episodes: EpisodeSampler, played: Played) -> Batch:
    made = scored_group(await episodes.judge(played, None), [True] * len(played.completions))
    batch = Batch.build([made])
    check_batch([made], batch)
    return batch


async def test_openais_client(tmp_path: Path, ray_here: None) -> None:
    """The agent of the examples: its second answer is right. Every sampled token is trained once."""
    command = [PYTHON, "examples/agents/agent.py"]
    async with sampler(tmp_path, command, f"3{END}", f"it is 4{END}") as episodes:
        played, metrics = await play(episodes, 3)
        batch = await group(episodes, played)
    assert [c.reward for c in played.completions] == [0.75] * 3
    ids = episodes.render.tokenizer([f"3{END}", f"it is 4{END}"])["input_ids"]
    sampled = sum(map(len, ids))
    assert int(batch.mask.sum()) == 3 * sampled == sum(c.num_sampled for c in played.completions)
    assert [len(c.turns) for c in played.completions] == [2] * 3 and not played.completions[0].branches
    assert metrics["session/branches"] == 1 and metrics["environment/endpoint/calls"] == 6
    assert metrics["session/ending/finished"] == 1 and all(is_documented(name) for name in metrics)
    assert [m["role"] for m in played.completions[0].messages] == ["assistant", "user", "assistant"]


@pytest.mark.skipif(shutil.which("jq") is None, reason="needs jq")
async def test_the_shell_script_of_the_examples(tmp_path: Path, ray_here: None) -> None:
    async with sampler(tmp_path, ["bash", "examples/agents/agent.sh"], f"it is 4{END}") as episodes:
        played, _ = await play(episodes)
    assert [c.reward for c in played.completions] == [1.0] * 2


TWO_REWARDS = """post rl/set_reward '{"reward": 1}' >/dev/null; post rl/set_reward '{"reward": 3}'"""
AFTER_ITS_END = (
    "post rl/end_session '{}' >/dev/null; post chat/completions '{}' | grep -q invalid_api_key && echo 1"
)
TOO_MANY_TURNS = """
for i in 1 2; do post chat/completions '{"messages": [{"role": "user", "content": "x"}]}'; done
exit 1
"""


def script(folder: Path, then: str) -> list[str]:
    (folder / "agent.sh").write_text(CURL.format(then=then))
    return ["bash", str(folder / "agent.sh")]


@pytest.mark.parametrize(
    ("then", "reward", "ending"),
    [
        ("echo so; echo 0.5", 0.5, "finished"),
        ("echo '{\"reward\": 2, \"steps\": 1}'", 2.0, "finished"),
        (TWO_REWARDS, 3.0, "finished"),
        (AFTER_ITS_END, 1.0, "finished"),
        ("sleep 100 & echo 1", 1.0, "finished"),  # what it leaves behind is killed
        ("setsid sleep 100 & echo 1", 1.0, "finished"),
        ("pwd >&2; ls >&2; cat $RFT_ROW >&2; exit 3", None, "environment_error"),
        ("kill -9 $$", None, "environment_error"),
        ("echo no number", None, "environment_error"),
        ("sleep 100", None, "timeout"),
        (TOO_MANY_TURNS, 0.0, "turn_limit"),
    ],
)  # fmt: skip
async def test_how_a_program_ends(
    tmp_path: Path, ray_here: None, then: str, reward: float | None, ending: str
) -> None:
    begin = time.monotonic()
    async with sampler(tmp_path, script(tmp_path, then), step_timeout_s=2, max_turns=2) as episodes:
        played, metrics = await play(episodes, 1)
    assert time.monotonic() - begin < 40
    assert metrics[f"session/ending/{ending}"] == 1
    if reward is None:
        assert not played.completions and metrics["session/lost"] == 1
        (event,) = [e for e in read_jsonl(tmp_path / "events.jsonl") if e["kind"] == "fault/environment"]
        if "exit 3" in then:
            assert '"answer": "4"' in event["what"] and "rft-session-" in event["what"]
    else:
        assert [c.reward for c in played.completions] == [reward]


LEAVES = """curl -m 0.5 -sS "$OPENAI_BASE_URL/chat/completions" -H "Authorization: Bearer $OPENAI_API_KEY" \\
--json '{"messages": [{"role": "user", "content": "x"}], "stream": true}'"""
RUBBISH = """
for key in "${OPENAI_API_KEY}x" "${OPENAI_API_KEY/-0-/-1-}" "${OPENAI_API_KEY/-1-/-0-}" ""; do
  curl -sS "$OPENAI_BASE_URL/chat/completions" -H "Authorization: Bearer $key" --json '[{]' >/dev/null
  curl -sS "$OPENAI_BASE_URL/../rl/end_session" -H "Authorization: Bearer $key" --json '{}' >/dev/null
done; exit 3"""

AFTER = "post rl/end_session '{}'; post chat/completions '{}'; exit 4"


@pytest.mark.parametrize(
    ("fault", "ending"),
    [
        pytest.param("sleep 100", "timeout", id="hangs"),
        pytest.param("kill -9 $$", "environment_error", id="is killed", marks=pytest.mark.slow),
        pytest.param(RUBBISH, "environment_error", id="sends rubbish with keys of others"),
        pytest.param(AFTER, "environment_error", id="calls after its end", marks=pytest.mark.slow),
    ],
)
async def test_a_fault_of_one_session_leaves_the_others_alone(
    tmp_path: Path, ray_here: None, fault: str, ending: str
) -> None:
    """The first of three programs that run at once fails in its second turn, and is played again."""
    claim = f"mkdir {tmp_path}/claimed 2>/dev/null && {{ touch {tmp_path}/on; {fault}\n}}\n"
    wait = f"until [ -e {tmp_path}/on ]; do sleep 0.05; done; sleep 0.5\n"
    again = """post chat/completions '{"messages": [{"role": "user", "content": "x"}]}' >/dev/null; echo 1"""
    command = script(tmp_path, f"{claim}{wait}{again}")
    async with sampler(tmp_path, command, step_timeout_s=2, max_retries=1) as episodes:
        played, metrics = await play(episodes, 3)
        batch = await group(episodes, played)
    assert [c.reward for c in played.completions] == [1.0] * 3
    assert metrics[f"session/ending/{ending}"] == 0.25 and metrics["session/ending/finished"] == 0.75
    assert int(batch.mask.sum()) == sum(c.num_sampled for c in played.completions)
    assert [len(c.turns) for c in played.completions] == [2] * 3
    assert metrics["environment/endpoint/errors"] == 0


async def test_a_program_that_hangs_before_its_first_call(tmp_path: Path, ray_here: None) -> None:
    async with sampler(tmp_path, ["sleep", "100"], setup_timeout_s=1) as episodes:
        played, metrics = await play(episodes, 1)
    assert not played.completions and metrics["session/ending/timeout"] == 1


async def test_a_client_that_leaves_during_a_call(tmp_path: Path, ray_here: None) -> None:
    """The controller cancels the call: nothing of it is recorded, and later calls are answered."""
    command = script(tmp_path, f'{LEAVES}; post completions \'{{"prompt": "a"}}\' >/dev/null; echo 1')
    async with sampler(tmp_path, command) as episodes:
        policy = episodes.generate
        assert isinstance(policy, Policy)
        first, second = asyncio.Event(), asyncio.Event()
        policy.gate = first
        running = asyncio.ensure_future(play(episodes, 1))
        async with asyncio.timeout(60):
            while len(policy.requests) < 1:
                await asyncio.sleep(0.01)
            policy.gate = second
            first.set()
            while policy.cancelled < 1:
                await asyncio.sleep(0.01)
        second.set()
        played, metrics = await running
        await group(episodes, played)
    assert [c.reward for c in played.completions] == [1.0] and metrics["session/turns"] == 2
    assert len(policy.requests) == 3 and policy.cancelled == 1


@pytest.mark.slow
async def test_two_agents_with_one_key(tmp_path: Path, ray_here: None) -> None:
    """Their calls are branches of one session; each sampled token is trained once."""
    body = '{"messages": [{"role": "user", "content": "x"}]}'
    two = f"(post chat/completions '{body}' && post chat/completions '{body}') >/dev/null"
    async with sampler(tmp_path, script(tmp_path, f"{two} & {two} & wait; echo 1")) as episodes:
        played, metrics = await play(episodes, 2)
        batch = await group(episodes, played)
    assert [c.reward for c in played.completions] == [1.0] * 2 and metrics["session/turns"] == 5
    assert int(batch.mask.sum()) == sum(c.num_sampled for c in played.completions) > 0


async def test_a_program_without_a_reward(tmp_path: Path, ray_here: None) -> None:
    async with sampler(tmp_path, script(tmp_path, "echo done"), options={"reward": False}) as episodes:
        assert not episodes.runner.gives_reward
        played, _ = await play(episodes, 1)
    assert [c.reward for c in played.completions] == [None] and played.completions[0].text == "four"


PRELOADED = """
import atexit, json, os, signal, subprocess, sys, threading, urllib.request
import beside

row = json.load(open(os.environ["RFT_ROW"]))
assert __name__ == "__main__" and sys.modules["__main__"].row is row
assert "colorsys" in sys.modules and sys.argv == [__file__, "two words"] and sys.path[0] == beside.FOLDER
assert os.listdir() == ["row.json"] and sys.stdin.read() == "" and os.getpgrp() == os.getpid()
assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
assert sorted(os.listdir("/proc/self/fd")) == ["0", "1", "2", "3"]  # 3: of the listing
body = json.dumps({"messages": [{"role": "user", "content": row["prompt"]}]}).encode()
headers = {"Authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "Content-Type": "application/json"}
request = urllib.request.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, headers)
answer = json.load(urllib.request.urlopen(request))["choices"][0]["message"]["content"]
subprocess.Popen(["sleep", "100"], start_new_session=True)
atexit.register(print, float(answer == "four"))
threading.Thread(target=lambda: threading.Event().wait(0.2) or print(7)).start()
"""


def preloaded(folder: Path, code: str) -> list[str]:
    (folder / "agent.py").write_text(code)
    (folder / "beside.py").write_text(f"FOLDER = {str(folder)!r}")
    return ["python", str(folder / "agent.py"), "two words"]


async def test_a_forked_program_finds_what_a_started_one_does(tmp_path: Path, ray_here: None) -> None:
    """Its threads end first, then its exit handlers run; what it leaves behind is killed."""
    options = {"preload": ["colorsys"]}
    async with sampler(tmp_path, preloaded(tmp_path, PRELOADED), options=options) as episodes:
        for _ in range(2):  # nothing of a session is left to the next one in the same worker
            played, metrics = await play(episodes, 2)
            assert [c.reward for c in played.completions] == [1.0] * 2, read_jsonl(tmp_path / "events.jsonl")
        await group(episodes, played)
    assert metrics["session/turns"] == 1 and metrics["environment/endpoint/errors"] == 0


@pytest.mark.parametrize(
    ("code", "ending", "words"),
    [
        ("def f():\n    1 / 0\nf()", "environment_error", "line 2, in f"),
        ("raise SystemExit('no')", "environment_error", "exited with status 1: no"),
        ("import os; os.abort()", "environment_error", "killed by signal 6"),
        ("import time; time.sleep(100)", "timeout", "setup_timeout_s"),
        ("import sys; print(1); sys.exit()", "finished", ""),
    ],
)
async def test_how_a_forked_program_ends(
    tmp_path: Path, ray_here: None, code: str, ending: str, words: str
) -> None:
    options = {"preload": ["colorsys"]}
    command = preloaded(tmp_path, code)
    async with sampler(tmp_path, command, options=options, setup_timeout_s=3) as episodes:
        _, metrics = await play(episodes, 1)
    assert metrics[f"session/ending/{ending}"] == 1
    whys = [e["what"] for e in read_jsonl(tmp_path / "events.jsonl") if e["kind"] == "fault/environment"]
    assert all(words in why and "forked.py" not in why for why in whys) and bool(whys) == bool(words), whys


@pytest.mark.parametrize(
    ("command", "name", "words"),
    [
        (["bash", "agent.py"], "json", "bash is not the Python of rft"),
        (["python", "-m", "agent"], "json", "must be `python FILE`"),
        (["python", "agent.py"], "no_such", "no_such cannot be imported"),
        (["python", "agent.py"], "threaded", "the import of threaded starts threads"),
    ],
)
async def test_what_cannot_be_preloaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str], name: str, words: str
) -> None:
    (tmp_path / "agent.py").write_text("")
    (tmp_path / "threaded.py").write_text(
        "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    command = [str(tmp_path / word) if word == "agent.py" else word for word in command]
    with pytest.raises(EnvironmentFault, match=words):
        async with sampler(tmp_path, command, options={"preload": [name]}):
            pass


AREAL = """
from openai import AsyncOpenAI

class Agent:
    def __init__(self, turns=2):
        self.turns = turns

    async def run(self, data, **extra):
        client = AsyncOpenAI(
            base_url=extra["base_url"], api_key=extra["api_key"], http_client=extra["http_client"]
        )
        messages, rewards = list(data["messages"]), {}
        for turn in range(self.turns):
            reply = await client.chat.completions.create(messages=messages, model="default")
            messages.append(reply.choices[0].message.model_dump(exclude_none=True))
            messages.append({"role": "user", "content": "more"})
            rewards[reply.id] = float(turn)
        return rewards

async def number(data, base_url, api_key, http_client):
    headers = {"Authorization": f"Bearer {api_key}"}
    body = {"messages": data["messages"]}
    answer = await http_client.post(f"{base_url}/chat/completions", json=body, headers=headers)
    return float(answer.json()["choices"][0]["message"]["content"] == "four")
"""


@pytest.mark.parametrize(("name", "reward", "turns"), [("Agent", 1.0, [0.0, 1.0]), ("number", 1.0, [None])])
async def test_areals_run(
    tmp_path: Path, ray_here: None, name: str, reward: float, turns: list[float | None]
) -> None:
    (tmp_path / "agent.py").write_text(AREAL)
    async with sampler(tmp_path, [], kind="function", path=f"{tmp_path}/agent.py:{name}") as episodes:
        played, metrics = await play(episodes, 2)
        await group(episodes, played)
    assert [c.reward for c in played.completions] == [reward] * 2, read_jsonl(tmp_path / "events.jsonl")
    assert [t.reward for t in played.completions[0].turns] == turns and metrics["session/branches"] == 1


async def test_areals_run_without_a_number(tmp_path: Path, ray_here: None) -> None:
    (tmp_path / "agent.py").write_text("async def run(data, **extra):\n    return float('nan')\n")
    async with sampler(tmp_path, [], kind="function", path=f"{tmp_path}/agent.py:run") as episodes:
        played, metrics = await play(episodes, 1)
    assert not played.completions and metrics["session/ending/environment_error"] == 1


async def test_an_actor_that_dies_is_replaced(tmp_path: Path, ray_here: None) -> None:
    """The sessions in it fail and are played again, at a new one."""
    async with sampler(tmp_path, script(tmp_path, "sleep 1; echo 1"), max_retries=3) as episodes:
        endpoint = episodes.runner.endpoint
        assert isinstance(endpoint, Endpoint)
        first = await endpoint.start()
        running = asyncio.ensure_future(play(episodes, 2))
        await asyncio.sleep(0.3)
        psutil.Process(endpoint._pid).kill()
        played, _ = await running
        assert [c.reward for c in played.completions] == [1.0] * 2
        await play(episodes, 1)
        assert endpoint._url != first


@pytest.mark.slow
async def test_an_actor_that_hangs_is_replaced(
    tmp_path: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rft.endpoint.handle.CONTROL_S", 2.0)
    async with sampler(tmp_path, script(tmp_path, "echo 1"), max_retries=3) as episodes:
        endpoint = episodes.runner.endpoint
        assert isinstance(endpoint, Endpoint)
        first = await endpoint.start()
        psutil.Process(endpoint._pid).suspend()
        played, metrics = await play(episodes, 2)
    assert [c.reward for c in played.completions] == [1.0] * 2 and endpoint._url != first
    assert metrics["session/ending/environment_error"] == 0.5, "each was played twice"


async def test_a_busy_controller_does_not_stall_it(ray_here: None) -> None:
    """The server answers while the event loop of the controller is blocked."""
    endpoint = Endpoint()

    async def reply(ask: Ask | SetReward) -> Answer | None:
        return None

    async with endpoint.session("s", 100, reply) as access:
        headers = {"Authorization": f"Bearer {access.key}"}
        answer = httpx.get(f"{access.url}/v1/models", headers=headers, timeout=20)  # blocks the loop
        assert answer.status_code == 200 and answer.json()["data"][0]["max_model_len"] == 100
    await endpoint.close()


async def test_it_does_not_listen_beyond_the_machine_without_a_key() -> None:
    with pytest.raises(ValueError, match="needs a key"):
        Endpoint("0.0.0.0")


async def test_a_wrong_command_is_found_when_it_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match="neither a program nor an executable file"):
        async with sampler(tmp_path, ["no-such-program"]):
            pass
