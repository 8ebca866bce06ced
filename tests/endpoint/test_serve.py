"""`rft serve`: a model in an engine behind the endpoint, and the newest checkpoint of a run."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, AuthenticationError

from rft.errors import ConfigError
from rft.tools.serve import serve, serving
from rft.utils.signals import StopRequests
from tests.integration.conftest import rft

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


def test_wrong_arguments(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_KEY", raising=False)
    for host, key, follow, words in (
        ("0.0.0.0", None, False, "a key is needed"),
        ("127.0.0.1", "NO_KEY", False, "NO_KEY is not set"),
    ):
        with pytest.raises(ConfigError, match=words):
            serve(str(tiny_folder), [], host, 0, key, follow, StopRequests(), print)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_run_is_followed(
    tiny_folder: Path, tmp_path: Path, ray_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rft.tools.serve.LOOK_EVERY_S", 0.2)
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
learner: {{threads: 1}}
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
        async with serving(str(tmp_path / "run"), HF, "127.0.0.1", 0, "", True, lines.append) as url:
            client = AsyncOpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
            await sample(client)
            await asyncio.to_thread(rft, "train", str(tmp_path / "run.yaml"), "train.steps=2")
            async with asyncio.timeout(120):
                while not lines:
                    await sample(client)
            await sample(client)

    asyncio.run(body())
    assert lines == ["serving the checkpoint of step 2"]
