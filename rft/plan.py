"""Preflight: resolve everything that a run needs, without training, and say what it will do.

`make_plan` loads data, tokenizer and model config (never weights), checks that the pieces fit, and
raises ConfigError with *all* problems. `Plan.lines` is what `rft check` prints.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch

from rft.config.schema import Config, algorithm_name
from rft.data import DataError, GroupStream, PromptSet, load_prompts
from rft.data.chat import Renderer
from rft.data.prompts import any_demonstration
from rft.errors import ConfigError
from rft.learner.model import ModelError, load_tokenizer, resolve_dtype
from rft.learner.spec import LearnerSpec
from rft.learner.stops import stop_ids, unstopped_turns
from rft.preflight.algorithm import problems as algorithm_problems
from rft.preflight.learner import (
    describe_training,
    learner_problems,
    stored_quantized_problem,
    trained_parameters,
    vocabulary_problem,
)
from rft.preflight.memory import ModelShape, learner_bytes, meta_network, replica_bytes
from rft.preflight.offline import OfflineData, load_offline, offline_problems, reference_problem
from rft.preflight.online import longest_sequence, mixes, online_problems, online_warnings
from rft.preflight.parallel import describe_ranks, parallel_problems
from rft.preflight.places import socket_problems, unwritable_folders
from rft.preflight.rewards import check_reward, check_values, protection
from rft.preflight.transport import channel_spec, choose_transport, layout_problems
from rft.preflight.warm_start import warm_start_problems
from rft.rollout.engine import EngineSpec
from rft.sync.adapter import engine_args as adapter_args
from rft.sync.proof import ProofSpec, fixed_tokens
from rft.sync.spec import ChannelSpec
from rft.utils.cores import parse_cores, usable_cores
from rft.utils.hashing import fingerprint
from rft.utils.paths import expand

Device = Literal["cpu", "cuda"]
Engine = Literal["vllm", "hf"]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Plan:
    """A run with everything resolved."""

    config: Config
    model: str  # folder or hub name that weights are loaded from
    tokenizer: Any
    shape: ModelShape
    device: Device
    engine: Engine
    transport: str
    stop_ids: tuple[int, ...]  # token ids that end a completion
    train_prompts: PromptSet | None
    eval_prompts: PromptSet | None
    offline: OfflineData | None = None  # offline training
    adapter_parameters: int | None = None  # of learner.adapter, where it can be told without weights

    def with_model(self, folder: str) -> Plan:
        """The same plan from other weights of the same shape (a finished warm start)."""
        return replace(self, model=folder)

    @property
    def tokenizer_path(self) -> str:
        """Folder or hub name of the tokenizer, for processes with another working folder."""
        return absolute_if_local(self.config.model.tokenizer or self.model)

    @property
    def reference_path(self) -> str | None:
        """Folder or hub name of the reference; None: the model that the run starts from."""
        reference = self.config.model.reference
        return None if reference is None else absolute_if_local(reference)

    def engine_spec(self) -> EngineSpec:
        """What each rollout replica is built from."""
        c = self.config.rollout
        return EngineSpec(
            kind=self.engine,
            model=self.model,
            dtype=str(resolve_dtype(c.dtype, self.device)).removeprefix("torch."),
            device=self.device,
            max_model_len=longest_sequence(self.config),
            max_num_seqs=c.max_num_seqs,
            tensor_parallel=c.tensor_parallel,
            seed=self.config.seed,
            kv_cache_gib=c.kv_cache_gib,
            gpu_memory_utilization=c.gpu_memory_utilization,
            threads=threads_for(c.threads, c.cores),
            cores=c.cores,
            eager=self.device == "cpu" if c.enforce_eager is None else c.enforce_eager,
            needs_text=bool(c.sampling.stop),
            transport=self.transport,
            sleeps=self.channel_spec().colocated,
            control_timeout_s=c.control_timeout_s,
            stop_token_ids=self.stop_ids,
            tokenizer=self.tokenizer_path,
            trust_remote_code=self.config.model.trust_remote_code,
            reference=(self.reference_path or self.model) if mixes(self.config) else None,
            engine_args=(adapter_args(self.config) if self.transport == "adapter" else {}) | c.engine_args,
        )

    def learner_spec(self) -> LearnerSpec:
        """What the learner is built from."""
        c = self.config
        mean, largest = self.gap_bounds()
        paths = {"path": self.model, "tokenizer": self.tokenizer_path, "reference": self.reference_path}
        return LearnerSpec(
            algorithm=c.algorithm,
            model=c.model.model_copy(update=paths),
            config=c.learner,
            train=c.train,
            sampling=c.rollout.sampling,
            device=self.device,
            threads=threads_for(c.learner.threads, c.learner.cores),
            seed=c.seed,
            max_gap_mean=mean,
            max_gap=largest,
            expects_fresh=c.algorithm.online and c.rollout.staleness == 0,
            stop_token_ids=self.stop_ids,
            data=c.data,
        )

    def channel_spec(self) -> ChannelSpec:
        """How weights travel from learner to replicas."""
        wire = str(resolve_dtype(self.config.rollout.dtype, self.device)).removeprefix("torch.")
        return channel_spec(self.config, self.transport, wire)

    def gap_bounds(self) -> tuple[float | None, float | None]:
        """(mean, largest) log-prob gap allowed between engine and learner."""
        c = self.config
        exact = (
            resolve_dtype(c.rollout.dtype, self.device)
            == resolve_dtype(c.learner.dtype, self.device)
            == torch.float32
        )
        mean, largest = c.sync.max_logp_gap_mean, c.sync.max_logp_gap
        return (
            (1e-3 if exact else 0.05) if mean is None else mean,
            (0.02 if exact else None) if largest is None else largest,
        )

    def proof_spec(self) -> ProofSpec | None:
        """How each push is proven; None where engines see sequences of one token only."""
        data = self.train_prompts or self.eval_prompts
        limit = min(longest_sequence(self.config), self.shape.max_positions) - 1  # vLLM samples one more
        if data is None or limit < 2:
            return None
        tokens = fixed_tokens(data.prompts, self.config.seed, limit)
        return ProofSpec(tokens, self.config.sync.prove_every, *self.gap_bounds())

    def lines(self) -> list[str]:
        """The plan in words."""
        c, t = self.config, self.config.train
        out = [
            f"run          {c.name} -> {c.run_dir}",
            f"algorithm    {algorithm_name(c.algorithm)}: {t.steps} steps",
            f"model        {self.model}: {self.shape.parameters:,} parameters, "
            f"vocabulary {self.shape.vocab:,}",
            f"stop tokens  {self._stop_tokens()}",
        ]
        if c.warm_start:
            out.append(
                f"warm start   {c.warm_start.steps} supervised steps of {c.warm_start.batch_size} "
                f"demonstrations, kept in {c.warm_start.cache}"
            )
        if self.train_prompts is not None:
            out.append(f"data         {self.train_prompts}")
        if self.offline is not None:
            out += self.offline.lines(c)
        if self.eval_prompts is not None:
            e = c.eval
            out.append(
                f"evaluation   {len(self.eval_prompts)} held-out prompts, {e.samples} samples each"
                f"{' and greedy' if e.greedy else ''}, every {e.every} steps"
            )
        if c.algorithm.online:
            out += self._online_lines()
        else:
            out.append(f"batch        {t.batch_size} rows a step, {t.minibatches * t.num_iterations} updates")
        out.append(f"learner      {describe_ranks(c, self.device)}")
        out.append(f"trains       {describe_training(c.learner, self.adapter_parameters)}")
        out.append(f"memory       learner about {self.learner_bytes() / 2**30:.2f} GiB on {self.device}")
        if c.algorithm.online:
            out += [f"warning      {warning}" for warning in online_warnings(c)]
        return out

    def _stop_tokens(self) -> str:
        return ", ".join(f"{self.tokenizer.decode([i])!r} ({i})" for i in self.stop_ids) or "none"

    def learner_bytes(self) -> int:
        """Predicted peak bytes of the learner, in one process."""
        c = self.config
        separate = self.reference_path not in (None, self.model) or c.learner.adapter is None
        return learner_bytes(
            self.shape,
            c.learner,
            reference=c.algorithm.needs_reference and separate,
            critic="values" in c.algorithm.outputs and c.algorithm.separate_critic,
            device=self.device,
            adapter=self.adapter_parameters or 0,
        )

    def _online_lines(self) -> list[str]:
        c, t, r = self.config, self.config.train, self.config.rollout
        spec = self.engine_spec()
        engine_memory = replica_bytes(self.shape, spec)
        rewards = ", ".join(f"{f.label} ({f.function}, weight {f.weight})" for f in c.rewards.functions)
        return [
            f"batch        {t.batch_size} prompts x {t.num_generations} completions = "
            f"{t.batch_size * t.num_generations} a step; {t.num_iterations} passes x {t.minibatches} updates",
            f"rollout      {r.replicas} x {self.engine} ({spec.dtype}, {spec.tensor_parallel} device(s), "
            f"{spec.threads} threads, about {engine_memory / 2**30:.2f} GiB each), staleness {r.staleness}",
            f"actors       the learner and {r.replicas} rollout replicas on {self.device}, "
            f"{c.rewards.workers} reward workers; weights over {self.transport}",
            f"rewards      {rewards}",
            *dict.fromkeys(protected for f in c.rewards.functions if (protected := protection(f))),
        ]


def threads_for(threads: int | None, cores: str | None) -> int:
    """CPU threads of a process: as asked, else as many as it can keep busy."""
    return usable_cores(cores) if threads is None else threads


class _Problems(list[str]):
    """All that is wrong with a config."""

    def attempt(self, what: str, action: Callable[[], Found]) -> Found | None:
        """What `action` returns; None, and a problem noted, if it fails."""
        try:
            return action()
        except (ModelError, DataError, ValueError, OSError) as error:
            self.append(f"{what}: {error}")
            return None


def make_plan(
    config: Config, *, model: str | None = None, evaluate: bool = False, starts: bool = True
) -> Plan:
    """Resolve a config; `model` overrides its model's path, `evaluate` prepares for sampling on held-out
    prompts whatever the algorithm, `starts` False: Ray and engines will not be started. Raises ConfigError
    with all problems."""
    problems = _Problems()
    attempt = problems.attempt
    sampled = config.algorithm.online or config.eval.generate or evaluate
    device = _device(config, problems)
    engine: Engine | None = attempt("rollout.engine", lambda: _engine(config)) if sampled else "hf"
    trusted = config.model.trust_remote_code
    shape = tokenizer = train = held_out = offline = stops = None
    if path := attempt("model", lambda: resolve_model(config, model)):
        shape = attempt("model.path", lambda: ModelShape.of(path, config.model))
        named = config.model.tokenizer or path
        tokenizer = attempt("model.tokenizer", lambda: load_tokenizer(named, trusted))
    limit = config.rollout.sampling.max_prompt_length
    if tokenizer is not None:
        if config.algorithm.online:
            train = attempt("data", lambda: load_prompts(config.data, tokenizer, "train", limit))
        else:
            offline = attempt("data", lambda: load_offline(config, tokenizer))
        if sampled and config.eval.every:
            held_out = attempt("data (held-out)", lambda: _eval_prompts(config, tokenizer, limit))
        if path and shape is not None and (train or offline):  # the data are read, so the template works
            stops = attempt("model", lambda: _stop_ids(config, path, tokenizer))
        if offline is not None and stops is not None and not config.algorithm.score_heads:
            problems += unstopped_turns(offline.sample, stops, tokenizer)
        if starts and not evaluate and path and shape is not None:
            problems += warm_start_problems(config, path, tokenizer, stops, shape.max_positions)
    if starts:
        problems += socket_problems(config, vllm=sampled and engine == "vllm")
        problems += [] if evaluate else unwritable_folders(config)
    problems += _misfits(config, shape, engine, train, offline)
    network = meta_network(path, trusted) if path and shape is not None else None
    problems += _part_problems(config, device, engine, shape, network)
    if tokenizer is not None and shape is not None:
        wrong = vocabulary_problem(tokenizer, shape.vocab)
        problems += [wrong] if wrong else []
    if config.rewards.functions:
        sets = {"the training data": train, "the held-out data": held_out}
        rows = {name: {p.id + 1: p.columns for p in found.prompts} for name, found in sets.items() if found}
        problems += check_reward(config.rewards, Path.cwd(), rows=rows)
        for name, found in sets.items():
            if found:
                problems += check_values(config.rewards, found.source, rows[name].items())
    if problems or path is None or shape is None or engine is None or stops is None:
        raise ConfigError(problems)
    adapter = config.learner.adapter
    return Plan(
        config=config,
        model=path,
        tokenizer=tokenizer,
        shape=shape,
        device=device,
        engine=engine,
        transport=choose_transport(config, device, engine),
        stop_ids=stops,
        train_prompts=train,
        eval_prompts=held_out,
        offline=offline,
        adapter_parameters=trained_parameters(network, adapter) if network is not None and adapter else None,
    )


def _device(config: Config, problems: list[str]) -> Device:
    """What learner and engines compute on; notes a problem where that is not here."""
    here: Device = "cuda" if torch.cuda.is_available() else "cpu"
    asked = config.ray.device
    if asked == "cuda" and here == "cpu" and config.ray.address is None:
        problems.append("ray.device: cuda, but this machine has no GPU; join a cluster by ray.address")
        return here
    return here if asked == "auto" else asked


def _part_problems(
    config: Config, device: Device, engine: Engine | None, shape: ModelShape | None, network: Any
) -> list[str]:
    """What the learner, its kernels, the ranks and the places of the actors each object to."""
    out = learner_problems("learner", config.learner, network, config.algorithm)
    if config.warm_start is not None:
        out += learner_problems("warm_start.learner", config.warm_start.learner, network, None)
    stored = stored_quantized_problem(config.learner, network, config.algorithm)
    out += [stored] if stored else []
    out += config.learner.kernels.misfits(device)
    out += parallel_problems(config, device)
    if engine is not None:
        wire = resolve_dtype(config.rollout.dtype, device).itemsize
        out += layout_problems(config, device, engine, shape.parameters * wire if shape else None)
    return out


def _eval_prompts(config: Config, tokenizer: Any, limit: int) -> PromptSet:
    found = load_prompts(config.data, tokenizer, "test", limit)
    return replace(found, prompts=found.prompts[: config.eval.problems])


def _stop_ids(config: Config, path: str, tokenizer: Any) -> tuple[int, ...]:
    turn_end = Renderer(config.data, tokenizer).turn_end
    known = stop_ids(path, tokenizer, turn_end, trust_remote_code=config.model.trust_remote_code)
    return tuple(sorted({*known, *config.rollout.sampling.stop_token_ids}))


def absolute_if_local(path: str) -> str:
    """A folder as an absolute path: workers have other working folders. A hub name stays as it is."""
    local = path.startswith((".", "/")) or Path(path).exists()
    return str(Path(path).absolute()) if local else path


def resolve_model(config: Config, model: str | None = None) -> str:
    """The folder or hub name of the policy; `tiny` is built in the cache first."""
    path = model or config.model.path
    if path != "tiny":
        resolved = absolute_if_local(expand(path))
        if Path(resolved).is_absolute() and not (Path(resolved) / "config.json").exists():
            raise ModelError(f"{path!r} is not a model folder: it has no config.json")
        return resolved
    from rft.tasks import REVISION
    from rft.tasks.tiny import build_tiny

    options = {"seed": config.seed, **config.model.options}
    folder = Path(config.output_dir) / ".cache" / f"tiny-{fingerprint({**options, 'code': REVISION})}"
    if not (folder / "config.json").exists():
        try:
            build_tiny(folder, **options)
        except TypeError as error:
            raise ModelError(f"model.options: {error}") from error
    return str(folder.absolute())


def _engine(config: Config) -> Engine:
    installed = importlib.util.find_spec("vllm") is not None
    if config.rollout.engine == "auto":
        return "vllm" if installed else "hf"
    if config.rollout.engine == "vllm" and not installed:
        raise ValueError(
            "vllm is not installed: install rft with the extra cpu or cuda, or set rollout.engine=hf"
        )
    return config.rollout.engine


def _misfits(
    config: Config,
    shape: ModelShape | None,
    engine: str | None,
    train: PromptSet | None,
    offline: OfflineData | None,
) -> list[str]:
    """Settings that are each fine and do not fit together."""
    out = []
    t, r, algorithm = config.train, config.rollout, config.algorithm
    demonstrated = train is not None and any(p.columns.get("completion") for p in train.prompts)
    if train is not None and algorithm.online and algorithm.uses_demonstrations:
        try:
            demonstrated = any_demonstration(train.prompts)
        except DataError as error:
            out.append(f"data: {error}")
            demonstrated = True
    lacks = algorithm_problems(
        algorithm,
        num_generations=t.num_generations,
        has_reference=True,  # the model that the run starts from
        has_critic=True,  # a value head is made where the algorithm reads values
        has_demonstrations=demonstrated or not algorithm.online,
        has_rewards=bool(config.rewards.functions),
        minibatches=t.num_iterations * t.minibatches,
        can_mix=engine == "hf",
    )
    if algorithm.online:
        lacks += online_problems(config, demonstrated)
    out += [f"algorithm.{algorithm_name(algorithm)}: {problem}" for problem in lacks]
    if not algorithm.online:
        out += offline_problems(config, offline, shape.max_positions if shape else 2**31)
    elif config.data.streaming:
        out.append("data.streaming: online training loads all of its prompts; set it to false")
    if config.model.reference is not None and shape is not None:
        if not algorithm.needs_reference:
            out.append(f"model.reference: {algorithm_name(algorithm)} reads no reference; leave it out")
        elif found := reference_problem(config.model.reference, shape.vocab, config.model.trust_remote_code):
            out.append(found)
    rows: Sized | None = train if offline is None or isinstance(offline.train, GroupStream) else offline.train
    if rows is not None and len(rows) < t.batch_size:
        out.append(
            f"train.batch_size: {t.batch_size} rows a step, but the data has only {len(rows)}; lower it"
        )
    length = longest_sequence(config) if algorithm.online else 0
    if shape is not None and length > shape.max_positions:
        out.append(
            f"rollout.sampling: max_prompt_length and max_completion_length make sequences of {length}, "
            f"but the model has {shape.max_positions} positions; lower one of them"
        )
    for key, cores in (("rollout.cores", r.cores), ("learner.cores", config.learner.cores)):
        if cores is not None:
            out += _bad_cores(key, cores)
    return out


def _bad_cores(key: str, cores: str) -> list[str]:
    try:
        missing = parse_cores(cores) - os.sched_getaffinity(0)
    except ValueError as error:
        return [f"{key}: {error}"]
    return [f"{key}: this machine has no core {min(missing)}"] if missing else []
