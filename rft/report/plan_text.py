"""Format a plan as text: the output of `rft check`."""

from __future__ import annotations

from collections.abc import Sequence

from rft.batch import Group, Prompt
from rft.config import validate
from rft.config.facts import longest_session
from rft.config.mixture import COLUMN
from rft.config.schema import Config, algorithm_name
from rft.data import first_row
from rft.data.mixture import mixture_lines
from rft.data.overlap import find_overlaps
from rft.plan import OfflinePlan, OnlinePlan, Plan
from rft.preflight.capacity import MemoryPlan, device_memory
from rft.preflight.data import UNNAMED, sampler_of_mixture
from rft.preflight.first_row import (
    describe_columns,
    describe_format,
    first_group_lines,
    first_prompt_lines,
    gold_verdicts,
    verdict_line,
)
from rft.preflight.rewards import protection
from rft.preflight.sessions import SessionPlan, cache_warnings, plan_sessions


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
    out += _first_row_lines(plan)
    for held_out in plan.eval_sets:
        settings, of = held_out.settings, f"{held_out.name}: " if held_out.name else ""
        out.append(
            f"evaluation   {of}{len(held_out.prompts)} held-out prompts, {settings.samples} samples each"
            f"{' and greedy' if settings.greedy else ''}, every {c.eval.every} steps"
        )
    if isinstance(plan, OnlinePlan):
        out += _online_lines(plan)
    else:
        out.append(f"batch        {t.batch_size} rows a step, {t.minibatches * t.num_iterations} updates")
    out.append(f"learner      {describe_ranks(c, plan.device)}")
    out.append(f"trains       {_describe_training(plan)}")
    memory, sessions = plan.memory(), _sessions(plan)
    out.append(_describe_memory(memory))
    warnings = [*validate.warnings(c), *memory.warnings()]
    if sessions is not None:
        warnings += sessions.warnings()
    elif isinstance(plan, OnlinePlan) and (plan.engine, plan.device) == ("vllm", "cpu"):
        warnings += cache_warnings(c, plan.shape)
    return out + [f"warning      {warning}" for warning in warnings]


def _first_row_lines(plan: Plan) -> list[str]:
    """Describe the first row: its columns, the rendered prompt, and the rewards' verdict on its answer."""
    c = plan.config
    out = []
    prompts = plan.train_prompts.prompts if isinstance(plan, OnlinePlan) else _prompts(plan)
    if (mixture := sampler_of_mixture(c, prompts)) is not None:
        out += [f"mixture      {line}" for line in mixture_lines(c.data, mixture)]
    for name, part in c.data.parts().items():
        of = f"{name}: " if name else ""
        out.append(f"format       {of}{describe_format(part)}")
        out.append(f"columns      {of}{describe_columns(first_row(part), part.columns)}")
    if isinstance(plan, OnlinePlan):
        out += _overlap_lines(plan)
        firsts = {prompt.columns.get(COLUMN): prompt for prompt in reversed(prompts)}
        for prompt in reversed(firsts.values()):
            out.append(f"first prompt {_block(first_prompt_lines(prompt, plan.tokenizer))}")
            verdicts = gold_verdicts(c.rewards, prompt, plan.tokenizer, c.data.rewards_by_source)
            out += [f"gold answer  {verdict_line(verdict)}" for verdict in verdicts]
        return out
    out += _overlap_lines(plan)
    return [*out, f"first row    {_block(first_group_lines(plan.data.sample[0], plan.tokenizer))}"]


def _overlap_lines(plan: Plan) -> list[str]:
    """Describe the overlap of training and evaluation rows."""
    rows: Sequence[Prompt | Group]
    held_out: dict[str, Sequence[Prompt | Group]] = {
        s.name or UNNAMED: s.prompts.prompts for s in plan.eval_sets
    }
    if isinstance(plan, OnlinePlan):
        rows = plan.train_prompts.prompts
    elif isinstance(plan, OfflinePlan):
        if plan.config.data.streaming:
            return ["overlap      not compared with evaluation rows: the training rows are streamed"]
        rows = plan.data.sample
        held_out |= {UNNAMED: plan.data.held_out.groups} if plan.data.held_out else {}
        held_out |= {name: groups.groups for name, groups in plan.data.sets.items()}
    overlaps = find_overlaps(rows, held_out)
    return [f"overlap      {_block(overlap.lines())}" for overlap in overlaps]


def _prompts(plan: Plan) -> list[Prompt]:
    return [group.prompt for group in plan.data.sample] if isinstance(plan, OfflinePlan) else []


def _block(lines: Sequence[str]) -> str:
    return f"\n{' ' * 13}".join(lines)


def _online_lines(plan: OnlinePlan) -> list[str]:
    c, t, r, spec = plan.config, plan.config.train, plan.config.rollout, plan.engine_spec()
    rewards = ", ".join(f"{f.label} ({f.function}, weight {f.weight})" for f in c.rewards.functions)
    return [
        f"batch        {t.batch_size} prompts x {t.num_generations} completions = "
        f"{t.batch_size * t.num_generations} a step; {t.num_iterations} passes x {t.minibatches} updates",
        f"rollout      {r.replicas} x {plan.engine} ({spec.dtype}, {r.tensor_parallel} device(s), "
        f"{r.threads or 'all'} threads), staleness {r.staleness}",
        f"actors       the learner and {r.replicas} rollout replicas on {plan.device}, "
        f"{c.rewards.workers} reward workers; weights over {plan.transport}",
        *_environment_lines(plan),
        f"rewards      {rewards or 'those of the environment'}",
        *dict.fromkeys(protected for f in c.rewards.functions if (protected := protection(f))),
    ]


def _sessions(plan: Plan) -> SessionPlan | None:
    if not isinstance(plan, OnlinePlan):
        return None
    capacity = device_memory(plan.config, plan.device)
    return plan_sessions(plan.config, plan.shape, plan.engine_spec(), capacity)


def _environment_lines(plan: OnlinePlan) -> list[str]:
    config, sessions = plan.config, _sessions(plan)
    if sessions is None:
        return []
    lines, longest = [], config.rollout.sampling.max_completion_length
    for source, e in config.environments.items():
        what = ", ".join([*([e.path] if e.path else []), *e.tools]) or e.kind
        lines.append(
            f"environment  {f'{source}: ' if source else ''}{e.kind}: {what}; up to {e.max_turns} turns of "
            f"{e.max_tokens_per_turn or longest} tokens in a context of {longest_session(config, e)}"
        )
    return [*lines, *sessions.lines()]


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


def _describe_memory(memory: MemoryPlan) -> str:
    parts = [
        f"learner {memory.learner / 2**30:.1f} GiB with micro-batches of up to {memory.largest:,} tokens"
    ]
    parts += [f"each replica {memory.replica / 2**30:.1f}"] if memory.replica else []
    parts += [f"a checkpoint in the background {memory.saving / 2**30:.1f}"] if memory.saving else []
    of = "" if memory.capacity is None else f" of {memory.capacity / 2**30:.1f}"
    return f"memory       about {memory.total / 2**30:.1f}{of} GiB on {memory.device}: {', '.join(parts)}"
