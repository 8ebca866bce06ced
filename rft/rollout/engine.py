"""The rollout engine interface: tokens in; tokens with their log-probs and policy versions out."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from rft.config.rollout import InFlight, RolloutConfig, SamplingConfig
from rft.sync.spec import Link, Update

CPU_BLOCK = 32  # tokens of a block of vLLM's KV cache on CPU


class Aborted(Exception):
    """A weight push aborted a request (`rollout.update: abort`), which must be sent again."""


@dataclass(frozen=True)
class Sampling:
    """Sampling parameters of a request. `seed` None: not reproducible."""

    n: int
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    min_p: float = 0.0
    mixture: float = 0.0  # sample from policy^(1 - mixture) * reference^mixture, per token (hf engine only)

    @staticmethod
    def of(config: SamplingConfig, n: int, seed: int | None) -> Sampling:
        """Return the parameters of `n` training rollouts of one prompt."""
        return Sampling(
            n,
            config.max_completion_length,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            stop=config.stop,
            seed=seed,
        )


@dataclass(frozen=True)
class Request:
    """One prompt, to be completed `sampling.n` times. session: name of requests whose prompts extend each
    other: they go to one replica, which has the keys and values of the turns before. scores_prompt: return
    the log-probs of the prompt too. prompt_top: of so many most likely tokens at each place of it."""

    id: str
    tokens: tuple[int, ...]
    sampling: Sampling
    copy: int = 0  # which copy of the model completes it, if there are two
    session: str = ""
    scores_prompt: bool = False
    prompt_top: int = 1


class ScoredToken(NamedTuple):
    """The log-prob of a prompt's token given its predecessors, at temperature 1, and the most likely tokens
    in its place with their log-probs, best first."""

    logp: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Generated:
    """One sampled completion.

    `logps[i]` is the log-prob of `tokens[i]` under the distribution that it was drawn from
    (temperature applied). `versions` are (policy version, start, end) spans over the tokens. `cached`: tokens
    of the prompt whose keys and values the engine had. `prompt`: the prompt's tokens from the second one on,
    with `Request.scores_prompt`.
    """

    tokens: tuple[int, ...]
    logps: tuple[float, ...]
    finish: Literal["stop", "length"]
    versions: tuple[tuple[int, int, int], ...]
    cached: int = 0
    prompt: tuple[ScoredToken, ...] = ()


class Generate(Protocol):
    """Complete a request; completions are returned in sample order."""

    async def __call__(self, request: Request) -> list[Generated]: ...


@dataclass(frozen=True)
class EngineSpec:
    """The data a replica builds its engine from: the config section and the resolved plan."""

    config: RolloutConfig
    kind: Literal["vllm", "hf"]
    model: str  # folder or hub name, like `tokenizer` and `reference`
    tokenizer: str
    dtype: str
    device: Literal["cpu", "cuda"]
    max_model_len: int
    seed: int
    transport: str
    stop_token_ids: tuple[int, ...]
    trust_remote_code: bool = False
    stop_strings: bool = False  # requests may have some, besides those of the config
    reference: str | None = None  # the frozen model for `Sampling.mixture`
    fusion: tuple[
        tuple[str, float], ...
    ] = ()  # further models whose logits are added, with weights (hf only)
    sleeps: bool = False  # while the learner uses their shared device (vLLM only)
    engine_args: dict[str, Any] = field(default_factory=dict)  # vLLM's, in addition to the derived ones


class RolloutEngine(Protocol):
    """One engine. Its weights are replaced between `begin_update` and `finish_update`; it does not sample
    during that time."""

    async def start(self) -> None: ...

    async def generate(self, request: Request) -> list[Generated]: ...

    async def score(self, tokens: tuple[int, ...]) -> list[float]:
        """Return the log-probs of `tokens[1:]`, each given its predecessors, under the engine's weights: at
        temperature 1, without a cache, ahead of waiting requests."""
        ...

    async def join(self, link: Link) -> None: ...

    async def begin_update(self, in_flight: InFlight) -> None: ...

    async def receive(self, update: Update) -> None: ...

    async def finish_update(self, version: int) -> None: ...

    async def resume(self) -> None: ...

    async def version(self) -> int: ...

    async def close(self) -> None: ...
