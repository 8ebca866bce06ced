"""Sessions as JSON lines, as `rft collect` writes them, and groups of them for offline training.

A line has the tokens that the engine was given and sampled, so that training on it encodes nothing again.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from rft.algorithms.base import DataKind
from rft.batch import Branch, Completion, Group, Prompt, Turn
from rft.config.data import DataConfig
from rft.data.errors import BadRows, DataError, RowProblem
from rft.data.rows import Split, hold_out, open_source
from rft.utils.hashing import fingerprint

KINDS: tuple[DataKind, ...] = ("sft", "preference", "unpaired")
"""The kinds of groups that sessions give."""


def tokenizer_id(tokenizer: Any) -> str:
    """Return a hash of a tokenizer's vocabulary: equal ids mean equal texts."""
    return fingerprint(tokenizer.get_vocab())


def line_of(
    prompt: Prompt, sample: int, c: Completion, success: bool | None, tokenizer: str
) -> dict[str, Any]:
    """Return a session as a JSON object.

    prompt: `tokens` are those that its group shares. sample: its number in the group. c: with reward and
    scores. success: None if it could not be judged. tokenizer: see `tokenizer_id`.
    """
    opening = prompt.text if isinstance(prompt.text, list) else [{"role": "user", "content": prompt.text}]
    if c.origin is not None and c.origin.opening:
        opening = [dict(message) for message in c.origin.opening]
    transcript = [dict(m) for m in c.messages] or [{"role": "assistant", "content": c.text}]
    turns = c.turns or ((0, len(c.tokens), None, ""),)
    mask = c.mask or (True,) * len(c.tokens)
    logps: Sequence[float] = c.logps or ()
    return {
        "prompt_id": prompt.id,
        "sample": sample,
        "row": {**prompt.columns, "prompt": prompt.text},
        "messages": [*opening, *transcript],
        "reward": c.reward,
        "success": success,
        "scores": {name: score.value for name, score in c.scores.items()},
        "outcome": {name: str(score.outcome) for name, score in c.scores.items()},
        "ending": "finished" if c.origin is None else c.origin.ending,
        "finish": c.finish,
        "seed": None if c.origin is None else c.origin.seed,
        "tokenizer": tokenizer,
        "prompt_ids": list(prompt.tokens),
        "ids": list(c.tokens),
        "logprobs": [p if sampled else None for p, sampled in zip(logps, mask, strict=True)],
        "turns": [{"start": a, "end": b, "reward": reward} for a, b, reward, _ in turns],
        "branches": [list(branch) for branch in c.branches],
    }


@dataclass(frozen=True)
class _Session:
    """A line of the file. success: None if the rewards could not judge it."""

    prompt: Prompt
    completion: Completion
    success: bool | None

    @property
    def reward(self) -> float:
        return self.completion.reward or 0.0


class SessionReader:
    """Build groups of collected sessions. `skipped`: numbers of unused prompts or lines, by reason."""

    def __init__(
        self, config: DataConfig, tokenizer: Any, kind: DataKind, max_length: int | None = None
    ) -> None:
        if kind not in KINDS:
            raise DataError(
                "collected sessions are demonstrations, pairs, or successes and failures, and this algorithm "
                f"trains on {kind} data; choose sft, dpo or kto, or remove data.sessions",
                source=config.path,
            )
        assert config.sessions is not None
        self.config, self.kind, self.settings = config, kind, config.sessions
        self.max_length = max_length or config.max_length
        self.tokenizer, self.vocabulary = tokenizer_id(tokenizer), len(tokenizer)
        self.source = str(config.path)
        self.skipped: dict[str, int] = {}

    def groups(self, split: Split) -> list[Group]:
        """Return the groups of a split. `limit` and `holdout` count prompts, so that the sessions of one
        prompt stay together. Raises DataError."""
        lines, self.source = open_source(self.config, split)
        self.bad, self.long = BadRows(self.source), BadRows(self.source)
        prompts: dict[Any, list[tuple[int, Mapping[str, Any]]]] = {}
        for number, line in enumerate(lines, 1):
            if not isinstance(line, Mapping) or "ids" not in line or "prompt_id" not in line:
                raise DataError(
                    "not a session of `rft collect`: it has no `ids` and `prompt_id`; remove "
                    "data.sessions to train on texts",
                    source=self.source,
                    row=number,
                )
            prompts.setdefault(line["prompt_id"], []).append((number, line))
        names = list(prompts)
        if not names:
            raise DataError("the dataset is empty; give at least one session", source=self.source)
        limit = self.config.limit if split == "train" else self.config.eval_limit
        chosen = hold_out(self.config, split, len(names), self.source)
        groups = []
        for index in chosen if limit is None else chosen[:limit]:
            read = [self._read(line, number) for number, line in prompts[names[index]]]
            groups += self._choose([session for session in read if session is not None])
        return groups

    def check(self, groups: Sequence[Group]) -> None:
        """Raise DataError for bad and overlong lines, unless the config skips them, and if none is left."""
        if self.bad and self.config.bad_rows != "skip":
            raise self.bad.error("fix or remove them, or set `bad_rows: skip` to leave them out")
        if self.long and self.config.overlong == "reject":
            raise self.long.error("raise the limit, or set `overlong: skip` to leave them out")
        for rows in (self.bad, self.long):
            self.skipped.update(rows.counts)
        if not groups:
            counts = ", ".join(f"{count}: {reason}" for reason, count in self.skipped.items())
            raise DataError(f"no session is left to train on ({counts})", source=self.source)

    # -- one line ------------------------------------------------------------------------------------------

    def _read(self, line: Mapping[str, Any], number: int) -> _Session | None:
        """Return the session of a line; None if it is bad or overlong, which is recorded."""
        try:
            if line.get("tokenizer") != self.tokenizer:
                raise RowProblem(
                    "it was sampled with another tokenizer, so its ids are other texts; train the model that "
                    "sampled it, or remove data.sessions to encode the column `messages` afresh"
                )
            session = self._parse(line, number)
        except RowProblem as problem:
            self.bad.add(str(problem), number)
            return None
        longest, shared = self.config.max_prompt_length, len(session.prompt.tokens)
        if longest is not None and shared > longest:
            self.long.add(f"the prompt is longer than max_prompt_length={longest} tokens", number)
            return None
        if self.max_length is not None and shared + len(session.completion.tokens) > self.max_length:
            self.long.add(f"the session is longer than max_length={self.max_length} tokens", number)
            return None
        return session

    def _parse(self, line: Mapping[str, Any], number: int) -> _Session:
        """Return the session of a line. Raises RowProblem."""
        shared, ids = self._ids(line, "prompt_ids"), self._ids(line, "ids")
        mask = [False] * len(ids)
        for turn in _listed(line, "turns"):
            start, end = (turn.get("start"), turn.get("end")) if isinstance(turn, Mapping) else (None, None)
            if type(start) is not int or type(end) is not int or not 0 <= start <= end <= len(ids):
                raise RowProblem(f"`turns` has {turn!r:.60}, not a part of the {len(ids)} `ids`")
            mask[start:end] = [True] * (end - start)
        if not any(mask):
            raise RowProblem("no turn sampled a token")
        reward, success = line.get("reward"), line.get("success")
        if reward is not None and (type(reward) not in (int, float) or not math.isfinite(reward)):
            raise RowProblem(f"`reward` must be a finite number or null, not {reward!r:.40}")
        if success is not None and not isinstance(success, bool):
            raise RowProblem(f"`success` must be true, false or null, not {success!r:.40}")
        row = line.get("row")
        columns = dict(row) if isinstance(row, Mapping) else {}
        text = columns.pop("prompt", "")
        completion = Completion(
            tokens=ids,
            finish="length" if line.get("finish") == "length" else "demonstration",
            mask=None if all(mask) else tuple(mask),
            demonstrated=len(ids),
            reward=None if reward is None else float(reward),
            branches=self._branches(line, len(shared), len(ids)),
            turns=tuple(Turn(t["start"], t["end"], None, "") for t in line["turns"]),
        )
        return _Session(Prompt(number - 1, shared, text, columns), completion, success)

    def _ids(self, line: Mapping[str, Any], name: str) -> tuple[int, ...]:
        ids = _listed(line, name)
        wrong = next((i for i in ids if type(i) is not int or not 0 <= i < self.vocabulary), None)
        if wrong is not None or not ids:
            what = (
                "is empty" if wrong is None else f"has {wrong!r:.40}, not a token id below {self.vocabulary}"
            )
            raise RowProblem(f"`{name}` {what}")
        return tuple(ids)

    def _branches(self, line: Mapping[str, Any], shared: int, length: int) -> tuple[Branch, ...]:
        branches = _listed(line, "branches") if line.get("branches") else []
        for branch in branches:
            two = isinstance(branch, list) and len(branch) == 2 and all(type(x) is int for x in branch)
            if not two or not 0 <= branch[0] < length or not -1 <= branch[1] < shared + branch[0]:
                raise RowProblem(f"`branches` has {branch!r:.60}, not [start, position that it follows]")
        starts = [branch[0] for branch in branches]
        if branches and (starts[0] != 0 or any(a >= b for a, b in pairwise(starts))):
            raise RowProblem("the starts of `branches` must ascend from 0")
        return tuple(Branch(*branch) for branch in branches)

    # -- the sessions of one prompt ------------------------------------------------------------------------

    def _choose(self, sessions: Sequence[_Session]) -> list[Group]:
        """Return the groups of a prompt's sessions, as the settings choose them."""
        least = self.settings.min_reward
        judged = [s for s in sessions if s.completion.reward is not None]
        self._skip("without a reward", len(sessions) - len(judged))
        if self.kind == "preference":
            return self._pairs(judged)
        kept = [s for s in judged if least is None or s.reward >= least]
        self._skip(f"with a reward below {least}", len(judged) - len(kept))
        if self.kind == "unpaired":
            marked = [s for s in kept if s.success is not None]
            self._skip("neither success nor failure", len(kept) - len(marked))
            return [Group(s.prompt, (replace(s.completion, reward=float(bool(s.success))),)) for s in marked]
        chosen = self._kept(kept)
        self._skip("not kept (data.sessions.keep)", len(kept) - len(chosen))
        return [
            Group(s.prompt, (replace(s.completion, reward=1.0, values={"reward": s.reward}),)) for s in chosen
        ]

    def _kept(self, sessions: Sequence[_Session]) -> Sequence[_Session]:
        if self.settings.keep == "successes":
            return [s for s in sessions if s.success]
        if self.settings.keep == "best" and sessions:
            return [max(sessions, key=lambda s: s.reward)]  # the first of equally good ones
        return sessions

    def _pairs(self, sessions: Sequence[_Session]) -> list[Group]:
        """Pair the best session with the worst, the second best with the second worst, ..."""
        order = sorted(sessions, key=lambda s: -s.reward)
        least, groups = self.settings.min_reward, list[Group]()
        for good, bad in zip(order, reversed(order), strict=True):
            if good.reward <= bad.reward or len(groups) == self.settings.pairs:
                break
            if good.prompt.tokens == bad.prompt.tokens and (least is None or good.reward >= least):
                pair = replace(good.completion, reward=1.0), replace(bad.completion, reward=0.0)
                groups.append(Group(good.prompt, pair))
        self._skip("prompts without a pair of different rewards", not groups)
        return groups

    def _skip(self, reason: str, count: int) -> None:
        if count:
            self.skipped[reason] = self.skipped.get(reason, 0) + count


def _listed(line: Mapping[str, Any], name: str) -> list[Any]:
    value = line.get(name)
    if not isinstance(value, list):
        raise RowProblem(f"`{name}` must be a list, not {value!r:.40}")
    return value
