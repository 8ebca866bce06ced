"""The online losses that TRL has too, and inputs for them: random, and meant to hurt.

An input is a padded batch of B = groups * size completions of at most L tokens: `logps`, `old_logps`,
`ref_logps`, `sampler_logps`, `entropy` [B, L] float32, `mask` [B, L] bool, `rewards` [B] float32, and, for
distillation, `student` and `teacher` [B, L, V].
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from parity import Comparison, Tensors
from torch import Tensor

from rft.algorithms import ALGORITHMS, Algorithm, PolicyOutput
from rft.algorithms.policy_gradient.base import PolicyGradient
from rft.batch import Batch, Completion, Group, Prompt
from rft.learner.objective import reduce_loss, weigh

STATE = {"entropy": 0.45, "entropy_coef": 0.03}  # of an adaptive entropy bonus, before the step
GROUPS, SIZE, LENGTH, VOCABULARY = 3, 4, 7, 11
KINDS = ("near", "same", "spread", "edge", "far", "equal", "short", "ragged", "tiny", "huge")


def make_input(seed: int, *, size: int = SIZE, far: float = 15.0) -> Tensors:
    """One input; its kind goes through KINDS.

    near: ratios about 1. same: exactly 1. spread: ratios from e^-1 to e. edge: ratios a hundred-thousandth
    inside and outside of the clips. far: log-ratios to +-`far`. equal: all rewards equal. short: one token
    each. ragged: some completions without any token. tiny, huge: rewards of 1e-6, 1e4.
    """
    g = torch.Generator().manual_seed(seed)
    kind = KINDS[seed % len(KINDS)]
    b = GROUPS * size
    logps = -3 * torch.rand(b, LENGTH, generator=g) - 0.01
    scale = {"near": 0.1, "spread": 0.5, "far": far / 2}.get(kind, 0.2)
    shift = (scale * torch.randn(b, LENGTH, generator=g)).clamp(-far, far)
    if kind == "same":
        shift = torch.zeros_like(shift)
    if kind == "edge":
        edges = torch.tensor([0.8, 1.2, 1.28, 0.5, 2.0, 5.0]).log()
        side = 2e-5 * torch.randint(0, 2, (b, LENGTH), generator=g) - 1e-5
        shift = edges[torch.randint(len(edges), (b, LENGTH), generator=g)] + side
    lengths = torch.randint(1, LENGTH + 1, (b,), generator=g)
    if kind == "short":
        lengths = torch.ones_like(lengths)
    if kind == "ragged":
        lengths = lengths * (torch.rand(b, generator=g) > 0.3)
        lengths[:2] = 3
    rewards = torch.randint(0, 2, (b,), generator=g).float() + 0.1 * torch.rand(b, generator=g)
    if kind == "equal":
        rewards = torch.full((b,), 0.5)
    rewards = rewards * {"tiny": 1e-6, "huge": 1e4}.get(kind, 1.0)
    return {
        "kind": kind,
        "size": size,
        "logps": logps,
        "old_logps": logps - shift,
        "ref_logps": logps + 0.3 * torch.randn(b, LENGTH, generator=g),
        "sampler_logps": logps - shift + 0.3 * torch.randn(b, LENGTH, generator=g),
        "entropy": torch.rand(b, LENGTH, generator=g),
        "mask": torch.arange(LENGTH)[None, :] < lengths[:, None],
        "rewards": rewards,
    }


def make_logits(seed: int) -> Tensors:
    """Logits of student and teacher, from nearly equal to nearly one-hot."""
    g = torch.Generator().manual_seed(seed)
    scale = (0.01, 1.0, 5.0, 30.0)[seed % 4]
    student, teacher = scale * torch.randn(2, GROUPS, LENGTH, VOCABULARY, generator=g)
    return {"student": student, "teacher": teacher}


# -- rft's side ---------------------------------------------------------------------------------------


def to_batch(x: Tensors, dtype: torch.dtype) -> tuple[Batch, Tensor]:
    """(batch, place): `place` [B, L] is the index in the batch of each padded cell."""
    b, length = x["logps"].shape
    size = x["size"]
    tokens = tuple(range(10, 10 + length))
    groups = []
    for i in range(0, b, size):
        rows = range(i, i + size)
        sides = (Completion(tokens, mask=tuple(x["mask"][r].tolist())) for r in rows)
        groups.append(Group(Prompt(i, (1,), ""), tuple(sides)))
    batch = Batch.build(groups)
    place = (batch.tokens >= 10).nonzero().reshape(b, length)
    filled = {
        name: _flat(x[name], place, batch, dtype) for name in ("old_logps", "ref_logps", "sampler_logps")
    }
    entropy = _flat(x["entropy"], place, batch, dtype)
    return batch.with_(**filled, old_entropy=entropy, rewards=x["rewards"].to(dtype)), place


def _flat(x: Tensor, place: Tensor, batch: Batch, dtype: torch.dtype) -> Tensor:
    flat = torch.zeros(batch.num_tokens, dtype=dtype)
    flat[place] = x.to(dtype)
    return flat.masked_fill(~batch.mask, 0)


def loss_of(
    algorithm: Algorithm, *, sampler: bool = False, count_all: bool = False, bonus: bool = False
) -> Callable[[Tensors, torch.dtype], dict[str, Tensor]]:
    """rft's loss and its gradient by log-prob, reduced by the learner over two micro-batches. `count_all`
    multiplies both by the completions with a token over all: the value of a mean over all. `bonus`: also the
    gradient by entropy, and the weight of an adaptive bonus after the step."""

    def ours(x: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
        batch, place = to_batch(x, dtype)
        if not sampler:
            batch = batch.with_(sampler_logps=None)
        batch, scale = weigh(algorithm, algorithm.prepare(batch), max_completion_length=LENGTH)
        if batch.weight is not None:
            batch = batch.with_(weight=batch.weight.to(dtype))
        batch = batch.with_(state=STATE if bonus else batch.state)
        leaf = x["logps"].to(dtype, copy=True).requires_grad_()
        entropy = x["entropy"].to(dtype, copy=True).requires_grad_()
        trees, size = list(range(len(leaf))), x["size"]
        total = torch.zeros((), dtype=dtype)
        for part in (trees[:size], trees[size:]):
            rows = place[part[0] : part[-1] + 1]
            micro = batch.select(part)
            where = ((rows - rows.min() + 1).flatten(),)
            logps, entropies = (
                torch.zeros(micro.num_tokens, dtype=dtype)
                .index_put(where, values[part[0] : part[-1] + 1].flatten())
                .masked_fill(~micro.mask, 0)
                for values in (leaf, entropy)
            )
            total = total + reduce_loss(algorithm, PolicyOutput(logps, entropy=entropies), micro, scale)
        if count_all:
            total = total * x["mask"].any(1).double().mean().to(dtype)
        total.backward()
        assert leaf.grad is not None
        answers = {"loss": total.detach(), "gradient": leaf.grad * x["mask"]}
        if not bonus:
            return answers
        assert isinstance(algorithm, PolicyGradient)
        by_entropy = torch.zeros_like(entropy) if entropy.grad is None else entropy.grad
        mean = float(x["entropy"].to(dtype)[x["mask"]].mean())
        after = algorithm.next_state(STATE, {"policy/entropy": mean}).get(
            "entropy_coef", algorithm.entropy_coef
        )
        return {**answers, "by_entropy": by_entropy * x["mask"], "weight": torch.tensor(after, dtype=dtype)}

    return ours


def advantages_of(algorithm: Algorithm) -> Callable[[Tensors, torch.dtype], dict[str, Tensor]]:
    """rft's advantages, one per completion (those with a token)."""

    def ours(x: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
        whole = {**x, "mask": torch.ones_like(x["mask"])}
        batch, place = to_batch(whole, dtype)
        advantages = algorithm.prepare(batch.with_(sampler_logps=None)).advantages
        assert advantages is not None
        return {"advantages": advantages[place[:, 0]]}

    return ours


def weights_of(algorithm: Any) -> Callable[[Tensors, torch.dtype], dict[str, Tensor]]:
    """The correction weights for the sampler, on masked-in tokens."""

    def ours(x: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
        batch, place = to_batch(x, dtype)
        assert batch.old_logps is not None
        weights = algorithm.weights(PolicyOutput(batch.old_logps), batch)[place]
        return {"weights": weights * x["mask"]}

    return ours


def distillation_of(beta: float) -> Callable[[Tensors, torch.dtype], dict[str, Tensor]]:
    algorithm = ALGORITHMS["distill"](beta=beta)

    def ours(x: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
        leaf = x["student"].to(dtype, copy=True).requires_grad_()
        student, teacher = leaf.log_softmax(-1), x["teacher"].to(dtype).log_softmax(-1)
        loss = algorithm.divergence(student, teacher).sum()
        loss.backward()
        assert leaf.grad is not None
        return {"loss": loss.detach(), "gradient": leaf.grad}

    return ours


# -- the list -----------------------------------------------------------------------------------------

LOSSES: list[tuple[str, str, dict[str, Any], dict[str, Any]]] = [
    # (row, rft algorithm, its settings, TRL's arguments)
    ("grpo", "grpo", {"normalization": "sequence"}, {"loss_type": "grpo"}),
    ("grpo, KL", "grpo", {"normalization": "sequence", "beta": 0.1}, {"loss_type": "grpo", "beta": 0.1}),
    (
        "grpo, delta",
        "grpo",
        {"normalization": "sequence", "dual_clip": 2.0},
        {"loss_type": "grpo", "delta": 2.0},
    ),
    ("grpo, token average", "grpo", {}, {"loss_type": "bnpo"}),
    ("dr_grpo", "dr_grpo", {}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
    ("dapo", "dapo", {}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    ("cispo", "cispo", {}, {"loss_type": "cispo", "epsilon_high": 5.0}),
    (
        "gspo",
        "gspo",
        {},
        {"loss_type": "grpo", "level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
    ),
    ("rloo", "rloo", {}, {"loss_type": "rloo"}),
    ("sapo", "sapo", {}, {"loss_type": "sapo"}),
    ("luspo", "luspo", {"epsilon": 0.2, "epsilon_high": 0.2}, {"loss_type": "luspo", "level": "sequence"}),
    ("vespo", "vespo", {}, {"loss_type": "vespo"}),
]
ROUNDED = "nearly equal distributions: a small difference of large terms, and TRL rounds beta first"
COUNTED_PAIRS = "a mean over pairs: TRL counts those without any trained token, rft does not"
EMPTY = "TRL adds the advantage of a completion without tokens to the loss: a constant; gradients agree"
COUNTED = "a mean over completions: TRL counts those without a trained token, rft does not"
OVERFLOW = "rft holds log-ratios within 20 nats; TRL's exp overflows to inf, and its gradient to nan"
BOUNDARY = "TRL interpolates the quantile in float32, which may leave out the token at the boundary"
MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")


def comparisons(count: int) -> list[Comparison]:
    """All online comparisons, `count` inputs each."""

    def padded() -> Iterator[Tensors]:
        return (make_input(seed) for seed in range(count))

    def pairs() -> Iterator[Tensors]:
        seeds = (seed for seed in itertools.count() if KINDS[seed % len(KINDS)] != "ragged")
        return (make_input(seed, size=2) for seed in itertools.islice(seeds, count))

    def ragged_pairs() -> Iterator[Tensors]:
        return (make_input(len(KINDS) * seed + KINDS.index("ragged"), size=2) for seed in range(count))

    def logits() -> Iterator[Tensors]:
        return (make_logits(seed) for seed in range(count))

    def held() -> Iterator[Tensors]:
        # The ratio of a sequence is the product of its tokens': 7 times 2.8 nats stays below 20.
        seeds = (seed for seed in itertools.count() if KINDS[seed % len(KINDS)] != "ragged")
        return (make_input(seed, far=2.8) for seed in itertools.islice(seeds, count))

    def ragged() -> Iterator[Tensors]:
        return (make_input(len(KINDS) * seed + KINDS.index("ragged")) for seed in range(count))

    def beyond() -> Iterator[Tensors]:
        return (make_input(len(KINDS) * seed + KINDS.index("far"), far=200.0) for seed in range(count))

    def whole() -> Iterator[Tensors]:
        seeds = (seed for seed in itertools.count() if KINDS[seed % len(KINDS)] != "ragged")
        return (make_input(seed) for seed in itertools.islice(seeds, count))

    found: list[Comparison] = []
    for row, name, ours, theirs in LOSSES:
        algorithm = ALGORITHMS[name](**ours)
        by_sequence = algorithm.normalizer == "sequence"
        inputs = held if name == "rloo" else whole if by_sequence else padded
        found.append(Comparison(row, "loss", loss_of(algorithm), inputs, theirs))
        if by_sequence and name != "rloo":
            empty = f"{row}, no tokens"
            found.append(Comparison(empty, "loss", loss_of(algorithm), ragged, theirs, COUNTED))
            counted = loss_of(algorithm, count_all=True)
            found.append(Comparison(f"{empty}, all counted", "loss", counted, ragged, theirs))
    grpo = loss_of(ALGORITHMS["grpo"](normalization="sequence"))
    found.append(Comparison("grpo, ratio past e^20", "loss", grpo, beyond, {"loss_type": "grpo"}, OVERFLOW))
    top = loss_of(ALGORITHMS["grpo"](top_entropy=0.2))
    settings = {"loss_type": "bnpo", "top_entropy": 0.2}
    found.append(Comparison("grpo, top entropy", "loss", top, padded, settings, BOUNDARY))
    for row, ours, theirs in (
        ("entropy bonus", {"entropy_coef": 0.03}, {"entropy_coef": 0.03}),
        ("entropy below its target", {"entropy_target": 0.5}, {"entropy_target": 0.5}),
        ("entropy above its target", {"entropy_target": 0.4}, {"entropy_target": 0.4}),
    ):
        with_bonus = loss_of(ALGORITHMS["grpo"](**ours), bonus=True)
        settings = {"loss_type": "bnpo", **STATE, **theirs}
        found.append(Comparison(f"grpo, {row}", "entropy_bonus", with_bonus, padded, settings))
    rloo_loss = loss_of(ALGORITHMS["rloo"](), count_all=True)
    found.append(
        Comparison("rloo, no tokens, all counted", "loss", rloo_loss, ragged, {"loss_type": "rloo"}, EMPTY)
    )
    for scale in ("group", "batch", "none"):
        algorithm = ALGORITHMS["grpo"](scale_rewards=scale)
        settings = {"scale_rewards": scale}
        found.append(
            Comparison(f"advantages, {scale}", "advantages", advantages_of(algorithm), padded, settings)
        )
    rloo = advantages_of(ALGORITHMS["rloo"]())
    found.append(Comparison("advantages, rloo", "rloo_advantages", rloo, padded))
    for mode in MODES:
        algorithm = ALGORITHMS["grpo"](correction=mode, correction_cap=1.5, correction_floor=0.5)
        settings = {"mode": mode, "cap": 1.5, "floor": 0.5 if mode.endswith("mask") else None}
        found.append(Comparison(f"correction, {mode}", "correction", weights_of(algorithm), padded, settings))
        both = ALGORITHMS["grpo"](normalization="sequence", correction=mode, correction_cap=1.5)
        settings = {"loss_type": "grpo", "mode": mode, "cap": 1.5}
        found.append(Comparison(f"grpo, {mode}", "loss", loss_of(both, sampler=True), whole, settings))
    for loss_type in ("sigmoid", "ipo"):
        dpo = loss_of(ALGORITHMS["online_dpo"](beta=0.3, loss_type=loss_type))
        settings = {"beta": 0.3, "loss_type": loss_type}
        found.append(Comparison(f"online_dpo, {loss_type}", "online_dpo", dpo, pairs, settings))
        empty = f"online_dpo, {loss_type}, no tokens"
        found.append(Comparison(empty, "online_dpo", dpo, ragged_pairs, settings, COUNTED_PAIRS))
    for beta in (0.0, 0.1, 0.5, 0.9, 1.0):
        reason = ROUNDED if 0 < beta < 1 else ""
        ours = distillation_of(beta)
        found.append(Comparison(f"distill, beta {beta}", "distill", ours, logits, {"beta": beta}, reason))
    return found
