"""Evaluate a model without a learner: `rft eval`."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rft.errors import ConfigError
from rft.loops.evaluate import evaluate, evaluation_of
from rft.metrics.evaluation import write_evaluation
from rft.plan import Plan
from rft.rollout.episodes import make_episodes
from rft.run_training import make_environments, make_pool, make_rewards, start_environments
from rft.utils.deadlines import stop_event, unless_stopped
from rft.utils.ray_cluster import ray_cluster
from rft.utils.signals import StopRequests


async def evaluate_model(plan: Plan, signals: StopRequests, out: Path | None = None) -> dict[str, float]:
    """Return the `eval/...` metrics of the plan's model, without a learner.

    out: folder for the outcome of each problem, as in a run's folder. Raises ConfigError where there is
    nothing to evaluate, and RunStopped on a stop signal.
    """
    config = plan.config
    if not plan.eval_sets:
        raise ConfigError(["rft eval: nothing to evaluate; name rewards, and set eval.every to 1 or more"])
    with ray_cluster(config.ray.address, config.ray.object_store_gib):
        pool = make_pool(plan)
        rewards, environments = make_rewards(config), make_environments(config)
        stop = stop_event(signals)
        try:
            starting = asyncio.gather(pool.start(), start_environments(environments, rewards))
            await unless_stopped(starting, stop)
            episodes = None
            if environments is not None:
                episodes = make_episodes(config, environments, pool.generate, plan.tokenizer)
            evaluating = evaluate(
                pool.generate,
                rewards,
                plan.tokenizer,
                plan.eval_sets,
                config,
                label="eval",
                episodes=episodes,
                align=config.rollout.align,
            )
            metrics, judged = await unless_stopped(evaluating, stop)
            if out is not None:
                write_evaluation(out, evaluation_of(0, judged))
            return metrics
        finally:
            await rewards.close()
            if environments is not None:
                await environments.close()
            await pool.close()
