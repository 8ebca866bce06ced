"""Consistency checks of a config, internally and against resolved facts, as pairs of (condition, message).

`problems` evaluates all checks, so that all errors are reported at once. Those of environments are in
`validate_environment`, and those that need files, data or the model's layers in `rft/preflight/`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args, get_type_hints

from rft.algorithms.base import Algorithm, Rollout
from rft.algorithms.divergence import TeacherDivergence
from rft.algorithms.extras import (
    ValuesSteps,
    compares_distributions,
    compares_rows,
    copies,
    reads_start,
    score_heads,
)
from rft.algorithms.supervised.mft import MFT
from rft.algorithms.supervised.rwr import RWR
from rft.config.evaluation import OF_SAMPLES
from rft.config.facts import Check, Facts, longest_sequence, rollouts
from rft.config.learner import (
    FROM_FIRST_BATCH,
    LIGER_REMEDY,
    PLAIN_LORA,
    AdapterConfig,
    GaloreConfig,
    LearnerConfig,
    LiftConfig,
    LisaConfig,
    SaftConfig,
)
from rft.config.schema import Config, algorithm_name
from rft.config.validate_environment import environment_checks
from rft.utils.cores import parse_cores


def problems(config: Config, facts: Facts) -> list[str]:
    """Return the message of every check that fails."""
    return [message for checks in CHECKS for wrong, message in checks(config, facts) if wrong]


# -- the algorithm and its data ------------------------------------------------------------------------


def algorithm_checks(config: Config, facts: Facts) -> Iterator[Check]:
    a, t, key = config.algorithm, config.train, f"algorithm.{algorithm_name(config.algorithm)}"
    name, updates = type(a).__name__, t.num_iterations * t.minibatches
    yield (
        a.online and t.num_generations < a.min_generations,
        f"{key}: {name} compares completions of one prompt, and num_generations is {t.num_generations}; "
        f"write num_generations: {a.min_generations} or more",
    )
    yield (
        a.online and a.uses_demonstrations and facts.demonstrations is False,
        f"{key}: {name} needs demonstrations, and the data has none; name their column under data.columns",
    )
    yield (
        "rewards" in a.needs and not config.rewards.functions and bool(config.single_turn),
        f"{key}: {name} needs a reward; name at least one under rewards",
    )
    yield (
        a.online
        and any(r.mixture for r in rollouts(config, bool(facts.demonstrations)))
        and facts.engine != "hf",
        f"{key}: {name} samples from a mixture with the reference, which vllm does not support; write "
        "mixture: 0, or set rollout.engine: hf",
    )
    yield (
        a.on_policy and updates > 1,
        f"{key}: {name} is on-policy and uses no importance ratio, but takes {updates} updates per batch; "
        "write num_iterations: 1 and one minibatch",
    )
    yield (
        a.needs_reference and a.refresh_reference == 1 and updates == 1,
        f"{key}: refresh_reference: 1 with one update per step makes the reference the policy at every "
        "update: log-ratios to it are always 0, which changes the loss; write refresh_reference: 20, or take "
        "several updates per step (train.minibatches, train.num_iterations)",
    )
    yield (
        getattr(a, "turn_returns", "none") != "none" and bool(config.single_turn),
        f"{key}: turn_returns credits the turns of sessions, and {_without_environment(config)}; remove it, "
        "or add the section environment",
    )
    for conflict in a.conflicts(t.num_generations):
        yield True, f"{key}: {conflict}"


STEP_JUDGES = ("process", "process_reward_model")  # rewards that score every step
_SEPARATOR = "\n\n"  # default separator of STEP_JUDGES


def _without_environment(config: Config) -> str:
    """Say which rows have no environment."""
    return f"{', '.join(config.single_turn) or 'the config'} has no environment"


def online_checks(config: Config, facts: Facts) -> Iterator[Check]:
    a, key = config.algorithm, f"algorithm.{algorithm_name(config.algorithm)}"
    if not a.online:
        return
    roles = [rollout.role for rollout in rollouts(config, bool(facts.demonstrations))]
    yield (
        any(roles) and roles != ["pioneer", "observer"] * (len(roles) // 2),
        f"{key}: pioneers and observers must alternate and fill the whole group",
    )
    yield (
        not config.rewards.functions and bool(config.single_turn) and "rewards" not in a.needs,
        f"{key}: no reward is given; evaluation needs one: `rewards: [{{function: math}}]`",
    )
    if isinstance(a, ValuesSteps) and not a.steps.branches:
        judge = next((f for f in config.rewards.functions if f.function in STEP_JUDGES), None)
        yield (
            judge is None,
            f"{key}: source: process needs a reward that judges step by step; name one of "
            f"{', '.join(STEP_JUDGES)} under rewards, or write source: continuations",
        )
        if judge is not None:
            separator = judge.options.get("separator", _SEPARATOR)
            yield (
                separator != a.steps.separator,
                f"{key}: separator: {a.steps.separator!r} differs from the separator of the reward "
                f"{judge.label} ({separator!r}); write the same in both",
            )
    yield (
        config.data.streaming,
        "data.streaming: online training loads all of its prompts; set it to false",
    )
    length = longest_sequence(config)
    yield (
        facts.positions is not None and length > facts.positions,
        f"rollout.sampling: max_prompt_length and max_completion_length allow sequences of {length} tokens, "
        f"but the model has {facts.positions} positions; lower one of them",
    )


def eval_checks(config: Config, facts: Facts) -> Iterator[Check]:
    """Check the section `eval`: its named sets fit the algorithm, the rewards and the engines."""
    a, limit, name = (
        config.algorithm,
        config.rollout.sampling.max_completion_length,
        algorithm_name(config.algorithm),
    )
    for set_name in ("", *config.eval.sets):
        key, rerank = f"eval.sets.{set_name}" if set_name else "eval", config.eval.of_set(set_name).rerank
        of_the_set = config.eval.sets[set_name].rewards if set_name else None
        labels = [f.label for f in (of_the_set or config.rewards).functions]
        yield (
            rerank is not None and rerank not in labels,
            f"{key}.rerank: no reward is called {rerank!r}; write one of {', '.join(labels) or 'none'}",
        )
    for set_name, s in config.eval.sets.items():
        key = f"eval.sets.{set_name}"
        sampled = a.online or s.rewards is not None
        yield (
            s.data.streaming,
            f"{key}.data.streaming: a held-out set is loaded as a whole; set it to false",
        )
        yield (
            s.rewards is not None and not s.rewards.functions,
            f"{key}.rewards: the list is empty; leave it out to use the rewards of the run",
        )
        yield (
            s.rewards is not None and bool(score_heads(a)),
            f"{key}.rewards: {name} trains a reward model, which generates nothing; remove them, and its "
            "loss on the rows is measured",
        )
        given = [f for f in (*OF_SAMPLES, "max_completion_length") if getattr(s, f) is not None]
        yield (
            not sampled and bool(given),
            f"{key}.{given[0] if given else ''}: {name} measures the loss on the rows of a set without "
            "rewards, and samples none; remove it, or give the set `rewards`",
        )
        yield (
            s.max_completion_length is not None and s.max_completion_length > limit,
            f"{key}.max_completion_length: {s.max_completion_length} exceeds the engines' {limit} "
            "(rollout.sampling.max_completion_length); lower the first, or raise the second",
        )


def privacy_checks(config: Config, facts: Facts) -> Iterator[Check]:
    """Check that a row influences a private run through its clipped gradient only."""
    a, c, key = config.algorithm, config.learner, "learner.privacy"
    if config.warm_start is not None:
        yield (
            config.warm_start.learner.privacy is not None,
            "warm_start.learner.privacy: a warm start is not private; train it in a separate offline run",
        )
    if c.privacy is None:
        return
    name = algorithm_name(a)
    yield (
        a.online,
        f"{key}: {name} samples completions, and their rewards and the engines read the rows as well; use an "
        "offline algorithm, such as sft or dpo, or remove it",
    )
    yield (
        not a.online and compares_rows(a),
        f"{key}: with {name} as set here the loss of a row depends on other rows, so that clipping a row's "
        "gradient does not bound its influence; use sft, dft, dpo, simpo, orpo or cpo",
    )
    yield (
        config.data.streaming or bool(config.data.mixture),
        f"{key}: rows are drawn independently from all rows; remove data.streaming and data.mixture",
    )
    yield (
        config.train.minibatches * config.train.num_iterations > 1,
        f"{key}: a step is one update; write train.minibatches: 1 and train.num_iterations: 1",
    )
    yield (
        config.train.batch_size < 32,
        f"{key}: a draw of few rows on average may have none, which epsilon does not cover; write "
        "train.batch_size: 32 or more",
    )
    yield c.parallel != "single", f"{key}: works in one process only; set learner.parallel to single"
    adapter = "" if c.adapter is None else c.adapter.method
    yield (
        adapter in FROM_FIRST_BATCH or isinstance(c.strategy, SaftConfig),
        f"{key}: {adapter or 'saft'} is initialised from rows, without noise; use lora, or another strategy",
    )


def offline_checks(config: Config, facts: Facts) -> Iterator[Check]:
    a, c, name = config.algorithm, config.learner, algorithm_name(config.algorithm)
    collected = config.data.sessions is not None
    yield (
        a.online and collected,
        f"data.sessions: {name} samples completions itself; remove it, or choose an offline algorithm: sft, "
        "dpo, kto",
    )
    if a.online:
        return
    if isinstance(a, RWR):
        yield (
            not collected and "reward" not in config.data.numbers,
            "data.numbers: rwr weighs responses by their reward; name its column: numbers: [reward]",
        )
        yield (
            bool(a.first_turn) and not collected,
            "algorithm.first_turn: only sessions have turns; set data.sessions, or write first_turn: 0",
        )
    yield (
        isinstance(a, MFT) and not config.data.mixture,
        "algorithm: mft balances the sources of data.mixture, and there is none; name them, or write sft",
    )
    yield (
        config.eval.generate and collected,
        "eval.generate: collected sessions are not played again; set it to false, and evaluate the trained "
        "model in its environment by `rft eval`",
    )
    yield (
        config.eval.generate and bool(score_heads(a)),
        f"eval.generate: {name} trains a reward model, which generates nothing; set it to false",
    )
    yield (
        config.eval.generate and not config.rewards.functions,
        "eval.generate: completions are scored by rewards; add `rewards: [{function: math}]`",
    )
    for part in ("adapter", "quantize", "strategy"):
        yield (
            bool(score_heads(a)) and getattr(c, part) is not None,
            f"learner.{part}: {name} trains a whole reward model with a new head; leave it out",
        )
    uncached = [
        (not a.needs_reference, f"{name} does not use a reference"),
        (
            compares_distributions(a),
            f"{name} compares whole distributions, for which the reference has to run",
        ),
        (config.data.streaming, "a streamed dataset cannot be scored before training"),
        (bool(a.refresh_reference), f"{name} updates its reference during the run"),
        (
            a.data == "unpaired" and a.prescored,
            f"{name} draws new mismatched pairs in each epoch (baseline: zero draws none)",
        ),
    ]
    why = next((why for wrong, why in uncached if wrong), "")
    yield c.reference_logps == "cached" and bool(why), f"learner.reference_logps: {why}; write live"
    yield (
        reads_start(a) and config.data.streaming,
        "algorithm.base: start scores every row before training, and a streamed dataset is read on demand; "
        "write base: policy, or data.streaming: false",
    )
    scored_before = next((why for wrong, why in uncached[2:] if wrong), "")
    yield config.teacher is not None and bool(scored_before), f"teacher: {scored_before}; remove it"
    yield (
        name == "kto" and facts.held_out_rows is not None and facts.held_out_rows < 2,
        "data: kto compares responses, and there is only one held-out row; raise data.holdout",
    )


def _truncation_checks(config: Config, facts: Facts) -> Iterator[Check]:
    """Check training on truncated samples: the learner has to know which tokens could be sampled."""
    a, s = config.algorithm, config.rollout.sampling
    if not a.online or not s.truncated:
        return
    key = "rollout.sampling: top_p, top_k and min_p"
    remedy = "write top_p: 1, top_k: 0 and min_p: 0"
    yield (
        config.rollout.staleness > 0,
        f"{key} sample from a set of tokens that only the current policy knows; write rollout.staleness: 0, "
        f"or {remedy}",
    )
    yield (
        "kl" in a.outputs,
        f"{key} leave tokens without a probability, and {algorithm_name(a)} compares whole distributions, as "
        f"set here; {remedy}",
    )
    yield (
        copies(a) > 1 or any(r.mixture for r in rollouts(config, bool(facts.demonstrations))),
        f"{key} are not supported where completions are not sampled from the policy alone; {remedy}",
    )
    yield (
        config.learner.kernels.logprob in ("triton", "liger"),
        f"{key} need learner.kernels.logprob: auto or chunked, not {config.learner.kernels.logprob}",
    )


def _teacher_checks(config: Config, facts: Facts) -> Iterator[Check]:
    """Check the use of a teacher behind an endpoint, whose log-probs are at temperature 1."""
    a, s, name = config.algorithm, config.rollout.sampling, algorithm_name(config.algorithm)
    if config.teacher is None:
        return
    yield not a.needs_reference, f"teacher: {name} does not use a reference, as set here; remove it"
    yield (
        config.model.reference is not None,
        "teacher, model.reference: both are the reference; remove one of them",
    )
    yield (
        config.learner.reference_logps == "cached",
        "learner.reference_logps: the teacher's log-probs are cached in any case; write live",
    )
    yield (
        compares_distributions(a) and not config.teacher.top_k,
        f"teacher.top_k: {name} compares distributions, as set here; write top_k: 20",
    )
    yield (
        bool(a.hooks),
        f"teacher: {name} trains on earlier samples, or a second policy, as set here; remove it",
    )
    yield bool(a.refresh_reference), f"teacher: {name} updates its reference during the run; remove it"
    by_rank = isinstance(a, TeacherDivergence) and a.by_rank
    yield (
        config.teacher.tokenizer is not None and not by_rank,
        "teacher.tokenizer: the distributions of two vocabularies can only be compared by rank; write "
        "algorithm: {name: distill, by_rank: true}, or logit_distill, or take a teacher with the policy's "
        "tokenizer",
    )
    sessions = bool(config.environments) or config.data.sessions is not None
    for key in ("template", "tokenizer"):
        yield (
            sessions and getattr(config.teacher, key) is not None,
            f"teacher.{key}: a session's prompts are read as the policy read them; remove it",
        )
    if not a.online:
        return
    yield (
        s.temperature != 1,
        f"teacher: its log-probs are at temperature 1, and rollout.sampling.temperature is "
        f"{s.temperature:g}; write 1",
    )
    yield (
        s.truncated,
        "teacher: its log-probs are over the whole vocabulary; write top_p: 1, top_k: 0, min_p: 0",
    )
    yield (
        copies(a) > 1 or any(r.mixture for r in rollouts(config, bool(facts.demonstrations))),
        f"teacher: {name} needs its reference in the engines, or trains a second policy; name a model in "
        "model.reference",
    )


def run_checks(config: Config, facts: Facts) -> Iterator[Check]:
    t, name = config.train, algorithm_name(config.algorithm)
    yield from _truncation_checks(config, facts)
    yield from _teacher_checks(config, facts)
    yield (
        config.model.reference is not None and not config.algorithm.needs_reference,
        f"model.reference: {name} does not use a reference; remove it",
    )
    yield (
        t.curriculum is not None
        and t.curriculum.allocate
        and any(r != Rollout() for r in rollouts(config, bool(facts.demonstrations))),
        f"train.curriculum.allocate: {name} plans the completions of a group; write false",
    )
    yield (
        facts.rows is not None and facts.rows < t.batch_size,
        f"train.batch_size: {t.batch_size} rows a step, but the data has only {facts.rows}; lower it",
    )
    yield (
        (facts.largest_token or 0) >= (facts.vocabulary or 2**63),
        f"model.tokenizer: it produces token ids up to {facts.largest_token}, but the model's vocabulary has "
        f"{facts.vocabulary} entries; use the model's own tokenizer",
    )
    for token in config.rollout.sampling.stop_token_ids:
        yield (
            facts.vocabulary is not None and not 0 <= token < facts.vocabulary,
            f"rollout.sampling.stop_token_ids: {token} is not in the model's vocabulary, whose ids are 0 to "
            f"{(facts.vocabulary or 0) - 1}; write the id of a token, or remove it",
        )
    for key, cores in (("rollout.cores", config.rollout.cores), ("learner.cores", config.learner.cores)):
        yield from _core_checks(key, cores, facts)


def _core_checks(key: str, cores: str | None, facts: Facts) -> Iterator[Check]:
    try:
        missing = parse_cores(cores) - facts.cores if cores is not None else set()
    except ValueError as error:
        yield True, f"{key}: {error}"
    else:
        yield bool(missing), f"{key}: this machine has no core {min(missing, default=0)}; choose among the "
        "cores that it has"


# -- the learner ---------------------------------------------------------------------------------------

QUANTIZED = ("lora", "dora", "eva", "loftq")  # methods that support a 4- or 8-bit base
ON_RANKS = ("lora", "dora")  # methods that support several ranks

# Keys not allowed in the DeepSpeed config, with the rft keys that replace them.
REPLACED_KEYS = {
    "optimizer": "learner.learning_rate, betas, eps and weight_decay",
    "scheduler": "learner.schedule",
    "gradient_clipping": "learner.max_grad_norm",
    "gradient_accumulation_steps": "learner.tokens_per_micro_batch",
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "learner.tokens_per_micro_batch",
    "bf16": "learner.dtype",
    "fp16": "learner.dtype",
    "torch_autocast": "learner.dtype",
}


def learner_checks(config: Config, facts: Facts) -> Iterator[Check]:
    """Check the learner of the run and of its warm start; the latter has no algorithm."""
    learners: list[tuple[str, LearnerConfig, Algorithm | None]]
    learners = [("learner", config.learner, config.algorithm)]
    if config.warm_start is not None:
        learners.append(("warm_start.learner", config.warm_start.learner, None))
    for key, c, algorithm in learners:
        for checks in (_method_checks(c, facts), _adapter_checks(c, algorithm)):
            yield from ((wrong, f"{key}.{message}") for wrong, message in checks)
    yield (
        facts.stored_quantization is not None and (config.learner.adapter is None or config.algorithm.online),
        f"model.path: its weights are stored quantised ({facts.stored_quantization}); give the "
        "unquantised model, and set learner.quantize: nf4 with learner.adapter to hold it in 4 bits",
    )
    yield from _kernel_checks(config, facts)
    for key, c, algorithm in learners:
        checks = _parallel_checks(key, c, algorithm, config, facts)
        yield from ((wrong, f"{key}.{message}") for wrong, message in checks)
    yield from _batch_checks(config)


def _method_checks(c: LearnerConfig, facts: Facts) -> Iterator[Check]:
    """Check quantisation, optimizer and strategy."""
    strategy, no_bitsandbytes = c.strategy, "bitsandbytes" not in facts.installed
    remedy = "needs bitsandbytes, which is not installed: install rft with the extra quant"
    yield c.quantize is not None and no_bitsandbytes, f"quantize: {c.quantize} {remedy}"
    yield (
        c.quantize is not None and c.adapter is None,
        f"quantize: weights in {8 if c.quantize == 'int8' else 4} bits cannot be trained themselves; add "
        "an adapter (adapter: {method: lora}), or leave quantize out for full fine-tuning",
    )
    yield c.optimizer not in ("adamw", "muon") and no_bitsandbytes, f"optimizer: {c.optimizer} {remedy}"
    yield (
        c.optimizer == "muon" and (strategy is not None or c.adapter is not None),
        "optimizer: muon updates whole matrices, and an adapter or a strategy trains parts of them; write "
        "adamw",
    )
    yield (
        c.optimizer != "adamw" and isinstance(strategy, GaloreConfig),
        f"strategy: galore cannot be combined with optimizer {c.optimizer}; use adamw",
    )
    yield (
        c.optimizer != "adamw" and isinstance(strategy, LiftConfig) and strategy.every > 0,
        f"strategy.every: lift moves AdamW's moments to other elements, and {c.optimizer} stores them in "
        "blocks; use adamw, or write every: 0",
    )
    if isinstance(strategy, LisaConfig):
        yield (
            facts.layers is not None and strategy.layers >= facts.layers,
            f"strategy.layers: the model has only {facts.layers} layers, so {strategy.layers} at a time "
            "selects all of them; lower it, or remove the strategy",
        )


def _adapter_checks(c: LearnerConfig, algorithm: Algorithm | None) -> Iterator[Check]:
    adapter = c.adapter
    if adapter is None:
        return
    yield (
        c.quantize is not None and adapter.method not in QUANTIZED,
        f"adapter.method: {adapter.method} does not work on a quantised base; "
        f"use one of {', '.join(QUANTIZED)}, or leave quantize out",
    )
    yield (
        c.strategy is not None,
        f"strategy: {c.strategy and c.strategy.name} selects weights of the policy to train, but an adapter "
        "freezes all of them; remove either the strategy or the adapter",
    )
    yield from _restart_checks(c, adapter, algorithm)
    yield (
        adapter.method == "loftq" and c.quantize not in ("nf4", "fp4"),
        "adapter.method: loftq compensates for 4-bit quantisation; set quantize: nf4, or use lora",
    )
    yield (
        algorithm is not None and algorithm.online and float(adapter.options.get("lora_dropout", 0) or 0) > 0,
        "adapter.options.lora_dropout: with dropout the learner's log-probs are not those of the engine "
        "that sampled; set it to 0 for online training",
    )


def _restart_checks(c: LearnerConfig, adapter: AdapterConfig, algorithm: Algorithm | None) -> Iterator[Check]:
    """Check that an adapter that restarts can be merged into its base again and again."""
    if not adapter.restart_every:
        return
    special = {"init_lora_weights", "use_dora", "lora_bias", "modules_to_save"}.intersection(adapter.options)
    yield (
        adapter.method != "lora" or bool(special),
        f"adapter.restart_every: only plain LoRA begins anew, not {', '.join(special) or adapter.method}; use"
        " method: lora without it, or write restart_every: 0",
    )
    yield (
        c.quantize is not None,
        f"adapter.restart_every: an adapter cannot be merged into a base in {c.quantize} without rounding it "
        "away; leave quantize out, or write restart_every: 0",
    )
    yield (
        c.parallel != "single",
        "adapter.restart_every: works in one process only; set parallel to single",
    )
    yield (
        algorithm is not None and bool(algorithm.refresh_reference),
        "adapter.restart_every: the reference is a copy of the initial model, which refresh_reference cannot "
        "replace by a model with an adapter; write refresh_reference: 0 or restart_every: 0",
    )


def _kernel_checks(config: Config, facts: Facts) -> Iterator[Check]:
    kernels = config.learner.kernels
    gpu_only = {"logprob": (("triton", "liger"), "chunked"), "attention": (("flex",), "masked")}
    for name, (needing_gpu, other) in gpu_only.items():
        kernel = getattr(kernels, name)
        yield (
            kernel in needing_gpu and facts.device != "cuda",
            f"learner.kernels.{name}: {kernel} needs a GPU, the learner is on {facts.device}: "
            f"write auto or {other}",
        )
    yield (
        kernels.logprob == "liger" and "liger_kernel" not in facts.installed,
        f"learner.kernels.logprob: liger needs liger-kernel, which is not installed: {LIGER_REMEDY}, "
        "or write auto or triton",
    )


def _parallel_checks(
    key: str, c: LearnerConfig, algorithm: Algorithm | None, config: Config, facts: Facts
) -> Iterator[Check]:
    """Check the number of ranks against the machine, and the trained parameters against the parallelism."""
    yield (
        c.parallel == "single" and c.ranks > 1,
        f"ranks: {c.ranks} ranks need {key}.parallel fsdp2 or deepspeed; single is one process",
    )
    yield (
        c.cpu_offload and c.parallel != "fsdp2",
        "cpu_offload: only fsdp2 uses it; for deepspeed write "
        f"{key}.deepspeed={{zero_optimization: {{stage: 2, offload_optimizer: {{device: cpu}}}}}}",
    )
    yield (  # the default is allowed: a resolved config contains it
        c.parallel != "deepspeed" and c.deepspeed != LearnerConfig.model_fields["deepspeed"].default,
        f"deepspeed: only used with {key}.parallel: deepspeed, but it is {c.parallel}; remove these settings",
    )
    if c.parallel == "single":
        return
    yield from _rank_checks(c, config, facts)
    for name in ("quantize", "strategy"):
        yield (
            getattr(c, name) is not None,
            f"{name}: works in one process only; set {key}.parallel to single",
        )
    yield c.optimizer != "adamw", f"optimizer: {c.optimizer} works in one process only; use adamw"
    # The reference of other methods, and a refreshed reference, are stored as full (unsharded) tensors.
    follows = algorithm is not None and bool(algorithm.refresh_reference)
    if c.adapter is not None:
        method, start = c.adapter.method, c.adapter.options.get("init_lora_weights")
        yield (
            method not in ON_RANKS or isinstance(start, str),
            f"adapter.method: {method} works in one process only (on several ranks: "
            f"{', '.join(ON_RANKS)}, as peft begins them); set {key}.parallel to single",
        )
        yield follows, f"adapter: a reference that follows it needs one process; set {key}.parallel to single"
        yield (
            c.parallel == "deepspeed" and zero_stage(c) == 3,
            "adapter: not supported with ZeRO stage 3; use stage 2, or fsdp2",
        )
    if c.parallel == "deepspeed":
        yield from _deepspeed_checks(c, algorithm, facts)


def _rank_checks(c: LearnerConfig, config: Config, facts: Facts) -> Iterator[Check]:
    try:
        bound = len(parse_cores(c.cores)) if c.cores is not None else c.ranks
    except ValueError:
        bound = c.ranks  # the error is reported by `_core_checks`
    yield bound < c.ranks, f"cores: {c.ranks} ranks share {bound} cores; give at least one for each"
    if config.ray.address is not None:
        return  # devices of an existing cluster are counted when the learner starts
    gpu, engines = facts.device == "cuda", _engine_devices(config) if config.algorithm.online else 0
    available, name = (facts.gpus, "GPUs") if gpu else (facts.usable_cores, "CPU cores")
    yield (
        c.ranks > available,
        f"ranks: {c.ranks} ranks need {c.ranks} {name}, this machine has {available}; "
        "lower it, or set ray.address to join a cluster",
    )
    yield (
        gpu and c.ranks <= available < c.ranks + engines,
        f"ranks: {c.ranks} ranks and the {engines} GPUs of rollout.replicas make {c.ranks + engines}, "
        f"this machine has {available}; lower one of them",
    )


def _engine_devices(config: Config) -> int:
    return config.rollout.replicas * config.rollout.tensor_parallel


def _batch_checks(config: Config) -> Iterator[Check]:
    """Check that every update has at least one unit of data per rank."""
    c, t, a = config.learner, config.train, config.algorithm
    units, what = t.batch_size // t.minibatches, "groups" if a.online else "rows"
    if a.online and a.unit != "pair" and c.prefix_sharing != "on":
        units, what = units * t.num_generations, "completions"
    yield (
        c.ranks > 1 and units < c.ranks,
        f"learner.ranks: an update has {units} {what}, too few for {c.ranks} ranks; raise train.batch_size, "
        "or lower learner.ranks or train.minibatches",
    )


def _deepspeed_checks(c: LearnerConfig, algorithm: Algorithm | None, facts: Facts) -> Iterator[Check]:
    yield (
        "deepspeed" not in facts.installed,
        "parallel: deepspeed is not installed: install rft with the extra deepspeed, or use fsdp2",
    )
    for name in sorted(c.deepspeed.keys() & REPLACED_KEYS.keys()):
        yield True, f"deepspeed.{name}: set by rft from {REPLACED_KEYS[name]}; remove it"
    stage, zero = zero_stage(c), c.deepspeed.get("zero_optimization")
    yield stage not in (1, 2, 3), f"deepspeed.zero_optimization.stage: must be 1, 2 or 3, got {stage!r}"
    for part in ("offload_optimizer", "offload_param"):
        entry = zero.get(part) if isinstance(zero, dict) else None
        yield (
            isinstance(entry, dict) and entry.get("device") == "nvme",
            f"deepspeed.zero_optimization.{part}: nvme is not supported; use cpu",
        )
    if algorithm is not None and stage == 3:
        yield (
            "kl" in algorithm.outputs,
            "deepspeed: this algorithm reads the reference's head, which stage 3 shards; use fsdp2",
        )
        yield (
            bool(algorithm.refresh_reference),
            "deepspeed: the reference cannot follow the policy under stage 3; use fsdp2",
        )


def zero_stage(c: LearnerConfig) -> Any:
    """Return the ZeRO stage of the DeepSpeed config, unvalidated."""
    zero = c.deepspeed.get("zero_optimization")
    return zero.get("stage", 0) if isinstance(zero, dict) else zero


# -- engines and weight sync ---------------------------------------------------------------------------

_FOR_ANY_ENGINE = ("gloo", "sparse", "file")
MAX_ADAPTER_RANK = 512  # vLLM's limit


def choose_transport(config: Config, facts: Facts) -> str:
    """Return the transport name, with `auto` resolved and the GPU-to-GPU variant of `sparse` selected."""
    chosen, gpus = config.sync.transport, facts.device == "cuda" and facts.engine == "vllm"
    if chosen == "sparse" and gpus and config.sync.folder is None:
        return "sparse_nccl"
    if chosen != "auto":
        return chosen
    if not gpus:
        return "gloo"
    return "ipc" if facts.gpus == 1 and not any(wrong for wrong, _ in _ipc_checks(config, facts)) else "nccl"


def engine_checks(config: Config, facts: Facts) -> Iterator[Check]:
    yield (
        bool(config.rollout.fusion) and facts.engine == "vllm",
        "rollout.fusion: vllm samples from one model; set rollout.engine: hf",
    )
    yield (
        config.ray.device == "cuda" and facts.device == "cpu",
        "ray.device: cuda, but this machine has no GPU; set ray.address to join a cluster",
    )
    yield (
        facts.samples and config.rollout.engine == "vllm" and "vllm" not in facts.installed,
        "rollout.engine: vllm is not installed: install rft with the extra cpu or cuda, or set "
        "rollout.engine=hf",
    )


def transport_checks(config: Config, facts: Facts) -> Iterator[Check]:
    """Check that the transport supports the layout of learner and engines."""
    sync, transport, cluster = config.sync, config.sync.transport, config.ray.address is not None
    if not config.algorithm.online:
        return
    yield (
        transport == "nccl" and facts.device == "cpu",
        "sync.transport: nccl needs GPUs, and this machine has none; use gloo or auto",
    )
    yield (
        facts.engine == "hf" and transport not in ("auto", *_FOR_ANY_ENGINE),
        f"sync.transport: {transport} needs rollout.engine vllm; hf receives over "
        f"{', '.join(_FOR_ANY_ENGINE)}",
    )
    specific = {"adapter": _sent_adapter_checks, "ipc": _ipc_checks}.get(transport)
    for wrong, message in specific(config, facts) if specific else ():
        yield wrong, f"sync.transport: {message}"
    needed = 1 + _engine_devices(config)
    yield (
        facts.device == "cuda"
        and config.learner.parallel == "single"  # several ranks are checked by `_rank_checks`
        and choose_transport(config, facts) != "ipc"
        and not cluster
        and needed > facts.gpus,
        f"rollout.replicas: the learner needs 1 GPU and the replicas need {needed - 1}, but this machine has "
        f"{facts.gpus}; lower rollout.replicas, or let one vLLM engine share the learner's GPU "
        "(sync.transport: ipc)",
    )
    if transport not in ("file", "sparse"):
        yield (
            sync.folder is not None,
            f"sync.folder: transport {transport} writes no files; remove it, or use file or sparse",
        )
    elif transport == "file" or sync.folder is not None:
        yield (
            copies(config.algorithm) == 2,
            "sync.folder: two policies would write to the same files; use transport gloo or nccl",
        )
        yield (
            copies(config.algorithm) != 2 and sync.folder is None and cluster,
            "sync.folder: shared memory reaches one machine only, and ray.address names a cluster; give a "
            "folder that all its nodes share under the same path",
        )


def _ipc_checks(config: Config, facts: Facts) -> Iterator[Check]:
    yield facts.device == "cpu", "ipc needs a GPU, and this machine has none; use gloo or auto"
    yield (
        config.learner.parallel != "single",
        "ipc is for a learner of one rank; set learner.parallel to single, or use nccl",
    )
    yield (
        _engine_devices(config) > 1,
        "ipc shares one GPU between the learner and one engine; set rollout.replicas and "
        "rollout.tensor_parallel to 1, or use nccl",
    )
    yield (
        config.rollout.staleness > 0,
        "with ipc the engine sleeps while the learner trains; set rollout.staleness to 0",
    )
    yield copies(config.algorithm) == 2, "ipc does not support two policies on one GPU; use nccl"
    yield (
        config.ray.address is not None,
        "ipc stays within one machine, and ray.address names a cluster; use nccl",
    )


def _sent_adapter_checks(config: Config, facts: Facts) -> Iterator[Check]:
    adapter = config.learner.adapter
    if adapter is None:
        yield True, "adapter sends only a LoRA adapter, but learner.adapter is not set; use auto"
        return
    yield (
        adapter.method not in PLAIN_LORA,
        f"vLLM does not compute learner.adapter.method {adapter.method} as an adapter (it knows "
        f"{', '.join(PLAIN_LORA)}); use auto, which pushes the merged weights",
    )
    yield (
        adapter.restart_every > 0,
        "learner.adapter.restart_every changes the base, of which the engine has the first one; use auto, "
        "which pushes the merged weights",
    )
    yield (
        adapter.method in FROM_FIRST_BATCH,
        f"learner.adapter.method {adapter.method} is initialised from the first batch, so nothing can be "
        "sent before it; use auto, which pushes the merged weights",
    )
    yield (
        adapter.method not in FROM_FIRST_BATCH and adapter.lora_rank > MAX_ADAPTER_RANK,
        f"vLLM's adapters have a rank of at most {MAX_ADAPTER_RANK}; lower learner.adapter.r",
    )
    yield (
        config.learner.quantize is not None,
        "the learner's base is quantised (learner.quantize), the engine's is not: with adapter, the engine "
        "would sample from a different base; use auto",
    )
    yield (
        config.rollout.update in ("keep", "continue"),
        "adapter cannot change under completions in flight; set rollout.update to wait or abort",
    )


def mixture_checks(config: Config, facts: Facts) -> Iterator[Check]:
    """Check `data.mixture` against the rewards and the loop."""
    sources, functions = config.data.mixture, config.rewards.functions
    labels = {f.label: f for f in functions}
    demonstrated = bool(facts.demonstrations) and config.algorithm.online
    demonstrated = demonstrated and any(r.prefix_share for r in rollouts(config, True))
    for name, source in sources.items():
        key = f"data.mixture.{name}"
        yield (
            name in labels,
            f"{key}: a reward has this name too, and both write reward/{name}/mean; rename one of them",
        )
        yield (
            source.system is not None and demonstrated,
            f"{key}.system: demonstrations of all sources share one system message; write data.system, or "
            "put the message into the source's prompts",
        )
        if source.rewards is None:
            continue
        unknown = [label for label in source.rewards if label not in labels]
        yield (
            bool(unknown),
            f"{key}.rewards: {', '.join(unknown)} is not among `rewards` ({', '.join(labels) or 'none'})",
        )
        yield (
            not unknown and all(labels[label].gate for label in source.rewards),
            f"{key}.rewards: name at least one reward that is not a gate, or leave the key out",
        )
        yield (
            config.rewards.combine == "vector",
            f"{key}.rewards: combine: vector needs every reward for every row; leave it out",
        )
        yield (
            not config.algorithm.online and not config.eval.generate,
            f"{key}.rewards: this run scores no completions; leave it out",
        )
    used = {label for source in sources.values() for label in source.rewards or labels}
    unused = [label for label in labels if label not in used]
    yield (
        bool(sources and unused),
        f"rewards: {', '.join(unused)} scores no source of data.mixture; name it in one, or remove it",
    )
    yield (
        bool(sources) and config.train.curriculum is not None,
        "train.curriculum: it draws rows by pass rate, and a mixture by its rates; leave one of them out",
    )
    yield (
        config.data.mixing == "aioli" and config.algorithm.online,
        "data.mixing: aioli learns rates by held-out losses, which an online run does not measure; choose "
        "fixed, proportional or temperature",
    )
    others = {f"eval.sets.{name}.data": s.data for name, s in config.eval.sets.items()}
    stage = config.warm_start
    if stage is not None and stage.data is not None:
        others["warm_start.data"] = stage.data
    for key, data in others.items():
        played = [name for name, source in data.mixture.items() if source.environment is not None]
        yield (
            bool(played),
            f"{key}.mixture.{', '.join(played)}.environment: only rows of `data` are played in an "
            "environment; remove it",
        )
    yield (
        stage is not None and stage.data is not None and stage.data.mixing == "aioli",
        "warm_start.data.mixing: aioli learns rates in offline runs, not in a warm start; choose another",
    )


CHECKS = (
    mixture_checks,
    engine_checks,
    algorithm_checks,
    online_checks,
    environment_checks,
    offline_checks,
    privacy_checks,
    eval_checks,
    run_checks,
    learner_checks,
    transport_checks,
)


def warnings(config: Config) -> list[str]:
    """Return warnings about settings that are valid but often unintended, one sentence each."""
    return [*_order_warnings(config), *_threshold_warnings(config)]


def _order_warnings(config: Config) -> list[str]:
    if not config.environments or not config.algorithm.reads_order:
        return []
    return [
        f"environment: {algorithm_name(config.algorithm)} reads the order of a session's tokens, so the run "
        "stops at the first session that branches (a chat template that rewrites earlier turns, an agent "
        "with several histories); grpo trains on those too"
    ]


def _threshold_warnings(config: Config) -> list[str]:
    threshold = getattr(config.algorithm, "threshold", None)
    models = [f for f in config.rewards.functions if f.function == "reward_model" and f.weight != 0]
    if threshold is None or not models or not config.algorithm.online:
        return []
    nullable = type(None) in get_args(get_type_hints(type(config.algorithm))["threshold"])
    instead = "threshold: null" if nullable else "another algorithm"
    return [
        f"algorithm.threshold: {threshold:g} is compared with scores of the reward {models[0].label}, "
        f"whose scale is arbitrary: all completions may lie below it, or all above; write {instead}, or "
        "choose a threshold from scores that the model gave"
    ]
