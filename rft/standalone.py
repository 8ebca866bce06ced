"""`rft eval`: the run's engines and rewards on its held-out prompts, for any model, without a learner."""

from __future__ import annotations

from pathlib import Path

from rft.config import ConfigError
from rft.evaluation import evaluate
from rft.plan import Plan
from rft.remote import ray_cluster
from rft.rewards import RewardRunner
from rft.run import make_pool


async def evaluate_model(plan: Plan) -> dict[str, float]:
    """The `eval/...` metrics of the plan's model. Raises ConfigError where there is nothing to evaluate."""
    config = plan.config
    if plan.eval_prompts is None or not config.rewards.functions:
        raise ConfigError(["eval: a config with rewards and eval.every above 0 is needed"])
    with ray_cluster(config.ray.address, config.ray.object_store_gib):
        pool = make_pool(plan)
        rewards = RewardRunner(config.rewards, Path.cwd())
        try:
            await pool.start()
            metrics, _ = await evaluate(
                pool,
                rewards,
                plan.tokenizer,
                plan.eval_prompts.prompts,
                config.eval,
                primary=config.rewards.functions[0].label,
                max_tokens=config.rollout.sampling.max_completion_length,
                seed=config.seed,
                label="eval",
            )
            return metrics
        finally:
            await rewards.close()
            await pool.close()
