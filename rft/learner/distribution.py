"""Full next-token distributions, for the few algorithms that need them: divergence to the reference, expected
embeddings, and changed input embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rft.algorithms.base import Algorithm
from rft.algorithms.extras import ChangesEmbeddings, ReadsDistributions
from rft.batch import Batch
from rft.kernels.attention import hidden_states
from rft.kernels.divergence import head_divergence
from rft.kernels.logprob import low_rank_factors
from rft.kernels.logprob_common import LogitMap
from rft.kernels.logprob_linear import wide_product
from rft.learner.model import Head, PolicyModel, head_of

NOTHING = -1e4  # log-prob of what cannot occur: its exponential is 0, and differences stay finite
SMALLEST_TAIL = 1e-7  # of a teacher's K probabilities: what float32 log-probs leave uncertain
CELLS = 2**24  # log-probs held at once: 64 MiB in float32


def next_logps(head: Head, hidden: Tensor, temperature: float) -> Tensor:
    """Return log-probs over the vocabulary [n, V] float32 at hidden states [n, H]."""
    with torch.autocast(hidden.device.type, enabled=False):  # autocast would round the logits to 16 bits
        z = wide_product(hidden, head.weight.to(hidden.dtype))
        low, low_rank = low_rank_factors(hidden, head.lora)
        if low is not None and low_rank is not None:
            z = z + low @ low_rank.to(low.dtype).t()
    if head.bias is not None:
        z = z + head.bias.to(z.dtype)
    return torch.log_softmax(LogitMap(temperature, head.softcap, head.logit_scale)(z), -1)


def _chunks(n: int, vocabulary: int) -> Iterator[slice]:
    size = max(1, CELLS // vocabulary)
    return (slice(i, i + size) for i in range(0, n, size))


def _fuses(head: Head, reference: Head) -> bool:
    """Whether the fused kernel supports two heads: without LoRA factors, and with the same softcap and scale
    for both."""
    same = head.softcap == reference.softcap and head.logit_scale == reference.logit_scale
    return same and head.lora is None and reference.lora is None


def divergence(
    algorithm: Algorithm | None,
    batch: Batch,
    rows: Tensor,
    head: Head,
    hidden: Tensor,
    reference: PolicyModel | None,
    temperature: float,
    backend: str,
) -> Tensor:
    """Return the algorithm's divergence [n] from the reference, or the batch's teacher, at `rows`."""
    if not isinstance(algorithm, ReadsDistributions):
        raise ValueError("kl is the divergence of an algorithm that reads distributions; none was given")
    if algorithm.compares_distributions and batch.teacher_ids is not None:
        assert batch.teacher_logps is not None
        top = batch.teacher_ids[rows], batch.teacher_logps[rows]
        return teacher_divergence(algorithm, head, hidden, *top, temperature)
    other = reference if algorithm.compares_distributions else None
    return full_divergence(
        algorithm,
        head,
        hidden,
        None if other is None else other.head(),
        None if other is None else other.states(batch, rows),
        temperature,
        "reference" if backend == "reference" else "chunked" if backend == "chunked" else "auto",
    )


def full_divergence(
    algorithm: ReadsDistributions,
    head: Head,
    hidden: Tensor,
    reference: Head | None,
    ref_hidden: Tensor | None,
    temperature: float,
    backend: Literal["auto", "reference", "chunked"] = "auto",
) -> Tensor:
    """Return `algorithm.divergence` [n] float32 of the policy's next-token distributions from the
    reference's, at hidden states [n, H], with gradient to the policy. Uses the fused kernel if it implements
    the divergence; otherwise the backward pass recomputes each row chunk instead of storing it. Without a
    reference, the policy's distribution, detached, replaces it."""
    known = algorithm.known_divergence
    if known is not None and reference is not None and ref_hidden is not None and _fuses(head, reference):
        return head_divergence(
            hidden,
            head.weight.to(hidden.dtype),
            ref_hidden,
            reference.weight.to(ref_hidden.dtype),
            known[0],
            beta=known[1],
            bias=head.bias,
            ref_bias=reference.bias,
            temperature=temperature,
            softcap=head.softcap,
            logit_scale=head.logit_scale,
            backend=backend,
        )

    def part(h: Tensor, r: Tensor | None) -> Tensor:
        logps = next_logps(head, h, temperature)
        if reference is None or r is None:
            return algorithm.divergence(logps, logps.detach())
        with torch.no_grad():
            other = next_logps(reference, r, temperature)
        return algorithm.divergence(logps, other)

    vocabulary = head.weight.shape[0]
    parts = [
        checkpoint(part, hidden[s], None if ref_hidden is None else ref_hidden[s], use_reentrant=False)
        for s in _chunks(len(hidden), vocabulary)
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def teacher_divergence(
    algorithm: ReadsDistributions, head: Head, hidden: Tensor, ids: Tensor, logps: Tensor, temperature: float
) -> Tensor:
    """Return `algorithm.divergence` [n] float32 of the policy's next-token distributions from a teacher's, of
    which the K most likely tokens are known: `ids` [n, K] int64 and `logps` [n, K] (see `TopTokens`). Both
    distributions are over K + 1 outcomes, see `with_tail`, unless it compares ranks. The backward pass
    recomputes each row chunk."""

    def part(h: Tensor, i: Tensor, p: Tensor) -> Tensor:
        if algorithm.compares_ranks:
            return algorithm.divergence(next_logps(head, h, temperature), p)
        return algorithm.divergence(*with_tail(next_logps(head, h, temperature), i, p))

    parts = [
        checkpoint(part, hidden[s], ids[s], logps[s], use_reentrant=False)
        for s in _chunks(len(hidden), head.weight.shape[0])
    ]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def with_tail(policy: Tensor, ids: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Return the log-probs [n, K + 1] of policy and teacher for each of the K tokens, and for all others
    together as one outcome. policy: [n, V] over the vocabulary. ids, teacher: [n, K], of the teacher.

    A divergence of the two is at most that of the whole distributions (grouping outcomes cannot increase an
    f-divergence), and 0 where those are equal. Ids that the policy does not have count among the others. The
    others have at least the probability SMALLEST_TAIL for the teacher.
    """
    known = (ids >= 0) & (ids < policy.shape[1])
    teacher = teacher.masked_fill(~known, -torch.inf)
    rest = -torch.expm1(teacher.exp().sum(-1).log())
    teacher = torch.cat([teacher.clamp(min=NOTHING), rest.clamp(min=SMALLEST_TAIL).log()[:, None]], -1)
    there = policy.gather(-1, ids.where(known, 0)).masked_fill(~known, NOTHING)
    listed = torch.zeros(len(policy), policy.shape[1] + 1, dtype=torch.bool, device=policy.device)
    listed = listed.scatter_(1, ids.where(known, policy.shape[1]), True)[:, :-1]
    others = policy.masked_fill(listed, NOTHING).logsumexp(-1, keepdim=True)
    others = torch.where(listed.all(-1, keepdim=True), teacher[:, -1:], others)  # there are no others
    return torch.cat([there, others], -1), teacher


@torch.no_grad()
def expected_embeddings(model: Any, batch: Batch, temperature: float) -> Tensor:
    """[T, H]: at masked-in tokens the mean embedding under the policy's prediction, elsewhere the
    token's embedding. Costs one forward."""
    table, head = model.get_input_embeddings().weight, head_of(model)
    rows = batch.mask.nonzero()[:, 0]
    hidden = hidden_states(model, batch)[batch.source[rows]]
    out = table[batch.tokens].clone()
    for s in _chunks(len(rows), len(table)):
        out[rows[s]] = (next_logps(head, hidden[s], temperature).exp() @ table.float()).to(out.dtype)
    return out


@contextmanager
def reading(model: Any, batch: Batch, algorithm: ChangesEmbeddings, temperature: float) -> Iterator[None]:
    """Replace the model's token embeddings by `algorithm.embed` of them within the block.

    Raises ValueError if the model's sequences cannot be packed, since the embeddings are then not [T, H].
    """

    def change(module: Any, inputs: Any, output: Tensor) -> Tensor:
        if output.shape[:-1] != (1, batch.num_tokens):
            raise ValueError(
                f"{type(algorithm).__name__} changes embeddings, which this model's architecture does not "
                "allow: its sequences cannot be packed; use another algorithm"
            )
        hook.remove()  # the extra forward of `expected` uses plain tokens
        return algorithm.embed(output[0], batch, lambda: expected_embeddings(model, batch, temperature))[None]

    hook = model.get_input_embeddings().register_forward_hook(change)
    try:
        yield
    finally:
        hook.remove()
