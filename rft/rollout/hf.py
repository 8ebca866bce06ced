"""Plain transformers as a rollout engine, for machines without vLLM: slow, simple, exact."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from threading import Event
from typing import Any, Literal

import torch
from torch import Tensor

from rft.config.rollout import InFlight
from rft.rollout.engine import EngineSpec, Generated, Request, Sampling, ScoredToken
from rft.sync.gloo import Receiver, load_into
from rft.sync.spec import Link, Update
from rft.utils.cores import threads_for
from rft.utils.quick_imports import quick_imports


class HFEngine:
    """Sample in batches with a KV cache. Methods as in `RolloutEngine`."""

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self._version = -1
        self.receiver: Receiver | None = None
        self._lock = asyncio.Lock()  # one request at a time; an update waits for the running one
        self._open = asyncio.Event()  # cleared while an update waits or runs
        self._open.set()

    async def start(self) -> None:
        with quick_imports():
            from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads_for(self.spec.config.threads, self.spec.config.cores))
        dtype = "auto" if self.spec.dtype == "auto" else getattr(torch, self.spec.dtype)

        def load(path: str) -> Any:
            remote = self.spec.trust_remote_code
            model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=remote)
            return model.to(self.spec.device).eval()

        self.model: Any = load(self.spec.model)
        self.reference: Any = load(self.spec.reference) if self.spec.reference else None
        self.fused = [(load(path), weight) for path, weight in self.spec.fusion]
        self.tokenizer: Any = None
        if self.spec.config.sampling.stop or self.spec.stop_strings:
            from transformers import AutoTokenizer

            self.tokenizer = AutoTokenizer.from_pretrained(
                self.spec.tokenizer, trust_remote_code=self.spec.trust_remote_code
            )

    async def generate(self, request: Request) -> list[Generated]:
        """Sample `request.sampling.n` completions, in sample order."""
        while True:
            await self._open.wait()
            async with self._lock:
                if self._open.is_set():
                    cancelled = Event()
                    sampling = asyncio.ensure_future(asyncio.to_thread(self._sample, request, cancelled))
                    try:
                        return await asyncio.shield(sampling)
                    except asyncio.CancelledError:
                        cancelled.set()
                        await sampling  # the thread uses the model until it ends
                        raise

    @torch.inference_mode()
    def _sample(self, request: Request, cancelled: Event) -> list[Generated]:
        s = request.sampling
        generator = torch.Generator(self.spec.device)
        if s.seed is None:
            generator.seed()
        else:
            generator.manual_seed(s.seed)
        stop_ids = {*s.stop_token_ids, *self.spec.stop_token_ids}
        tokens: list[list[int]] = [[] for _ in range(s.n)]
        logps: list[list[float]] = [[] for _ in range(s.n)]
        finish: list[Literal["stop", "length"] | None] = [None] * s.n
        ids = torch.tensor([request.tokens], device=self.spec.device).expand(s.n, -1)
        policy, reference = _Reader(self.model), _Reader(self.reference)
        fused = [(_Reader(model), weight) for model, weight in self.fused]
        for _ in range(s.max_tokens):
            logits = policy.read(ids)
            if s.mixture:
                logits = torch.lerp(logits, reference.read(ids), s.mixture)
            for other, weight in fused:  # EFT (Mitchell et al. 2023); a negative weight is a contrast
                logits = logits + weight * other.read(ids)
            ids, chosen = _draw(logits, s, generator)
            for i, (token, logp) in enumerate(zip(ids[:, 0].tolist(), chosen.tolist(), strict=True)):
                if finish[i] is None:
                    tokens[i].append(token)
                    logps[i].append(logp)
                    if token in stop_ids or self._hits_stop_string(tokens[i], s.stop):
                        finish[i] = "stop"
            if all(finish) or cancelled.is_set():
                break
        top = request.prompt_top
        scored = self._score_prompt(request.tokens, top) if request.scores_prompt else ()
        return [
            Generated(tuple(t), tuple(p), f or "length", ((self._version, 0, len(t)),), prompt=scored)
            for t, p, f in zip(tokens, logps, finish, strict=True)
        ]

    async def score(self, tokens: tuple[int, ...]) -> list[float]:
        """Score between two requests, ahead of queued ones."""
        self._open.clear()
        try:
            async with self._lock:
                return await asyncio.to_thread(self._score, tokens)
        finally:
            self._open.set()

    def _score(self, tokens: tuple[int, ...]) -> list[float]:
        return [token.logp for token in self._score_prompt(tokens, 1)]

    @torch.inference_mode()
    def _score_prompt(self, tokens: tuple[int, ...], top: int) -> tuple[ScoredToken, ...]:
        ids = torch.tensor([tokens], device=self.spec.device)
        logits = self.model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        for other, weight in self.fused:
            logits = logits + weight * other(input_ids=ids, use_cache=False).logits[0, :-1].float()
        logps = logits.log_softmax(-1)
        best, chosen = logps.topk(min(top, logps.shape[-1])), logps.gather(-1, ids[0, 1:, None])[:, 0]
        rows = zip(chosen.tolist(), best.indices.tolist(), best.values.tolist(), strict=True)
        return tuple(ScoredToken(logp, tuple(zip(i, p, strict=True))) for logp, i, p in rows)

    def _hits_stop_string(self, tokens: list[int], stop: Iterable[str]) -> bool:
        if not stop:
            return False
        text = self.tokenizer.decode(tokens)
        return any(word in text for word in stop)

    async def join(self, link: Link) -> None:
        if self.receiver is not None:
            self.receiver.close()
        self.receiver = await asyncio.to_thread(Receiver, link)

    async def begin_update(self, in_flight: InFlight) -> None:
        """Pause between requests: they run one by one, each to its end. With `wait`, queued requests run
        before the update; otherwise they stay queued during it."""
        if in_flight != "wait":
            self._open.clear()
        await self._lock.acquire()

    async def receive(self, update: Update) -> None:
        assert self.receiver is not None, "join comes first"
        await asyncio.to_thread(load_into, self.model, self.receiver.receive(update))

    async def finish_update(self, version: int) -> None:
        self._version = version

    async def resume(self) -> None:
        if self._lock.locked():
            self._lock.release()
        self._open.set()

    async def version(self) -> int:
        return self._version

    async def close(self) -> None:
        if self.receiver is not None:
            self.receiver.close()


class _Reader:
    """A model with its KV cache, which reads a sequence in pieces."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, None

    def read(self, ids: Tensor) -> Tensor:
        """Return the logits [n, V] float32 after `ids` [n, t], which continue the tokens read before."""
        out = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache = out.past_key_values
        logits: Tensor = out.logits[:, -1].float()
        return logits


def _draw(logits: Tensor, s: Sampling, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sample from [n, V] logits: (tokens [n, 1], log-probs [n] of the distribution drawn from)."""
    if s.temperature == 0:
        logps = logits.float().log_softmax(-1)
        best = logps.argmax(-1, keepdim=True)
        return best, logps.gather(-1, best)[:, 0]
    logits = logits.float() / s.temperature
    if s.min_p:
        logits = logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(s.min_p), -torch.inf)
    if s.top_k:
        logits = logits.masked_fill(logits < logits.topk(s.top_k).values[:, -1:], -torch.inf)
    if s.top_p < 1:
        ordered, order = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        drop = torch.zeros_like(before, dtype=torch.bool).scatter(-1, order, before >= s.top_p)
        logits = logits.masked_fill(drop, -torch.inf)
    logps = logits.log_softmax(-1)
    tokens = torch.multinomial(logps.exp(), 1, generator=generator)
    return tokens, logps.gather(-1, tokens)[:, 0]
