"""The learner: owns forward, reduction, backward and optimizer. Runs as a Ray actor or in process."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rft.algorithms.base import PolicyOutput
from rft.batch import Batch, Completion, Group, Prompt
from rft.data.reward_texts import reward_texts
from rft.errors import LearnerError, LogpGapError
from rft.kernels import logprob_common
from rft.learner import objective, state
from rft.learner.critic import Critic
from rft.learner.forward import PolicyModel
from rft.learner.held_out import Sums, held_out_sums
from rft.learner.model import count_parameters, load_causal_lm, load_tokenizer, resolve_dtype
from rft.learner.parallel.base import Parallel
from rft.learner.parallel.ranks import own_part
from rft.learner.schedule import learning_rate
from rft.learner.scoring import load_scoring_model
from rft.learner.spec import LearnerInfo, LearnerSpec
from rft.learner.strategies import make_strategy
from rft.packing import micro_batches, tree_tokens
from rft.utils.cores import parse_cores, threads_for
from rft.utils.seeds import derive_seed, seed_everything


class Learner:
    """One policy in training. Every method is synchronous and leaves the learner consistent."""

    def __init__(self, spec: LearnerSpec, parallel: Parallel | None = None) -> None:
        self.spec = spec
        self.parallel = parallel or Parallel()
        if spec.config.cores:
            import os

            cores = own_part(parse_cores(spec.config.cores), self.parallel.rank, self.parallel.ranks)
            os.sched_setaffinity(0, cores)
        sharing = self.parallel.ranks if spec.device == "cpu" and not spec.config.cores else 1
        torch.set_num_threads(threads_for(spec.config.threads, None, sharing))
        seed_everything(spec.seed)
        self.algorithm = spec.algorithm
        self.strategy = make_strategy(spec)
        with self.parallel.one_rank_at_a_time():
            self.policy = self._load_policy()
            self.parallel.shard(self.policy)
        self.reference = None if spec.config.reference_logps == "cached" else self._load_reference()
        self.make_optimizer()
        self.version = 0
        self.scoring_seconds = 0.0  # of the step that runs
        self.state: dict[str, float] = {}
        self.updates_made = 0  # of the step at hand
        self.messages: list[str] = []
        self.previewed: list[Batch] = []
        self.self_checked = spec.config.self_check == "off"
        if self.parallel.rank:  # the same weights on all ranks, but not the same dropout
            seed_everything(derive_seed(spec.seed, self.parallel.rank))

    # -- set-up ------------------------------------------------------------------------------------

    def _load_policy(self) -> PolicyModel:
        spec = self.spec
        device = self.parallel.loading_device(spec.device)
        model = self.load_model(spec.model.path, device, self.strategy.dtype, self.strategy.quantize)
        self.parameters = count_parameters(model)
        self.strategy.attach(model)
        model.train()
        if spec.config.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        value_head = None
        if "values" in spec.algorithm.outputs:
            trunk = (
                self.load_model(spec.model.path, device).train() if spec.algorithm.separate_critic else None
            )
            width, kernel = model.config.get_text_config().hidden_size, spec.config.kernels.attention
            value_head = Critic(width, trunk, kernel).to(device)
        return self._wrap(model, value_head)

    def load_model(
        self, path: str, device: str, dtype: torch.dtype = torch.float32, quantize: str | None = None
    ) -> Any:
        """The trained network: a language model, or, for an algorithm with score heads, a reward model."""
        spec = self.spec
        if not spec.algorithm.score_heads:
            model = load_causal_lm(path, dtype, device, spec.model.trust_remote_code, quantize)
            if spec.stop_token_ids and model.generation_config is not None:
                model.generation_config.eos_token_id = list(spec.stop_token_ids)
            return model
        return load_scoring_model(
            path,
            spec.algorithm.score_heads,
            per_token=spec.algorithm.unit == "token",
            texts=None if spec.data is None else reward_texts(spec.algorithm.data, spec.data),
            dtype=torch.float32,
            device=device,
            trust_remote_code=spec.model.trust_remote_code,
        )

    def _load_reference(self) -> PolicyModel | None:
        if not self.algorithm.needs_reference:
            return None
        if self.spec.model.reference in (None, self.spec.model.path):
            shared = self.strategy.reference(self.policy)
            if shared is not None:
                return shared
        dtype = resolve_dtype(self.spec.config.dtype, self.spec.device)
        path = self.spec.model.reference or self.spec.model.path
        device = self.parallel.loading_device(self.spec.device)
        with self.parallel.one_rank_at_a_time():
            model = load_causal_lm(path, dtype, device, self.spec.model.trust_remote_code)
            reference = self._wrap(model.eval().requires_grad_(False), None)
            self.parallel.shard(reference)
        self.parallel.freeze(reference)
        return reference

    def _wrap(self, model: Any, value_head: Any) -> PolicyModel:
        return PolicyModel(
            model,
            temperature=self.spec.temperature,
            compute_dtype=resolve_dtype(self.spec.config.dtype, self.spec.device),
            value_head=value_head,
            kernels=self.spec.config.kernels,
        )

    def make_optimizer(self) -> None:
        """A new optimizer of what the strategy trains, and of the critic. Collective."""
        extra: list[dict[str, Any]] = []
        if self.policy.value_head is not None:
            critic = list(self.policy.value_head.trained())
            rate = self.algorithm.critic_rate
            extra.append({"params": critic, "weight_decay": 0.0, "scale": rate, "critic": True})
        self.optimizer: Any = self.parallel.optimizer(
            self.policy, lambda: self.strategy.optimizer(self.policy.model, extra)
        )

    def describe(self) -> LearnerInfo:
        """Return facts for the log."""
        return LearnerInfo(
            parameters=self.parameters,
            trained=sum(getattr(p, "ds_numel", p.numel()) for p in self.strategy.trained(self.policy)),
            device=self.spec.device,
            ranks=self.parallel.ranks,
            compute_dtype=str(self.policy.compute_dtype),
            threads=torch.get_num_threads(),
            version=self.version,
        )

    def pop_messages(self) -> list[str]:
        """Return the messages for the user since the last call: which kernels this rank chose by measuring
        them, and steps without an update."""
        messages, self.messages = self.messages, []
        return logprob_common.pop_messages() + messages

    # -- one step ----------------------------------------------------------------------------------

    def step(self, batch: Batch, step: int) -> dict[str, float]:
        """Train on a batch (all inner epochs and mini-batches); returns the step's metrics.

        The policy's version rises by one. Where nothing is trained on (every completion was cut off and
        `mask_truncated` leaves those out), weights, optimizer and algorithm state stay as they are; of
        several mini-batches, those without a trained token are passed over.

        Raises LogpGapError before anything is updated when the batch's fresh samples do not fit the learner's
        own log-probs, LearnerError on a non-finite gradient.
        """
        start = time.perf_counter()
        self.scoring_seconds = 0.0
        spec = self.spec
        gap = objective.LogpGap()
        self._check_fresh(batch)
        if not self.self_checked:
            self.policy.self_check(batch, fall_back=spec.config.self_check == "fall_back")
            self.self_checked = True
        batch = self.prepare(self.at_step(batch, step), gap)
        trained = objective.has_units(self.algorithm, batch)
        if trained and self.strategy.begin(
            lambda: self._look_at(batch), lambda: self._accumulate(batch, None)
        ):
            self.parallel.discard(self.optimizer)
            self.make_optimizer()
            self.previewed.clear()
        lr = learning_rate(spec.config, step, spec.train.steps)
        alone = self.algorithm.critic_only(batch.state)
        for group in self.optimizer.param_groups:  # a rate of 0 stops weight decay too
            group["lr"] = lr * group.get("scale", 1.0) if group.get("critic") or not alone else 0.0
        updates: list[dict[str, float]] = []
        self.updates_made = 0
        for iteration in range(spec.train.num_iterations if trained else 0):
            for mini in self._minibatches(batch, step, iteration):
                if not objective.has_units(self.algorithm, mini):
                    continue
                first = not updates and batch.old_logps is None
                updates.append(self._update(mini, gap if first else None))
                self.updates_made += 1
        self.version += 1
        metrics = objective.merge_means(updates)
        if updates:
            self.state = self.algorithm.next_state(self.state, metrics)
        else:
            self.messages.append(_why_nothing_was_trained(batch, step))
        every = self.algorithm.refresh_reference
        if self.reference is not None and every and self.version % every == 0:
            self.parallel.reshard()
            self.reference.follow(self.policy)
        seconds = time.perf_counter() - start
        scoring = {"time/reference": self.scoring_seconds} if self.scoring_seconds else {}
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
            **scoring,
        }

    def preview(self, batch: Batch) -> None:
        """Show a batch of later steps to an adapter that begins as the data say; the first step makes it."""
        self.previewed.append(batch)

    def _look_at(self, batch: Batch) -> None:
        """Run the first batch, and those previewed, forward: an adapter is made of what its layers read."""
        for one in (batch, *self.previewed):
            self.score(one)

    def at_step(self, batch: Batch, step: int) -> Batch:
        """The batch with the algorithm's state and the place in the run."""
        progress = step / max(self.spec.train.steps - 1, 1)
        length = float(self.spec.sampling.max_completion_length)
        now = {"progress": progress, "max_completion_length": length, "version": float(self.version)}
        return batch.with_(state={**self.state, **now})

    def prepare(self, batch: Batch, gap: objective.LogpGap) -> Batch:
        """The algorithm's prepared batch, with all that its loss needs computed. What `prepare` does not read
        is computed after it, and not for what it left out of the mask."""
        before = self.algorithm.before_prepare
        batch = self.algorithm.prepare(self.fill(batch, before, gap))
        return self.fill(batch, self.algorithm.needs - before, gap)

    def fill(self, batch: Batch, needs: frozenset[str], gap: objective.LogpGap) -> Batch:
        """Compute those of `needs` that a forward gives: old and reference log-probs, values, entropy."""
        several = self.spec.train.num_iterations * self.spec.train.minibatches > 1
        extra = needs & {"values", "end_values"}
        extra |= frozenset({"entropy"} if "old_entropy" in needs else ())
        changes: dict[str, Any] = {}
        old = "old_logps" in needs and batch.old_logps is None and (several or self.algorithm.prescored)
        if old or extra:
            out = self.score(batch, outputs=extra)
            changes |= {"old_logps": out["logps"]}
            changes |= {name: out[name] for name in ("values", "end_values") if name in extra}
            if "entropy" in extra:
                changes["old_entropy"] = out["entropy"]
            gap.add(out["logps"], batch, self.version)
            self._check_gap(gap)
        if "ref_logps" in needs and self.reference is not None and batch.ref_logps is None:
            changes["ref_logps"] = self.score(batch, model=self.reference)["logps"]
        return batch.with_(**changes)

    @torch.no_grad()
    def score(
        self, batch: Batch, *, outputs: frozenset[str] = frozenset(), model: PolicyModel | None = None
    ) -> dict[str, Tensor]:
        """Log-probs (and `outputs`) of a batch under the policy or another model, without gradient,
        on CPU: {"logps": [T] float32, ...}."""
        begin = time.perf_counter()
        model = model or self.policy
        names = ("logps", *sorted(outputs))
        found = {name: torch.zeros(batch.num_tokens) for name in names}
        scored, place = batch.pruned(batch.mask)
        tree_of_token = scored.tree[scored.segment]
        for trees in self.plan(scored) if scored.num_tokens else ():
            out = model.run(self.micro(scored if trees else batch, trees), outputs)
            where = place[torch.isin(tree_of_token, torch.tensor(trees, dtype=torch.int64))]
            for name in names if trees else ():
                found[name][where] = getattr(out, name).float().cpu()
        whole = {name: self.parallel.sum(values) for name, values in found.items()}
        self.scoring_seconds += time.perf_counter() - begin
        return whole

    def score_tokens(self, tokens: Sequence[int]) -> list[float]:
        """The policy's log-probs of `tokens[1:]`, each after those before it, at temperature 1 (which engines
        score prompts at). Collective."""
        group = Group(Prompt(0, tuple(tokens[:1]), ""), (Completion(tuple(tokens[1:])),))
        batch = Batch.build([group])
        scored = self.score(batch, model=self.policy.at_temperature(1.0))
        logps: list[float] = scored["logps"][batch.mask].tolist()
        return logps

    def score_reference(self, batch: Batch) -> Tensor:
        """[T] float32: the reference's log-probs, for a cache; the reference is loaded where it is not."""
        if self.reference is None:
            self.reference = self._load_reference()
        assert self.reference is not None, "the algorithm needs no reference"
        return self.score(batch, model=self.reference)["logps"]

    def release_reference(self) -> None:
        """Free the reference's memory: batches bring `ref_logps` from now on."""
        self.reference = None

    def evaluate(self, batch: Batch, step: int) -> Sums:
        """Sums and counts of the held-out measures over a batch; see `held_out_sums`."""
        return held_out_sums(self, batch, step)

    def plan(self, batch: Batch) -> list[list[int]]:
        """This rank's micro-batches of a batch, as tree ids: as many on every rank, some of them empty."""
        if not batch.num_tokens:
            return [[]]
        keep = self.algorithm.unit == "pair"
        size, ranks = self.spec.config.tokens_per_micro_batch, self.parallel.ranks
        width = self.policy.model.config.get_text_config().hidden_size
        return micro_batches(batch, size, ranks, keep_groups=keep, hidden_size=width)[self.parallel.rank]

    def micro(self, batch: Batch, trees: list[int]) -> Batch:
        """A micro-batch. For an empty one the batch's smallest tree, whose results must not count: a rank
        without work still takes part in the collectives of forward and backward."""
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

    def _update(self, mini: Batch, gap: objective.LogpGap | None) -> dict[str, float]:
        """Accumulate the gradient of one mini-batch and step the optimizer."""
        return {**self._accumulate(mini, gap), **self._optimize()}

    def _accumulate(self, mini: Batch, gap: objective.LogpGap | None) -> dict[str, float]:
        """Add the gradient of one mini-batch's loss; returns its metrics."""
        mini, scale = objective.weigh(self.algorithm, mini, self.spec.sampling.max_completion_length)
        means, total = objective.TokenMeans(), 0.0
        measured = self.spec.config.entropy and not self.algorithm.score_heads
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
            expected = objective.foreseen(self.algorithm, micro, scale) if trees else None
            out = self.policy.run(
                micro, outputs, algorithm=self.algorithm, reference=self.reference, expected=expected
            )
            if not trees:
                self.parallel.backward(objective.nothing(out), last=last)
                continue
            loss = objective.reduce_loss(self.algorithm, out, micro.to(self.policy.device), scale)
            total += float(loss.detach())
            penalty = self.strategy.penalty() if last else None
            self.parallel.backward(loss if penalty is None else loss + penalty, last=last)
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
        bound = self.spec.config.max_grad_norm
        norm, finite = self.parallel.update(self.strategy.trained(self.policy), self.optimizer, bound)
        if not finite and self.spec.config.on_nonfinite == "stop":
            made = self.updates_made
            kept = f"the step's {made} earlier updates stand" if made else "nothing was updated"
            raise LearnerError(
                f"the gradient norm is {norm} at policy version {self.version}; {kept}. "
                "Lower learner.learning_rate, or set learner.on_nonfinite: skip to drop such updates."
            )
        measured = {"train/grad_norm": norm} if finite else {}
        return {**measured, "train/skipped": float(not finite)}

    def _check_fresh(self, batch: Batch) -> None:
        """Raise LogpGapError where completions were sampled, none of them by the current version. Asked of
        the batch as it was received: what `prepare` leaves of it to train on is another matter."""
        if not self.spec.expects_fresh or batch.version is None:
            return
        sampled = batch.mask if batch.demonstrated is None else batch.mask & ~batch.demonstrated
        versions = batch.version[sampled]
        if versions.numel() and not bool((versions == self.version).any()):
            raise LogpGapError(
                f"no token of this batch was sampled by policy version {self.version}: the engines are stale "
                f"(their newest version is {int(versions.max())})"
            )

    def _check_gap(self, gap: objective.LogpGap) -> None:
        for what, found, bound in (
            ("mean", gap.mean, self.spec.max_gap_mean),
            ("largest", gap.largest, self.spec.max_gap),
        ):
            if bound is not None and found > bound:
                self.parallel.discard(self.optimizer)
                raise LogpGapError(
                    f"rollout engine and learner disagree at policy version {self.version}: {what} gap of "
                    f"the log-probs {found:.4g} over {gap.tokens} fresh tokens, allowed {bound:.4g}. "
                    f"Version {self.version} did not arrive as it was sent, or the two compute differently "
                    "(sync.max_logp_gap and sync.max_logp_gap_mean set the bounds)."
                )

    # -- weights -----------------------------------------------------------------------------------

    def weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """The plain policy's parameters under their Hugging Face names, tied ones once, adapters merged in
        one layer at a time. dtype: what the caller casts them to; they may come in it, or as they are."""
        self.parallel.reshard()
        return self.strategy.weights(self.policy.model, self.parallel.full_tensor, dtype)

    def export(self, folder: str) -> str:
        """Write the policy and its tokenizer as an ordinary Hugging Face folder, and an adapter besides in
        its folder `adapter`. Collective."""
        if self.strategy.model_state() is not None:
            self.strategy.export(Path(folder), self.parallel.full_tensor, self.parallel.rank == 0)
            if self.parallel.rank:
                return folder
        else:
            weights = self.parallel.model_state(self.policy.model)
            if self.parallel.rank:
                return folder
            self.policy.model.save_pretrained(folder, state_dict=weights)
        load_tokenizer(self.spec.tokenizer, self.spec.model.trust_remote_code).save_pretrained(folder)
        return folder

    # -- state -------------------------------------------------------------------------------------

    def capture_state(self) -> state.Writer:
        """Copy all that a resumed learner needs; returns a writer of the copies. See `state.capture`."""
        return state.capture(self)

    def write_state(self, folder: Path) -> None:
        """Write all that a resumed learner needs into `folder`. Collective; rank 0 writes."""
        write = self.capture_state()
        if self.parallel.rank == 0:
            write(folder)

    def read_state(self, folder: Path) -> None:
        """Take over the state that `write_state` left."""
        state.restore(self, folder)


def _why_nothing_was_trained(batch: Batch, step: int) -> str:
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
    if not a.numel():
        return {}
    return {"policy/advantage_mean": float(a.mean()), "policy/advantage_std": float(a.std(unbiased=False))}
