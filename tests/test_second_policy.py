"""Two copies of the model: each learns from its own words, and from the rewards of both."""

from __future__ import annotations

from dataclasses import replace

import torch

from rft.algorithms import ALGORITHMS
from rft.batch import Batch, Group
from rft.contrib.second_policy import masked_to


def paired(groups: list[Group]) -> list[Group]:
    """Pioneers are copy 0, observers copy 1."""
    return [
        replace(
            g,
            completions=tuple(
                replace(c, values={"pair": float(k // 2), "observer": float(k % 2), "copy": float(k % 2)})
                for k, c in enumerate(g.completions)
            ),
        )
        for g in groups
    ]


def test_a_copy_is_trained_on_its_own_words_with_the_same_advantages(make_groups) -> None:
    groups = paired(make_groups(groups=2, size=4))
    groups = [
        replace(
            g,
            completions=tuple(replace(c, reward=r) for c, r in zip(g.completions, (1, 0, 0, 0), strict=True)),
        )
        for g in groups
    ]
    cory = ALGORITHMS["cory"]()
    whole = cory.prepare(Batch.build(groups))
    copy_of = Batch.build(groups).columns["copy"]
    masks = []
    for copy in (0, 1):
        batch = cory.prepare(Batch.build(masked_to(groups, copy)))
        assert torch.equal(batch.lengths > 0, copy_of == copy)
        assert torch.equal(batch.advantages[batch.mask], whole.advantages[batch.mask])
        assert batch.advantages[batch.mask].abs().max() > 0
        masks.append(batch.mask)
    assert torch.equal(masks[0] | masks[1], whole.mask) and not (masks[0] & masks[1]).any()
