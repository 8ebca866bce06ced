"""`rft serve`: a model, or the newest checkpoint of a run, behind the endpoint, to evaluate or try it."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from importlib.util import find_spec
from ipaddress import ip_address
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from rft.batch import Prompt
from rft.checkpoint import newest_step
from rft.config.load import apply_overrides, load_config, parse_config
from rft.config.schema import Config
from rft.data.chat import Renderer
from rft.data.errors import RowProblem
from rft.endpoint.calls import SessionCalls, cut, tokens_of
from rft.endpoint.handle import REMEDY, Endpoint
from rft.endpoint.server import Open
from rft.endpoint.types import Answer, Ask, Echoed, Refused, SetReward
from rft.environments.types import EnvironmentFault, Reply
from rft.errors import ConfigError, ModelError
from rft.plan import Plan, make_plan
from rft.preflight.memory import ModelShape
from rft.preflight.model import resolve_model
from rft.preflight.rewards import check_reward
from rft.rewards.runner import RewardRunner
from rft.rollout.align import Aligner
from rft.rollout.calls import Call
from rft.rollout.engine import Generate, Generated, Request, Sampling
from rft.rollout.pool import RolloutPool
from rft.rollout.sample import decode
from rft.rollout.session import Budget, Session, text_of
from rft.rollout.tool_calls import format_of
from rft.run_training import make_pool
from rft.tools.export import export_run
from rft.utils.deadlines import stop_event
from rft.utils.ray_cluster import ray_cluster
from rft.utils.signals import StopRequests

CHECK_INTERVAL_S = 5.0  # for a newer checkpoint
CONTEXT = 8192  # tokens of prompt and answer, unless the model has fewer positions
NAME = "serve"

Say = Callable[[str], None]
R = TypeVar("R")


class _Direct:
    """The calls of a session that belongs to no episode."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def follow(self, call: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
        return asyncio.create_task(call)

    async def chat(self, **arguments: Any) -> Reply:
        return await self.session.chat(**arguments)

    def reward(self, value: float, name: str = "reward", call: int | None = None) -> None:
        raise NotImplementedError


class Served:
    """A plan's model in its engines. Each call is a session of one turn, sampled as the client wishes."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.render = Renderer(plan.config.data, plan.tokenizer)
        self.pool: RolloutPool = make_pool(plan)
        self.pool.spec = replace(self.pool.spec, stop_strings=True)
        self.calls: set[asyncio.Task[Any]] = set()
        self.rewards: RewardRunner | None = None  # of rollout.align
        if (align := plan.config.rollout.align) is not None:
            self.rewards = RewardRunner(align.rewards, Path.cwd())
        self._numbers = count()
        try:
            self.parser: str | None = format_of(self.render)
        except RowProblem:
            self.parser = None

    async def start(self) -> None:
        """Start the engines, and the workers of rewards that align."""
        await asyncio.gather(self.pool.start(), *([self.rewards.start()] if self.rewards else []))

    async def reply(self, ask: Ask | SetReward) -> Answer | None:
        if isinstance(ask, SetReward):
            raise Refused(404, "not_found", "rewards are not accepted: rft serve does not train")
        length = self.pool.spec.max_model_len
        wishes = ask.sampling
        seed = wishes.get("seed")
        sampling = Sampling(
            1,
            length,
            temperature=wishes.get("temperature", 1.0),
            top_p=wishes.get("top_p", 1.0),
            seed=None if seed is None else int(seed) % 2**31,
        )
        budget = Budget(1, length, length)
        name = f"{NAME}-{next(self._numbers)}"
        if ask.echo or ask.prompt_top is not None:
            return await self._track(self._echo(ask, name, sampling))
        nothing = Prompt(0, (), [{"role": "user", "content": ""}])
        session = Session(self._generate(ask), self.render, nothing, sampling, budget, name, self.parser)
        return await self._track(SessionCalls(session, _Direct(session)).reply(ask))

    def _generate(self, ask: Ask) -> Generate:
        """Return the function that completes a request: aligned, unless the request is greedy."""
        align, rewards = self.plan.config.rollout.align, self.rewards
        if align is None or rewards is None:
            return self.pool.generate
        aligner = Aligner(align, self.pool.generate, rewards, self.plan.tokenizer)

        async def generate(request: Request) -> list[Generated]:
            if request.sampling.temperature == 0:
                return await self.pool.generate(request)
            text = [dict(message) for message in ask.messages] or ask.text
            if text is None:
                (text,) = decode([request.tokens], self.plan.tokenizer)
            return await aligner.sample(request, Prompt(0, request.tokens, text))

        return generate

    async def _track(self, answering: Coroutine[Any, Any, R]) -> R:
        """Await an answer, for which `close` waits."""
        task = asyncio.ensure_future(answering)
        self.calls.add(task)
        task.add_done_callback(self.calls.discard)
        return await task

    async def _echo(self, ask: Ask, name: str, sampling: Sampling) -> Answer:
        """Return the prompt with its log-probs, and `max_tokens` more. Raises Refused."""
        tokenizer, limit = self.plan.tokenizer, self.pool.spec.max_model_len
        if (fewest := self.render.fewest_tokens(len(ask.text or ""))) >= limit:
            text = f"the prompt has {fewest} tokens or more; with one more, {limit} fit into the context"
            raise Refused(400, "context_length_exceeded", text, "prompt")
        tokens = tokens_of(ask, tokenizer)
        wrong = next((t for t in tokens if not 0 <= t < len(tokenizer)), None)
        if wrong is not None or not tokens:
            what = "is empty" if wrong is None else f"has {wrong}, not a token id below {len(tokenizer)}"
            raise Refused(400, "invalid_request", f"prompt {what}", "prompt")
        if len(tokens) >= limit:  # vLLM samples a token also where only the prompt is scored
            text = f"the prompt has {len(tokens)} tokens; with one more, {limit} fit into the context"
            raise Refused(400, "context_length_exceeded", text, "prompt")
        wanted = 16 if ask.max_tokens is None else ask.max_tokens
        room = max(1, min(wanted, limit - len(tokens)))
        sampling = replace(sampling, max_tokens=room, stop=ask.stop, stop_token_ids=ask.stop_token_ids)
        scores = ask.prompt_top is not None or ask.details
        request = Request(
            name, tokens, sampling, scores_prompt=scores, prompt_top=max(ask.prompt_top or 1, 1)
        )
        (generated,) = await self.pool.generate(request)
        sampled = generated.tokens if wanted else ()
        call = Call(tokens, sampled, generated.logps[: len(sampled)], generated.finish, ())
        content, stopped_by = cut(text_of(call, tokenizer)[0], ask.stop)
        answer = Answer(
            content,
            finish=generated.finish if wanted else "length",
            stopped_by=stopped_by,
            prompt_length=len(tokens),
            length=len(sampled),
        )
        if not scores:
            return replace(answer, echoed=(Echoed(decode([tokens], tokenizer)[0], None, "", None),))
        scored = [None, *generated.prompt]
        shown = decode([[t] for t in tokens], tokenizer)
        ids = sorted({i for s in generated.prompt for i, _ in s.top})
        texts = dict(zip(ids, decode([[i] for i in ids], tokenizer), strict=True))
        echoed = [
            Echoed(text, None, "", None, token)
            if s is None
            else Echoed(
                text,
                s.logp,
                texts[s.top[0][0]],
                s.top[0][1],
                token,
                tuple((i, texts[i], p) for i, p in s.top[: ask.prompt_top]),
            )
            for token, text, s in zip(tokens, shown, scored, strict=True)
        ]
        return replace(
            answer,
            prompt=tokens,
            sampled=sampled,
            logps=call.logps,
            texts=tuple(decode([[t] for t in sampled], tokenizer)),
            echoed=tuple(echoed),
        )

    async def close(self) -> None:
        """Stop the engines after the calls in flight."""
        if self.calls:
            await asyncio.wait(self.calls)
        await self.pool.close()
        if self.rewards is not None:
            await self.rewards.close()


def config_of(target: str, overrides: list[str]) -> Config:
    """Return the config of a run folder, or one for a model."""
    folder = Path(target)
    if (folder / "config.yaml").exists():
        return load_config(folder / "config.yaml", overrides)
    raw: dict[str, Any] = {
        "algorithm": "grpo",
        "model": {"path": target},
        "data": {"kind": "arithmetic", "limit": 64},
        "rewards": ["math"],
        "eval": {"every": 0},
    }
    plain = parse_config(raw)
    try:
        positions = ModelShape.of(resolve_model(plain), plain.model).max_positions
    except ModelError as error:
        raise ConfigError([f"{target}: {error}"]) from None
    half = min(CONTEXT, positions) // 2
    raw["rollout"] = {"sampling": {"max_prompt_length": half, "max_completion_length": half}}
    return parse_config(apply_overrides(raw, overrides))


async def started(config: Config, model: str) -> Served:
    """Return a model in its engines."""
    served = Served(await asyncio.to_thread(make_plan, config, model=model, evaluate=True))
    try:
        await served.start()
    except BaseException:
        await served.close()
        raise
    return served


@asynccontextmanager
async def serving(
    target: str, overrides: list[str], host: str, port: int, key: str, follow: bool, say: Say
) -> AsyncIterator[str]:
    """Serve a model or a run for the length of a block; yield the URL."""
    config, run = config_of(target, overrides), Path(target)
    is_run = (run / "config.yaml").exists()
    if (align := config.rollout.align) is not None:
        where = {"requests": {1: ()}}  # without columns
        if problems := check_reward(align.rewards, Path.cwd(), rows=where):
            raise ConfigError([f"rollout.align.rewards: {problem}" for problem in problems])
    if follow and not is_run:
        raise ConfigError([f"--follow: {target} is not a run folder, which --follow needs; leave it out"])
    with tempfile.TemporaryDirectory(prefix="rft-serve-") as scratch:

        async def load() -> tuple[int | None, Served]:
            if not is_run:
                return None, await started(config, target)
            step = newest_step(run / "checkpoints")
            folder = Path(scratch, str(step))
            try:
                await asyncio.to_thread(export_run, run, folder)
                return step, await started(config, str(folder))
            except BaseException:
                shutil.rmtree(folder, ignore_errors=True)
                raise

        step, current = await load()
        context = current.pool.spec.max_model_len
        endpoint = Endpoint(host, port, Open(NAME, key, context))

        async def reply(ask: Ask | SetReward) -> Answer | None:
            return await current.reply(ask)

        async def renew() -> None:
            """Load newer checkpoints beside the old one; calls in flight end where they began."""
            nonlocal step, current
            tried = step
            while True:
                await asyncio.sleep(CHECK_INTERVAL_S)
                if (newest := newest_step(run / "checkpoints")) == tried:
                    continue
                old, its_step, tried = current, step, newest
                try:
                    step, current = await load()
                except Exception as error:  # such as a checkpoint that the run has deleted meanwhile
                    say(f"warning: the checkpoint of step {newest} could not be loaded, and that of step "
                        f"{step} is still served: {error}")  # fmt: skip
                    continue
                say(f"serving the checkpoint of step {step}")
                await old.close()
                shutil.rmtree(Path(scratch, str(its_step)), ignore_errors=True)

        async def revive() -> None:
            """Start the endpoint's process again if it dies."""
            while True:
                await endpoint.died()
                try:
                    say(
                        f"warning: the endpoint's process died; another serves at {await endpoint.start()}/v1"
                    )
                except EnvironmentFault as error:
                    say(f"warning: the endpoint's process died, and another one cannot be started: {error}")
                    await asyncio.sleep(CHECK_INTERVAL_S)

        endpoint.share(NAME, reply)
        tasks = list[asyncio.Task[None]]()
        try:
            url = await endpoint.start()
            tasks += [asyncio.create_task(revive())]
            tasks += [asyncio.create_task(renew())] if follow else []
            yield url
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await endpoint.close()
            await current.close()


def beyond_this_machine(host: str, port: int) -> bool:
    """Return whether other machines reach an address. Raises ConfigError if nothing can listen there."""
    try:
        ip = ip_address(host)
    except ValueError:
        raise ConfigError(
            [f"--host {host}: not an IP address; write 127.0.0.1, or 0.0.0.0 to serve other machines too"]
        ) from None
    with socket.socket(socket.AF_INET if ip.version == 4 else socket.AF_INET6) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            sock.bind((host, port))
        except (OSError, OverflowError) as error:
            why = getattr(error, "strerror", None) or error
            raise ConfigError([f"--port {port}: cannot listen at {host}:{port}: {why}"]) from None
    return not ip.is_loopback


def serve(
    target: str, overrides: list[str], host: str, port: int, key_env: str | None, follow: bool,
    signals: StopRequests, say: Say,
) -> None:  # fmt: skip
    """Serve until a stop is requested. key_env: the environment variable with the key of the endpoint."""
    if find_spec("aiohttp") is None:
        raise ConfigError([REMEDY])
    key = "" if key_env is None else os.environ.get(key_env, "")
    if key_env is not None and not key:
        raise ConfigError([f"--key-env: the environment variable {key_env} is not set"])
    address = "127.0.0.1" if host == "localhost" else host
    if beyond_this_machine(address, port):
        if not key:
            raise ConfigError([f"--host {host}: beyond this machine a key is needed; write --key-env NAME"])
        say(f"warning: everybody who reaches {host}:{port} and has the key can use the model")

    async def run() -> None:
        stop = stop_event(signals)
        async with serving(target, overrides, address, port, key, follow, say) as url:
            say(f"serving {target} at {url}/v1")
            await stop.wait()

    with ray_cluster(None, 0.3):
        asyncio.run(run())
