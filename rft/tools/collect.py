"""`rft collect`: play sessions with a config's environment and engine, without training, and write them down.

OUT/collect.yaml          the config and the arguments
    sessions.jsonl        one line for each session (`rft.data.sessions`); it appears when all were played
    sessions.part.jsonl   until then: whole groups, in the order in which they were finished
"""

from __future__ import annotations

import asyncio
import json
import os
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rft.algorithms.base import Rollout
from rft.batch import Prompt
from rft.config.schema import Config
from rft.data import load_prompts
from rft.data.sessions import line_of, tokenizer_id
from rft.errors import ConfigError
from rft.loops.evaluate import is_correct
from rft.metrics.log import iterate_jsonl
from rft.plan import OnlinePlan, make_plan
from rft.preflight.data import is_finished, warm_start_folder
from rft.rollout.engine import Request, Sampling
from rft.rollout.episodes import make_episodes
from rft.rollout.sample import Judged, completions_of, judge
from rft.run_training import make_environments, make_pool, make_rewards, start_environments
from rft.tools.export import weights_of
from rft.tools.out_folder import claimed
from rft.utils.deadlines import stop_event, unless_stopped
from rft.utils.files import write_atomic
from rft.utils.hashing import model_digest
from rft.utils.ray_cluster import ray_cluster
from rft.utils.seeds import derive_seed
from rft.utils.signals import StopRequests

SESSIONS, PART, SETTINGS = "sessions.jsonl", "sessions.part.jsonl", "collect.yaml"
SAY_EVERY = 10  # times in a collection that its progress is printed

Say = Callable[[str], None]
Play = Callable[[Prompt, int, int], Awaitable[Judged]]  # prompt, number of its first session, sessions
ToolsOf = Callable[[Prompt], list[dict[str, Any]]]  # their JSON schemas


@dataclass(frozen=True)
class Arguments:
    """The arguments of a collection.

    model: a folder or hub name, or a run's folder (None: the config's). samples: sessions of a prompt (None:
    train.num_generations). prompts: the first so many rows of the split (None: all). up_to: sessions that a
    prompt without a success may have, out of what the others leave of `samples` each (None: all have
    `samples`).
    """

    model: str | None = None
    samples: int | None = None
    prompts: int | None = None
    split: Literal["train", "test"] = "train"
    up_to: int | None = None


@dataclass(frozen=True)
class Collected:
    """A finished collection. lost: sessions that could not be played or whose prompt gave none. solved:
    prompts with a success."""

    file: Path
    sessions: int
    successes: int
    lost: int
    solved: int

    def __str__(self) -> str:
        lost = f", {self.lost} lost to faults" if self.lost else ""
        share = self.successes / self.sessions if self.sessions else 0.0
        return f"{self.file}: {self.sessions} sessions, {share:.1%} successes{lost}"


def collect(config: Config, out: Path, arguments: Arguments, signals: StopRequests, say: Say) -> Collected:
    """Collect into a folder, from where an earlier call of the same collection stopped.

    Raises ConfigError before anything is started if the config is wrong or the folder has something else,
    RunStopped on a stop signal, which keeps the finished sessions.
    """
    with tempfile.TemporaryDirectory(prefix="rft-collect-") as scratch:
        model, name = _start(config, arguments.model, Path(scratch))
        plan = make_plan(config, model=model, evaluate=True)
        if not isinstance(plan, OnlinePlan):
            raise ConfigError(["rft collect: the config's algorithm samples nothing; write algorithm: grpo"])
        samples = arguments.samples or config.train.num_generations
        prompts, up_to = _prompts(plan, arguments), arguments.up_to
        if up_to is not None and up_to < samples:
            raise ConfigError(
                [f"--up-to: {up_to} is below --samples {samples}, what a prompt has on average; write "
                 f"--up-to {4 * samples}"]
            )  # fmt: skip
        settings = {
            "config": config.to_dict(),
            "model": name,
            "weights": model_digest(plan.model),
            "split": arguments.split,
            "samples": samples,
            "prompts": len(prompts),
            **({} if up_to is None else {"up_to": up_to}),
        }
        planned = len(prompts) * samples if up_to is None else None
        files, holds = (SESSIONS, PART), "sessions of other settings"
        with claimed(out, "rft collect", SETTINGS, files, settings, holds):
            file = _File(out)
            if (out / SESSIONS).exists():
                say(f"{out} is complete")
                return _summary(out, planned)
            if file.successes:
                say(f"going on: {len(file.successes)} of {len(prompts)} prompts were played before")
            rounds = _rounds(prompts, samples, up_to, file)
            with ray_cluster(config.ray.address, config.ray.object_store_gib):
                asyncio.run(_play(plan, name, rounds, file, signals, say))
            file.finish()
        return _summary(out, planned)


def _start(config: Config, given: str | None, scratch: Path) -> tuple[str | None, str]:
    """Return the model to sample from, the given one or the config's after its warm start, and its name."""
    if given is not None:
        return weights_of(given, scratch)
    plan, stage = make_plan(config, starts=False, evaluate=True), config.warm_start
    if stage is None:
        return None, plan.model
    made = warm_start_folder(config, stage, plan.model)
    if not is_finished(made):
        raise ConfigError(
            ["rft collect: the config's warm start was not trained yet; name a model or a run by --model"]
        )
    return str(made), str(made)


def _prompts(plan: OnlinePlan, arguments: Arguments) -> Sequence[Prompt]:
    prompts = plan.train_prompts
    if arguments.split == "test":
        limit = plan.config.rollout.sampling.max_prompt_length
        prompts = load_prompts(plan.config.data, plan.tokenizer, "test", limit)
    return prompts.prompts[: arguments.prompts]


# -- playing -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Round:
    """Prompts that are played at once, `samples` sessions each."""

    prompts: Sequence[Prompt]
    samples: int


def _rounds(prompts: Sequence[Prompt], samples: int, up_to: int | None, file: _File) -> Iterator[_Round]:
    """Yield the rounds of a collection that `file` does not hold yet: one, with `samples` of each prompt.

    With `up_to`, `samples` x prompts sessions in all are spent where they are needed: every round has one
    session of each prompt without a success, in order, until the sessions are used or each such prompt has
    `up_to` (elimination: Zuo and Zhu, "Strategic scaling of test-time compute", 2025, arXiv:2506.12721, with
    all active queries served in turn). Which prompts a round has follows from the rounds before alone, so
    that a collection that was stopped goes on as it would have.
    """
    if up_to is None:
        yield _Round([prompt for prompt in prompts if prompt.id not in file.successes], samples)
        return
    for number in range(up_to):
        before = {prompt.id: file.successes.get(prompt.id, [])[:number] for prompt in prompts}
        left = samples * len(prompts) - sum(map(len, before.values()))
        active = [prompt for prompt in prompts if not any(before[prompt.id])][:left]
        if not active:
            return
        if todo := [prompt for prompt in active if len(file.successes.get(prompt.id, [])) <= number]:
            yield _Round(todo, 1)


async def _play(
    plan: OnlinePlan, model: str, rounds: Iterator[_Round], file: _File, signals: StopRequests, say: Say
) -> None:
    """Play the sessions of the rounds, and write each prompt's when they are finished."""
    stop = stop_event(signals)
    tokenizer, primary = tokenizer_id(plan.tokenizer), plan.config.rewards.primary
    rollout = plan.config.rollout
    async with _players(plan, stop) as (play, tools_of):

        async def play_one(prompt: Prompt, samples: int) -> None:
            first = len(file.successes.get(prompt.id, []))
            judged = await play(prompt, first, samples)
            pairs = list(zip(judged.completions, judged.rewards, strict=True))
            shown = tools_of(prompt) or prompt.columns.get("tools")
            more = {"model": model, "group_size": len(pairs), **({"tools": shown} if shown else {})}
            file.append(
                [
                    more
                    | line_of(
                        judged.prompt,
                        first + k,
                        replace(c, reward=reward.value, scores=reward.scores),
                        is_correct(reward, primary),
                        tokenizer,
                    )
                    for k, (c, reward) in enumerate(pairs)
                ]
            )

        async def play_all(prompts: Sequence[Prompt], samples: int) -> None:
            waiting, played, every = iter(prompts), 0, max(1, len(prompts) // SAY_EVERY)

            async def worker() -> None:
                nonlocal played
                for prompt in waiting:
                    await play_one(prompt, samples)
                    played += 1
                    if played % every == 0:
                        say(f"{played} of {len(prompts)} prompts")

            at_once = max(1, 2 * rollout.replicas * rollout.max_num_seqs // samples)  # groups in flight
            working = [asyncio.create_task(worker()) for _ in range(min(at_once, len(prompts)))]
            try:
                await unless_stopped(asyncio.gather(*working), stop)
            finally:
                for task in working:
                    task.cancel()
                await asyncio.gather(*working, return_exceptions=True)

        for number, each in enumerate(rounds, 1):
            if number > 1:
                say(f"one more session for {len(each.prompts)} prompts without a success")
            await play_all(each.prompts, each.samples)


@asynccontextmanager
async def _players(plan: OnlinePlan, stop: asyncio.Event) -> AsyncIterator[tuple[Play, ToolsOf]]:
    """Start engines, rewards and environments for the length of a block; yield the function that plays a
    prompt's sessions and scores them, and the one that returns the tools of the prompt's environment."""
    config = plan.config
    pool, rewards, environments = make_pool(plan), make_rewards(config), make_environments(config)
    scoring = rewards.start() if environments is None else start_environments(environments, rewards)
    try:
        await unless_stopped(asyncio.gather(pool.start(), scoring), stop)
        episodes = None
        if environments is not None:
            episodes = make_episodes(config, environments, pool.generate, plan.tokenizer)

        async def play(prompt: Prompt, first: int, samples: int) -> Judged:
            key = ("collect", prompt.id, first) if first else ("collect", prompt.id)  # another for each round
            name, seed = "-".join(map(str, key)), derive_seed(config.seed, *key)
            sampling = Sampling.of(config.rollout.sampling, samples, seed)
            if episodes is not None and (own := episodes.of(prompt)) is not None:
                played = await own.sample(name, prompt, [Rollout()] * samples, sampling, training=False)
                return await own.judge(played, rewards, training=False)
            generated = await pool.generate(Request(name, prompt.tokens, sampling))
            completions = completions_of(generated, plan.tokenizer)
            return await judge(prompt, completions, rewards, training=False)

        def tools_of(prompt: Prompt) -> list[dict[str, Any]]:
            own = None if episodes is None else episodes.of(prompt)
            return [] if own is None else own.runner.tools

        yield play, tools_of
    finally:
        await rewards.close()
        if environments is not None:
            await environments.close()
        await pool.close()


# -- the folder ----------------------------------------------------------------------------------------


class _File:
    """The lines of an unfinished collection. successes: of each prompt, whether its sessions were one."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / PART
        self.successes: dict[int, list[bool]] = {}
        if not self.path.exists():
            return
        lines = Counter(row["prompt_id"] for row in iterate_jsonl(self.path))
        with write_atomic(self.path) as temporary, temporary.open("w", encoding="utf-8") as file:
            for row in iterate_jsonl(self.path):
                if lines[row["prompt_id"]] >= row["group_size"]:  # not cut off by a kill
                    self._count([row])
                    file.write(_as_text(row))

    def append(self, lines: Sequence[dict[str, Any]]) -> None:
        """Add sessions of a prompt, on disk when this returns."""
        text = "".join(map(_as_text, lines))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        self._count(lines)

    def _count(self, lines: Sequence[dict[str, Any]]) -> None:
        for line in lines:
            self.successes.setdefault(line["prompt_id"], []).append(line["success"] is True)

    def finish(self) -> None:
        """Write all sessions in the order of the prompts, and remove the unfinished file."""
        self.path.touch()  # missing if no group could be played
        places, start = [], 0
        with self.path.open("rb") as part:
            for line in part:
                row = json.loads(line)
                places.append((row["prompt_id"], row["sample"], start))
                start += len(line)
            with write_atomic(self.folder / SESSIONS) as temporary, temporary.open("wb") as file:
                for _, _, place in sorted(places):
                    part.seek(place)
                    file.write(part.readline())
        self.path.unlink(missing_ok=True)


def _as_text(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False, default=str) + "\n"


def _summary(out: Path, planned: int | None) -> Collected:
    """Count the sessions of a finished collection. planned: how many there should be, if that is known."""
    sessions, successes, solved = 0, 0, set[int]()
    with (out / SESSIONS).open(encoding="utf-8") as file:
        for line in map(json.loads, file):
            sessions += 1
            if line["success"] is True:
                successes += 1
                solved.add(line["prompt_id"])
    lost = 0 if planned is None else planned - sessions
    return Collected(out / SESSIONS, sessions, successes, lost, len(solved))
