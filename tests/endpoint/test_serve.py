"""`rft serve`: a model in an engine behind the endpoint, and the newest checkpoint of a run."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from openai import AsyncOpenAI, AuthenticationError, BadRequestError

from rft.errors import ConfigError
from rft.tools.serve import config_of, serve, serving
from rft.utils.signals import StopRequests
from tests.integration.conftest import ENV, ROOT, pids_of, processes_of, rft
from tests.specs import needs_vllm
from tests.venvs import python_with

ASK: Any = [{"role": "user", "content": "what is 1 + 2?"}]
HF = ["rollout.engine=hf", "rollout.threads=1"]


async def sample(client: AsyncOpenAI, **wishes: Any) -> str:
    reply = await client.chat.completions.create(model="m", messages=ASK, max_tokens=12, **wishes)
    return reply.choices[0].message.content or ""


async def test_a_model_samples_as_the_client_wishes(tiny_folder: Path, ray_here: None) -> None:
    lines: list[str] = []
    async with serving(str(tiny_folder), HF, "127.0.0.1", 0, "secret", False, lines.append) as url:
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="secret", max_retries=0)
        assert await sample(client, seed=1) == await sample(client, seed=1) != await sample(client, seed=2)
        assert await sample(client, temperature=0) == await sample(client, temperature=0, seed=5)
        text = await client.completions.create(model="m", prompt="1 + 2 =", max_tokens=4, temperature=0)
        assert text.usage is not None and 1 <= text.usage.completion_tokens <= 4
        stopped = await client.completions.create(
            model="m", prompt="1 + 2 =", max_tokens=64, stop=["e", "1", " "]
        )
        assert not set(stopped.choices[0].text) & {"e", "1", " "}
        pieces = [
            c
            async for c in await client.chat.completions.create(
                model="m", messages=ASK, max_tokens=4, stream=True
            )
        ]
        assert pieces[-1].choices[0].finish_reason in ("stop", "length")
        with pytest.raises(AuthenticationError):
            await sample(AsyncOpenAI(base_url=f"{url}/v1", api_key="other", max_retries=0))


RECORDING = """
import json

def ones(prompts, completions, **columns):
    with open({file!r}, "a") as out:
        out.write(json.dumps([prompts[0], [c[-1]["content"] for c in completions]]) + "\\n")
    return [float(c[-1]["content"].count("1")) for c in completions]
"""


async def test_answers_are_aligned_with_a_reward(tiny_folder: Path, tmp_path: Path, ray_here: None) -> None:
    """The answer is the best of the eight completions that the reward saw; a greedy one is not scored."""
    log = tmp_path / "scored.jsonl"
    (tmp_path / "ones.py").write_text(RECORDING.format(file=str(log)))
    rewards = f"{{functions: ['{tmp_path}/ones.py:ones'], workers: 1}}"
    align = f"rollout.align={{method: best_of_n, n: 8, rewards: {rewards}}}"
    async with serving(str(tiny_folder), [*HF, align], "127.0.0.1", 0, "", False, print) as url:
        client = AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        answers = [await sample(client, seed=seed) for seed in (1, 2)]
        await sample(client, temperature=0)
    calls = [json.loads(line) for line in log.read_text().splitlines()]
    assert all(prompt == ASK for prompt, _ in calls)
    scored = [text for _, texts in calls for text in texts]
    assert len(scored) == 16
    assert answers == [max(texts, key=lambda text: text.count("1")) for texts in (scored[:8], scored[8:])]
    oracle = "rollout.align={method: qalign, rewards: [math]}"
    with pytest.raises(ConfigError, match=r"rollout.align.rewards: .*answer"):
        async with serving(str(tiny_folder), [*HF, oracle], "127.0.0.1", 0, "", False, print):
            pass


async def check_log_probs(url: str, folder: str, tolerance: float) -> None:
    """Ask for the log-probs of a text as lm-eval does, and compare them with those of transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("what is 1 + 2 + 30?")["input_ids"] + tokenizer(" 33")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0].float()
    expected = logits.log_softmax(-1)
    chosen = [float(expected[i, t]) for i, t in enumerate(ids[1:])]
    client = AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
    asked: Any = {"model": "m", "temperature": 0, "seed": 1234, "logprobs": 1, "echo": True}
    for prompt, max_tokens in (([ids], 1), (ids, 0), (tokenizer.decode(ids), 1)):
        out = await client.completions.create(prompt=prompt, max_tokens=max_tokens, **asked)
        (choice,) = out.choices
        given = choice.logprobs
        assert given is not None and given.token_logprobs and given.top_logprobs and given.tokens
        end = len(given.tokens) - max_tokens
        assert len(given.tokens) == len(ids) + max_tokens and "".join(given.tokens) == choice.text
        assert given.token_logprobs[0] is None and given.top_logprobs[0] is None
        assert given.text_offset == [sum(map(len, given.tokens[:i])) for i in range(len(given.tokens))]
        assert given.token_logprobs[1:end] == pytest.approx(chosen, abs=tolerance)
        best = [max(top.values()) for top in given.top_logprobs[1:end]]
        assert best == pytest.approx(expected[: len(ids) - 1].max(-1).values.tolist(), abs=tolerance)
        greedy = [a == b for a, b in zip(given.token_logprobs[1:end], best, strict=True)]
        assert greedy == (expected[: len(ids) - 1].argmax(-1) == torch.tensor(ids[1:])).tolist()
        if max_tokens:
            assert given.token_logprobs[-1] == pytest.approx(float(expected[-1].max()), abs=tolerance)
        assert out.usage is not None and out.usage.prompt_tokens == len(ids)
    out = await client.completions.create(
        model="m", prompt=ids, max_tokens=1, temperature=0, extra_body={"prompt_logprobs": 3}
    )
    (choice,) = out.choices
    places = (choice.model_extra or {})["prompt_logprobs"]
    assert choice.text and choice.logprobs is None and len(places) == len(ids) and places[0] is None
    for token, entries, row in zip(ids[1:], places[1:], expected, strict=False):
        assert entries[str(token)]["logprob"] == pytest.approx(float(row[token]), abs=tolerance)
        best = sorted((entry["logprob"] for entry in entries.values()), reverse=True)[:3]
        assert best == pytest.approx(row.topk(3).values.tolist(), abs=tolerance)
    plain = await client.completions.create(model="m", prompt="1 + 2 =", max_tokens=2, temperature=0)
    asked = {"model": "m", "prompt": "1 + 2 =", "temperature": 0, "max_tokens": 2}
    echoed = await client.completions.create(echo=True, **asked)
    assert echoed.choices[0].text == "1 + 2 =" + plain.choices[0].text
    for wrong, words in (
        ({"prompt": [], "max_tokens": 1}, "prompt is empty"),
        ({"prompt": [10**6], "max_tokens": 1}, "not a token id"),
        ({"prompt": [5] * 10_000, "max_tokens": 1}, "fit into the context"),
        ({"prompt": "a", "max_tokens": 0, "echo": False}, "needs echo"),
    ):
        with pytest.raises(BadRequestError, match=words):
            await client.completions.create(**{"model": "m", "echo": True, "logprobs": 1, **wrong})


async def test_texts_are_scored(tiny_folder: Path, ray_here: None) -> None:
    async with serving(str(tiny_folder), HF, "127.0.0.1", 0, "", False, print) as url:
        await check_log_probs(url, str(tiny_folder), 1e-4)


def test_wrong_arguments(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        used = taken.getsockname()[1]
        for host, port, key, words in (
            ("0.0.0.0", 0, None, "a key is needed"),
            ("127.0.0.1", 0, "NO_KEY", "NO_KEY is not set"),
            ("my.host", 0, None, "my.host: not an IP address"),
            ("127.0.0.1", used, None, f"cannot listen at 127.0.0.1:{used}: Address already in use"),
            ("127.0.0.1", 70_000, None, "--port 70000: cannot listen"),
        ):
            with pytest.raises(ConfigError, match=words):
                serve(str(tiny_folder), [], host, port, key, False, StopRequests(), print)


@pytest.mark.slow
@pytest.mark.timeout(500)
@pytest.mark.parametrize("engine", ["hf", pytest.param("vllm", marks=needs_vllm)])
def test_a_run_is_followed(
    engine: str, tiny_folder: Path, tmp_path: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Calls are answered through the change of engines; then the log-probs are those of the newest model."""
    monkeypatch.setattr("rft.tools.serve.CHECK_INTERVAL_S", 0.2)
    (tmp_path / "run.yaml").write_text(
        f"""
name: run
output_dir: {tmp_path}
algorithm: grpo
model: {{path: {tiny_folder}}}
data: {{kind: arithmetic, limit: 64}}
rewards: [{{function: {tmp_path}/varied.py:varied}}]
train: {{steps: 1, batch_size: 2, num_generations: 2}}
rollout: {{engine: hf, threads: 1}}
learner: {{threads: 1, learning_rate: 1.0e-2}}
eval: {{every: 0}}
checkpoint: {{every: 1}}
"""
    )
    (tmp_path / "varied.py").write_text(
        "def varied(completions, **columns): return [len(c) % 2 for c in completions]\n"
    )
    lines: list[str] = []
    rft("train", str(tmp_path / "run.yaml"))

    async def body() -> None:
        run, settings = tmp_path / "run", [f"rollout.engine={engine}", "rollout.threads=1"]
        async with serving(str(run), settings, "127.0.0.1", 0, "", True, lines.append) as url:
            await check_log_probs(url, str(run / "model"), 2e-3)
            client = AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
            await sample(client)
            await asyncio.to_thread(rft, "train", str(tmp_path / "run.yaml"), "train.steps=2")
            async with asyncio.timeout(240):
                while not lines:
                    await sample(client)
            await check_log_probs(url, str(run / "model"), 2e-3)

    asyncio.run(body())
    assert lines == ["serving the checkpoint of step 2"]


async def test_a_checkpoint_that_cannot_be_loaded_is_reported(
    tiny_folder: Path, tmp_path: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The newest one that could be loaded is still served, and the next one is loaded."""
    monkeypatch.setattr("rft.tools.serve.CHECK_INTERVAL_S", 0.05)
    run, steps = tmp_path / "run", iter([1, 2, 2, 2, 3])
    run.mkdir()
    overrides = [f"model.path={tiny_folder}", "rollout.engine=hf", "rollout.threads=1"]
    (run / "config.yaml").write_text(
        yaml.safe_dump(config_of(str(tiny_folder), overrides[1:]).model_dump(mode="json"))
    )
    monkeypatch.setattr("rft.tools.serve.newest_step", lambda _: next(steps, 3))

    def export(_: Path, out: Path) -> None:
        if out.name == "2":
            raise OSError("it is gone")
        shutil.copytree(tiny_folder, out)

    monkeypatch.setattr("rft.tools.serve.export_run", export)
    lines: list[str] = []
    async with serving(str(run), overrides, "127.0.0.1", 0, "", True, lines.append) as url:
        async with asyncio.timeout(60):
            while len(lines) < 2:
                await asyncio.sleep(0.05)
        await sample(AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0))
    assert "step 2 could not be loaded, and that of step 1 is still served: it is gone" in lines[0]
    assert lines[1:] == ["serving the checkpoint of step 3"]


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("number", "host"), [(signal.SIGTERM, "127.0.0.1"), (signal.SIGHUP, "0.0.0.0")], ids=["here", "beyond"]
)
def test_its_process_dies_and_it_is_stopped(
    number: signal.Signals, host: str, tiny_folder: Path, tmp_path: Path
) -> None:
    """Killed, the endpoint comes back at its address. A signal ends the command, and nothing is left. Beyond
    this machine it prints a warning."""
    mark = f"served-{tmp_path.name}-{number}"
    command = [sys.executable, "-m", "rft.cli", "serve", str(tiny_folder), "--port", "0", *HF]
    command += ["--host", host, "--key-env", "SERVE_KEY"]
    environment = {**ENV, "RFT_TEST_MARK": mark, "SERVE_KEY": "secret"}
    with (
        (tmp_path / "said").open("w") as said,
        subprocess.Popen(command, cwd=ROOT, env=environment, stderr=said, start_new_session=True) as process,
    ):
        try:
            (url,) = await_line(tmp_path / "said", r"serving .* at (http://\S+)/v1")
            assert httpx.get(f"{url}/health").status_code == 200
            (endpoint,) = [
                p for p in pids_of(mark) if b"EndpointActor" in Path(f"/proc/{p}/cmdline").read_bytes()
            ]
            os.kill(endpoint, signal.SIGKILL)
            (again,) = await_line(tmp_path / "said", r"process died; another serves at (http://\S+)/v1")
            assert again == url and httpx.get(f"{url}/health").status_code == 200
            for key, status in (("secret", 200), ("secre", 401)):
                models = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"})
                assert models.status_code == status
            process.send_signal(number)
            assert process.wait(60) == 0
            deadline = time.monotonic() + 20
            while left := processes_of(mark):
                assert time.monotonic() < deadline, left
                time.sleep(0.2)
        finally:
            process.kill()
    text = (tmp_path / "said").read_text()
    assert "Traceback" not in text
    assert ("warning: everybody who reaches 0.0.0.0:0 and has the key" in text) == (host == "0.0.0.0")


def await_line(file: Path, pattern: str) -> tuple[str, ...]:
    """Wait for a line of a file; return the groups of its match."""
    deadline = time.monotonic() + 120
    while not (match := re.search(pattern, file.read_text())):
        assert time.monotonic() < deadline, file.read_text()[-3000:]
        time.sleep(0.1)
    return match.groups()


TASK = """
task: sums
dataset_path: json
dataset_kwargs: {{data_files: {{test: {folder}/rows.jsonl}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
"""
LM_EVAL = ("lm-eval[api]==0.4.13", "transformers>=5,<6")  # of these, the API's models need no torch


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_lm_eval_scores_choices(tiny_folder: Path, tmp_path: Path, ray_here: None) -> None:
    """Its `local-completions` picks the choices that transformers picks."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    python = python_with("RFT_LM_EVAL_PYTHON", *LM_EVAL)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, dtype=torch.float32)
    rows, picked = [], []
    for a, b in ((1, 2), (3, 4), (5, 3), (2, 2), (7, 1), (4, 5)):
        choices = [str(a + b), str(a + b + 1), str(a * b + 10), "none"]
        rows.append({"question": f"{a} + {b} =", "choices": choices, "answer": 0})
        begin, logps = tokenizer(f"{a} + {b} =")["input_ids"], []
        for choice in choices:
            ids = tokenizer(f"{a} + {b} = {choice}")["input_ids"]
            with torch.no_grad():
                table = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            logps.append(sum(float(table[i - 1, ids[i]]) for i in range(len(begin), len(ids))))
        picked.append(max(range(len(choices)), key=logps.__getitem__))
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "sums.yaml").write_text(TASK.format(folder=tmp_path))
    expected = sum(choice == 0 for choice in picked) / len(rows)

    async def body() -> None:
        async with serving(str(tiny_folder), HF, "127.0.0.1", 0, "", False, print) as url:
            arguments = f"model=m,base_url={url}/v1/completions,tokenizer={tiny_folder},num_concurrent=2"
            command = [
                *(python, "-m", "lm_eval", "--model", "local-completions", "--tasks", "sums"),
                *("--model_args", arguments, "--include_path", str(tmp_path), "--log_samples"),
                *("--output_path", str(tmp_path / "out")),
            ]
            process = await asyncio.create_subprocess_exec(
                *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
            )
            output, _ = await process.communicate()
            assert process.returncode == 0, output.decode()[-4000:]

    asyncio.run(body())
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["sums"]["acc,none"] == pytest.approx(expected)
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    seen = {}
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        logps = [float(answer[0]) for answer in sample["filtered_resps"]]
        seen[sample["doc_id"]] = max(range(len(logps)), key=logps.__getitem__)
    assert [seen[i] for i in range(len(rows))] == picked
