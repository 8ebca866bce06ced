"""What of a policy is trained: everything, an adapter, or a part that a strategy chooses."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rft.learner.strategies.base import Strategy

if TYPE_CHECKING:
    from rft.learner.spec import LearnerSpec


def make_strategy(spec: LearnerSpec) -> Strategy:
    """The strategy that the learner's config asks for."""
    from rft.contrib.strategies.draws import Hft, Lisa
    from rft.contrib.strategies.galore import Galore
    from rft.contrib.strategies.subnetwork import Subnetwork
    from rft.learner.strategies.adapter import Adapter

    if spec.config.adapter is not None:
        return Adapter(spec)
    if spec.config.strategy is None:
        return Strategy(spec)
    kinds: dict[str, type[Strategy]] = {"lisa": Lisa, "hft": Hft, "galore": Galore, "subnetwork": Subnetwork}
    return kinds[spec.config.strategy.name](spec)
