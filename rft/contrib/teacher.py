"""A teacher behind an endpoint: score completions, or a dataset once, with vLLM's `prompt_logprobs`.

    POST /completions {"prompt": ids, "prompt_logprobs": K, "max_tokens": 1}
      -> choices[0].prompt_logprobs: null for the first token, then {"ID": {"logprob": ..}, ...}

The entry of a place has the K most likely tokens and the one that stands there.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from safetensors.torch import load_file, save_file

from rft.algorithms.extras import compares_distributions
from rft.batch import Batch, Completion, Group, Prompt
from rft.config.schema import Config
from rft.config.teacher import TeacherConfig
from rft.data.chat import Renderer
from rft.data.groups import GroupSet
from rft.data.messages import read_tools
from rft.errors import ConfigError, EngineError
from rft.metrics import Progress
from rft.plan import OfflinePlan, OnlinePlan
from rft.rollout.hooks import LoopHooks
from rft.rollout.sample import decode, text_length
from rft.samples import TopTokens
from rft.utils.deadlines import unless_stopped
from rft.utils.files import write_atomic
from rft.utils.hashing import json_digest
from rft.utils.http import HTTPFailure, Poster

Row = dict[str, dict[str, Any]]  # of one place: the entry of each token, by id
Array = np.ndarray[Any, Any]
PROBE = "The quick brown fox jumps over 13 lazy dogs."
CHUNK = 512  # groups in one file of the cache: a stopped run continues after the last complete one


@dataclass(frozen=True)
class Scores:
    """Log-probs [n] of n tokens, in nats, and the teacher's most likely tokens in their places."""

    logps: tuple[float, ...]
    top: TopTokens


class Teacher:
    """The client of a teacher. It sends token ids: those of the policy, or with `teacher.tokenizer` those of
    the teacher for the same text."""

    def __init__(self, config: Config, tokenizer: Any) -> None:
        assert config.teacher is not None
        self.config: TeacherConfig = config.teacher
        self.tokenizer = self.own_tokenizer = tokenizer
        if self.config.tokenizer is not None:
            self.own_tokenizer = _load_tokenizer(self.config.tokenizer, config.model.trust_remote_code)
        self.render = Renderer(config.data, self.own_tokenizer)
        self.top_k = self.config.top_k if compares_distributions(config.algorithm) else 0
        self.cache = Path(self.config.cache or Path(config.output_dir) / ".cache")
        key = os.environ.get(self.config.api_key_env, "")
        self._client = httpx.AsyncClient(
            headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=self.config.request_timeout_s
        )
        self._poster = Poster(self.config.retries)
        self._slots = asyncio.Semaphore(self.config.concurrency)
        self._checked = False

    async def check(self) -> None:
        """Score a sentence. Raises ConfigError if the server does not score prompts, or has another
        tokenizer; EngineError if it cannot be reached."""
        if self._checked:
            return
        tokens: list[int] = self.own_tokenizer(PROBE)["input_ids"]
        for token, row in zip(tokens, await self._ask(tokens), strict=True):
            theirs = None if row is None else row[str(token)].get("decoded_token")
            ours = self.own_tokenizer.decode([token])
            if not theirs or "\ufffd" in theirs + ours:  # part of a character, or a server without texts
                continue
            if theirs.strip() != ours.strip():
                raise ConfigError(
                    [
                        f"teacher: the token {token} is {theirs!r} at {self.config.base_url}, not {ours!r}; "
                        "use a teacher with the policy's tokenizer, or set teacher.tokenizer"
                    ]
                )
        self._checked = True

    async def score(self, group: Group) -> Group:
        """Return the group with `ref_logps` and `teacher` at each completion. Raises EngineError."""
        score = self._score if self.config.tokenizer is None else self._score_text
        prompt = self._seen(group.prompt)
        scored = await asyncio.gather(*(score(prompt, c) for c in group.completions))
        return replace(group, completions=tuple(map(_with, group.completions, scored)))

    async def score_all(self, groups: Sequence[Group]) -> list[Group]:
        """Return a dataset's groups with their scores, which are read from the cache where they are in it."""
        result: list[Group] = []
        for start in range(0, len(groups), CHUNK):
            chunk = groups[start : start + CHUNK]
            file = self.cache / f"teacher-{self._digest(chunk)}.safetensors"
            if not file.exists():
                await self.check()
                self._save(file, await asyncio.gather(*(self.score(group) for group in chunk)))
            result += _read(chunk, file)
        return result

    async def close(self) -> None:
        await self._client.aclose()

    async def _score(self, prompt: Prompt, c: Completion) -> Scores:
        logps = np.zeros(len(c.tokens), np.float32)
        ids, top = self._empty(c)
        runs = list(_runs(prompt, c))
        for (_, start, end), rows in zip(
            runs,
            await asyncio.gather(*(self._ask([*before, *c.tokens[a:b]]) for before, a, b in runs)),
            strict=True,
        ):
            for place, row in zip(range(start, end), rows[start - end :], strict=True):
                if row is None:  # the first token of all
                    continue
                logps[place] = row[str(c.tokens[place])]["logprob"]
                self._fill(ids[place], top[place], row)
        return Scores(tuple(logps.tolist()), TopTokens(ids, top))

    async def _score_text(self, prompt: Prompt, c: Completion) -> Scores:
        """Score the text of a completion with the teacher's tokenizer. Its distributions are put where a
        token of the policy begins with one of the teacher; the log-probs of single tokens are 0."""
        ids, top = self._empty(c)
        length = text_length(c.tokens, self.tokenizer, stopped=c.finish == "stop")
        (text,) = decode([c.tokens[:length]], self.tokenizer)
        ours, begins = _encode(self.tokenizer, text)
        if c.mask is None and ours == list(c.tokens[:length]):  # else the places of its tokens are not known
            theirs, places = _encode(self.own_tokenizer, text)
            end = list(self.render.end_ids) or [self.own_tokenizer.eos_token_id]
            sent = [*prompt.tokens, *theirs, *end[:1]]
            rows = (await self._ask(sent))[len(prompt.tokens) :]
            # Tokens of one character have one place: its first token's entry counts.
            row_at = dict(zip([*places, len(text)][::-1], rows[::-1], strict=True))
            at = [*begins, len(text)][: len(c.tokens)]

            for place, begin in enumerate(at):
                row = row_at.get(begin) if place == 0 or at[place - 1] != begin else None
                if row is not None:
                    self._fill(ids[place], top[place], row)
        return Scores((0.0,) * len(c.tokens), TopTokens(ids, top))

    def _empty(self, c: Completion) -> tuple[Array, Array]:
        ids = np.full((len(c.tokens), max(self.top_k, 1)), -1, np.int32)
        return ids, np.full(ids.shape, -np.inf, np.float32)

    def _fill(self, ids: Array, top: Array, row: Row) -> None:
        """Write the K most likely tokens of an entry into [K] ids and log-probs."""
        best = sorted(((e["logprob"], int(i)) for i, e in row.items()), reverse=True)[: self.top_k]
        ids[: len(best)] = [i for _, i in best]
        top[: len(best)] = [p for p, _ in best]

    def _seen(self, prompt: Prompt) -> Prompt:
        """Return the prompt as the teacher reads it. Raises ConfigError for a column that is missing."""
        if self.config.template is None and self.config.tokenizer is None:
            return prompt
        text = prompt.text
        if self.config.template is not None:
            asked = text if isinstance(text, str) else text[-1]["content"]
            try:
                shown = self.config.template.format(**{**prompt.columns, "prompt": asked})
            except (KeyError, IndexError, ValueError) as error:
                raise ConfigError(
                    [
                        f"teacher.template: {error!r} in row {prompt.id + 1}; it may name `{{prompt}}` and "
                        f"the columns {', '.join(sorted(prompt.columns)) or '(none)'}"
                    ]
                ) from None
            text = shown if isinstance(text, str) else [*text[:-1], {**text[-1], "content": shown}]
        tools = read_tools(prompt.columns.get("tools"))
        return replace(prompt, tokens=tuple(self.render.prompt(text, tools)[1]))

    async def _ask(self, tokens: Sequence[int]) -> list[Row | None]:
        """Return the entry of each token. Raises EngineError, and ConfigError for a server of another
        kind."""
        url = f"{self.config.base_url}/completions"
        body = {
            "model": self.config.model,
            "prompt": list(tokens),
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": self.top_k,
        }
        try:
            async with self._slots:
                response = await self._poster.post(self._client, url, body)
        except HTTPFailure as error:
            raise EngineError(f"the teacher at {error}") from None
        try:
            rows: list[Row | None] = response.json()["choices"][0]["prompt_logprobs"]
            whole = len(rows) == len(tokens) and all(
                row is None or str(token) in row for token, row in zip(tokens, rows, strict=True)
            )
        except (ValueError, KeyError, IndexError, TypeError):
            whole = False
        if not whole:
            raise ConfigError(
                [
                    f"teacher: {self.config.base_url} does not score prompts: its reply has no "
                    "`prompt_logprobs` for each token of the prompt. Use vLLM, `rft serve`, or another "
                    "server with that parameter"
                ]
            )
        return rows

    def _digest(self, groups: Sequence[Group]) -> str:
        rows = [
            [self._seen(g.prompt).tokens, [[c.tokens, c.branches] for c in g.completions]] for g in groups
        ]
        return json_digest([self.config.model, self.config.tokenizer, self.top_k, rows])[:16]

    def _save(self, file: Path, groups: Sequence[Group]) -> None:
        scored = [c for g in groups for c in g.completions]
        tops = [c.teacher for c in scored if c.teacher is not None]
        tensors = {
            "logps": torch.tensor([p for c in scored for p in c.ref_logps or ()]),
            "ids": torch.from_numpy(np.concatenate([top.ids for top in tops])),
            "top": torch.from_numpy(np.concatenate([top.logps for top in tops])),
        }
        self.cache.mkdir(parents=True, exist_ok=True)
        with write_atomic(file) as temporary:
            save_file(tensors, temporary)


class TeacherHooks(LoopHooks):
    """Hooks that add a teacher's scores to each group of an online run."""

    def __init__(self, teacher: Teacher) -> None:
        self.teacher = teacher
        self._seconds = 0.0  # the slowest group's, since the last step

    async def scored(self, group: Group) -> Group:
        begin = time.perf_counter()
        group = await self.teacher.score(group)
        self._seconds = max(self._seconds, time.perf_counter() - begin)
        return group

    async def after_push(self, step: int, build: Callable[[list[Group]], Batch]) -> dict[str, float]:
        seconds, self._seconds = self._seconds, 0.0
        return {"time/teacher": seconds}

    async def close(self) -> None:
        await self.teacher.close()


async def hooks_of(plan: OnlinePlan, progress: Progress, stop: asyncio.Event) -> TeacherHooks:
    """Check the teacher of an online run; return the hooks that ask it."""
    progress.stage("asking the teacher")
    teacher = Teacher(plan.config, plan.tokenizer)
    try:
        await unless_stopped(teacher.check(), stop)
    except BaseException:
        await teacher.close()
        raise
    return TeacherHooks(teacher)


async def with_teacher(plan: OfflinePlan, progress: Progress, stop: asyncio.Event) -> OfflinePlan:
    """Return the plan with a teacher's scores at each completion of its training and held-out groups."""
    progress.stage("scoring by the teacher")
    teacher = Teacher(plan.config, plan.tokenizer)

    async def scored(groups: GroupSet) -> GroupSet:
        return replace(groups, groups=await unless_stopped(teacher.score_all(groups.groups), stop))

    data = plan.data
    assert isinstance(data.train, GroupSet), "the checks of the config refuse a teacher for a stream"
    try:
        train = await scored(data.train)
        held_out = None if data.held_out is None else await scored(data.held_out)
        sets = {name: await scored(rows) for name, rows in data.sets.items()}
        by_source = {name: await scored(rows) for name, rows in data.by_source.items()}
    finally:
        await teacher.close()
    data = replace(data, train=train, sample=train.groups, held_out=held_out, sets=sets, by_source=by_source)
    return replace(plan, data=data)


def _load_tokenizer(path: str, trust_remote_code: bool) -> Any:
    """Load a fast tokenizer, which knows where its tokens begin. Raises ConfigError."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ConfigError([f"teacher.tokenizer: {path!r} cannot be loaded: {error}"]) from None
    if not tokenizer.is_fast:
        raise ConfigError([f"teacher.tokenizer: {path!r} is not a fast tokenizer, which rft needs here"])
    return tokenizer


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[int]]:
    """Return a text's token ids, and where each token begins, in characters."""
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(encoded["input_ids"]), [begin for begin, _ in encoded["offset_mapping"]]


def _runs(prompt: Prompt, c: Completion) -> Iterator[tuple[list[int], int, int]]:
    """Yield (the tokens before a branch, its start, its end), for each branch of a completion."""
    shared, branches = len(prompt.tokens), c.branches or ((0, len(prompt.tokens) - 1),)
    ends = [*(start for start, _ in branches[1:]), len(c.tokens)]

    def path(last: int) -> list[int]:
        """Return the tokens up to position `last` of (prompt + completion)."""
        if last < shared:
            return list(prompt.tokens[: last + 1])
        place = last - shared
        start, after = next((s, a) for (s, a), end in zip(branches, ends, strict=True) if s <= place < end)
        return [*path(after), *c.tokens[start : place + 1]]

    for (start, after), end in zip(branches, ends, strict=True):
        yield path(after), start, end


def _with(c: Completion, scores: Scores) -> Completion:
    return replace(c, ref_logps=scores.logps, teacher=scores.top)


def _read(groups: Sequence[Group], file: Path) -> list[Group]:
    """Return groups with the scores of a file of the cache. Raises ValueError if it does not fit them."""
    tensors = load_file(file)
    logps, ids, top = (tensors[name] for name in ("logps", "ids", "top"))
    lengths = [len(c.tokens) for g in groups for c in g.completions]
    if not sum(lengths) == len(logps) == len(ids) == len(top):
        raise ValueError(
            f"{file} has the scores of {len(logps)} tokens, but the data has {sum(lengths)}: delete the "
            "file, and the teacher is asked again"
        )
    parts = zip(logps.split(lengths), ids.split(lengths), top.split(lengths), strict=True)
    scores = (Scores(tuple(p.tolist()), TopTokens(i.numpy(), t.numpy())) for p, i, t in parts)
    return [replace(g, completions=tuple(_with(c, next(scores)) for c in g.completions)) for g in groups]
