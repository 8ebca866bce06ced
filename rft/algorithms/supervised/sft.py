"""Supervised fine-tuning: maximum likelihood of the demonstrated tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from rft.algorithms.base import Algorithm, Normalizer, PolicyOutput, setting
from rft.batch import Batch, Group


@dataclass(frozen=True)
class SFT(Algorithm):
    """loss = -log p(token), averaged over the tokens of all responses.

    `balance: tasks` averages over the tokens of each source of `data.mixture`, and then over the sources of
    the batch, so that sources with long responses do not dominate (Liu et al., "MFTCoder", 2023, section 3).
    """

    online: ClassVar[bool] = False
    needs_demonstrations: ClassVar[bool] = True

    balance: Literal["tokens", "tasks"] = setting(
        "tokens", "average the loss over all tokens, or over each source of a mixture and then over sources"
    )

    @property
    def normalizer(self) -> Normalizer:
        return "token" if self.balance == "tokens" else "task"

    @property
    def compares_rows(self) -> bool:
        return super().compares_rows or self.balance == "tasks"

    def arrange(self, groups: Sequence[Group]) -> list[Group]:
        """Number the sources of the batch, as `values["task"]`; rows without one are a source too."""
        if self.balance == "tokens":
            return list(groups)
        names = [str(group.prompt.columns.get("mixture_source", "")) for group in groups]
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

    def loss(self, policy: PolicyOutput, batch: Batch) -> Tensor:
        return -policy.logps.masked_fill(~batch.mask, 0)
