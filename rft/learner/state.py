"""A policy in training with its reference and its optimizer: load, save, export."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rft.algorithms.extras import TrainsCritic, score_heads, separate_critic
from rft.data.reward_texts import reward_texts
from rft.errors import BrokenWeights
from rft.learner.load import (
    count_parameters,
    load_causal_lm,
    load_scoring_model,
    load_tokenizer,
    resolve_dtype,
)
from rft.learner.model import Critic, PolicyModel
from rft.learner.parallel import Parallel, local_share
from rft.learner.spec import LearnerInfo, LearnerSpec
from rft.learner.strategy import make_strategy
from rft.utils.cores import parse_cores, processor, threads_for
from rft.utils.seeds import derive_seed, rng_state, seed_everything, set_rng_state

Writer = Callable[[Path], None]


class TrainState:
    """A policy in training with its reference, critic and optimizer; `Learner` adds the training step."""

    def __init__(self, spec: LearnerSpec, parallel: Parallel | None = None) -> None:
        self.spec = spec
        self.parallel = parallel or Parallel()
        if spec.config.cores:
            cores = local_share(parse_cores(spec.config.cores), self.parallel.rank, self.parallel.ranks)
            os.sched_setaffinity(0, cores)
        sharing = self.parallel.ranks if spec.device == "cpu" and not spec.config.cores else 1
        torch.set_num_threads(threads_for(spec.config.threads, None, sharing))
        seed_everything(spec.seed)
        self.algorithm = spec.algorithm
        self.strategy = make_strategy(spec)
        with self.parallel.one_rank_at_a_time():
            self.policy = self._load_policy()
            self.parallel.shard(self.policy)
        self.reference: PolicyModel | None = None
        if spec.config.reference_logps != "cached":
            self.reference = self._load_reference()
        self.make_optimizer()
        self.version = 0
        self.state: dict[str, float] = {}  # the algorithm's
        if self.parallel.rank:  # the same weights on all ranks, but different dropout
            seed_everything(derive_seed(spec.seed, self.parallel.rank))

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
            separate = separate_critic(spec.algorithm)
            trunk = self.load_model(spec.model.path, device).train() if separate else None
            width, kernel = model.config.get_text_config().hidden_size, spec.config.kernels.attention
            value_head = Critic(width, trunk, kernel).to(device)
        return self._wrap(model, value_head)

    def load_model(
        self, path: str, device: str, dtype: torch.dtype = torch.float32, quantize: str | None = None
    ) -> Any:
        """Load the network: a language model or, for an algorithm with score heads, a reward model."""
        spec = self.spec
        if not score_heads(spec.algorithm):
            model = load_causal_lm(path, dtype, device, spec.model.trust_remote_code, quantize)
            if spec.stop_token_ids and model.generation_config is not None:
                model.generation_config.eos_token_id = list(spec.stop_token_ids)
            return model
        return load_scoring_model(
            path,
            score_heads(spec.algorithm),
            per_token=spec.algorithm.unit == "token",
            texts=None if spec.data is None else reward_texts(spec.algorithm.data, spec.data),
            dtype=torch.float32,
            device=device,
            trust_remote_code=spec.model.trust_remote_code,
        )

    def _load_reference(self) -> PolicyModel | None:
        if not self.algorithm.needs_reference or self.spec.teacher:
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
            truncation=self.spec.sampling if self.algorithm.online else None,
            compute_dtype=resolve_dtype(self.spec.config.dtype, self.spec.device),
            value_head=value_head,
            kernels=self.spec.config.kernels,
        )

    def make_optimizer(self) -> None:
        """Make the optimizer of the trained parameters and of the critic. Collective."""
        extra: list[dict[str, Any]] = []
        if self.policy.value_head is not None:
            critic = list(self.policy.value_head.trained())
            rate = self.algorithm.critic_rate if isinstance(self.algorithm, TrainsCritic) else 1.0
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
            processor=processor() if self.spec.device == "cpu" else torch.cuda.get_device_name(),
            version=self.version,
        )

    # -- weights -----------------------------------------------------------------------------------

    def weights(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the policy's parameters under their Hugging Face names, tied ones once, with adapters merged
        one layer at a time. dtype: the caller's target dtype; tensors may be returned in it or uncast.
        Collective."""
        self.parallel.reshard()
        return self.strategy.weights(self.policy.model, self.parallel.full_tensor, dtype)

    def export(self, folder: str) -> str:
        """Write the policy and its tokenizer as a Hugging Face folder, and an adapter into its subfolder
        `adapter`. Collective."""
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

    # -- checkpoints -------------------------------------------------------------------------------

    def capture_state(self) -> Writer:
        """Copy the learner's state to the CPU of rank 0, and return a function that writes the copies to a
        folder. It shares no data with the learner, so it may run on a thread while training continues.
        Collective; only rank 0 may call the writer."""
        parallel, policy, reference = self.parallel, self.policy, self.reference
        model, strategy = policy.model, self.strategy
        part = strategy.model_state()  # of the model, if a checkpoint needs no more
        weights = parallel.model_state(model) if part is None else {}
        reference_state = (
            reference.unshared_state() if reference is not None and self.algorithm.refresh_reference else None
        )
        rest = {
            "optimizer": parallel.optimizer_state(self.optimizer),
            "version": self.version,
            "state": dict(self.state),
            "value_head": None if policy.value_head is None else parallel.model_state(policy.value_head),
            "reference": None if reference_state is None else parallel.model_state(reference_state),
            "part": None if part is None else parallel.copy(part),
            "strategy": parallel.copy(strategy.state()),
            "rng": parallel.gather(rng_state()),
        }

        if parallel.rank == 0:
            parameters = {name for name, _ in model.named_parameters()}  # buffers may contain infinities
            trained = rest["part"]
            if part is None:
                trained = {name: w for name, w in weights.items() if name in parameters}
            _require_finite(self.version, {**trained, **(rest["value_head"] or {})})

        def write(folder: Path) -> None:
            if part is None:
                model.save_pretrained(folder / "model", state_dict=weights)
                tokenizer = load_tokenizer(self.spec.tokenizer, self.spec.model.trust_remote_code)
                tokenizer.save_pretrained(folder / "model")
            torch.save(rest, folder / "learner.pt")

        return write

    def read_state(self, folder: Path) -> None:
        """Load the state written by a `capture_state` writer, on any number of ranks. Collective."""
        parallel, policy, strategy = self.parallel, self.policy, self.strategy
        saved = torch.load(folder / "learner.pt", map_location="cpu", weights_only=True, mmap=True)
        if saved["part"] is None:
            with parallel.one_rank_at_a_time():
                model = self.load_model(str(folder / "model"), device="cpu")
                parallel.load_model_state(policy.model, model.state_dict())
                del model
        if strategy.load(saved["part"], saved["strategy"], parallel.set_full):
            self.make_optimizer()
        parallel.load_optimizer_state(self.optimizer, saved["optimizer"])
        self.version, self.state = saved["version"], saved["state"]
        if policy.value_head is not None:
            parallel.load_model_state(policy.value_head, saved["value_head"])
        reference_state = None if self.reference is None else self.reference.unshared_state()
        if reference_state is not None and saved["reference"] is not None:
            parallel.load_model_state(reference_state, saved["reference"])
        if parallel.rank < len(saved["rng"]):  # an additional rank keeps its seed
            set_rng_state(saved["rng"][parallel.rank])


def _require_finite(version: int, trained: Mapping[str, Tensor]) -> None:
    """Raise BrokenWeights for non-finite weights: their checkpoint would replace an older, sound one."""
    for name, tensor in trained.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BrokenWeights(
                f"the weights of version {version} are not finite, first {name}: not saved. Lower "
                "learner.learning_rate and resume from the last checkpoint, which is older."
            )
