"""Recognise rows of known dataset formats, and give them the column names of rft."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

RowFormat = Literal["Alpaca", "verl"]

SUMMARIES: dict[RowFormat, str] = {
    "Alpaca": "Alpaca (prompt: instruction, then input; completion: output)",
    "verl": "verl (prompt: messages; answer: reward_model.ground_truth)",
}


def row_format(row: Mapping[str, Any]) -> RowFormat | None:
    """Return the format of a raw row, by its columns; None: rft's, or an unknown one.

    Alpaca has `instruction`, `output` and often `input`, without `prompt`; verl has `data_source`, `prompt`
    and `reward_model` with a `ground_truth`.
    """
    if "prompt" not in row and isinstance(row.get("instruction"), str) and "output" in row:
        return "Alpaca"
    rule = row.get("reward_model")
    if "data_source" in row and "prompt" in row and isinstance(rule, Mapping) and "ground_truth" in rule:
        return "verl"
    return None


def with_known_names(row: dict[str, Any], raw: Mapping[str, Any]) -> dict[str, Any]:
    """Add the columns that follow from a known format, unless `row` has them.

    row: columns renamed by the config. raw: the row before.
    """
    kind = row_format(raw)
    if kind == "Alpaca":
        given = raw.get("input")
        task = raw["instruction"]
        return {"prompt": f"{task}\n\n{given}" if given else task, "completion": raw["output"], **row}
    if kind == "verl":
        return {"answer": raw["reward_model"]["ground_truth"], **row}
    return row
