"""Resolve everything that a run needs, without training.

`make_plan` loads data, tokenizer and model config (never weights), checks that the pieces fit, and raises
ConfigError with *all* problems. `rft/report/plan_text.py` prints a plan.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, TypeVar

from rft import run_dir
from rft.config import validate
from rft.config.facts import Device, Engine, longest_sequence, mixes_reference, samples_held_out
from rft.config.learner import LearnerConfig
from rft.config.schema import Config
from rft.data import DataError, GroupStream, PromptSet
from rft.errors import ConfigError, ModelError
from rft.learner.load import load_tokenizer
from rft.learner.spec import LearnerSpec
from rft.preflight.capacity import (
    MemoryPlan,
    StepSize,
    device_memory,
    offline_step,
    online_step,
    plan_memory,
)
from rft.preflight.data import (
    EvalSet,
    OfflineData,
    check_mixture,
    check_offline,
    check_warm_start,
    has_demonstrations,
    load_eval_sets,
    load_offline,
    load_train_prompts,
)
from rft.preflight.dtype import resolve_dtypes
from rft.preflight.environment import check_environment, longest_prompts
from rft.preflight.machine import check_folders, check_sockets, check_sync_folder, machine_facts, sync_folder
from rft.preflight.memory import ModelShape, meta_network
from rft.preflight.model import (
    check_adapter,
    check_fusion,
    check_reference,
    check_vllm_heads,
    check_weights,
    count_adapter_parameters,
    resolve_fusion,
    resolve_model,
    resolve_optional,
    resolve_stops,
)
from rft.preflight.rewards import check_align, check_run_rewards
from rft.rollout.engine import EngineSpec
from rft.sync.adapter import engine_args as adapter_args
from rft.sync.proof import ProofSpec, fixed_tokens
from rft.sync.spec import ChannelSpec
from rft.utils.dotted import load_dotted
from rft.utils.dtypes import item_bytes

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, repr=False)
class BasePlan:
    """The resolved settings shared by online and offline runs. `str` describes the plan, for people."""

    config: Config
    model: str  # folder or hub name of the weights to load
    reference_path: str | None  # likewise of the reference; None: the model that the run starts from
    fusion: tuple[tuple[str, float], ...]  # of rollout.fusion: folder or hub name, weight
    given_tokenizer: str | None  # folder or hub name of `model.tokenizer`
    tokenizer: Any
    shape: ModelShape
    device: Device
    engine: Engine
    transport: str
    stop_ids: tuple[int, ...]  # token ids that end a completion
    eval_sets: tuple[EvalSet, ...]  # held-out prompts for sampling
    adapter_parameters: int | None  # of learner.adapter, if they can be counted without weights
    dtype_choice: str  # the result of `dtype: auto`, and its reason; "" if the config has none
    step_size: StepSize

    def __repr__(self) -> str:
        return self.text

    @cached_property
    def text(self) -> str:
        """The plan as `rft check` prints it. Reads the first row, and runs the rewards on its answer."""
        return "\n".join(load_dotted("rft.report.plan_text.plan_lines")(self))

    def with_model(self, folder: str) -> Self:
        """Return the same plan with other weights of the same shape (a finished warm start)."""
        return replace(self, model=folder)

    @property
    def tokenizer_path(self) -> str:
        """Folder or hub name of the tokenizer."""
        return self.given_tokenizer or self.model

    def memory(self, learner: LearnerConfig | None = None) -> MemoryPlan:
        """Predict the run's memory, with its learner or with another one, such as the warm start's."""
        c, chosen = self.config, learner or self.config.learner
        separate = self.reference_path not in (None, self.model) or chosen.adapter is None
        return plan_memory(
            c,
            chosen,
            self.shape,
            self.engine_spec() if c.algorithm.online or samples_held_out(c) else None,
            self.step_size,
            device=self.device,
            reference=c.algorithm.needs_reference and separate and c.teacher is None,
            adapter=self.adapter_parameters or 0,
            capacity=device_memory(c, self.device),
        )

    def learner_config(self, learner: LearnerConfig) -> LearnerConfig:
        """Return a learner's config with its micro-batch resolved for the device."""
        return learner.model_copy(update={"tokens_per_micro_batch": self.memory(learner).tokens})

    def engine_spec(self) -> EngineSpec:
        """Return the spec of each rollout replica."""
        c, adapter = self.config.rollout, self.config.learner.adapter
        lora = adapter_args(adapter) if adapter and self.transport == "adapter" else {}
        return EngineSpec(
            config=c,
            kind=self.engine,
            model=self.model,
            tokenizer=self.tokenizer_path,
            dtype=c.dtype,
            device=self.device,
            max_model_len=longest_sequence(self.config),
            seed=self.config.seed,
            transport=self.transport,
            stop_token_ids=self.stop_ids,
            trust_remote_code=self.config.model.trust_remote_code,
            stop_strings=bool(self.config.environments),
            fusion=self.fusion,
            reference=(self.reference_path or self.model) if mixes_reference(self.config) else None,
            sleeps=self.channel_spec().colocated,
            engine_args=lora | c.engine_args,
        )

    def learner_spec(self) -> LearnerSpec:
        """Return the spec of the learner."""
        c = self.config
        mean, largest = self.gap_bounds()
        paths = {"path": self.model, "tokenizer": self.tokenizer_path, "reference": self.reference_path}
        return LearnerSpec(
            algorithm=c.algorithm,
            model=c.model.model_copy(update=paths),
            config=self.learner_config(c.learner),
            train=c.train,
            sampling=c.rollout.sampling,
            device=self.device,
            seed=c.seed,
            teacher=c.teacher is not None,
            max_gap_mean=mean,
            max_gap=largest,
            expects_fresh=c.algorithm.online and c.rollout.staleness == 0,
            stop_token_ids=self.stop_ids,
            data=c.data,
        )

    def channel_spec(self) -> ChannelSpec:
        """Return how weights are sent from learner to replicas."""
        folder = sync_folder(self.config, self.transport)
        return ChannelSpec(
            transport=self.transport,
            wire_dtype=self.config.rollout.dtype,
            folder=None if folder is None else str(folder),
            config=self.config.sync,
        )

    @property
    def _exact(self) -> bool:  # engine and learner compute in float32
        return self.config.rollout.dtype == self.config.learner.dtype == "float32"

    def gap_bounds(self) -> tuple[float | None, float | None]:
        """Return the (mean, largest) log-prob gap allowed between engine and learner."""
        c, exact = self.config, self._exact
        mean, largest = c.sync.max_logp_gap_mean, c.sync.max_logp_gap
        return (
            (1e-3 if exact else 0.1) if mean is None else mean,
            (0.02 if exact else None) if largest is None else largest,
        )

    def proof_spec(self) -> ProofSpec | None:
        """Return how each push is proven; None if engines only see one-token sequences."""
        limit = min(longest_sequence(self.config), self.shape.max_positions) - 1  # vLLM samples one more
        prompts = self.proof_prompts()
        if prompts is None or limit < 2:
            return None
        tokens = fixed_tokens(prompts.prompts, self.config.seed, limit)
        return ProofSpec(tokens, self.config.sync.prove_every, *self.gap_bounds(), rounded=not self._exact)

    def proof_prompts(self) -> PromptSet | None:
        """Return the prompts whose tokens are used to prove a push."""
        return self.eval_sets[0].prompts if self.eval_sets else None


@dataclass(frozen=True, kw_only=True, repr=False)
class OnlinePlan(BasePlan):
    """A run that trains on completions that it samples itself."""

    train_prompts: PromptSet

    def proof_prompts(self) -> PromptSet:
        return self.train_prompts


@dataclass(frozen=True, kw_only=True, repr=False)
class OfflinePlan(BasePlan):
    """A run that trains on rows of a dataset."""

    data: OfflineData


Plan = OnlinePlan | OfflinePlan


class _Problems(list[str]):
    """Collect all problems of a config."""

    def attempt(self, what: str, action: Callable[[], T]) -> T | None:
        """Return the result of `action`; if it fails, record a problem and return None."""
        try:
            return action()
        except (ModelError, DataError, ValueError, OSError) as error:
            self.append(f"{what}: {error}")
            return None


def make_plan(
    config: Config, *, model: str | None = None, evaluate: bool = False, starts: bool = True
) -> Plan:
    """Resolve a config. `model` overrides its model's path, `evaluate` prepares for sampling on held-out
    prompts with any algorithm, `starts` False: Ray and engines will not be started. Raises ConfigError with
    all problems."""
    problems = _Problems()
    attempt, online, trusted = problems.attempt, config.algorithm.online, config.model.trust_remote_code
    samples = online or samples_held_out(config) or evaluate
    facts = machine_facts(config, samples=samples)

    # Resolve the model (only from its config) and the data.
    shape = tokenizer = train = offline = stops = None
    sets: tuple[EvalSet, ...] | None = ()
    path = attempt("model", lambda: resolve_model(config, model))
    reference = attempt("model.reference", lambda: resolve_optional(config.model.reference, config))
    given = attempt("model.tokenizer", lambda: resolve_optional(config.model.tokenizer, config))
    fusion = attempt("rollout.fusion", lambda: resolve_fusion(config)) or ()
    if path is not None:
        cache = Path(config.output_dir) / ".cache"
        shape = attempt("model.path", lambda: ModelShape.of(path, config.model, cache))
    if path is not None and (shape is not None or given is not None):
        tokenizer = attempt("model.tokenizer", lambda: load_tokenizer(given or path, trusted))
    dtype_choice = ""
    if path is not None and shape is not None:
        config, dtype_choice = resolve_dtypes(config, facts.device, shape.parameters)
        facts = replace(
            facts,
            layers=shape.layers,
            positions=shape.max_positions,
            vocabulary=shape.vocab,
            stored_quantization=shape.quantization,
        )
    if tokenizer is not None:
        facts = replace(facts, largest_token=max(tokenizer.get_vocab().values()))
        if online:
            train = attempt("data", lambda: load_train_prompts(config, tokenizer))
        else:
            offline = attempt("data", lambda: load_offline(config, tokenizer))
        if samples and config.eval.every:
            sets = attempt("data (held-out)", lambda: load_eval_sets(config, tokenizer, evaluate=evaluate))
    if train is not None:
        shown = attempt("data", lambda: has_demonstrations(train, config.algorithm))
        longest = longest_prompts(config, train)
        facts = replace(facts, rows=len(train), demonstrations=shown, longest_prompt=longest)
    if offline is not None:
        streamed, others = isinstance(offline.train, GroupStream), offline.held_out
        facts = replace(
            facts,
            rows=None if streamed else len(offline.sample),
            held_out_rows=None if others is None else len(others),
        )

    # Check that they fit each other, the algorithm and this machine.
    named = [
        ("model.path", path),
        ("model.reference", reference),
        *(("rollout.fusion", p) for p, _ in fusion),
    ]
    problems += [problem for key, p in named if p is not None for problem in check_weights(key, p)]
    problems += [] if evaluate else check_mixture(config, train, offline)
    if path is not None and tokenizer is not None and shape is not None:
        if train is not None or offline is not None:  # the data could be read, so the chat template works
            stops = attempt("model", lambda: resolve_stops(config, path, tokenizer, shape))
        if starts and not evaluate:
            problems += check_warm_start(config, path, tokenizer, stops, shape.max_positions)
    if offline is not None:
        problems += check_offline(config, offline, tokenizer, stops, facts.positions)
    problems += validate.problems(config, facts)
    learners = {"learner": config.learner}
    if config.warm_start is not None:
        learners["warm_start.learner"] = config.warm_start.learner
    for key, learner in learners.items():
        if learner.adapter is not None:
            network = meta_network(path, trusted) if path is not None and shape is not None else None
            problems += check_adapter(key, learner.adapter, network)
    if reference is not None and shape is not None and config.algorithm.needs_reference:
        problems += check_reference(reference, shape.vocab, trusted)
    problems += check_fusion(fusion, shape.vocab, trusted, trains=not evaluate) if shape is not None else []
    problems += check_environment(config, tokenizer, train) if starts else []
    problems += check_run_rewards(config, train, sets or ()) if starts else []
    problems += check_align(config, sets or (), trains=not evaluate)
    if path is not None and shape is not None and facts.engine == "vllm" and facts.samples:
        problems += check_vllm_heads(path, config.rollout.engine_args)
    if starts:
        problems += check_sockets(config, vllm=facts.engine == "vllm")
        problems += [] if evaluate else check_folders(config)
    width = item_bytes(config.rollout.dtype, facts.device)
    problems += check_sync_folder(config, shape.parameters * width if shape else None)

    if not problems and path and shape and stops is not None:
        adapter = config.learner.adapter
        if offline is None:
            step = online_step(config, longest_sequence(config), shape.hidden)
        else:
            step = offline_step(config, offline.sample)
        counted = None if adapter is None else count_adapter_parameters(meta_network(path, trusted), adapter)
        plan = BasePlan(
            config=config,
            model=path,
            reference_path=reference,
            fusion=fusion,
            given_tokenizer=given,
            tokenizer=tokenizer,
            shape=shape,
            device=facts.device,
            engine=facts.engine,
            transport=validate.choose_transport(config, facts),
            stop_ids=stops,
            eval_sets=sets or (),
            adapter_parameters=counted,
            dtype_choice=dtype_choice,
            step_size=step,
        )
        if train is not None:
            return OnlinePlan(**vars(plan), train_prompts=train)
        if offline is not None:
            return OfflinePlan(**vars(plan), data=offline)
    raise ConfigError(problems)


def check_plan(config: Config) -> Plan:
    """Resolve a config and its run folder, without training. Raises ConfigError with all problems."""
    problems: list[str] = []
    config = run_dir.keep_dtypes(config, "auto")
    try:
        run_dir.claim(config, "auto")
    except ConfigError as error:
        problems += error.problems
    try:
        plan = make_plan(config)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from None
    if problems:
        raise ConfigError(problems)
    return plan
