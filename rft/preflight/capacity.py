"""Plan the memory of a run: predict the need, and choose the micro-batch that fits the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rft.algorithms.extras import copies, separate_critic
from rft.batch import Group
from rft.config.learner import DEFAULT_MICRO_BATCH, LearnerConfig
from rft.config.schema import Config
from rft.preflight.machine import count_gpus
from rft.preflight.memory import PROCESS_BYTES, ModelShape, learner_bytes, replica_bytes, saved_bytes
from rft.rollout.engine import EngineSpec
from rft.utils.memory import machine_memory
from rft.work import worth_sharing

# Values of tokens_per_micro_batch that `auto` and the advice choose from.
MICRO_BATCHES = (16384, 12288, 8192, 6144, 4096, 3072, 2048, 1536, 1024, 768, 512, 384, 256)
USABLE = 0.85  # of a device's memory: the prediction may be 15 % too low
# The driver, Ray and the reward workers, on the machine that also runs learner and engines.
OTHER_BYTES = 3 << 29


@dataclass(frozen=True)
class StepSize:
    """Tokens of a step: the most that a micro-batch can hold (`total`), and the least (`tree`), since a
    prompt is not separated from its completions where they share it."""

    total: int
    tree: int

    def micro_batch(self, tokens: int) -> int:
        """Return the tokens of the largest micro-batch under the limit `tokens`."""
        return min(max(tokens, self.tree), self.total)


def online_step(config: Config, longest: int, hidden: int) -> StepSize:
    """Bound the tokens of an online step by the length limits. longest: tokens of the longest sequence."""
    train, limits = config.train, config.rollout.sampling
    n, prompt = train.num_generations, min(limits.max_prompt_length, longest)
    completion = longest if config.environments else longest - prompt  # a session bounds only their sum
    mode = config.learner.prefix_sharing
    shared = worth_sharing([(prompt, [completion] * n)], hidden) if mode == "auto" else mode == "on"
    group = prompt + n * completion if shared else n * longest
    whole = shared or config.algorithm.unit == "pair"
    return StepSize(group * train.batch_size // train.minibatches, group if whole else longest)


def offline_step(config: Config, groups: Sequence[Group]) -> StepSize:
    """Bound the tokens of an offline step by the longest rows of the data."""
    sizes = [[len(g.prompt.tokens) + len(c.tokens) for c in g.completions] for g in groups]
    together = config.algorithm.unit == "pair" or config.learner.prefix_sharing != "off"
    tree = max(sum(size) if together else max(size) for size in sizes)
    rows = config.train.batch_size // config.train.minibatches
    return StepSize(sum(sorted(map(sum, sizes))[-rows:]), tree)


@dataclass(frozen=True)
class MemoryPlan:
    """Predicted memory of a run at its peak, in bytes, on the device that limits it.

    learner: of one rank. replica: of one replica on CPU; 0 on a GPU, where it is configured. saving: the
    copy that a background checkpoint takes. total: of everything on the device. capacity: of the device;
    None: unknown, since it is on other machines. tokens: the limit of a micro-batch; largest: the largest
    micro-batch of a step under it.
    """

    device: str
    tokens: int
    largest: int
    learner: int
    replica: int
    saving: int
    total: int
    capacity: int | None
    advice: tuple[str, ...] = ()  # config overrides that make the run fit, if it does not

    @property
    def exceeds(self) -> bool:
        return self.capacity is not None and self.total > self.capacity

    def warnings(self) -> list[str]:
        """Return a warning if the run needs more memory than the device has."""
        if self.capacity is None or not self.exceeds:
            return []
        where = "this machine" if self.device == "cpu" else "the GPU"
        remedy = (
            f"set {' and '.join(self.advice)}"
            if self.advice
            else ("use a smaller model, learner.adapter, or a device with more memory")
        )
        return [
            f"memory: the run needs about {self.total / 2**30:.1f} GiB at its peak, and {where} has "
            f"{self.capacity / 2**30:.1f}; {remedy}"
        ]


def device_memory(config: Config, device: str) -> int | None:
    """Return the bytes of the memory that the learner uses: a GPU's, or this machine's within its limits.
    None: the run's actors are on the nodes of a cluster."""
    if config.ray.address is not None:
        return None
    if device == "cuda":
        return int(torch.cuda.get_device_properties(0).total_memory) if count_gpus() else None
    return machine_memory()


def plan_memory(
    config: Config,
    learner: LearnerConfig,
    shape: ModelShape,
    engine: EngineSpec | None,
    step: StepSize,
    *,
    device: str,
    reference: bool,
    adapter: int = 0,
    capacity: int | None,
) -> MemoryPlan:
    """Resolve `tokens_per_micro_batch: auto` of a learner, and predict the run's memory.

    engine: of each replica; None: the run samples nothing. reference: whether the learner holds another
    model. adapter: number of its trained parameters. capacity: see `device_memory`.
    """

    def planned(learner: LearnerConfig, tokens: int, background: bool = True) -> MemoryPlan:
        background = background and config.checkpoint.background
        return _predict(
            config, learner, shape, engine, step, device, reference, adapter, capacity, tokens, background
        )

    def fits(plan: MemoryPlan) -> bool:
        return plan.capacity is None or plan.total <= USABLE * plan.capacity

    asked = learner.tokens_per_micro_batch
    sizes = [DEFAULT_MICRO_BATCH] if capacity is None else MICRO_BATCHES
    plans = [planned(learner, n) for n in (sizes if asked == "auto" else (asked,))]
    plan = next(filter(fits, plans), plans[-1])
    if not plan.exceeds:
        return plan
    checkpointing = learner.model_copy(update={"gradient_checkpointing": True})
    tokens, recompute = "learner.tokens_per_micro_batch", "learner.gradient_checkpointing: true"
    attempts: list[tuple[tuple[str, ...], LearnerConfig, bool]]
    attempts = [((), learner, True)] if asked != "auto" else []
    attempts += [((recompute,), checkpointing, True)]
    attempts += [((recompute, "checkpoint.background: false"), checkpointing, False)]
    for settings, changed, background in attempts:
        for n in MICRO_BATCHES:
            if fits(planned(changed, n, background)):
                advice = (*settings, f"{tokens}: {n}") if asked != "auto" else settings
                return _with_advice(plan, advice)
    return plan


def _with_advice(plan: MemoryPlan, advice: tuple[str, ...]) -> MemoryPlan:
    return MemoryPlan(**{**vars(plan), "advice": advice})


def _predict(
    config: Config,
    learner: LearnerConfig,
    shape: ModelShape,
    engine: EngineSpec | None,
    step: StepSize,
    device: str,
    reference: bool,
    adapter: int,
    capacity: int | None,
    tokens: int,
    background: bool,
) -> MemoryPlan:
    largest = step.micro_batch(tokens)
    critic = "values" in config.algorithm.outputs and separate_critic(config.algorithm)
    needed = PROCESS_BYTES + learner_bytes(
        shape,
        learner,
        reference=reference,
        tokens=largest,
        critic=critic,
        device=device,
        adapter=adapter,
        accumulates=largest < step.total,
    )
    every = config.checkpoint.every
    saving = saved_bytes(shape, learner, adapter) if background and 0 < every < config.train.steps else 0
    replica = 0 if engine is None or device == "cuda" else replica_bytes(shape, engine)
    total = needed
    if device == "cpu":
        models = copies(config.algorithm)
        ranks = learner.ranks if learner.parallel != "single" else 1
        total = models * (ranks * needed + saving + config.rollout.replicas * replica) + OTHER_BYTES
    return MemoryPlan(device, tokens, largest, needed, replica, saving, total, capacity)
