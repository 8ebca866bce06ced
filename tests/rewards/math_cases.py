"""Judgements with known verdicts, made from real data: shared by the tests and the benchmark."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from real_data import read_rows

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_PAIR = re.compile(r"(\\left)?([(\[])(.*),(.*?)(\\right)?([)\]])")


class Case(NamedTuple):
    """A completion, the gold answer, and whether it is right."""

    completion: str
    answer: str
    right: bool


def gsm8k() -> tuple[list[Case], list[Case]]:
    """Every gold solution with its own answer, and with perturbed ones: off by one, sign."""
    solutions = [r["answer"] for name in ("train", "test") for r in read_rows(f"gsm8k/{name}.jsonl")]
    right = [Case(s, s, True) for s in solutions]
    wrong = []
    for solution in solutions:
        gold = int(solution.split("####")[1].replace(",", ""))
        wrong += [Case(solution, str(other), False) for other in {gold + 1, gold - 1, -gold} - {gold}]
    return right, wrong


def math500() -> tuple[list[Case], list[Case]]:
    """Every gold solution with its own answer, and perturbed answers in a box."""
    rows = read_rows("math500/test.jsonl")
    right = [Case(r["solution"], r["answer"], True) for r in rows]
    wrong = [
        Case(rf"Therefore the answer is $\boxed{{{other}}}$.", r["answer"], False)
        for r in rows
        for other in perturbed(r["answer"])
    ]
    return right, wrong


def model_solutions() -> list[Case]:
    """Right and wrong solutions of GSM8K's questions, written by models."""
    gold = {r["question"]: r["answer"] for r in read_rows("gsm8k/test.jsonl")}
    rows: list[dict[str, Any]] = [r for r in read_rows("gsm8k/preferences.jsonl") if r["prompt"] in gold]
    return [Case(r[k], gold[r["prompt"]], k == "chosen") for r in rows for k in ("chosen", "rejected")]


def perturbed(answer: str) -> list[str]:
    """The answer with its last number off by one, with the other sign, and with swapped entries."""
    found = []
    numbers = list(_NUMBER.finditer(answer))
    if numbers and "^\\circ" not in answer[numbers[-1].end() :] + " ":
        last = numbers[-1]
        text = last.group()
        more = str(int(text) + 1) if "." not in text else f"{float(text) + 1:g}"
        found.append(answer[: last.start()] + more + answer[last.end() :])
    plain = _NUMBER.fullmatch(answer) or re.fullmatch(r"-?\\d?frac\{\d+\}\{\d+\}|-?\d*\\sqrt\{\d+\}", answer)
    if plain and answer != "0":
        found.append(answer[1:] if answer.startswith("-") else f"-{answer}")
    pair = _PAIR.fullmatch(answer)
    if pair and pair[3].count(",") == 0 and pair[3].strip() != pair[4].strip():
        left, right = (pair[1] or "") + pair[2], (pair[5] or "") + pair[6]
        found.append(f"{left}{pair[4].strip()}, {pair[3].strip()}{right}")
    return found
