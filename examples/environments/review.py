"""An environment as a function: the policy answers, criticises its answer, and answers again."""

from __future__ import annotations

from typing import Any

from rft.environments.types import Session
from rft.rewards.math import math

CRITICISE = "Check this answer line by line. Is it right?"
AGAIN = "Now give your final answer."


async def review(row: dict[str, Any], session: Session, bonus: float = 0.1) -> dict[str, float]:
    """Reward the last answer, and pay `bonus` for a review that improved it."""
    messages = [{"role": "user", "content": row["prompt"]}]
    replies = [await session.chat(messages)]
    for request in (CRITICISE, AGAIN):
        messages += [replies[-1].message(), {"role": "user", "content": request}]
        replies.append(await session.chat(messages))
    first, _, last = (float(math(reply.content, row["answer"]).value or 0.0) for reply in replies)
    return {"reward": last + bonus * (last > first), "first": first, "last": last}
