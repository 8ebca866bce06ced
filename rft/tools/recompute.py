"""`rft replay`: compute a step of an online run again, from its record and a checkpoint before it.

Neither the environment nor an engine runs: the record has their answers. Steps between the checkpoint
and the step are computed first, each from the record of that step.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rft import checkpoint
from rft.batch import Batch
from rft.checkpoint import Checkpoint
from rft.config.load import differences, parse_config
from rft.config.schema import Config
from rft.errors import ConfigError, RecordError
from rft.learner.workers import LearnerHandle
from rft.loops.recorder import ROUNDING
from rft.metrics import record
from rft.metrics.names import is_reproducible
from rft.metrics.record import StepRecord
from rft.plan import Plan, make_plan
from rft.preflight.data import warm_start_folder
from rft.run_training import start_learner
from rft.utils import yaml_files
from rft.utils.ray_cluster import ray_cluster
from rft.work import shares_prefix

Say = Callable[[str], None]
Start = Callable[[Plan], LearnerHandle]
SHOWN = ("train/loss", "train/grad_norm")
TOLERANCE = {"torch.float32": 1e-4, "torch.float16": 1e-2, "torch.bfloat16": 3e-2}
"""By the learner's dtype, where rounding may differ: of a gradient norm, and of a loss below 1 absolutely."""


@dataclass(frozen=True)
class Recomputed:
    """A step's recorded and recomputed metrics. tolerance: 0 if they must be equal."""

    step: int
    recorded: Mapping[str, float]
    now: Mapping[str, float]
    tolerance: float

    @property
    def names(self) -> list[str]:
        """Metrics that do not depend on time or memory: loss and gradient norm first."""
        both = {name for name in {*self.recorded, *self.now} if is_reproducible(name)}
        return [*SHOWN, *sorted(both - {*SHOWN})]

    def equal(self, name: str) -> bool:
        a, b = self.recorded.get(name), self.now.get(name)
        return a == b or (a != a and b != b)  # NaN, for a step without an update

    def close(self, name: str) -> bool:
        """Whether the loss or the gradient norm is within the tolerance."""
        a, b = self.recorded.get(name), self.now.get(name)
        if self.equal(name) or a is None or b is None:
            return self.equal(name)
        size = max(abs(a), abs(b), 1.0 if name == "train/loss" else 0.0)
        return abs(a - b) <= self.tolerance * size

    @property
    def kept(self) -> bool:
        return all(map(self.close, SHOWN if self.tolerance else self.names))


@dataclass(frozen=True)
class Replay:
    """The steps that were computed again, the requested one last, and causes of other rounding."""

    run: Path
    start: Checkpoint | None  # None: the weights that the run began with
    steps: list[Recomputed]
    causes: list[str]

    @property
    def kept(self) -> bool:
        return self.steps[-1].kept

    def lines(self) -> Iterator[str]:
        last, others = self.steps[-1], self.steps[:-1]
        start = "the weights that the run began with" if self.start is None else self.start.path.name
        through = f", through {len(others)} step{'s' if len(others) > 1 else ''}" if others else ""
        yield f"step {last.step} of {self.run}, from {start}{through}"
        if not last.recorded:
            yield "  the step failed when it was recorded: there is nothing to compare with"
        yield f"  {'':<18} {'recorded':<24} {'recomputed':<24}"
        for name in SHOWN:
            a, b = last.recorded.get(name), last.now.get(name)
            mark = "equal" if last.equal(name) else "within rounding" if last.close(name) else "DIFFERS"
            yield f"  {name:<18} {a!r:<24} {b!r:<24} {mark}"
        rest = last.names[len(SHOWN) :]
        other = [name for name in rest if not last.equal(name)]
        yield f"  {len(rest)} other values: " + (
            f"{len(other)} differ: {', '.join(other)}" if other else "equal"
        )
        for step in others:
            if not step.kept:
                yield f"  the first step that differs: {step.step}"
                break
        if self.causes:
            yield f"promised: loss and gradient norm within rounding ({'; '.join(self.causes)})"
        else:
            yield "promised: equal, to the bit"
        yield "verdict: " + ("kept" if self.kept else "BROKEN")


def replay(run: Path, step: int, say: Say, start: Start | None = None) -> Replay:
    """Compute a step again. start: makes the learner (None: as a run does, on Ray).

    Raises ConfigError if there is nothing to compute it from, or if settings changed on the way.
    """
    checkpoint_, records = _find(run, step)
    config, causes = _config_of(run, records)
    plan = make_plan(config, starts=False)
    if (stage := config.warm_start) is not None:
        plan = plan.with_model(str(warm_start_folder(config, stage, plan.model)))
    begin = "the start" if checkpoint_ is None else checkpoint_.path.name
    say(f"computing {len(records)} step{'s' if len(records) > 1 else ''} from {begin}")
    if start is not None:
        return asyncio.run(_compute(run, plan, start(plan), checkpoint_, records, causes))
    with ray_cluster(config.ray.address, config.ray.object_store_gib):
        learner = start_learner(plan, plan.learner_spec())
        try:
            return asyncio.run(_compute(run, plan, learner, checkpoint_, records, causes))
        finally:
            learner.kill()


async def _compute(
    run: Path,
    plan: Plan,
    learner: LearnerHandle,
    start: Checkpoint | None,
    records: list[StepRecord],
    causes: list[str],
) -> Replay:
    info = asdict(await learner.describe())
    then = records[-1].learner
    causes = [*causes, *(f"{k}: {then.get(k)} -> {info[k]}" for k in ROUNDING if then.get(k) != info[k])]
    if info["device"] != "cpu":
        causes.append("the order of additions on a GPU is not fixed")
    tolerance = TOLERANCE[info["compute_dtype"]] if causes else 0.0
    if start is not None:
        await learner.restore(str(start.path))
    steps = []
    for one in records:
        share = shares_prefix(one.groups, plan.config.learner.prefix_sharing, plan.shape.hidden)
        now = await learner.step(Batch.build(one.groups, share_prefix=share), one.step - 1)
        steps.append(Recomputed(one.step, one.metrics, now, tolerance))
    return Replay(run, start, steps, causes)


# -- the inputs of a step ------------------------------------------------------------------------


def _find(run: Path, step: int) -> tuple[Checkpoint | None, list[StepRecord]]:
    """Return the newest sound checkpoint before a step (None: the run's start), and the records from there to
    the step. Raises ConfigError."""
    if not (run / "config.yaml").exists():
        raise ConfigError([f"{run} is not a run folder: it has no config.yaml"])
    folder = run / record.FOLDER
    paths = record.steps(folder)
    if step not in paths:
        raise ConfigError([f"--step {step}: {_why_missing(run, paths)}"])
    start, rejected = checkpoint.scan(run / "checkpoints", before=step)
    first = 1 if start is None else start.step + 1
    missing = [n for n in range(first, step) if n not in paths]
    if missing:
        damaged = "".join(f"; {r} (passed over)" for r in rejected)
        gone = f"{missing[0]}" if len(missing) == 1 else f"{missing[0]} to {missing[-1]}"
        if start is None:
            why = f"there is no usable checkpoint before it{damaged}, and no record of step {gone}"
            hint = "from the run's first weights, the records of all steps are needed"
        else:
            why = f"the newest usable checkpoint before it is of step {start.step}{damaged}, and there is no"
            why += f" record of step {gone}"
            hint = "choose a step nearer to a checkpoint"
        raise ConfigError(
            [f"--step {step}: {why}: {hint}; tracking.record_steps and checkpoint.keep limit what is kept"]
        )
    try:
        return start, [record.read(paths[n]) for n in range(first, step + 1)]
    except RecordError as error:
        raise ConfigError([f"--step {step}: {error}"]) from error


def _why_missing(run: Path, paths: Mapping[int, Path]) -> str:
    try:
        config = parse_config(yaml_files.read(run / "config.yaml"))
    except (yaml_files.YamlError, ConfigError) as error:
        return f"there is no record of it, and {run / 'config.yaml'} cannot be read: {error}"
    if not config.algorithm.online:
        return f"{run} trained offline: its steps are rows of the dataset, and nothing is recorded"
    if not paths:
        kept = config.tracking.record_steps
        why = "tracking.record_steps is 0" if kept == 0 else "no step was finished, or they were removed"
        return f"{run} has no records: {why}"
    return (
        f"there is no record of it; {run} has those of steps {min(paths)} to {max(paths)} "
        f"(tracking.record_steps: {config.tracking.record_steps})"
    )


def _config_of(run: Path, records: list[StepRecord]) -> tuple[Config, list[str]]:
    """Return the config to compute with, the last record's, and the reasons why rounding may differ.

    Raises ConfigError where the records need different configs.
    """
    last = records[-1]
    causes = [
        f"{name}: version {last.versions.get(name)} -> {version}"
        for name, version in checkpoint.library_versions().items()
        if last.versions.get(name) != version
        and name in ("rft", "torch", "transformers", "peft", "deepspeed")
    ]
    for one in records[:-1]:
        for key, a, b in differences(one.config, last.config):
            if key == "train.steps":
                why = f"train.steps was {a!r} at step {one.step} and {b!r} at step {last.step}"
                hint = "choose a step whose checkpoint was written after the change"
                raise ConfigError([f"--step {last.step}: {why}, and the learning rate depends on it: {hint}"])
            if key.startswith("learner.") and f"{key}: {a} -> {b}" not in causes:
                causes.append(f"{key}: {a} -> {b}")
        for key, a, b in differences(one.learner, last.learner):
            causes += [] if f"{key}: {a} -> {b}" in causes else [f"{key}: {a} -> {b}"]
    config = parse_config(dict(last.config))
    tokens = {"tokens_per_micro_batch": last.learner["tokens_per_micro_batch"]}
    return config.model_copy(update={"learner": config.learner.model_copy(update=tokens)}), causes
