"""The processes of `test_parallel.py`, which take the same few steps alone and as two ranks:
`python -m tests.parallel_ranks MODEL FOLDER`. One process imports the libraries for all."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as multiprocessing
from torch.utils._python_dispatch import TorchDispatchMode

from rft.algorithms import ALGORITHMS
from rft.batch import Batch, Completion, Group, Prompt
from rft.config.learner import LearnerConfig
from rft.learner.learner import Learner
from rft.learner.parallel import Parallel, Rendezvous, RendezvousStore, join
from rft.learner.spec import LearnerSpec
from tests.specs import learner_spec

STEPS = 3
FULL = ("fsdp2", "zero1", "zero2", "zero3")
LORA = ("fsdp2 lora", "zero2 lora", "fsdp2 dora")
KINDS = (*FULL, *LORA)
MASKED_KINDS = ("fsdp2",)


def batch(step: int) -> Batch:
    """Step 0: a single tree, so that one of two ranks has nothing. Later: lengths from 1 to 90."""
    dice = random.Random(step)
    tokens = lambda n: tuple(dice.randrange(6, 300) for _ in range(n))  # noqa: E731
    groups = []
    for index in range(1 if step == 0 else 5):
        lengths = [90 if (index, k) == (1, 0) else dice.randint(1, 12) for k in range(3)]
        completions = tuple(
            Completion(tokens(n), logps=(-2.0,) * n, versions=((step, 0, n),), reward=float(k % 2))
            for k, n in enumerate(lengths)
        )
        groups.append(Group(Prompt(index, tokens(dice.randint(2, 9)), "text"), completions))
    return Batch.build(groups, share_prefix=step == 0)


def spec(model: Path, **config: Any) -> LearnerSpec:
    """A large epsilon: with a small one Adam makes full steps of gradients that are nothing but rounding."""
    config = {
        "learning_rate": 1e-3,
        "eps": 1e-3,
        "tokens_per_micro_batch": 60,
        "max_grad_norm": 0.05,
    } | config
    return learner_spec(model, ALGORITHMS["grpo"](beta=0.1), **config)


def method(kind: str) -> str:
    """ "lora" of "fsdp2 lora"; "" where all parameters are trained."""
    return kind.partition(" ")[2]


def alone(kind: str) -> str:
    """The single process that ranks of a kind must agree with."""
    return f"single {method(kind)}".strip()


def trains(kind: str) -> dict[str, Any]:
    """What of the learner's config makes a kind."""
    return {"adapter": {"method": method(kind), "r": 4}, "learning_rate": 1e-2} if method(kind) else {}


def weights(learner: Learner) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in learner.weights()}


class Gathered(TorchDispatchMode):
    """Counts the bytes that this rank contributes to all-gathers."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "all_gather_into_tensor" in str(func):
            self.bytes += args[0].nbytes
        return func(*args, **(kwargs or {}))


def gathered(learner: Learner, dtype: torch.dtype | None) -> tuple[int, dict[str, torch.Tensor]]:
    """Bytes that a push in this dtype gathers from this rank, and what arrives."""
    with Gathered() as gathered:
        tensors = {name: tensor.clone() for name, tensor in learner.weights(dtype)}
    return gathered.bytes, tensors


def work(model: Path, root: Path, kind: str, parallel: Parallel | None) -> None:
    """Three steps, the state saved after the first two; then, on several ranks, a second learner that goes on
    from the state of the single one. Rank 0 leaves what came of it in the kind's folder."""
    folder = root / kind
    (folder / "state").mkdir(parents=True, exist_ok=True)
    own = spec(model, gradient_checkpointing=parallel is not None, **trains(kind))
    learner = Learner(own, parallel)
    result: dict[str, Any] = {"metrics": [], "weights": [], "scores": []}
    for step in range(STEPS):
        result["metrics"].append(learner.step(batch(step), step))
        result["scores"].append(torch.tensor(learner.score_tokens(range(6, 200))))
        result["weights"].append(weights(learner))  # after a forward without backward
        if step == 1:
            write = learner.capture_state()
            if learner.parallel.rank == 0:
                write(folder / "state")
    if kind == "fsdp2":
        result["pushes"] = [gathered(learner, dtype) for dtype in (None, torch.bfloat16)]
    learner.export(str(folder / "model"))
    if parallel is not None:
        second = Learner(replace(own, seed=2), parallel_again(learner.parallel))
        second.read_state(root / alone(kind) / "state")
        result["resumed"] = second.step(batch(2), 2)
        result["resumed weights"] = weights(second)
    if learner.parallel.rank == 0:
        torch.save(result, folder / "result.pt")


def parallel_of(kind: str) -> Parallel:
    from rft.contrib.deepspeed import ZeRO
    from rft.learner.fsdp2 import FSDP2

    name = kind.partition(" ")[0]
    if name == "fsdp2":
        return FSDP2(LearnerConfig(), "cpu")
    return ZeRO(LearnerConfig(deepspeed={"zero_optimization": {"stage": int(name[-1])}}), "cpu")


def parallel_again(parallel: Parallel) -> Parallel:
    stage = getattr(parallel, "stage", None)
    return parallel_of("fsdp2" if stage is None else f"zero{stage}")


def rank(rank: int, place: Rendezvous, model: str, root: str) -> None:
    """One of two processes, for all kinds in turn."""
    torch.set_num_threads(1)
    join(place, rank, 2, "cpu")
    for kind in KINDS:
        work(Path(model), Path(root), kind, parallel_of(kind))
    for kind in MASKED_KINDS:
        steps = masked_steps(Path(model), parallel_of(kind))
        if rank == 0:
            torch.save(steps, Path(root) / f"masked {kind}.pt")
    torch.distributed.barrier()


def single(_: int, model: str, root: str) -> None:
    """The processes that ranks must agree with, in turn."""
    torch.set_num_threads(1)
    for kind in dict.fromkeys(map(alone, KINDS)):
        work(Path(model), Path(root), kind, None)
    torch.save(masked_steps(Path(model), None), Path(root) / "masked single.pt")


def masked_groups(seed: int, cut_off: Callable[[int, int], bool]) -> list[Group]:
    """Three groups of four; `cut_off(group, k)` says which completions ran into the length limit."""
    dice = random.Random(seed)
    tokens = lambda n: tuple(dice.randrange(6, 300) for _ in range(n))  # noqa: E731
    groups = []
    for g in range(3):
        completions = []
        for k in range(4):
            n, finish = dice.randint(2, 9), "length" if cut_off(g, k) else "stop"
            own = {"logps": (-3.0,) * n, "versions": ((seed, 0, n),), "finish": finish}
            completions.append(Completion(tokens(n), reward=float(k % 2), **own))
        groups.append(Group(Prompt(g, tokens(4), "text"), tuple(completions)))
    return groups


MASKED = {
    "none": lambda g, k: False,
    "all": lambda g, k: True,
    "but one": lambda g, k: (g, k) != (2, 3),  # all other micro-batches, and a rank, have nothing to train on
}


def masked_steps(model: Path, parallel: Parallel | None) -> list[dict[str, Any]]:
    """Metrics and weights of three steps of which the second has nothing to train on."""
    own = spec(model, tokens_per_micro_batch=1, weight_decay=0.1)
    algorithm = ALGORITHMS["grpo"](beta=0.1, mask_truncated=True)
    learner = Learner(replace(own, algorithm=algorithm, expects_fresh=True), parallel)
    steps = []
    for i, kind in enumerate(("none", "all", "but one")):
        metrics = learner.step(Batch.build(masked_groups(i, MASKED[kind])), i)
        steps.append({"metrics": metrics, "weights": weights(learner)})
    return steps


if __name__ == "__main__":
    multiprocessing.spawn(single, sys.argv[1:], 1)
    store = RendezvousStore("127.0.0.1", 120)
    multiprocessing.spawn(rank, (store.address, *sys.argv[1:]), 2)
