"""What a resumed learner needs, out of a learner and back into one; whole, whatever the number of ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rft.errors import BrokenWeights
from rft.learner.model import load_tokenizer
from rft.utils.seeds import rng_state, set_rng_state

if TYPE_CHECKING:
    from rft.learner.learner import Learner

Writer = Callable[[Path], None]


def capture(learner: Learner) -> Writer:
    """Copy a learner's state to the CPU of rank 0. Returns a writer of the copies into a folder; it shares
    nothing with the learner, so that it may run on a thread while training goes on. Collective; only
    rank 0 may call the writer."""
    parallel, policy, reference = learner.parallel, learner.policy, learner.reference
    model, strategy = policy.model, learner.strategy
    part = strategy.model_state()  # of the model, where that is all a checkpoint needs
    weights = parallel.model_state(model) if part is None else {}
    own = reference.own_state() if reference is not None and learner.algorithm.refresh_reference else None
    rest = {
        "optimizer": parallel.optimizer_state(learner.optimizer),
        "version": learner.version,
        "state": dict(learner.state),
        "value_head": None if policy.value_head is None else parallel.model_state(policy.value_head),
        "reference": None if own is None else parallel.model_state(own),
        "part": None if part is None else parallel.copy(part),
        "strategy": parallel.copy(strategy.state()),
        "rng": parallel.gather(rng_state()),
    }

    if parallel.rank == 0:
        parameters = {name for name, _ in model.named_parameters()}  # buffers may hold infinities
        trained = (
            {name: w for name, w in weights.items() if name in parameters} if part is None else rest["part"]
        )
        _require_finite(learner.version, {**trained, **(rest["value_head"] or {})})

    def write(folder: Path) -> None:
        if part is None:
            model.save_pretrained(folder / "model", state_dict=weights)
            tokenizer = load_tokenizer(learner.spec.tokenizer, learner.spec.model.trust_remote_code)
            tokenizer.save_pretrained(folder / "model")
        torch.save(rest, folder / "learner.pt")

    return write


def _require_finite(version: int, trained: Mapping[str, Tensor]) -> None:
    """Raise BrokenWeights rather than let a checkpoint of weights that are not finite take the place of an
    older, sound one."""
    for name, tensor in trained.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise BrokenWeights(
                f"the weights of version {version} are not finite, first {name}: not saved. Lower "
                "learner.learning_rate and go on from the last checkpoint, which is older."
            )


def restore(learner: Learner, folder: Path) -> None:
    """Take over the state that a writer of `capture` left, by any number of ranks. Collective."""
    parallel, policy, strategy = learner.parallel, learner.policy, learner.strategy
    saved = torch.load(folder / "learner.pt", map_location="cpu", weights_only=True, mmap=True)
    if saved["part"] is None:
        with parallel.one_rank_at_a_time():
            model = learner.load_model(str(folder / "model"), device="cpu")
            parallel.load_model_state(policy.model, model.state_dict())
            del model
    if strategy.load(saved["part"], saved["strategy"], parallel.set_full):
        learner.make_optimizer()
    parallel.load_optimizer_state(learner.optimizer, saved["optimizer"])
    learner.version, learner.state = saved["version"], saved["state"]
    if policy.value_head is not None:
        parallel.load_model_state(policy.value_head, saved["value_head"])
    own = None if learner.reference is None else learner.reference.own_state()
    if own is not None and saved["reference"] is not None:
        parallel.load_model_state(own, saved["reference"])
    if parallel.rank < len(saved["rng"]):  # a rank that is new keeps the seed of its own
        set_rng_state(saved["rng"][parallel.rank])
