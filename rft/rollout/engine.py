"""The interface of rollout engines: tokens in; tokens with their log-probs and policy versions out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from rft.config.rollout import InFlight, RolloutConfig
from rft.sync.spec import Link, Update


class Aborted(Exception):
    """A weight push aborted a request (`rollout.update: abort`): it has to be sent again."""


@dataclass(frozen=True)
class Sampling:
    """How to sample a request. `seed` None: not reproducible."""

    n: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    mixture: float = 0.0  # draw from policy^(1 - mixture) * reference^mixture, per token (hf engine only)


@dataclass(frozen=True)
class Request:
    """One prompt to complete `sampling.n` times."""

    id: str
    tokens: tuple[int, ...]
    sampling: Sampling
    copy: int = 0  # which copy of the model completes it, where there are two


@dataclass(frozen=True)
class Generated:
    """One sampled completion.

    `logps[i]` is the log-prob of `tokens[i]` under the distribution that it was drawn from
    (temperature applied). `versions` are (policy version, start, end) spans over the tokens.
    """

    tokens: tuple[int, ...]
    logps: tuple[float, ...]
    finish: Literal["stop", "length"]
    versions: tuple[tuple[int, int, int], ...]


class Generate(Protocol):
    """Complete a request; the completions come in sample order."""

    async def __call__(self, request: Request) -> list[Generated]: ...


@dataclass(frozen=True)
class EngineSpec:
    """What a replica builds its engine from: the config's section, and what the plan resolved."""

    config: RolloutConfig
    kind: Literal["vllm", "hf"]
    model: str  # folder or hub name, as of `tokenizer` and `reference`
    tokenizer: str
    dtype: str
    device: Literal["cpu", "cuda"]
    max_model_len: int
    seed: int
    transport: str
    stop_token_ids: tuple[int, ...]
    trust_remote_code: bool = False
    reference: str | None = None  # the frozen model that `Sampling.mixture` mixes in
    sleeps: bool = False  # while the learner has the device that the two share (vLLM only)
    engine_args: dict[str, Any] = field(default_factory=dict)  # vLLM's, over those made from the other fields


class RolloutEngine(Protocol):
    """One engine. Its weights are replaced between `begin_update` and `finish_update`; during that
    time it samples nothing."""

    async def start(self) -> None: ...

    async def generate(self, request: Request) -> list[Generated]: ...

    async def score(self, tokens: tuple[int, ...]) -> list[float]:
        """The log-probs of `tokens[1:]`, each after those before it, with the engine's weights: at
        temperature 1, from no cache, ahead of requests that wait."""
        ...

    async def join(self, link: Link) -> None: ...

    async def begin_update(self, in_flight: InFlight) -> None: ...

    async def receive(self, update: Update) -> None: ...

    async def finish_update(self, version: int) -> None: ...

    async def resume(self) -> None: ...

    async def version(self) -> int: ...

    async def close(self) -> None: ...
