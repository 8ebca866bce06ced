"""Preflight of offline runs: their data, and what an algorithm would trip over in the middle of training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rft.algorithms import Algorithm, PolicyOutput
from rft.algorithms.base import DataKind
from rft.batch import Batch, Group
from rft.config.schema import Config, algorithm_name
from rft.data import (
    DataError,
    GroupSampler,
    GroupSet,
    GroupSource,
    GroupStream,
    first_row,
    has_held_out,
    load_groups,
)

TRIED = 8  # groups of the dry run


@dataclass(frozen=True)
class OfflineData:
    """What an offline run trains on, `sample` of it (all, or a stream's first groups), and what it is
    evaluated on."""

    train: GroupSet | GroupStream
    sample: list[Group]
    held_out: GroupSet | None

    def source(self, config: Config) -> GroupSource:
        """The groups in the run's order."""
        if isinstance(self.train, GroupStream):
            return self.train
        return GroupSampler(self.train, config.seed, shuffle=config.data.shuffle)

    def lines(self, config: Config) -> list[str]:
        """Both in words."""
        if isinstance(self.train, GroupStream):
            out = [f"data         streamed from {self.train.source}"]
        else:
            out = [f"data         {self.train}"]
        if self.held_out is not None:
            out.append(f"evaluation   {self.held_out}, every {config.eval.every} steps")
        elif config.eval.every:
            out.append("evaluation   none: there are no held-out rows (data.holdout, data.eval_path)")
        return out


def load_offline(config: Config, tokenizer: Any) -> OfflineData:
    """Read the data of an offline run; of a stream, the first batch. Raises DataError."""
    kind, data = _group_kind(config), config.data
    held_out = None
    if config.eval.every and has_held_out(data):
        limit = min(config.eval.problems, data.eval_limit or config.eval.problems)
        whole = data.model_copy(update={"streaming": False, "eval_limit": limit})
        try:
            held_out = load_groups(whole, tokenizer, kind, "test")
        except DataError as error:
            raise DataError(f"held-out rows: {error}\n(without them: eval.every: 0)") from error
    if not data.streaming:
        train = load_groups(data, tokenizer, kind)
        return OfflineData(train, train.groups, held_out)
    first = GroupStream(data, tokenizer, kind).next(config.train.batch_size)
    return OfflineData(GroupStream(data, tokenizer, kind), first, held_out)


def _group_kind(config: Config) -> DataKind:
    """The kind of groups that the algorithm trains on; preferences may come as ranked lists, too."""
    kind = config.algorithm.data
    if kind == "preference":
        row = first_row(config.data)
        if "completions" in row and "chosen" not in row:
            return "ranked"
    return kind


def offline_problems(config: Config, data: OfflineData | None, positions: int) -> list[str]:
    """Settings of an offline run that do not fit together, or not to its data and to a model that reads
    `positions` tokens."""
    algorithm, out = config.algorithm, []
    name = algorithm_name(algorithm)
    if config.eval.generate and algorithm.score_heads:
        out.append(f"eval.generate: {name} trains a reward model, which generates nothing; set it to false")
    if config.eval.generate and not config.rewards.functions:
        out.append("eval.generate: completions are scored by rewards; add `rewards: [{function: math}]`")
    for key in ("adapter", "quantize", "strategy"):
        if algorithm.score_heads and getattr(config.learner, key) is not None:
            out.append(f"learner.{key}: {name} trains a whole reward model with a new head; leave it out")
    if config.learner.reference_logps == "cached":
        out += _uncached(algorithm, name, config.data.streaming)
    if data is None:
        return out
    if data.held_out is not None and name == "kto" and len(data.held_out) < 2:
        out.append("data: kto compares responses, and there is only one held-out row; set aside more")
    out += overlong_problem("data", data.sample, positions)
    return out + dry_run(algorithm, data.sample[: min(TRIED, config.train.batch_size)])


def overlong_problem(key: str, groups: Sequence[Group], positions: int) -> list[str]:
    """What is wrong where a row is longer than the model's positions. key: what the config calls the data."""
    longest = max(len(g.prompt.tokens) + len(c.tokens) for g in groups for c in g.completions)
    if longest <= positions:
        return []
    return [
        f"{key}: the longest row has {longest} tokens, and the model {positions} positions; set "
        f"max_length: {positions}, and overlong: skip or truncate"
    ]


def _uncached(algorithm: Algorithm, name: str, streaming: bool) -> list[str]:
    """Why reference log-probs of an algorithm cannot be computed beforehand."""
    if not algorithm.needs_reference:
        why = f"{name} reads no reference"
    elif algorithm.compares_distributions:
        why = f"{name} compares whole distributions, for which the reference has to run"
    elif streaming:
        why = "a stream is never seen as a whole"
    elif algorithm.refresh_reference:
        why = f"{name} moves its reference"
    elif algorithm.data == "unpaired" and algorithm.prescored:
        why = f"{name} pairs prompts with other responses anew each epoch; or write baseline: zero"
    else:
        return []
    return [f"learner.reference_logps: {why}; write live"]


def dry_run(algorithm: Algorithm, groups: list[Group]) -> list[str]:
    """What the algorithm says of real groups with made-up log-probs: a column that is missing, for one."""
    try:
        batch = Batch.build(algorithm.arrange(groups))
        nothing = torch.zeros(batch.num_tokens)
        batch = batch.with_(old_logps=nothing, ref_logps=nothing, state={"progress": 0.0})
        batch = algorithm.prepare(batch)
        scores = torch.zeros(batch.num_tokens, max(algorithm.score_heads, 1))
        policy = PolicyOutput(logps=nothing, entropy=nothing, values=nothing, kl=nothing, scores=scores)
        algorithm.loss(policy, batch)
    except ValueError as error:
        remedy = (
            "; give it under data.numbers (weight: under data.sources)" if "columns[" in str(error) else ""
        )
        return [f"algorithm.{algorithm_name(algorithm)}: {error}{remedy}"]
    return []


def reference_problem(reference: str, vocabulary: int, trust_remote_code: bool) -> str | None:
    """Why a model cannot be the reference of a policy with that vocabulary; None where it can."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(reference, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        why = str(error).splitlines()[0]
        return f"model.reference: {reference!r} is neither a model folder nor a hub model: {why}"
    size = config.get_text_config().vocab_size
    if size != vocabulary:
        return (
            f"model.reference: {reference} has a vocabulary of {size:,}, the policy one of {vocabulary:,}; "
            "its log-probs of the policy's tokens mean nothing"
        )
    return None
