"""Judged solutions of the embedded task: what is said of them is true."""

from __future__ import annotations

import re

import pytest

from rft.tasks.pairs import ArithmeticPairs


def final(text: str) -> str:
    found = re.search(r"(?:#### |boxed\{)(-?\d+)", text)
    assert found is not None, text
    return found[1]


@pytest.mark.parametrize("options", [{}, {"styles": {"prose": 1, "code": 1}, "wrong_fraction": 0.1}])
def test_judgements_are_true(options: dict) -> None:
    rows = ArithmeticPairs(**options).rows("train", 300, seed=3)
    assert rows == ArithmeticPairs(**options).rows("train", 300, seed=3)
    for row in rows:
        assert final(row["chosen"]) == row["answer"] != final(row["rejected"])
        assert row["label"] is (final(row["completion"]) == row["answer"])
        assert row["completion"] in (row["chosen"], row["rejected"])
        assert 0 < row["margin"] <= 1
        assert row["score"] == [float(row["label"]), 1.0 if row["label"] else row["score"][1]]
        assert 0 <= row["score"][1] <= 1
        assert final("".join(row["completions"])) == final(row["completion"])
    assert 0.4 < sum(row["label"] for row in rows) / len(rows) < 0.6


def test_a_step_is_right_until_the_first_mistake() -> None:
    for row in ArithmeticPairs().rows("train", 200, seed=1):
        right = True
        for line, label in zip(row["completions"], row["labels"], strict=True):
            step = re.fullmatch(r"(\d+)([+-])(\d+)=(\d+)\n", line)
            if step is not None:
                value = int(step[1]) + int(step[3]) * (1 if step[2] == "+" else -1)
                right = right and value == int(step[4])
            assert label is right, row
        assert row["labels"][-1] is row["label"]


def test_judgements_that_never_come_about_are_refused() -> None:
    with pytest.raises(ValueError, match="no wrong solution among 1000 demonstrations"):
        ArithmeticPairs(slips=[500]).rows("train", 1, seed=0)
    with pytest.raises(ValueError, match="no wrong solution"):
        ArithmeticPairs(wrong_fraction=0.0).rows("train", 1, seed=0)


def test_pairs_are_what_verification_makes_of_the_demonstrations() -> None:
    """Careful solutions are mostly right and hasty ones mostly wrong: so are the chosen and the rejected."""
    rows = ArithmeticPairs().rows("train", 400, seed=2)
    careful = [
        sum("+" in row[name] or "-" in row[name] for row in rows) / 400 for name in ("chosen", "rejected")
    ]
    assert careful[0] > 0.6 and careful[1] < 0.1
