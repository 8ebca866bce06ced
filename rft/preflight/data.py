"""Load and check the rows of an offline run and the demonstrations of a warm start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from rft.algorithms import Algorithm, PolicyOutput
from rft.algorithms.base import DataKind
from rft.algorithms.extras import arrange, reads_start, score_heads
from rft.batch import Batch, Group, Prompt
from rft.config.data import DataConfig
from rft.config.evaluation import EvalConfig
from rft.config.rewards import RewardsConfig
from rft.config.schema import Config, WarmStartConfig, algorithm_name
from rft.data import (
    DataError,
    GroupSampler,
    GroupSet,
    GroupSource,
    GroupStream,
    PromptSet,
    first_row,
    has_held_out,
    load_groups,
    load_prompts,
)
from rft.data.mixture import MixtureSampler, mixture_sampler
from rft.data.overlap import REASON, overlapping
from rft.data.prompts import any_demonstration
from rft.data.rows import Split
from rft.data.sampler import PromptSampler, Sampler
from rft.data.stops import unstopped_turns
from rft.tasks import REVISION
from rft.utils.dotted import load_dotted
from rft.utils.hashing import fingerprint

PRIVATE_ORDER = "rft.contrib.privacy.PoissonSampler"
DRY_RUN_GROUPS = 8
UNNAMED = "evaluation"  # the held-out set without a name, in reports of overlaps
GENERATED = 64  # checked rows of a generated task, whose rows share one format


@dataclass(frozen=True)
class EvalSet:
    """Held-out prompts that are sampled, with the settings of their evaluation.

    name: "" for the unnamed set, whose metrics are `eval/...`; else `eval/NAME/...`. rewards: of the set;
    None: those of the run, and its environment.
    """

    name: str
    prompts: PromptSet
    settings: EvalConfig
    max_tokens: int
    rewards: RewardsConfig | None = None

    @property
    def key(self) -> str:
        """Return the config section of the set."""
        return f"eval.sets.{self.name}" if self.name else "eval"


def load_eval_sets(config: Config, tokenizer: Any, *, evaluate: bool = False) -> tuple[EvalSet, ...]:
    """Load the prompts of every held-out set that is sampled; the unnamed one comes first.

    evaluate: for `rft eval`, which samples all sets for which there are rewards, whatever the algorithm. With
    named sets, data without held-out rows has no unnamed set. Raises DataError.
    """
    held, online, sampling = config.eval, config.algorithm.online, config.rollout.sampling
    rewarded = bool(config.rewards.functions or config.environments)
    sets = []
    wanted = rewarded and (online or held.generate or evaluate)
    if wanted and (not held.sets or has_held_out(config.data)):
        prompts = load_prompts(config.data, tokenizer, "test", sampling.max_prompt_length)
        sets.append(EvalSet("", _first(prompts, held.problems), held, sampling.max_completion_length))
    for name in held.sampled_sets(online=online or (evaluate and rewarded)):
        section, settings = held.sets[name], held.of_set(name)
        try:
            split = split_of(section.data)
            prompts = load_prompts(section.data, tokenizer, split, sampling.max_prompt_length)
        except DataError as error:
            raise DataError(f"eval.sets.{name}.data: {error}") from error
        limit = section.max_completion_length or sampling.max_completion_length
        sets.append(EvalSet(name, _first(prompts, settings.problems), settings, limit, section.rewards))
    return tuple(sets)


def _first(prompts: PromptSet, count: int) -> PromptSet:
    return replace(prompts, prompts=prompts.prompts[:count])


def split_of(data: DataConfig) -> Split:
    """Return the split of a named held-out set: its evaluation rows if it has any, else all its rows."""
    return "test" if has_held_out(data) else "train"


def load_train_prompts(config: Config, tokenizer: Any) -> PromptSet:
    """Load the training prompts of an online run. Raises DataError."""
    prompts = load_prompts(config.data, tokenizer, "train", config.rollout.sampling.max_prompt_length)
    if config.data.decontaminate == "report":
        return prompts
    kept = without_overlaps(prompts.prompts, _evaluation_rows(config, tokenizer))
    return replace(prompts, prompts=kept, skipped=_with_dropped(prompts.skipped, len(prompts) - len(kept)))


def _with_dropped(skipped: Mapping[str, int], dropped: int) -> dict[str, int]:
    return {**skipped, REASON: dropped} if dropped else dict(skipped)


def _evaluation_rows(config: Config, tokenizer: Any) -> dict[str, Sequence[Prompt | Group]]:
    """Load the rows of all held-out sets, by name, for a comparison with training rows. Raises DataError."""
    if not config.eval.every:
        return {}
    rows: dict[str, Sequence[Prompt | Group]] = {
        s.name or UNNAMED: s.prompts.prompts for s in load_eval_sets(config, tokenizer)
    }
    if not config.algorithm.online:
        held_out = _held_out(config, tokenizer)
        rows |= {UNNAMED: held_out.groups} if held_out is not None else {}
        rows |= {name: groups.groups for name, groups in _held_out_groups(config, tokenizer).items()}
    return rows


Item = TypeVar("Item", Prompt, Group)


def without_overlaps(rows: Sequence[Item], held_out: Mapping[str, Sequence[Prompt | Group]]) -> list[Item]:
    """Return the training rows that overlap no evaluation row. Raises DataError if none is left."""
    if not any(held_out.values()):
        raise DataError(
            "`decontaminate: drop` compares with evaluation rows, and there are none: set `eval_path`, or "
            "write `decontaminate: report`"
        )
    overlapping_rows = overlapping(rows, held_out)
    kept = [row for index, row in enumerate(rows) if index not in overlapping_rows]
    if not kept:
        raise DataError(
            "`decontaminate: drop` leaves no row: all of them overlap evaluation rows; use other training "
            "rows"
        )
    return kept


CURRICULUM = "rft.contrib.curriculum.Curriculum"


def prompt_sampler(config: Config, prompts: Sequence[Prompt]) -> PromptSampler:
    """Return the order in which an online run draws its prompts."""
    if config.train.curriculum is not None:
        curriculum: PromptSampler = load_dotted(CURRICULUM)(
            len(prompts), config.seed, config.train.curriculum
        )
        return curriculum
    plain = Sampler(len(prompts), config.seed, shuffle=config.data.shuffle)
    return sampler_of_mixture(config, prompts) or plain


def sampler_of_mixture(config: Config, prompts: Sequence[Prompt]) -> MixtureSampler | None:
    """Return the order of a run's mixture; None if its data are not a mixture."""
    return mixture_sampler(config.data, prompts, config.seed, config.train.steps * config.train.batch_size)


def check_mixture(config: Config, train: PromptSet | None, offline: OfflineData | None) -> list[str]:
    """Check that the sources of a mixture suffice for the run."""
    rows = [] if train is None else train.prompts
    rows = rows if offline is None else [group.prompt for group in offline.sample]
    mixture = sampler_of_mixture(config, rows) if rows else None
    try:
        if mixture is not None:
            mixture.check()
    except DataError as error:
        return [f"data: {error}"]
    return []


def has_demonstrations(prompts: PromptSet, algorithm: Algorithm) -> bool:
    """Return whether any prompt has a demonstration. Raises DataError if a required one is invalid."""
    if algorithm.uses_demonstrations:
        return any_demonstration(prompts.prompts)
    return any(p.columns.get("completion") for p in prompts.prompts)


# -- offline runs --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OfflineData:
    """Training and held-out groups of an offline run.

    sample: all training groups, or a stream's first batch.
    """

    train: GroupSet | GroupStream
    sample: list[Group]
    held_out: GroupSet | None
    sets: Mapping[str, GroupSet] = field(default_factory=dict)  # named held-out sets that are not sampled
    by_source: Mapping[str, GroupSet] = field(default_factory=dict)  # held-out rows for `mixing: aioli`

    def source(self, config: Config, groups: Sequence[Group] | None = None) -> GroupSource:
        """Return the training groups in sampling order. groups: the same ones with further fields."""
        if groups is None and isinstance(self.train, GroupStream):
            return self.train
        groups = self.sample if groups is None else groups
        order: PromptSampler | None = sampler_of_mixture(config, [group.prompt for group in groups])
        if config.learner.privacy is not None:
            order = load_dotted(PRIVATE_ORDER)(len(groups), config.seed, config.learner.privacy)
        return GroupSampler(groups, config.seed, shuffle=config.data.shuffle, sampler=order)

    def lines(self, config: Config) -> list[str]:
        """Describe training and held-out data, for the plan."""
        streamed = isinstance(self.train, GroupStream)
        out = [f"data         {f'streamed from {self.train.source}' if streamed else self.train}"]
        if self.held_out is not None:
            out.append(f"evaluation   {self.held_out}, every {config.eval.every} steps")
        elif config.eval.every:
            out.append("evaluation   none: there are no held-out rows (data.holdout, data.eval_path)")
        out += [f"held out     {name}: {rows}" for name, rows in self.sets.items()]
        return out


def load_offline(config: Config, tokenizer: Any) -> OfflineData:
    """Load the data of an offline run; of a stream, only the first batch. Raises DataError."""
    kind, data = _group_kind(config, config.data), config.data
    held_out = _held_out(config, tokenizer) if config.eval.every else None
    sets = _held_out_groups(config, tokenizer) if config.eval.every else {}
    if not data.streaming:
        train = load_groups(data, tokenizer, kind)
        if data.decontaminate == "drop":
            train = _decontaminated(train, _evaluation_rows(config, tokenizer))
        return OfflineData(train, train.groups, held_out, sets, _held_out_by_source(config, tokenizer))
    first = GroupStream(data, tokenizer, kind).next(config.train.batch_size)
    return OfflineData(GroupStream(data, tokenizer, kind), first, held_out, sets)


def _decontaminated(train: GroupSet, held_out: Mapping[str, Sequence[Prompt | Group]]) -> GroupSet:
    kept = without_overlaps(train.groups, held_out)
    return replace(train, groups=kept, skipped=_with_dropped(train.skipped, len(train) - len(kept)))


def _held_out(config: Config, tokenizer: Any) -> GroupSet | None:
    """Load the unnamed held-out set of an offline run; None: it has none. Raises DataError."""
    data = config.data
    if not has_held_out(data):
        return None
    limit = min(config.eval.problems, data.eval_limit or config.eval.problems)
    whole = data.model_copy(update={"streaming": False, "eval_limit": limit})
    try:
        held_out = load_groups(whole, tokenizer, _group_kind(config, data), "test")
    except DataError as error:
        raise DataError(
            f"held-out rows: {error}\n(to train without evaluation, set eval.every: 0)"
        ) from error
    return replace(held_out, groups=held_out.groups[:limit])


def _held_out_groups(config: Config, tokenizer: Any) -> dict[str, GroupSet]:
    """Load the named held-out sets on which the loss is measured: those without rewards. Raises DataError."""
    sampled, sets = config.eval.sampled_sets(online=False), {}
    for name, section in config.eval.sets.items():
        if name in sampled:
            continue
        limit = config.eval.of_set(name).problems
        split = split_of(section.data)
        key = "eval_limit" if split == "test" else "limit"
        limits = {"streaming": False, key: min(limit, getattr(section.data, key) or limit)}
        data = section.data.model_copy(update=limits)
        try:
            sets[name] = load_groups(data, tokenizer, _group_kind(config, data), split)
        except DataError as error:
            raise DataError(f"eval.sets.{name}.data: {error}") from error
    return sets


def _held_out_by_source(config: Config, tokenizer: Any) -> dict[str, GroupSet]:
    """Load the held-out rows of each source by which `mixing: aioli` measures losses. Raises DataError."""
    data, sets = config.data, {}
    if data.mixing != "aioli":
        return {}
    for name, part in data.parts().items():
        if not has_held_out(part):
            raise DataError(
                f"mixture.{name}: `mixing: aioli` measures losses on held-out rows; set `holdout`"
            )
        limit = min(data.aioli.rows, part.eval_limit or data.aioli.rows)
        limited = part.model_copy(update={"eval_limit": limit})
        held_out = load_groups(limited, tokenizer, _group_kind(config, part), "test")
        sets[name] = replace(held_out, groups=held_out.groups[:limit])
    return sets


def _group_kind(config: Config, data: DataConfig) -> DataKind:
    """Return the kind of groups of the algorithm; preference data may also be ranked lists."""
    kind = config.algorithm.data
    if kind == "preference":
        row = first_row(data)
        if "completions" in row and "chosen" not in row:
            return "ranked"
    return kind


def check_offline(
    config: Config, data: OfflineData, tokenizer: Any, stops: Sequence[int] | None, positions: int | None
) -> list[str]:
    """Check the rows against the model and the algorithm."""
    algorithm, problems = config.algorithm, []
    # Turns of collected sessions end where their engine stopped them.
    if stops is not None and not score_heads(algorithm) and config.data.sessions is None:
        problems += unstopped_turns(data.sample, stops, tokenizer)
    problems += check_lengths("data", data.sample, positions)
    for name, rows in data.sets.items():
        problems += check_lengths(f"eval.sets.{name}.data", rows.groups, positions)
    return problems + check_batch(algorithm, data.sample[: min(DRY_RUN_GROUPS, config.train.batch_size)])


def check_lengths(key: str, groups: Sequence[Group], positions: int | None) -> list[str]:
    """Check that the longest row fits the model's positions. key: config key of the data."""
    longest = max(len(g.prompt.tokens) + len(c.tokens) for g in groups for c in g.completions)
    if positions is None or longest <= positions:
        return []
    return [
        f"{key}: the longest row has {longest} tokens, and the model {positions} positions; set "
        f"max_length: {positions}, and overlong: skip or truncate"
    ]


def check_batch(algorithm: Algorithm, groups: list[Group]) -> list[str]:
    """Run an algorithm on real groups with dummy log-probs, to detect e.g. missing columns."""
    try:
        batch = Batch.build(arrange(algorithm, groups))
        zeros = torch.zeros(batch.num_tokens)
        scores = torch.zeros(batch.num_tokens, max(score_heads(algorithm), 1))
        columns = {**batch.columns, "old_scores": scores[: batch.num_sequences]}
        if reads_start(algorithm):
            columns["start_logps"] = torch.zeros(batch.num_sequences, batch.num_tokens)
        filled = {"old_logps": zeros, "ref_logps": zeros, "old_entropy": zeros}
        batch = batch.with_(**filled, columns=columns, state={"progress": 0.0})
        batch = algorithm.prepare(batch)
        policy = PolicyOutput(logps=zeros, entropy=zeros, values=zeros, kl=zeros, scores=scores)
        algorithm.loss(policy, batch)
    except ValueError as error:
        remedy = (
            "; give it under data.numbers (weight: under data.sources)" if "columns[" in str(error) else ""
        )
        return [f"algorithm.{algorithm_name(algorithm)}: {error}{remedy}"]
    return []


# -- the warm start ------------------------------------------------------------------------------------


def warm_start_folder(config: Config, stage: WarmStartConfig, model: str) -> Path:
    """Return the cache folder of a warm start's result."""
    key = {
        "stage": stage.model_dump(mode="json", exclude={"cache"}),
        "data": warm_start_data(config, stage).model_dump(mode="json"),
        "model": config.model.model_dump(mode="json"),
        "seed": config.seed,
        "code": REVISION,
        "loaded": model,
    }
    if warm_start_data(config, stage).decontaminate == "drop":  # then the evaluation rows matter as well
        key["evaluation"] = config.data.model_dump(mode="json"), config.eval.model_dump(mode="json")
    return Path(stage.cache) / f"warm-start-{fingerprint(key)}"


def warm_start_data(config: Config, stage: WarmStartConfig) -> DataConfig:
    """Return the data config of the stage: its `data`, or else the run's."""
    return stage.data or config.data


def warm_start_groups(config: Config, data: DataConfig, tokenizer: Any) -> GroupSet:
    """Load the demonstrations of a warm start. Raises DataError."""
    groups = load_groups(data, tokenizer, "sft")
    if data.decontaminate == "report":
        return groups
    return _decontaminated(groups, _evaluation_rows(config, tokenizer))


def is_finished(folder: Path) -> bool:
    """Return whether a warm start's folder contains its result."""
    return (folder / "config.json").exists()


def check_warm_start(
    config: Config, model: str, tokenizer: Any, stops: Sequence[int] | None, positions: int
) -> list[str]:
    """Check the demonstrations of a warm start, unless it is cached and its data are not read again.

    stops: stop token ids; None: not known yet. positions: maximum positions of the model.
    """
    stage = config.warm_start
    if stage is None or is_finished(warm_start_folder(config, stage, model)):
        return []
    data = warm_start_data(config, stage)
    draws = stage.steps * stage.batch_size
    if data.resolved_kind not in ("file", "hub", "mixture"):
        data = data.model_copy(update={"limit": min(data.limit or GENERATED, GENERATED)})
    key = "warm_start.data"
    try:
        groups = warm_start_groups(config, data, tokenizer).groups
        if mixture := mixture_sampler(data, [group.prompt for group in groups], config.seed, draws):
            mixture.check("warm_start.steps x warm_start.batch_size")
    except DataError as error:
        other = "" if stage.data else "\n(this is the data of the run; name other data under warm_start.data)"
        return [f"{key}: {error}{other}"]
    unstopped = [] if stops is None else unstopped_turns(groups, stops, tokenizer, key)
    return unstopped + check_lengths(key, groups, positions)
