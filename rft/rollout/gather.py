"""One prompt's group, from the algorithm's plan to completions with rewards: sample, judge, value steps."""

from __future__ import annotations

import math
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace

from rft.algorithms.base import Algorithm
from rft.batch import Completion, Group, Prompt
from rft.data.chat import Renderer
from rft.data.demonstrations import demonstrations_of
from rft.loops.evaluate import Judged, judge
from rft.rewards.runner import RewardRunner
from rft.rollout.engine import Generated, Request, Sampling
from rft.rollout.group import sample_group
from rft.rollout.steps import value_steps

Generate = Callable[[Request], Awaitable[list[Generated]]]


@dataclass(frozen=True)
class Gatherer:
    """What all groups of a run share."""

    algorithm: Algorithm
    generate: Generate
    rewards: RewardRunner
    render: Renderer

    async def group(
        self, prompt: Prompt, sampling: Sampling, name: str, step: int, progress: float
    ) -> tuple[Group, float]:
        """The prompt's group, and the seconds that its rewards took.

        sampling: of ordinary completions; `n` is the group's size. name: unique among the requests in
        flight. step: finished steps. progress: the share of the run that is done, 0 to 1.
        """
        demonstration = (
            bool(demonstrations_of(prompt))
            if self.algorithm.uses_demonstrations
            else bool(prompt.columns.get("completion"))
        )
        plan = self.algorithm.rollouts(sampling.n, progress=progress, demonstration=demonstration)
        pioneer, observer = (self.algorithm.copy_of(step, observer=seen) for seen in (False, True))
        sampled = await sample_group(
            self.generate, name, prompt, plan, sampling, self.render, (pioneer, observer)
        )
        begin = time.perf_counter()

        async def judged_again(completions: list[Completion]) -> Judged:
            return await judge(prompt, completions, self.rewards, progress)

        judged = await judged_again(sampled.completions)
        seconds = time.perf_counter() - begin
        steps = self.algorithm.steps
        if steps is not None:
            judged = await value_steps(
                judged, steps, self.generate, judged_again, sampling, name, self.render.tokenizer
            )
        return scored_group(judged, sampled.trained), seconds


def scored_group(judged: Judged, trained: list[bool]) -> Group:
    """The completions that could be judged, with their rewards; the others leave the group.

    A yardstick (not `trained`) leaves too; its reward becomes `values["baseline"]` of the others. Who has
    lost the other one of its pair leaves as well. A reward called `win_rate` is the column of that name, nan
    where it abstains.
    """
    rows = list(zip(judged.completions, judged.rewards, trained, strict=True))
    yardsticks = [r.value for _, r, train in rows if not train and r.value is not None]
    shared = {"baseline": sum(yardsticks) / len(yardsticks)} if yardsticks else {}
    lost = {c.values["pair"] for c, r, _ in rows if r.value is None and "pair" in c.values}
    kept = []
    for c, r, train in rows:
        if not train or r.value is None or c.values.get("pair") in lost:
            continue
        rates = {k: math.nan if s.value is None else s.value for k, s in r.scores.items() if k == "win_rate"}
        kept.append(replace(c, reward=r.value, scores=r.scores, values={**c.values, **shared, **rates}))
    return Group(judged.prompt, tuple(kept) if yardsticks or all(trained) else ())
