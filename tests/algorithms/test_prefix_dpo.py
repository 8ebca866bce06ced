"""Pairs of continuations of one beginning, beside those of whole completions."""

from __future__ import annotations

import math

import torch
from worlds import completion, fill, group, spread

from rft.algorithms import ALGORITHMS, PolicyOutput
from rft.batch import Batch, Completion

LOGPS = {10: -1.0, 11: -2.0, 12: -3.0, 13: -0.5, 14: -1.5}
OVER_REFERENCE = {10: 0.1, 11: 0.2, 12: -0.3, 13: 0.4, 14: -0.2}


def test_pairs_begin_with_the_same_tokens() -> None:
    """Whole completions a = (10, 11) and b = (12,); after (10,) a good continuation 13 and a bad one 14, and
    a second prompt with the same numbers. Margins 0.3 + 0.3 and 0.4 + 0.2; a's mean log-prob is -1.5, that of
    the good continuation -0.5, without the beginning."""

    def continuation(token: int, reward: float) -> Completion:
        return completion((10, token), reward, mask=(False, True), demonstrated=1, values={"prefix": 1.0})

    groups = [
        group(
            n, completion((10, 11), 1.0), completion((12,), 0.0), continuation(14, 0.0), continuation(13, 1.0)
        )
        for n in range(2)
    ]
    algorithm = ALGORITHMS["prefix_dpo"](beta=0.5)
    batch = Batch.build(groups)
    tables = {"old_logps": LOGPS, "ref_logps": {t: p - OVER_REFERENCE[t] for t, p in LOGPS.items()}}
    batch = algorithm.prepare(fill(batch, tables))
    first, second = algorithm.pairs(batch)
    assert list(zip(first.tolist(), second.tolist(), strict=True)) == [(0, 1), (3, 2), (4, 5), (7, 6)]
    loss = algorithm.loss(PolicyOutput(spread(batch, LOGPS)), batch)
    expected = [math.log1p(math.exp(-0.3)) + 1.5, math.log1p(math.exp(-0.3)) + 0.5] * 2
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert algorithm.acts_on(batch)[batch.mask].all()
