"""Format a plan as text: the output of `rft check`."""

from __future__ import annotations

from rft.algorithms.extras import separate_critic
from rft.config import validate
from rft.config.schema import Config, algorithm_name
from rft.plan import OnlinePlan, Plan
from rft.preflight.memory import learner_bytes, replica_bytes
from rft.preflight.rewards import protection


def plan_lines(plan: Plan) -> list[str]:
    """Describe a plan, line by line."""
    c, t, warm_start = plan.config, plan.config.train, plan.config.warm_start
    stops = ", ".join(f"{plan.tokenizer.decode([i])!r} ({i})" for i in plan.stop_ids) or "none"
    out = [
        f"run          {c.name} -> {c.run_dir}",
        f"algorithm    {algorithm_name(c.algorithm)}: {t.steps} steps",
        f"model        {plan.model}: {plan.shape.parameters:,} parameters, vocabulary {plan.shape.vocab:,}",
        f"stop tokens  {stops}",
    ]
    why = f" (auto: {plan.dtype_choice})" if plan.dtype_choice else ""
    out.append(f"dtype        learner {c.learner.dtype}, engines {c.rollout.dtype}{why}")
    if warm_start is not None:
        out.append(
            f"warm start   {warm_start.steps} supervised steps of {warm_start.batch_size} demonstrations, "
            f"kept in {warm_start.cache}"
        )
    out += [f"data         {plan.train_prompts}"] if isinstance(plan, OnlinePlan) else plan.data.lines(c)
    if plan.eval_prompts is not None:
        out.append(
            f"evaluation   {len(plan.eval_prompts)} held-out prompts, {c.eval.samples} samples each"
            f"{' and greedy' if c.eval.greedy else ''}, every {c.eval.every} steps"
        )
    if isinstance(plan, OnlinePlan):
        out += _online_lines(plan)
    else:
        out.append(f"batch        {t.batch_size} rows a step, {t.minibatches * t.num_iterations} updates")
    out.append(f"learner      {describe_ranks(c, plan.device)}")
    out.append(f"trains       {_describe_training(plan)}")
    out.append(f"memory       learner about {_learner_gib(plan):.2f} GiB on {plan.device}")
    return out + [f"warning      {warning}" for warning in validate.warnings(c)]


def _online_lines(plan: OnlinePlan) -> list[str]:
    c, t, r, spec = plan.config, plan.config.train, plan.config.rollout, plan.engine_spec()
    gib = replica_bytes(plan.shape, spec) / 2**30
    rewards = ", ".join(f"{f.label} ({f.function}, weight {f.weight})" for f in c.rewards.functions)
    return [
        f"batch        {t.batch_size} prompts x {t.num_generations} completions = "
        f"{t.batch_size * t.num_generations} a step; {t.num_iterations} passes x {t.minibatches} updates",
        f"rollout      {r.replicas} x {plan.engine} ({spec.dtype}, {r.tensor_parallel} device(s), "
        f"{r.threads or 'all'} threads, about {gib:.2f} GiB each), staleness {r.staleness}",
        f"actors       the learner and {r.replicas} rollout replicas on {plan.device}, "
        f"{c.rewards.workers} reward workers; weights over {plan.transport}",
        f"rewards      {rewards}",
        *dict.fromkeys(protected for f in c.rewards.functions if (protected := protection(f))),
    ]


def describe_ranks(config: Config, device: str) -> str:
    """Describe the placement of the learner's ranks."""
    c = config.learner
    if c.parallel == "single":
        return f"1 process on {device}"
    stage = f" stage {validate.zero_stage(c)}" if c.parallel == "deepspeed" else ""
    each = "GPU" if device == "cuda" else "CPU core"
    where = "the cluster, packed on as few machines as hold them" if config.ray.address else "this machine"
    return f"{c.ranks} ranks ({c.parallel}{stage}), one {each} each, on {where}"


def _describe_training(plan: Plan) -> str:
    c, count = plan.config.learner, plan.adapter_parameters
    if c.adapter is None:
        part = "all parameters" if c.strategy is None else f"parts, by {c.strategy.name}"
        return f"{part}, {c.optimizer}"
    base = f"a base in {c.quantize}" if c.quantize else "a frozen base"
    of = "" if count is None else f" of {count:,} parameters"
    return f"an adapter ({c.adapter.method}){of} on {base}, {c.optimizer}"


def _learner_gib(plan: Plan) -> float:
    """Predict the peak memory of the learner, in one process."""
    c = plan.config
    separate = plan.reference_path not in (None, plan.model) or c.learner.adapter is None
    peak = learner_bytes(
        plan.shape,
        c.learner,
        reference=c.algorithm.needs_reference and separate,
        critic="values" in c.algorithm.outputs and separate_critic(c.algorithm),
        device=plan.device,
        adapter=plan.adapter_parameters or 0,
    )
    return peak / 2**30
