"""Every metric and event that a run writes, each documented once. `docs/metrics.md` is generated from this
file (`python -m rft.tools.metric_docs > docs/metrics.md`), and a test fails when a run logs an unlisted name.

A `*` stands for any text, as in `reward/outcome/*`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import cache
from typing import Literal, NamedTuple


class Metric(NamedTuple):
    """A one-line description of a metric and its unit ("" for a plain number)."""

    meaning: str
    unit: str = ""


METRICS: dict[str, Metric] = {
    # -- where the run is
    "step": Metric("optimizer steps done when the line was written; 0 is the untrained model", "steps"),
    "data/epoch": Metric("passes over the training prompts so far", "epochs"),
    "data/prompts": Metric("prompts handed out so far", "prompts"),
    "data/dropped": Metric("groups dropped so far", "groups"),
    "data/measured": Metric("prompts with a measured pass rate (train.curriculum)", "prompts"),
    "data/pass_rate": Metric("mean pass rate of the measured prompts", "share"),
    "data/dropped/*": Metric("groups dropped so far for one reason", "groups"),
    "privacy/epsilon": Metric("epsilon spent so far, at the delta of learner.privacy", "nats"),
    "data/*/rows": Metric("rows drawn from one source of a mixture so far", "rows"),
    "data/*/rate": Metric("learned rate of one source (`mixing: aioli`)", "share"),
    "data/*/share": Metric("share of the rows drawn so far that are of one source of a mixture", "share"),
    "data/*/epoch": Metric("passes over one source of a mixture so far", "epochs"),
    "data/*/tokens": Metric("tokens of one source of a mixture that this step was trained on", "tokens"),
    # -- reward
    "reward/mean": Metric("mean reward of the batch's completions"),
    "reward/std": Metric("standard deviation of the reward over the batch"),
    "reward/min": Metric("smallest reward of the batch"),
    "reward/max": Metric("largest reward of the batch"),
    "reward/outcome/*": Metric(
        "share of scores with this outcome: correct, wrong, unparseable, timeout, error, abstain", "share"
    ),
    "reward/dropped": Metric(
        "completions that no reward could judge, removed from their group", "completions"
    ),
    "reward/demonstrated": Metric("mean reward of completions that start with a demonstration"),
    "reward/own": Metric("mean reward of completions without a demonstration"),
    "reward/workers/killed": Metric("reward workers killed for exceeding their time, so far", "workers"),
    "reward/workers/crashed": Metric("reward workers that crashed, so far", "workers"),
    "reward/workers/recycled": Metric("reward workers replaced after their share of work, so far", "workers"),
    "environment/episodes": Metric("episodes played, including those that a fault ended", "episodes"),
    "environment/tool_calls": Metric("mean number of tool calls of an episode", "calls"),
    "environment/tool_errors": Metric("share of tool calls that gave the policy an error", "share"),
    "environment/seconds": Metric("mean time of an episode spent in the environment", "s"),
    "environment/workers/started": Metric("environment workers started, so far", "workers"),
    "environment/workers/killed": Metric(
        "environment workers killed for exceeding their time, so far", "workers"
    ),
    "environment/workers/crashed": Metric("environment workers that died, so far", "workers"),
    "environment/workers/recycled": Metric(
        "environment workers replaced after their share, so far", "workers"
    ),
    "environment/endpoint/calls": Metric("model calls that came by HTTP, so far", "calls"),
    "environment/endpoint/refused": Metric("requests with the key of no open session", "requests"),
    "environment/endpoint/busy": Metric("requests answered by 429: too many were in flight", "requests"),
    "environment/endpoint/errors": Metric("requests that the endpoint failed to answer", "requests"),
    "reward/*/mean": Metric(
        "mean score of one reward function, before its weight; of a source of a mixture, its mean reward"
    ),
    "reward/*/std": Metric("standard deviation of one reward function's score"),
    "reward/*/seconds_per_call": Metric("mean time of one judgement of one reward function", "s"),
    **{
        f"reward/*/{outcome}": Metric(f"scores of one reward function with the outcome {outcome}", "scores")
        for outcome in ("correct", "wrong", "unparseable", "timeout", "error", "abstain")
    },
    "reward/*/logged/*": Metric("mean of the values that a reward function passed to TRL's `log_metric`"),
    "group/degenerate": Metric("groups whose rewards are all equal: they carry no gradient", "groups"),
    "group/degenerate_share": Metric("share of the step's groups whose rewards are all equal", "share"),
    "group/count": Metric("groups trained on in this step", "groups"),
    "group/filtered": Metric("groups without signal that were left out and refilled", "groups"),
    # -- held-out evaluation
    "eval/accuracy": Metric("share of correct held-out completions, sampled", "share"),
    "eval/accuracy_stderr": Metric("standard error of eval/accuracy over problems", "share"),
    "eval/accuracy_low": Metric("lower end of its 95 % bootstrap interval over problems", "share"),
    "eval/accuracy_high": Metric("upper end of that interval", "share"),
    "eval/greedy_accuracy": Metric("share of held-out problems solved by greedy decoding", "share"),
    "eval/pass@*": Metric("chance that at least one of k samples is correct, unbiased estimate", "share"),
    "eval/maj@*": Metric(
        "share of problems whose most frequent answer among the first k samples is correct, ties broken at "
        "random (expectation); present where a reward extracts answers",
        "share",
    ),
    "eval/best@*": Metric(
        "share of problems whose best of n samples by `eval.rerank` is correct, ties broken at random "
        "(expectation)",
        "share",
    ),
    "eval/reward": Metric("mean combined reward of held-out completions, sampled"),
    "eval/distinct": Metric("distinct completions as a share of a problem's samples, mean", "share"),
    "eval/distinct_*": Metric("distinct n-grams as a share of all in a problem's samples, mean", "share"),
    "eval/distinct_answers": Metric("number of different answers among a problem's samples, mean", "answers"),
    "eval/confidence": Metric("mean confidence that held-out completions state", "share"),
    "eval/ece": Metric(
        "expected calibration error of the stated confidence: mean distance between confidence and accuracy "
        "over ten equal bins, weighed by their completions",
        "share",
    ),
    "eval/declined": Metric(
        "share of held-out completions that decline to answer (`eval.decline`), sampled", "share"
    ),
    "eval/accuracy_answered": Metric(
        "share of correct completions among the held-out ones that do not decline and could be judged",
        "share",
    ),
    "eval/stated": Metric("share of held-out completions that state a confidence", "share"),
    "eval/negative_flips": Metric(
        "share of problems solved at step 0 and failed now, by greedy decoding or else the first sample",
        "share",
    ),
    "eval/positive_flips": Metric("share of problems failed at step 0 and solved now, likewise", "share"),
    "eval/forgetting": Metric(
        "accuracy at step 0 minus accuracy now, over problems judged both times", "share"
    ),
    "eval/unjudged": Metric("held-out completions that the reward could not judge", "completions"),
    "eval/problems": Metric("held-out problems evaluated", "problems"),
    "eval/outcome/*": Metric("share of held-out completions with this outcome", "share"),
    "eval/length_mean": Metric("mean length of held-out completions", "tokens"),
    "eval/truncated": Metric("share of held-out completions cut at the length limit", "share"),
    "eval/loss": Metric("mean loss on held-out examples, per unit of the algorithm (offline training)"),
    "eval/nll": Metric("mean of -log p over the held-out (preferred) responses' tokens", "nats/token"),
    "eval/preference_accuracy": Metric(
        "share of held-out pairs whose preferred one is ahead in reward", "share"
    ),
    "eval/preference_margin": Metric("mean reward margin of held-out pairs, implicit or learned"),
    "eval/reward_good": Metric("implicit reward of held-out responses labelled good, mean"),
    "eval/reward_bad": Metric("implicit reward of held-out responses labelled bad, mean"),
    "eval/label_accuracy": Metric("share of held-out labels that the implicit reward predicts", "share"),
    "eval/score": Metric("mean reward of a reward model over held-out responses"),
    "eval/score_error": Metric("mean distance of a predicted score from the given one, held-out"),
    "eval/step_accuracy": Metric("share of held-out steps that a process reward model labels right", "share"),
    "eval/examples": Metric("held-out examples evaluated (offline training)", "rows"),
    # -- preferences and reward models (offline training)
    "preference/accuracy": Metric(
        "share of the step's pairs whose preferred one is ahead in reward", "share"
    ),
    "preference/margin": Metric("mean reward margin over the pairs' tokens"),
    "preference/chosen": Metric("log-prob per token of the preferred responses", "nats/token"),
    "preference/rejected": Metric("log-prob per token of the other responses", "nats/token"),
    "preference/reward": Metric("mean reward of a reward model over the responses' tokens"),
    "bco/reward_good": Metric("mean implicit reward of good responses"),
    "bco/reward_bad": Metric("mean implicit reward of bad responses"),
    "bco/shift": Metric("moving average of both, which the rewards are compared with"),
    "kto/z": Metric("divergence from the reference that good and bad responses are measured against", "nats"),
    # -- policy
    "policy/kl": Metric("divergence of the policy from the one that sampled, k3 estimate", "nats/token"),
    "solutions/trained": Metric("distinct solutions of a prompt that mml trains on", "solutions"),
    "policy/kl_ref": Metric("divergence of the policy from the reference, k3 estimate", "nats/token"),
    "policy/aligned": Metric("share of tokens that begin where one of the teacher's tokenizer does", "share"),
    "policy/divergence": Metric("full divergence of the policy from the teacher", "nats/token"),
    "policy/kl_coefficient": Metric("weight of the KL term in this step, if it is adaptive (`kl_target`)"),
    "policy/entropy_coef": Metric(
        "weight of the entropy bonus in this step, if it is adaptive (`entropy_target`)"
    ),
    "policy/entropy": Metric("entropy of the policy, mean over sampled tokens", "nats/token"),
    "policy/clip_fraction": Metric("share of tokens whose ratio is clipped", "share"),
    "policy/ratio": Metric("ratio of the policy to the behaviour policy, mean over tokens"),
    "policy/ratio_spread": Metric("distance of that ratio from 1, mean over tokens"),
    "policy/advantage_mean": Metric("mean advantage over tokens"),
    "policy/advantage_std": Metric("standard deviation of the advantage over tokens"),
    "policy/mismatch_kl": Metric("divergence of the learner's log-probs from the sampler's", "nats/token"),
    "policy/correction": Metric("importance weight against the sampler, mean over tokens"),
    "policy/corrected_away": Metric("share of tokens whose importance weight was cut or set to 0", "share"),
    "policy/masked_fraction": Metric("share of tokens left out by off-policy correction", "share"),
    # -- learner
    "train/loss": Metric("loss of the whole batch, by the algorithm's normalisation"),
    "train/grad_norm": Metric("norm of the gradient before clipping"),
    "train/learning_rate": Metric("learning rate of this step"),
    "train/tokens": Metric("tokens processed by the learner in this step", "tokens"),
    "train/loss_tokens": Metric("tokens that the loss acted on in this step", "tokens"),
    "train/micro_batches": Metric("micro-batches that the step was split into", "micro-batches"),
    "train/updates": Metric(
        "optimizer updates of this step: inner epochs times mini-batches, less those without a trained token",
        "updates",
    ),
    "train/skipped": Metric("updates skipped because the gradient was not finite", "updates"),
    "critic/loss": Metric("loss of the critic, mean over tokens"),
    "critic/explained_variance": Metric("share of the returns' variance that the critic predicts"),
    "copy/*": Metric("a metric of the second copy's learner, if two copies of the model are trained"),
    # -- completions
    "completion/length_mean": Metric("mean length of the completions", "tokens"),
    "completion/length_std": Metric("standard deviation of the completions' length", "tokens"),
    "completion/length_min": Metric("shortest completion", "tokens"),
    "completion/length_max": Metric("longest completion", "tokens"),
    "completion/truncated": Metric("share of completions cut at the length limit", "share"),
    "completion/duplicates": Metric("share of completions that repeat another one of their group", "share"),
    "completion/shared": Metric(
        "share of completions that also answer another prompt, word for word", "share"
    ),
    "completion/distinct_*": Metric("distinct n-grams as a share of all: diversity of the output", "share"),
    # -- rollout
    "rollout/age_mean": Metric("mean age of trained completions: policy version minus theirs", "versions"),
    "rollout/age_max": Metric("largest age of a trained completion", "versions"),
    "rollout/age/*": Metric("share of trained completions with exactly this age", "share"),
    "rollout/tokens": Metric("tokens sampled for this step", "tokens"),
    "rollout/inflight": Metric("prompts in flight when the step ended", "prompts"),
    "rollout/waiting": Metric("free or waiting slots when the step ended", "slots"),
    "rollout/requeued": Metric("prompts resent after a fault, so far", "prompts"),
    "rollout/versions_mean": Metric("mean number of policy versions that a completion spans", "versions"),
    "engine/alive": Metric("engines that answer", "engines"),
    "engine/*/version": Metric("policy version that an engine holds", "version"),
    "engine/*/silence": Metric("seconds since an engine's last health check succeeded", "s"),
    "engine/restarts": Metric("engines rebuilt so far", "engines"),
    # -- sessions in an environment
    "session/turns": Metric("mean number of model calls of a session", "calls"),
    "session/branches": Metric(
        "mean number of branches of a session: 1 if every call's prompt extends the call before", "branches"
    ),
    "session/retokenised": Metric(
        "mean number of a session's prompts that contain an earlier turn and were encoded afresh, because "
        "the chat template does not repeat that turn",
        "calls",
    ),
    "session/rewritten": Metric(
        "mean number of a session's turns whose spelling the chat template would change; they are kept as "
        "sampled",
        "calls",
    ),
    "session/bridged": Metric(
        "mean number of a session's prompts that keep the tokens of earlier turns by the rules of the "
        "model's family (the package renderers), where the chat template does not repeat those turns",
        "calls",
    ),
    "session/tool_calls": Metric("mean number of a session's tool calls, without malformed ones", "calls"),
    "session/turn_reward/*": Metric(
        "mean reward that the environment gave a turn, counted from 1, over the sessions that took it; the "
        "8th includes all later turns"
    ),
    "session/malformed": Metric("mean number of a session's answers with a malformed tool call", "calls"),
    "session/cached": Metric(
        "mean number of a session's prompt tokens that the engine found in its prefix cache", "tokens"
    ),
    "session/tokens": Metric("mean number of sampled tokens of a session", "tokens"),
    "session/context": Metric("mean length of a session's longest prompt with its answer", "tokens"),
    "session/seconds": Metric("mean duration of a session", "s"),
    "session/model_seconds": Metric("mean time of a session spent in model calls", "s"),
    "session/score/*": Metric("mean of a named score that the environment gave"),
    "session/ending/*": Metric(
        "share of sessions with this ending: finished, context_full, turn_limit, environment_error, "
        "tool_error, timeout; sessions with the last three are retried",
        "share",
    ),
    "session/lost": Metric(
        "samples removed from their group because the environment kept failing, or nothing was sampled",
        "samples",
    ),
    "session/logp_gap/*": Metric(
        "sync/logp_gap over the tokens of one turn, counted from 1; the last one also has all later turns",
        "nats",
    ),
    "session/logp_gap_mean/*": Metric("sync/logp_gap_mean over the tokens of one turn", "nats"),
    "eval/align/accepted": Metric(
        "share of the proposals that the chains of rollout.align accepted", "share"
    ),
    "eval/session/*": Metric("a metric session/..., over held-out sessions"),
    "eval/*/*": Metric("a metric eval/... of a named held-out set (`eval.sets`): eval/NAME/accuracy"),
    # -- weights to the engines
    "sync/logp_gap": Metric(
        "largest difference between the engine's log-prob of a token and the learner's, over the tokens that "
        "the version in training sampled; absent where a step has none",
        "nats",
    ),
    "sync/logp_gap_mean": Metric("mean of the difference in sync/logp_gap, over its tokens", "nats"),
    "sync/proof_gap": Metric(
        "largest difference between a replica's log-prob of a fixed token and the learner's, for the version "
        "that the step began with; in 16 bits, divided by log-probs of more than 1 nat",
        "nats",
    ),
    "sync/proof_gap_mean": Metric("mean of the difference in sync/proof_gap, of the worst replica", "nats"),
    "sync/bytes": Metric("bytes pushed to each engine after this step", "bytes"),
    "sync/version": Metric("policy version that all engines acknowledged", "version"),
    "sync/tensors": Metric("tensors pushed to each engine after this step", "tensors"),
    "sync/changed_share": Metric("share of the weights whose bfloat16 bits this step changed", "share"),
    "sync/changed_share_min": Metric("sync/changed_share of the matrix that changed least", "share"),
    "sync/changed_share_max": Metric("sync/changed_share of the matrix that changed most", "share"),
    "sync/changed/*": Metric("sync/changed_share of one matrix (sync.measure_changes: matrices)", "share"),
    # -- time
    "time/wall": Metric("when the line was written: seconds since 1970 (UTC)", "s"),
    "time/step": Metric("whole step", "s"),
    "time/rollout": Metric("waiting for completions", "s"),
    "time/reward": Metric("waiting for rewards", "s"),
    "time/teacher": Metric("scoring a group by the teacher's server, the slowest group", "s"),
    "time/reference": Metric("scoring before the updates: reference and old log-probs, values", "s"),
    "time/train": Metric("forward, backward, optimizer", "s"),
    "time/sync": Metric("pushing weights and waiting for all engines", "s"),
    "time/sync_announce": Metric("part of time/sync before the engines are paused: reading, writing", "s"),
    "time/proof": Metric("from the push to the proof that it arrived, while engines sample", "s"),
    "time/switch": Metric("offloading and reloading learner and engine (sync.transport: ipc)", "s"),
    "time/sync_measure": Metric("part of time/sync spent on measuring changes", "s"),
    "time/eval": Metric("held-out evaluation", "s"),
    "time/checkpoint": Metric("time that the step waited for the checkpoint", "s"),
    "throughput/tokens_per_s": Metric("sampled and trained completion tokens per second of step", "tokens/s"),
    "throughput/train_tokens_per_s": Metric("the learner's tokens per second of time/train", "tokens/s"),
    "throughput/samples_per_s": Metric("completions per second of step", "completions/s"),
    # -- memory
    "memory/device/*": Metric(
        "bytes in use on the GPU that learner and engine share, by both, after the switch to train, to push "
        "and to rollout (sync.transport: ipc)",
        "bytes",
    ),
    "memory/learner_peak": Metric("peak bytes of the learner on that GPU since the last push", "bytes"),
}

EVENTS: dict[str, str] = {
    "run/opened": "a process began to write: pid, host, total_steps, resumed_at (none: from the start)",
    "run/dtype": "`dtype: auto` was resolved: choice (dtype, sections, reason)",
    "run/closed": "the process stopped writing: last_step, reason (done, stopped, or the error)",
    "run/superseded": "lines after the resume point were set aside: file, lines, first_step, last_step",
    "run/stopping": "a stop was requested: signal (and who sent it)",
    "run/stopped": "stopped on request: step, signal, saved (step of the last checkpoint), error",
    "run/failed": "ended by an error: step, error",
    "phase/started": "a part of a step (rollout, train, sync) began: phase, step",
    "phase/ended": "a part of a step ended: phase, step, seconds",
    "version/proved": "every replica scores fixed tokens as the learner does: version, tokens, gaps",
    "version/pushed": "weights reached the engines: version, seconds, bytes, engines",
    "group/trained": "a step's groups were trained on: step, prompts ([epoch, row] each), ages",
    "group/dropped": "a group is not trained on: prompt ([epoch, row]), reason, again (true: a second try)",
    "group/requeued": "a request was sent out again: request, reason",
    "checkpoint/saved": "a checkpoint is complete: step, path, seconds, held (seconds that training waited)",
    "checkpoint/rejected": "a resume passed over a damaged checkpoint: path, reason",
    "checkpoint/restored": "the run resumed from a checkpoint: step, path",
    "eval/done": "a held-out evaluation ended: step, accuracy (offline: loss), seconds",
    "fault/*": "a part failed: fields part, what (the error), action (the next step), and the work it held",
    "engine/started": "an engine answers: engine, version, node, seconds",
    "engine/lost": "an engine no longer answers: engine, reason, held (work it had)",
    "engine/rebuilt": "an engine was rebuilt and holds the current version: engine, version, seconds",
    "session/prompts": "how prompts of later turns keep token ids: kept_by (chat template, renderers), what "
    "(the family, or why there is none), source (of a mixture)",
    "engine/health": "health check: engine, version, inflight",
    "guard/*": "a guard triggered: step, value, limit, message, action (warn or stop)",
    "metric/non_finite": "metrics were NaN or infinite and were written as null: step, values",
    "metric/added": "the line of the step that a run resumed at was completed (an evaluation that was cut "
    "short): step, names",
}


@cache
def _pattern(table: Literal["metrics", "events"]) -> re.Pattern[str]:
    """Compile the names of a table. Takes a quarter of a second, so it is done on first use."""
    names: Iterable[str] = METRICS if table == "metrics" else EVENTS
    parts = (re.escape(name).replace(r"\*", ".+") for name in names)
    return re.compile("|".join(f"(?:{part})" for part in parts))


def is_documented(name: str) -> bool:
    """True if `name` is a metric of the table (`*` matches any non-empty text)."""
    return _pattern("metrics").fullmatch(name) is not None


def is_documented_event(kind: str) -> bool:
    """True if `kind` is an event of the table."""
    return _pattern("events").fullmatch(kind) is not None


def is_reproducible(name: str) -> bool:
    """True if two equal runs in synchronous mode must write the same number: all but times, memory, counts
    of faults, bytes pushed and proofs (a resumed run starts with a full push, and proves it)."""
    places = (
        "time/",
        "throughput/",
        "memory/",
        "engine/",
        "sync/bytes",
        "sync/proof",
        "reward/workers/",
        "environment/",  # timing, and repeated episodes
        "rollout/requeued",
        "session/ending/",  # repeated after a fault
        "session/cached",
    )
    return not name.startswith(places) and not name.endswith(("seconds_per_call", "seconds"))
