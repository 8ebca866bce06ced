"""Held-out evaluation: the run's own engines and rewards on prompts that it never trains on."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch

from rft.batch import Prompt
from rft.config.schema import EvalConfig
from rft.rewards.runner import RewardRunner
from rft.rewards.types import Outcome, SampleReward
from rft.rollout.engine import Generate, Request, Sampling
from rft.rollout.sample import Judged, completions_of, judge
from rft.utils.seeds import derive_seed


def is_correct(reward: SampleReward, primary: str) -> bool | None:
    """Whether the primary reward function judged it correct; None where it could not judge."""
    score = reward.scores[primary]
    return None if score.value is None else score.outcome == Outcome.correct


async def evaluate(
    generate: Generate,
    rewards: RewardRunner,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    config: EvalConfig,
    *,
    primary: str,
    max_tokens: int,
    seed: int,
    label: str,
    progress: float = 0.0,
) -> tuple[dict[str, float], list[Judged]]:
    """Accuracy over `config.samples` samples per prompt, pass@k, and greedy accuracy.

    The seeds depend on `seed` and the prompt alone, so two policies see the same dice. Returns the
    metrics (`eval/...`) and the judged samples.
    """
    sampled = [
        Sampling(
            config.samples, max_tokens, config.temperature, config.top_p, seed=derive_seed(seed, "eval", p.id)
        )
        for p in prompts
    ]

    async def one(kind: str, prompt: Prompt, sampling: Sampling) -> Judged:
        request = Request(f"{label}-{kind}-{prompt.id}", prompt.tokens, sampling)
        completions = completions_of(await generate(request), tokenizer)
        return await judge(prompt, completions, rewards, progress, training=False)

    work = [one("sample", p, s) for p, s in zip(prompts, sampled, strict=True)]
    if config.greedy:
        work += [one("greedy", p, Sampling(1, max_tokens, temperature=0.0)) for p in prompts]
    judged = await asyncio.gather(*work)
    by_sample, by_greedy = judged[: len(prompts)], judged[len(prompts) :]
    metrics = _accuracy([[is_correct(r, primary) for r in j.rewards] for j in by_sample])
    if by_greedy:
        greedy = _accuracy([[is_correct(j.rewards[0], primary)] for j in by_greedy])
        metrics["eval/greedy_accuracy"] = greedy["eval/accuracy"]
    completions = [c for j in by_sample for c in j.completions]
    metrics["eval/length_mean"] = sum(len(c.tokens) for c in completions) / len(completions)
    metrics["eval/truncated"] = sum(c.finish == "length" for c in completions) / len(completions)
    metrics["eval/problems"] = float(len(prompts))
    outcomes = Counter(str(r.scores[primary].outcome) for j in by_sample for r in j.rewards)
    metrics |= {f"eval/outcome/{k}": v / len(completions) for k, v in sorted(outcomes.items())}
    return metrics, by_sample


def _accuracy(table: list[list[bool | None]]) -> dict[str, float]:
    """Accuracy and pass@k (k = 1, 2, 4, ...) over prompts; what could not be judged is left out."""
    rows = [[x for x in row if x is not None] for row in table]
    judged = [row for row in rows if row]
    if not judged:
        return {"eval/accuracy": math.nan}
    means = torch.tensor([sum(row) / len(row) for row in judged], dtype=torch.float64)
    out = {"eval/accuracy": float(means.mean())}
    if len(judged) > 1:
        out["eval/accuracy_stderr"] = float(means.std() / math.sqrt(len(judged)))
    n = max(len(row) for row in judged)
    k = 2
    while k <= n:
        whole = [row for row in judged if len(row) >= k]
        out[f"eval/pass@{k}"] = sum(pass_at_k(len(row), sum(row), k) for row in whole) / len(whole)
        k *= 2
    out["eval/unjudged"] = float(sum(len(a) - len(b) for a, b in zip(table, rows, strict=True)))
    return out


def pass_at_k(n: int, correct: int, k: int) -> float:
    """The unbiased chance that one of k of n samples is correct (Chen et al. 2021, eq. 1)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)
