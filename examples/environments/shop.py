"""A tool and an environment class: a price list, and a shop in which the policy spends its money."""

from __future__ import annotations

from typing import Any

PRICES = {"apple": 2, "bread": 3, "cheese": 7}


def price(item: str) -> int:
    """Look up the price of an item.

    Args:
        item: the item, e.g. apple
    """
    if item not in PRICES:
        raise ValueError(f"the shop has no {item}; it has {', '.join(PRICES)}")
    return PRICES[item]


class Shop:
    """Spend all of the money. Public methods are the tools of the policy."""

    def reset(self, **row: Any) -> str:
        """Start an episode with a row of the dataset; the returned text is appended to its prompt."""
        self.money = 5 + len(row["prompt"]) % 8
        self.bought: list[str] = []
        return f"\n\nYou are in a shop and have {self.money} coins. Spend exactly all of them."

    def look(self) -> dict[str, int]:
        """List the items and their prices."""
        return PRICES

    def buy(self, item: str) -> str:
        """Buy an item.

        Args:
            item: the item, e.g. apple
        """
        cost = price(item)
        if cost > self.money:
            raise ValueError(f"{item} costs {cost}, and you have {self.money}")
        self.money -= cost
        self.bought.append(item)
        return f"You have {self.money} coins left."

    def get_reward(self) -> dict[str, float]:
        """Score the episode: `reward` is trained on, the other numbers are logged."""
        return {"reward": float(self.money == 0), "items": len(self.bought)}
