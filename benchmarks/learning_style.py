"""The format of a completion as a number: a reward of weight 0 makes a metric of it."""

from __future__ import annotations

from collections.abc import Sequence

from rft.config.tasks import Style
from rft.rewards.types import Text, text_of
from rft.tasks.arithmetic import style_of


def written_in(completions: Sequence[Text], style: Style) -> list[float]:
    """1 for a completion of the arithmetic task that is written in `style`, 0 for any other.

    As a reward of weight 0 named `chain`, with `options: {style: chain}`, its mean is logged as
    `reward/chain/mean`: the format's share among the sampled completions.
    """
    return [float(style_of(text_of(completion)) == style) for completion in completions]
