"""What works on a model without a run: `rft eval`, and the export of an adapter's checkpoint."""

from __future__ import annotations

import asyncio
from pathlib import Path

from rft.config.load import load_config
from rft.errors import ConfigError
from rft.learner.learner import Learner
from rft.loops.evaluate import evaluate
from rft.plan import Plan, make_plan
from rft.preflight.data import warm_start_folder
from rft.rewards.runner import RewardRunner
from rft.run_training import make_pool
from rft.utils.deadlines import unless_stopped
from rft.utils.ray_cluster import ray_cluster
from rft.utils.signals import StopSignals

END_S = 30.0  # for ending the engines after a stop signal


async def evaluate_model(plan: Plan, signals: StopSignals) -> dict[str, float]:
    """The `eval/...` metrics of the plan's model. Raises ConfigError where there is nothing to evaluate, and
    RunStopped on a stop signal."""
    config = plan.config
    if plan.eval_prompts is None or not config.rewards.functions:
        raise ConfigError(["eval: a config with rewards and eval.every above 0 is needed"])
    with ray_cluster(config.ray.address, config.ray.object_store_gib):
        pool = make_pool(plan)
        rewards = RewardRunner(config.rewards, Path.cwd())
        stop, loop = asyncio.Event(), asyncio.get_running_loop()

        def request(reason: str) -> float:
            loop.call_soon_threadsafe(stop.set)
            return END_S

        signals.handle(request=request)
        try:
            await unless_stopped(pool.start(), stop)
            evaluating = evaluate(
                pool.generate,
                rewards,
                plan.tokenizer,
                plan.eval_prompts.prompts,
                config.eval,
                primary=config.rewards.functions[0].label,
                max_tokens=config.rollout.sampling.max_completion_length,
                seed=config.seed,
                label="eval",
            )
            metrics, _ = await unless_stopped(evaluating, stop)
            return metrics
        finally:
            signals.handle(request=lambda reason: END_S)
            await rewards.close()
            await pool.close()


def export_checkpoint(config: Path, checkpoint: Path, out: Path) -> None:
    """Write the policy of a checkpoint that holds an adapter alone, merged into the run's base.

    Raises ConfigError where the base or the data that the run's config names are no longer there.
    """
    plan = make_plan(load_config(config), starts=False)
    if (stage := plan.config.warm_start) is not None:
        plan = plan.with_model(str(warm_start_folder(plan.config, stage, plan.model)))
    learner = Learner(plan.learner_spec())
    learner.read_state(checkpoint)
    learner.export(str(out))
