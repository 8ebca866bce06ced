"""The hand-made pair of the offline tests, with reward-head scores, and random groups of each kind."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from worlds import LOGPS, OVER_REFERENCE, completion, fill, group, spread

from rft.algorithms import Algorithm, PolicyOutput
from rft.algorithms.extras import arrange, score_heads
from rft.batch import Batch, Completion, Group, Prompt
from rft.learner.objective import reduce_loss, weigh

KL = {10: 0.4, 11: 0.5, 12: 0.6}
SCORES = {10: (0.9, 0.3), 11: (0.7, 0.1), 12: (0.2, 0.4)}
NAN = float("nan")


def hand_batch(progress: float = 0.5) -> Batch:
    """One prompt, a = (10, 11) chosen, b = (12,) rejected; log-ratios to the reference 0.3 and -0.3."""
    a = {
        "weight": 0.5,
        "aligned_logps": -1.0,
        "margin": 0.2,
        "task": 0.0,
        "reward": 1.0,
        "targets": (1.0, NAN),
        "step_labels": (1.0, 0.0),
        "start_logps": (-1.0, -3.0),
    }
    b = {
        "weight": 2.0,
        "aligned_logps": -4.0,
        "margin": 0.2,
        "reward": 0.25,
        "task": 1.0,
        "targets": (0.5, 0.2),
        "step_labels": (NAN,),
        "start_logps": (-2.5,),
    }
    groups = [group(0, completion((10, 11), 1.0, values=a), completion((12,), 0.0, values=b))]
    tables = {"old_logps": LOGPS, "ref_logps": {t: x - OVER_REFERENCE[t] for t, x in LOGPS.items()}}
    tables["old_entropy"] = KL
    return fill(Batch.build(groups), tables).with_(state={"progress": progress})


def hand_policy(batch: Batch, heads: int = 1, dtype: torch.dtype = torch.float64) -> PolicyOutput:
    scores = [spread(batch, {t: s[k] for t, s in SCORES.items()}, dtype) for k in range(max(heads, 1))]
    return PolicyOutput(
        logps=spread(batch, LOGPS, dtype), kl=spread(batch, KL, dtype), scores=torch.stack(scores, -1)
    )


# -- random batches -----------------------------------------------------------------------------------

VOCABULARY = 400


def random_groups(data: str, seed: int, groups: int = 5) -> list[Group]:
    """Groups as `load_groups(kind=data)` gives them, with every numeric column; token ids never repeat."""
    g = torch.Generator().manual_seed(seed)
    sizes = {"preference": 2, "pairwise": 2, "ranked": 3}
    token, found = 10, []
    for number in range(groups):
        responses = []
        for rank in range(sizes.get(data, 1)):
            n = int(torch.randint(2, 7, (1,), generator=g))
            mask = tuple(i % 2 == 1 for i in range(n)) if data == "steps" else None
            reward = float((number % 2) if data == "unpaired" else -rank)
            numbers = torch.rand(4, generator=g).tolist()
            values: dict[str, Any] = {
                "weight": numbers[0] + 0.1,
                "aligned_logps": -3 * numbers[1],
                "margin": 0.3,
                "reward": numbers[0],
                "targets": (numbers[2], numbers[3]),
                "step_labels": tuple(float((number + i) % 2) for i in range(n // 2)),
                "start_logps": tuple(-0.5 - 0.3 * ((7 * i + number) % 5) for i in range(n)),
            }
            tokens = tuple(range(token, token + n))
            responses.append(Completion(tokens, mask=mask, reward=reward, values=values))
            token += n
        found.append(Group(Prompt(number, (1, 2, 3), "prompt"), tuple(responses)))
    return found


def random_tables(seed: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    logps = -2 * torch.rand(VOCABULARY, generator=g, dtype=torch.float64) - 0.1
    noise = torch.randn(VOCABULARY, 3, generator=g, dtype=torch.float64)
    return {
        "logps": logps,
        "old_logps": logps,
        "ref_logps": logps + 0.3 * noise[:, 0],
        "old_entropy": noise[:, 0].abs(),
        "scores": noise[:, 1:],
    }


def objective(
    algorithm: Algorithm,
    groups: list[Group],
    tables: Mapping[str, Tensor],
    *,
    share_prefix: bool = False,
    parts: Callable[[Batch], Iterable[list[int]]] | None = None,
) -> tuple[Tensor, Tensor]:
    """(loss, gradient by token id of log-probs and scores), reduced as the learner does."""
    batch = Batch.build(arrange(algorithm, groups), share_prefix=share_prefix)
    batch = algorithm.prepare(fill(batch, tables).with_(state={"progress": 0.5}))
    batch, scale = weigh(algorithm, batch, max_completion_length=8)
    leaves = [tables["logps"].clone().requires_grad_(), tables["scores"].clone().requires_grad_()]
    total = torch.zeros((), dtype=torch.float64)
    for trees in parts(batch) if parts else [range(int((batch.parent < 0).sum()))]:
        micro = batch.select(trees)
        heads = [spread(micro, leaves[1][:, k], torch.float64) for k in range(max(score_heads(algorithm), 1))]
        policy = PolicyOutput(
            logps=spread(micro, leaves[0], torch.float64),
            kl=spread(micro, leaves[0].square(), torch.float64),  # any function of the policy will do
            scores=torch.stack(heads, -1),
        )
        total = total + reduce_loss(algorithm, policy, micro, scale)
    total.backward()
    grads = [leaf.grad if leaf.grad is not None else torch.zeros_like(leaf) for leaf in leaves]
    return total.detach(), torch.cat([grads[0][:, None], grads[1]], -1)
