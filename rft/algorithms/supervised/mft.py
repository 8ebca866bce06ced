"""Multi-task fine-tuning: supervised fine-tuning on a mixture whose sources count equally."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rft.algorithms.base import PolicyOutput, column
from rft.algorithms.supervised.sft import SFT
from rft.batch import Batch, Group

SOURCE = "mixture_source"  # the column of a mixture's rows with the name of their source


@dataclass(frozen=True)
class MFT(SFT):
    """loss = mean over the sources of the batch of the mean of -log p over a source's tokens; Liu et al.,
    "MFTCoder" (2023), section 3, the loss weighted by valid tokens.

    Unlike in `sft`, sources of `data.mixture` with long responses do not dominate. A batch of one source is
    trained on as by `sft`.
    """

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """Number the sources of the batch, as `values["task"]`; rows without one are a source too."""
        names = [str(group.prompt.columns.get(SOURCE, "")) for group in groups]
        number = {name: float(i) for i, name in enumerate(sorted(set(names)))}
        return [
            replace(
                group,
                completions=tuple(
                    replace(c, values={**c.values, "task": number[name]}) for c in group.completions
                ),
            )
            for group, name in zip(groups, names, strict=True)
        ]

    def prepare(self, batch: Batch) -> Batch:
        """Add `columns["task_weight"]` [N], the factor that turns the mean over all tokens into the mean over
        sources: (all tokens) / (sources * tokens of the source)."""
        task = column(batch, "task").long()
        tokens = torch.bincount(task, weights=batch.lengths.double())
        weight = tokens.sum() / (tokens.count_nonzero().clamp(min=1) * tokens.clamp(min=1))
        return batch.with_(columns={**batch.columns, "task_weight": weight[task].float()})

    def loss(self, policy: PolicyOutput, batch: Batch) -> torch.Tensor:
        return super().loss(policy, batch) * batch.to_tokens(column(batch, "task_weight"))
