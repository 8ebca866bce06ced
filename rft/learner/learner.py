"""One training step: prepare the batch, weight the loss, accumulate gradients, update.

    metrics = Learner(spec).step(batch, 0)

A learner runs in a Ray actor (workers.py) or in process. Every rank calls every method.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.optim import AdamW

from rft.algorithms.base import PolicyOutput
from rft.algorithms.extras import ChangesEmbeddings, critic_only, score_heads
from rft.algorithms.math.sequences import branching, last_tokens
from rft.batch import Batch, Completion, Group, Prompt
from rft.errors import LearnerError, LogpGapError
from rft.kernels import logprob_common
from rft.learner import objective
from rft.learner.model import PolicyModel
from rft.learner.objective import Sums
from rft.learner.parallel import Parallel
from rft.learner.schedule import learning_rate
from rft.learner.spec import LearnerSpec
from rft.learner.state import TrainState
from rft.learner.strategy import Strategy, make_moments
from rft.packing import micro_batches
from rft.utils.memory import return_freed_memory
from rft.utils.quantized import evaluation_mode
from rft.work import tree_tokens

# Of an algorithm's needs, those that a forward computes.
SCORED = frozenset({"old_logps", "ref_logps", "old_entropy", "values", "end_values"})


class Learner(TrainState):
    """A policy in training, with its training step. Every method leaves the learner consistent."""

    def __init__(self, spec: LearnerSpec, parallel: Parallel | None = None) -> None:
        super().__init__(spec, parallel)
        self.scoring_seconds = 0.0  # of the current step
        self.updates_made = 0  # of the current step
        self.messages: list[str] = []
        self.previewed: list[Batch] = []
        self.self_checked = spec.config.self_check == "off"
        self.moments_made = False  # before any activation

    def pop_messages(self) -> list[str]:
        """Return the messages for the user since the last call: kernels that this rank chose by timing them,
        and steps without an update."""
        messages, self.messages = self.messages, []
        return logprob_common.pop_messages() + messages

    def make_moments(self) -> None:
        """Make the optimizer's moments before the first step, where that takes long: on CPU, AdamW of all
        parameters in one process. It changes no result."""
        plain = type(self.optimizer) is AdamW and type(self.strategy) is Strategy
        if self.spec.device == "cpu" and self.parallel.ranks == 1 and plain:
            make_moments(self.optimizer)
            self.moments_made = True

    # -- one step ----------------------------------------------------------------------------------

    def step(self, batch: Batch, step: int) -> dict[str, float]:
        """Train on a batch (all inner epochs and mini-batches); return the step's metrics.

        The policy's version increases by one. If there is nothing to train on (every completion was truncated
        and `mask_truncated` excludes those), weights, optimizer and algorithm state stay unchanged;
        mini-batches without a trained token are skipped.

        Raises LogpGapError before any update if the log-probs of the batch's fresh samples do not match the
        learner's, LearnerError on a non-finite gradient.
        """
        start = time.perf_counter()
        self.scoring_seconds = 0.0
        spec = self.spec
        gap = objective.LogpGap()
        self._check_fresh(batch)
        self._check_order(batch)
        if not self.self_checked:
            self.policy.self_check(batch, fall_back=spec.config.self_check == "fall_back")
            self.self_checked = True
        batch = self.prepare(self.at_step(batch, step), gap)
        trained = objective.has_units(self.algorithm, batch)
        if trained and self.strategy.begin(
            lambda: self._score_previewed(batch), lambda: self._accumulate(batch, None)
        ):
            self.parallel.discard(self.optimizer)
            self.make_optimizer()
            self.previewed.clear()
        lr = learning_rate(spec.config, step, spec.train.steps)
        alone = critic_only(self.algorithm, batch.state)
        for group in self.optimizer.param_groups:  # a rate of 0 stops weight decay too
            group["lr"] = lr * group.get("scale", 1.0) if group.get("critic") or not alone else 0.0
        updates: list[dict[str, float]] = []
        self.updates_made = 0
        for iteration in range(spec.train.num_iterations if trained else 0):
            for mini in self._minibatches(batch, step, iteration):
                if not objective.has_units(self.algorithm, mini):
                    continue
                first = not updates and batch.old_logps is None
                metrics = self._accumulate(mini, gap if first else None)
                updates.append({**metrics, **self._optimize()})
                self.updates_made += 1
        self.version += 1
        metrics = objective.merge_means(updates)
        if updates:
            self.state = self.algorithm.next_state(self.state, metrics)
        else:
            self.messages.append(_no_update_message(batch, step))
        every = self.algorithm.refresh_reference
        if self.reference is not None and every and self.version % every == 0:
            self.parallel.reshard()
            self.reference.follow(self.policy)
            if self.algorithm.reset_optimizer:
                self.make_optimizer()
        seconds = time.perf_counter() - start
        return {
            **metrics,
            **_advantage_metrics(batch),
            **self.algorithm.report(batch),
            **gap.metrics,
            "train/learning_rate": lr,
            "train/tokens": float(batch.num_tokens),
            "train/loss_tokens": float(batch.mask.sum()),
            "train/updates": float(len(updates)),
            "throughput/train_tokens_per_s": batch.num_tokens / (seconds - self.scoring_seconds),
            "time/train": seconds - self.scoring_seconds,
            **({"time/reference": self.scoring_seconds} if self.scoring_seconds else {}),
        }

    def preview(self, batch: Batch) -> None:
        """Show a batch of later steps, during the first step, to an adapter that is initialised from data."""
        self.previewed.append(batch)

    def _score_previewed(self, batch: Batch) -> None:
        """Run the first and the previewed batches forward, so that the adapter reads its layers' inputs."""
        for one in (batch, *self.previewed):
            self.score(one)

    def at_step(self, batch: Batch, step: int) -> Batch:
        """Add the algorithm's state and the progress of the run to a batch."""
        progress = step / max(self.spec.train.steps - 1, 1)
        length = float(self.spec.sampling.max_completion_length)
        now = {"progress": progress, "max_completion_length": length, "version": float(self.version)}
        return batch.with_(state={**self.state, **now})

    def prepare(self, batch: Batch, gap: objective.LogpGap) -> Batch:
        """Let the algorithm prepare a batch, and compute all inputs of its loss. Inputs that `prepare` does
        not read are computed after it, without the tokens that it masked out."""
        needs, before = self.algorithm.needs, self.algorithm.before_prepare
        if self.policy.truncation is not None and (self._several or self.algorithm.needs_reference):
            needs |= {"support"}
            before |= {"support"} if before & SCORED else frozenset()
        batch = self.algorithm.prepare(self.fill(batch, before, gap))
        return self.fill(batch, needs - before, gap)

    @property
    def _several(self) -> bool:  # updates of a batch
        return self.spec.train.num_iterations * self.spec.train.minibatches > 1

    def fill(self, batch: Batch, needs: frozenset[str], gap: objective.LogpGap) -> Batch:
        """Compute the `needs` that a forward pass yields: old and reference log-probs, values, entropy, and
        the tokens that could be sampled (`support`), over which all log-probs are taken."""
        extra = needs & {"values", "end_values", "support"}
        extra |= frozenset({"entropy"} if "old_entropy" in needs else ())
        old = "old_logps" in needs and batch.old_logps is None and (self._several or self.algorithm.prescored)
        if old or extra:
            out = self.score(batch, outputs=extra)
            changes = {name: out[name] for name in extra - {"entropy"}}
            if batch.old_logps is None:  # an algorithm may have set others
                changes["old_logps"] = out["logps"]
            if "entropy" in extra:
                changes["old_entropy"] = out["entropy"]
            batch = batch.with_(**changes)
            gap.add(out["logps"], batch, self.version)
            self._check_gap(gap)
        if "old_scores" in needs:
            scores = self.score(batch, outputs=frozenset({"scores"}))["scores"]
            batch = batch.with_(columns={**batch.columns, "old_scores": scores[last_tokens(batch)]})
        if "ref_logps" in needs and self.reference is not None and batch.ref_logps is None:
            batch = batch.with_(ref_logps=self.score(batch, model=self.reference)["logps"])
        return batch

    @torch.no_grad()
    def score(
        self, batch: Batch, *, outputs: frozenset[str] = frozenset(), model: PolicyModel | None = None
    ) -> dict[str, Tensor]:
        """Score a batch with the policy or another model, without gradient: log-probs and `outputs`, on CPU,
        {"logps": [T] float32, ...}. Collective."""
        begin = time.perf_counter()
        model = model or self.policy
        names = ("logps", *sorted(outputs))
        scores = {name: torch.zeros(batch.num_tokens) for name in names}
        if "support" in outputs:
            weight = model.head().weight
            width = -(-getattr(weight, "ds_shape", weight.shape)[0] // 8)
            scores["support"] = torch.zeros(batch.num_tokens, width, dtype=torch.uint8)
        if "scores" in outputs:
            scores["scores"] = torch.zeros(batch.num_tokens, score_heads(self.algorithm))
        scored, place = batch.pruned(batch.mask)
        tree_of_token = scored.tree[scored.segment]
        for trees in self.plan(scored) if scored.num_tokens else ():
            out = model.run(self.micro(scored if trees else batch, trees), outputs)
            where = place[torch.isin(tree_of_token, torch.tensor(trees, dtype=torch.int64))]
            for name in names if trees else ():
                scores[name][where] = getattr(out, name).to(scores[name].dtype).cpu()
        scores = {name: self.parallel.sum(values) for name, values in scores.items()}
        self.scoring_seconds += time.perf_counter() - begin
        return scores

    def score_tokens(self, tokens: Sequence[int]) -> list[float]:
        """Score `tokens[1:]`, each given its predecessors, at temperature 1, as engines score prompts.
        Collective."""
        group = Group(Prompt(0, tuple(tokens[:1]), ""), (Completion(tuple(tokens[1:])),))
        batch = Batch.build([group])
        scored = self.score(batch, model=self.policy.at_temperature(1.0))
        logps: list[float] = scored["logps"][batch.mask].tolist()
        return logps

    def score_reference(self, batch: Batch) -> Tensor:
        """Return the reference's log-probs, [T] float32, for a cache. Loads the reference if necessary."""
        self.reference = self.reference or self._load_reference()
        if self.reference is None:
            raise LearnerError(
                f"{type(self.algorithm).__name__} needs no reference, so there is none to score"
            )
        return self.score(batch, model=self.reference)["logps"]

    def score_policy(self, batch: Batch) -> Tensor:
        """Return the policy's log-probs, [T] float32, for a cache, without dropout. Collective."""
        with evaluation_mode(self.policy.model):
            return self.score(batch)["logps"]

    def release_reference(self) -> None:
        """Free the reference's memory: from now on, batches contain `ref_logps`."""
        self.reference = None

    @torch.no_grad()
    def evaluate(self, batch: Batch, step: int) -> Sums:
        """Return sums and counts, over units, of the algorithm's loss and its `held_out` measures on held-out
        data. Dropout and changed embeddings are off; the learner's state is not changed."""
        algorithm = self.algorithm
        batch = self.prepare(self.at_step(batch, step), objective.LogpGap())
        batch, scale = objective.weigh(algorithm, batch, self.spec.sampling.max_completion_length)
        units = float(batch.mask.sum() if algorithm.unit == "token" else round(1 / scale))
        plain = None if isinstance(algorithm, ChangesEmbeddings) else algorithm
        sums: Sums = {}
        loss = 0.0
        with evaluation_mode(self.policy.model):
            for trees in self.plan(batch):
                micro = self.micro(batch, trees)
                out = self.policy.run(micro, algorithm.outputs, algorithm=plain, reference=self.reference)
                if not trees:
                    continue
                micro = micro.to(self.policy.device)
                loss += float(objective.reduce_loss(algorithm, out, micro, scale))
                for name, values in algorithm.held_out(out, micro).items():
                    measured = {name: (float(values.sum(dtype=torch.float64)), float(values.numel()))}
                    sums = objective.add_sums([sums, measured])
        parts = self.parallel.gather((loss, sums))
        loss = sum(part for part, _ in parts)
        return {"loss": (loss * units, units), **objective.add_sums(part for _, part in parts)}

    def plan(self, batch: Batch) -> list[list[int]]:
        """Split a batch into this rank's micro-batches of tree ids: as many on every rank, some empty."""
        if not batch.num_tokens:
            return [[]]
        keep = self.algorithm.unit == "pair"
        size, ranks = self.spec.config.micro_batch_tokens, self.parallel.ranks
        width = self.policy.model.config.get_text_config().hidden_size
        return micro_batches(batch, size, ranks, keep_groups=keep, hidden_size=width)[self.parallel.rank]

    def micro(self, batch: Batch, trees: list[int]) -> Batch:
        """Select a micro-batch. An empty one gets the batch's smallest tree, whose results must not count: a
        rank without work still takes part in the collectives of forward and backward."""
        return batch.select(trees or [int(tree_tokens(batch).argmin())])

    def _minibatches(self, batch: Batch, step: int, iteration: int) -> Iterator[Batch]:
        """Split by groups into `minibatches` parts, in an order that depends on seed, step and epoch."""
        if self.spec.train.minibatches == 1:
            yield batch
            return
        groups = list(range(batch.num_groups))
        random.Random(f"{self.spec.seed}/{step}/{iteration}").shuffle(groups)
        for part in range(self.spec.train.minibatches):
            chosen = torch.tensor(sorted(groups[part :: self.spec.train.minibatches]))
            yield batch.select_groups(chosen)

    def _accumulate(self, mini: Batch, gap: objective.LogpGap | None) -> dict[str, float]:
        """Add the gradient of one mini-batch's loss; return its metrics."""
        mini, scale = objective.weigh(self.algorithm, mini, self.spec.sampling.max_completion_length)
        means, total = objective.TokenMeans(), 0.0
        measured = self.spec.config.entropy and not score_heads(self.algorithm)
        outputs = self.algorithm.outputs | (frozenset({"entropy"}) if measured else frozenset())

        def note(out: PolicyOutput, micro: Batch) -> None:
            if gap is not None:
                gap.add(out.logps.cpu(), micro, self.version)
            micro = micro.to(self.policy.device)
            with torch.no_grad():
                metrics = self.algorithm.metrics(out, micro)
                if out.entropy is not None:
                    metrics.setdefault("policy/entropy", out.entropy)
                means.add(metrics, micro.mask)

        trained, idle = objective.divide(self.algorithm, mini)
        if idle.num_tokens and self.spec.config.measure_untrained:
            for trees in self.plan(idle):
                micro = self.micro(idle, trees)
                with torch.no_grad():
                    out = self.policy.run(micro, outputs, algorithm=self.algorithm, reference=self.reference)
                if trees:
                    note(out, micro)
        plan = self.plan(trained)
        for trees in plan:
            micro, last = self.micro(trained if trees else mini, trees), trees is plan[-1]
            expected = objective.predict_logp_grad(self.algorithm, micro, scale) if trees else None
            out = self.policy.run(
                micro, outputs, algorithm=self.algorithm, reference=self.reference, expected=expected
            )
            if not trees:
                self.parallel.backward(objective.zero_loss(out), last=last)
                continue
            loss = objective.reduce_loss(self.algorithm, out, micro.to(self.policy.device), scale)
            total += float(loss.detach())
            penalty = self.strategy.penalty() if last else None
            self.parallel.backward(loss if penalty is None else loss + penalty, last=last)
            if trees is plan[0] and not last:  # the gradients lie among the freed activations
                self._return_freed_memory()
            note(out, micro)
        parts = self.parallel.gather((means, total, gap))
        if gap is not None:
            gap.merge(part for _, _, part in parts)
            self._check_gap(gap)
        return {
            **objective.TokenMeans.merged(part for part, _, _ in parts).means(),
            "train/loss": sum(part for _, part, _ in parts),
            "train/micro_batches": float(len(plan)),
        }

    def _optimize(self) -> dict[str, float]:
        """Clip the accumulated gradient and update the weights; return metrics."""
        bound = self.spec.config.max_grad_norm
        norm, finite = self.parallel.update(self.strategy.trained(self.policy), self.optimizer, bound)
        if not finite and self.spec.config.on_nonfinite == "stop":
            made = self.updates_made
            kept = f"the step's {made} earlier updates are kept" if made else "nothing was updated"
            raise LearnerError(
                f"the gradient norm is {norm} at policy version {self.version}; {kept}. "
                "Lower learner.learning_rate, or set learner.on_nonfinite: skip to drop such updates."
            )
        if self.version == 0 and not self.moments_made:  # the moments that it has made lie among freed memory
            self._return_freed_memory()
        measured = {"train/grad_norm": norm} if finite else {}
        return {**measured, "train/skipped": float(not finite)}

    def _return_freed_memory(self) -> None:
        if self.spec.device == "cpu":
            return_freed_memory()

    def _check_fresh(self, batch: Batch) -> None:
        """Raise LogpGapError if completions were sampled, but none of them by the current version. Checks the
        batch as received, before `prepare` masks tokens."""
        if not self.spec.expects_fresh or batch.version is None:
            return
        sampled = batch.mask if batch.demonstrated is None else batch.mask & ~batch.demonstrated
        versions = batch.version[sampled]
        if versions.numel() and not bool((versions == self.version).any()):
            raise LogpGapError(
                f"no token of this batch was sampled by policy version {self.version}: the engines are stale "
                f"(their newest version is {int(versions.max())})"
            )

    def _check_order(self, batch: Batch) -> None:
        """Raise LearnerError for sessions without the order of tokens that the algorithm reads."""
        if self.algorithm.reads_order and bool((branches := branching(batch)).any()):
            raise LearnerError(
                f"{type(self.algorithm).__name__} reads the order of a session's tokens, and "
                f"{int(branches.sum())} of the {batch.num_sequences} sessions of this batch branch: a call's "
                "prompt did not extend the call before. Use an algorithm of group rewards, such as grpo, or "
                "a chat template and an environment that only append (session/branches is then 1)"
            )

    def _check_gap(self, gap: objective.LogpGap) -> None:
        for what, gap_value, bound in (
            ("mean", gap.mean, self.spec.max_gap_mean),
            ("largest", gap.largest, self.spec.max_gap),
        ):
            if bound is not None and gap_value > bound:
                self.parallel.discard(self.optimizer)
                raise LogpGapError(
                    f"rollout engine and learner disagree at policy version {self.version}: {what} gap of "
                    f"the log-probs {gap_value:.4g} over {gap.tokens} fresh tokens, "
                    f"allowed {bound:.4g}{gap.where()}. "
                    f"Version {self.version} did not arrive as it was sent, or the two compute differently "
                    "(sync.max_logp_gap and sync.max_logp_gap_mean set the bounds)."
                )


def _no_update_message(batch: Batch, step: int) -> str:
    cut_off = batch.truncated is not None and bool(batch.truncated.all())
    if batch.mask.any():
        why = "no two rewards of a group differ, so there is no pair"
    elif cut_off:
        why = f"all {batch.num_sequences} completions ran into the length limit, which the loss leaves out"
    else:
        why = "the loss leaves out every token of the batch"
    return f"step {step + 1} changes no weights: {why}"


def _advantage_metrics(batch: Batch) -> dict[str, float]:
    if batch.advantages is None or not batch.mask.any():
        return {}
    a = batch.advantages[batch.mask]
    return {"policy/advantage_mean": float(a.mean()), "policy/advantage_std": float(a.std(unbiased=False))}
