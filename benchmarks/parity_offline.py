"""The offline losses that TRL has too, and inputs for them: random, and meant to hurt.

An input is a padded batch of P pairs, the P chosen first, then the P rejected, of at most L tokens:
`logps`, `ref_logps` [2P, L] float32, `lengths` [2P], `sum_squares` [2P, L] (log of the sum of squared
probabilities), `rewards` [2P] (of a reward head), `margin` [P]; for KTO the same 2P responses with
`labels` [2P] and `other_logps`, `other_ref_logps` [2P, L] of mismatched ones, of `lengths` too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from parity import Comparison, Tensors
from torch import Tensor

from rft.algorithms import ALGORITHMS, Algorithm, PolicyOutput
from rft.batch import Batch, Completion, Group, Prompt
from rft.learner.objective import reduce_loss, weigh

PAIRS, LENGTH = 5, 7
KINDS = ("near", "same", "spread", "far", "short", "ragged", "tiny", "sure", "lost", "tied")


def make_input(seed: int, *, equal_chosen: bool = False) -> Tensors:
    """One input; its kind goes through KINDS.

    near, spread: log-ratios to the reference about 0.1 and 1. same: exactly 0. far: to +-15 a token,
    +-100 a response. short: one token each. ragged: one against many. tiny: 1e-4. sure: log-probs near
    0. lost: log-probs near -50. tied: chosen and rejected alike, number for number.
    `equal_chosen` gives all chosen one length: a mean over tokens is then one over pairs.
    """
    g = torch.Generator().manual_seed(seed)
    kind = KINDS[seed % len(KINDS)]
    n = 2 * PAIRS
    logps = -3 * torch.rand(n, LENGTH, generator=g) - 0.01
    if kind == "sure":
        logps = logps * 1e-3
    if kind == "lost":
        logps = logps - 50
    scale = {"near": 0.1, "same": 0.0, "far": 7.0, "tiny": 1e-4}.get(kind, 1.0)
    ref_logps = logps + (scale * torch.randn(n, LENGTH, generator=g)).clamp(-15, 15)
    lengths = torch.randint(1, LENGTH + 1, (n,), generator=g)
    if kind == "short":
        lengths = torch.ones_like(lengths)
    if kind == "ragged":
        lengths = torch.tensor([1, LENGTH] * PAIRS)
    if kind == "tied":
        logps[PAIRS:], ref_logps[PAIRS:], lengths[PAIRS:] = logps[:PAIRS], ref_logps[:PAIRS], lengths[:PAIRS]
    if equal_chosen:
        lengths[:PAIRS] = lengths[0]
    spread = {"far": 50.0, "tiny": 1e-4}.get(kind, 1.0)
    return {
        "kind": kind,
        "logps": logps,
        "ref_logps": ref_logps,
        "lengths": lengths,
        "sum_squares": -2 * torch.rand(n, LENGTH, generator=g),
        "rewards": spread * torch.randn(n, generator=g),
        "margin": torch.rand(PAIRS, generator=g),
        "labels": torch.rand(n, generator=g) < (1.0 if kind == "near" else 0.5),
        "other_logps": -3 * torch.rand(n, LENGTH, generator=g),
        "other_ref_logps": -3 * torch.rand(n, LENGTH, generator=g) - (1.0 if seed % 2 else 0.0),
    }


# -- rft's side ---------------------------------------------------------------------------------------


def _sequences(algorithm: Algorithm, x: Tensors) -> list[tuple[int, int, float, dict[str, Any]]]:
    """(group, row of the padded batch, reward, values) of each sequence, group by group; rows from 2P
    are the mismatched ones of KTO."""
    n, margin = 2 * PAIRS, x["margin"].tolist()
    if algorithm.data == "unpaired":
        label = x["labels"].float().tolist()
        found = []
        for i in range(n):
            found += [(i, row, label[i], {"mismatched": float(row >= n)}) for row in (i, n + i)]
        return found if algorithm.prescored else found[::2]
    return [
        (i, row, reward, {"margin": margin[i]})
        for i in range(PAIRS)
        for row, reward in ((i, 1.0), (PAIRS + i, 0.0))
    ]


def to_batch(algorithm: Algorithm, x: Tensors, share_prefix: bool) -> tuple[Batch, Tensor, Tensor]:
    """(batch, row [T], column [T]): where each masked-in token stands in the padded batch."""
    rows = _sequences(algorithm, x)
    lengths = x["lengths"].tolist() * 2
    groups: dict[int, list[Completion]] = {}
    for group, row, reward, values in rows:
        tokens = tuple(LENGTH * row + column + 2 for column in range(lengths[row]))
        groups.setdefault(group, []).append(Completion(tokens, reward=reward, values=values))
    built = [Group(Prompt(i, (0, 1), ""), tuple(c)) for i, c in groups.items()]
    batch = Batch.build(built, share_prefix=share_prefix)
    cell = (batch.tokens - 2).clamp(min=0)
    return batch, cell // LENGTH, cell % LENGTH


def loss_of(
    algorithm: Algorithm, scores: bool = False
) -> Callable[[Tensors, torch.dtype], dict[str, Tensor]]:
    """rft's loss and gradient, by log-prob or (`scores`) by the reward of the last token, reduced by the
    learner over two micro-batches, prompts shared."""

    def ours(x: Tensors, dtype: torch.dtype) -> dict[str, Tensor]:
        batch, row, column = to_batch(algorithm, x, share_prefix=True)
        leaf = x["logps"].to(dtype, copy=True).requires_grad_()
        rewards = x["rewards"].to(dtype, copy=True).requires_grad_()

        def at(y: Tensor, other: Tensor | None = None) -> Tensor:
            whole = y if other is None else torch.cat([y, other])
            return whole.to(dtype)[row.clamp(max=len(whole) - 1), column].masked_fill(~batch.mask, 0)

        policy = at(leaf, x["other_logps"])
        reference = at(x["ref_logps"], x["other_ref_logps"])
        batch = algorithm.prepare(batch.with_(old_logps=policy.detach(), ref_logps=reference))
        batch, scale = weigh(algorithm, batch, max_completion_length=LENGTH)
        batch = batch.with_(columns={k: v.to(dtype) for k, v in batch.columns.items()})
        if batch.weight is not None:
            batch = batch.with_(weight=batch.weight.to(dtype))
        reward = rewards[row.clamp(max=len(rewards) - 1)][:, None]
        squares = at(x["sum_squares"], x["sum_squares"])
        total = torch.zeros((), dtype=dtype)
        trees = range(int((batch.parent < 0).sum()))
        tree = batch.tree[batch.segment]
        for part in (trees[:2], trees[2:]):
            inside = torch.isin(tree, torch.tensor(list(part)))
            output = PolicyOutput(policy[inside], kl=squares[inside], scores=reward[inside])
            total = total + reduce_loss(algorithm, output, batch.select(part), scale)
        total.backward()
        grad = rewards.grad if scores else leaf.grad
        assert grad is not None
        return {"loss": total.detach(), "gradient": grad}

    return ours


# -- the comparisons ----------------------------------------------------------------------------------

FORWARD_KL = (
    "log-ratios past 20 nats are held there (e^20 is 5e8): TRL overflows to inf and nan on 'far', rft stays "
    "finite; equal elsewhere"
)
CANCELS = (
    "on 'lost', the difference of two mean log-probs near -50 has lost two digits in float32, on both sides"
)
ROUNDING = (
    "TRL's rounding: it sums log-probs and subtracts the two large sums, rft sums differences; the "
    "exponential magnifies it (see the errors against float64)"
)


def comparisons(count: int) -> Iterator[Comparison]:
    """Everything that both have, on `count` inputs each."""

    def add(
        name: str, peer: str, algorithm: Algorithm, reason: str = "", equal: bool = False, **settings: Any
    ) -> Comparison:
        def inputs() -> Iterator[Tensors]:
            return (make_input(seed, equal_chosen=equal) for seed in range(count))

        return Comparison(
            name, peer, loss_of(algorithm, scores=peer == "reward_model"), inputs, settings, reason
        )

    dpo, make = ALGORITHMS["dpo"], ALGORITHMS
    yield add("sft", "sft", make["sft"](), loss_type="nll")
    yield add("dft", "sft", make["dft"](), loss_type="dft")
    names = {"exo": "exo_pair", "nca": "nca_pair", "bco": "bco_pair"}
    plain = ("sigmoid", "hinge", "ipo", "nca", "bco", "sppo_hard", "apo_zero", "apo_down")
    for name in plain:
        yield add(f"dpo {name}", "dpo", dpo(loss_type=name), loss_type=names.get(name, name))
    yield add("dpo discopop", "dpo", dpo(loss_type="discopop"), ROUNDING, loss_type="discopop")
    for name in ("robust", "exo", "aot"):
        settings = {"loss_type": names.get(name, name), "label_smoothing": 0.1}
        yield add(f"dpo {name}", "dpo", dpo(loss_type=name, label_smoothing=0.1), **settings)
    normalized = dpo(length_normalized=True)
    yield add("dpo length_normalized", "dpo", normalized, loss_type="sigmoid_norm")
    yield add("dpo tail", "dpo", dpo(tail=0.3), ld_alpha=0.3)
    yield add("dpo js", "dpo", dpo(divergence_type="js"), ROUNDING, f_divergence_type="js_divergence")
    forward = dpo(divergence_type="forward_kl")
    yield add("dpo forward_kl", "dpo", forward, FORWARD_KL, f_divergence_type="forward_kl")
    alpha = dpo(divergence_type="alpha", alpha=0.5)
    yield add("dpo alpha", "dpo", alpha, ROUNDING, f_divergence_type="alpha_divergence", f_alpha=0.5)
    yield add("dpo weighting", "dpo", dpo(weighting="aligned"), use_weighting=True)
    yield add("dpo nll", "dpo", dpo(nll=0.5), equal=True, nll=0.5)
    yield add("cpo", "cpo", make["cpo"](), equal=True, loss_type="sigmoid", cpo_alpha=1.0)
    yield add("cpo hinge", "cpo", make["cpo"](loss_type="hinge", nll=0.0), loss_type="hinge")
    yield add("cpo ipo", "cpo", make["cpo"](loss_type="ipo", nll=0.0), loss_type="ipo")
    simpo = {"loss_type": "simpo", "beta": 2.0}
    yield add("simpo", "cpo", make["simpo"](), CANCELS, **simpo)
    yield add(
        "simpo smoothed", "cpo", make["simpo"](label_smoothing=0.1), CANCELS, label_smoothing=0.1, **simpo
    )
    yield add("simpo alpha", "cpo", make["simpo"](alpha=0.25), alpha=0.25, **simpo)
    yield add("orpo", "orpo", make["orpo"](), equal=True)
    yield add("kto", "kto", make["kto"](undesirable=0.5), loss_type="kto")
    yield add("kto zero", "kto", make["kto"](baseline="zero", undesirable=0.5), loss_type="apo_zero_unpaired")
    yield add("reward_model", "reward_model", make["reward_model"]())
    both = make["reward_model"](centre=0.01, margin=True)
    yield add("reward_model margin, centre", "reward_model", both, margin=True, centre=0.01)
