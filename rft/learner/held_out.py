"""The learner's part of offline evaluation: the loss and the algorithm's own measures, without a step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from rft.batch import Batch
from rft.learner import objective
from rft.utils.quantized import evaluation_mode

if TYPE_CHECKING:
    from rft.learner.learner import Learner

Sums = dict[str, tuple[float, float]]  # name -> (sum over units, number of units)


@torch.no_grad()
def held_out_sums(learner: Learner, batch: Batch, step: int) -> Sums:
    """What `eval/...` is made of, for part of the held-out data: the algorithm's loss by its own unit, and
    what its `held_out` measures. Dropout and changed embeddings are off; the learner is left as it was."""
    algorithm, model = learner.algorithm, learner.policy.model
    batch = learner.prepare(learner.at_step(batch, step), objective.LogpGap())
    batch, scale = objective.weigh(algorithm, batch, learner.spec.sampling.max_completion_length)
    units = float(batch.mask.sum() if algorithm.unit == "token" else round(1 / scale))
    shown = None if algorithm.embeds else algorithm
    sums: Sums = {}
    loss = 0.0
    with evaluation_mode(model):
        for trees in learner.plan(batch):
            micro = learner.micro(batch, trees)
            out = learner.policy.run(micro, algorithm.outputs, algorithm=shown, reference=learner.reference)
            if not trees:
                continue
            micro = micro.to(learner.policy.device)
            loss += float(objective.reduce_loss(algorithm, out, micro, scale))
            for name, values in algorithm.held_out(out, micro).items():
                total, count = sums.get(name, (0.0, 0.0))
                sums[name] = (total + float(values.sum(dtype=torch.float64)), count + values.numel())
    parts = learner.parallel.gather((loss, sums))
    merged = {name: _add(part.get(name) for _, part in parts) for _, part in parts for name in part}
    return {"loss": (sum(part for part, _ in parts) * units, units), **merged}


def _add(parts: Iterable[tuple[float, float] | None]) -> tuple[float, float]:
    found = [part for part in parts if part is not None]
    return sum(total for total, _ in found), sum(count for _, count in found)
