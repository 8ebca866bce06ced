"""Plan the sessions of an agentic run: KV cache, concurrency, tokens of a step, staleness."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rft.config.environment import EnvironmentConfig
from rft.config.facts import environment_key, longest_sequence
from rft.config.schema import Config
from rft.preflight.memory import ModelShape
from rft.rollout.engine import CPU_BLOCK, EngineSpec
from rft.utils.dtypes import item_bytes


@dataclass(frozen=True)
class SessionPlan:
    """The sessions of a run. Sizes are those at the limits of the config: most sessions need less.

    context: tokens of the longest session. per_turn: sampled tokens of a call. turns: calls of a session.
    samples: sessions of a step. running: sessions at a time; limit: why not more. token_bytes: keys and
    values of one token.
    cache: bytes for keys and values in one replica; None: unknown, or the engine hf, which keeps none.
    cache_key: the config key that sets it.
    """

    context: int
    per_turn: int
    turns: int
    samples: int
    running: int
    limit: str
    token_bytes: int
    cache: int | None
    cache_key: str
    replicas: int
    staleness: int

    @property
    def session_bytes(self) -> int:
        return self.context * self.token_bytes

    @property
    def fitting(self) -> int | None:
        """Sessions of full length whose keys and values fit into all replicas; None: unknown."""
        return None if self.cache is None else self.replicas * (self.cache // self.session_bytes)

    @property
    def sampled(self) -> int:
        """Sampled tokens of a step, at most."""
        return self.samples * min(self.turns * self.per_turn, self.context)

    def lines(self) -> list[str]:
        """Describe the plan, for `rft check`."""
        fitting = f"; {_gib(self.cache)} per replica hold {self.fitting:,}" if self.cache is not None else ""
        old = f"at most {self.staleness} version{'s' * (self.staleness != 1)} before it is trained on"
        mixed = f", and its turns may have up to {self.staleness + 1}" if self.staleness else ""
        return [
            f"sessions     {self.samples:,} a step, {self.running:,} at a time ({self.limit})",
            f"kv cache     {_mib(self.session_bytes)} for a session of {self.context:,} tokens{fitting}",
            f"step tokens  up to {self.sampled:,} sampled; up to {self.samples * self.context:,} read and "
            f"trained, and {self.samples * self.turns * self.context:,} if every turn starts a branch",
            f"staleness    the first call of a session is {old}{mixed}",
        ]

    def warnings(self) -> list[str]:
        """Return a warning if the KV cache does not hold the sessions that run at a time."""
        if self.cache is None or self.fitting is None or self.fitting >= self.running:
            return []
        value = f"{self.cache_key} gives {_gib(self.cache)} of KV cache per replica"
        if self.fitting == 0:
            return [
                f"environment.max_episode_tokens: a session of {self.context:,} tokens needs "
                f"{_gib(self.session_bytes)}, and {value}: the engine does not start; {self._raise(1)}, or "
                f"lower environment.max_episode_tokens to {self.cache // self.token_bytes:,}"
            ]
        return [
            f"environment.concurrency: {self.running} sessions of up to {self.context:,} tokens need "
            f"{_gib(self.running * self.session_bytes)}, and {value}: it holds {self.fitting} of them, and "
            f"the prompts of the others are computed again; {self._raise(self.running)}, "
            f"or set environment.concurrency: {self.fitting}"
        ]

    def _raise(self, sessions: int) -> str:
        """Return the change with which this number of sessions fits."""
        if self.cache_key == "rollout.kv_cache_gib":
            each = -(-sessions // self.replicas)
            return f"set rollout.kv_cache_gib: {-(-each * self.session_bytes >> 30)}"
        return f"raise {self.cache_key}, or add replicas"


def plan_sessions(
    config: Config, shape: ModelShape, spec: EngineSpec, capacity: int | None
) -> SessionPlan | None:
    """Return the plan of a config's sessions; None without an environment.

    capacity: bytes of the engine's device; None: unknown. Layers that keep no keys and values for all tokens
    (sliding windows, linear attention) need less than is planned.
    """
    train, rollout = config.train, config.rollout
    if not config.environments:
        return None
    played = list(config.environments.values())
    plan = config.algorithm.rollouts(train.num_generations, progress=0.0, demonstration=False)
    samples = train.batch_size * len(plan)
    running, limit = _running(config.environments, samples * (rollout.staleness + 1))
    cache, key = _cache(spec, shape, capacity)
    return SessionPlan(
        context=spec.max_model_len,
        per_turn=max(e.max_tokens_per_turn or rollout.sampling.max_completion_length for e in played),
        turns=max(e.max_turns for e in played),
        samples=samples,
        running=running,
        limit=limit,
        token_bytes=_token_bytes(shape, spec.dtype, spec.engine_args),
        cache=cache,
        cache_key=key,
        replicas=rollout.replicas,
        staleness=rollout.staleness,
    )


def cache_warnings(config: Config, shape: ModelShape) -> list[str]:
    """Return a warning if vLLM on CPU cannot keep the keys and values of one sequence: it would not start.

    Layers that keep less than is counted (sliding windows, latent or linear attention) may fit all the same.
    """
    rollout, tokens = config.rollout, longest_sequence(config)
    blocks = -(-tokens // CPU_BLOCK) + 1  # vLLM leaves one unused
    needed = blocks * CPU_BLOCK * _token_bytes(shape, rollout.dtype, rollout.engine_args)
    needed //= rollout.tensor_parallel  # it splits the heads, and each of its workers has a whole cache
    if needed <= rollout.kv_cache_bytes or "kv_cache_memory_bytes" in rollout.engine_args:
        return []
    enough = math.ceil(needed / 2**30 * 1000) / 1000
    return [
        f"rollout.kv_cache_gib: {rollout.kv_cache_gib:g} GiB do not hold the longest sequence, whose "
        f"{tokens:,} tokens need {_mib(needed)}: the engine may not start; set rollout.kv_cache_gib: "
        f"{enough:g}, or lower the lengths"
    ]


def _token_bytes(shape: ModelShape, dtype: str, engine_args: Mapping[str, Any]) -> int:
    """Return the bytes of a token's keys and values in all layers."""
    narrow = str(engine_args.get("kv_cache_dtype", "")).startswith("fp8")
    return 2 * shape.layers * shape.key * (1 if narrow else item_bytes(dtype))


def _running(environments: Mapping[str, EnvironmentConfig], wanted: int) -> tuple[int, str]:
    allowed = sum(e.concurrency for e in environments.values())
    keys = " + ".join(f"{environment_key(source)}.concurrency" for source in environments)
    if allowed < wanted:
        return allowed, f"{keys}; {wanted:,} may be in flight"
    return wanted, f"all that may be in flight; {keys} allows {allowed:,}"


def _cache(spec: EngineSpec, shape: ModelShape, capacity: int | None) -> tuple[int | None, str]:
    """Return the bytes for keys and values of one replica, and the key that sets them."""
    config = spec.config
    if spec.kind == "hf":
        return None, ""
    if spec.device == "cpu":
        return config.kv_cache_bytes, "rollout.kv_cache_gib"
    key = f"rollout.gpu_memory_utilization: {config.gpu_memory_utilization:g}"
    if capacity is None:
        return None, key
    weights = shape.parameters * item_bytes(spec.dtype)
    usable = config.gpu_memory_utilization * capacity * config.tensor_parallel
    return max(0, int(usable - weights)), key


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
