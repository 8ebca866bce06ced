"""Check instructions that a program can verify, as in IFEval (arXiv:2311.07911).

A sample's columns `instruction_id_list` and `kwargs` (as in IFEval's data) name the checks; the reward
is 1 if all pass, or the fraction that passes. The checks are reimplemented from the paper's table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal

from rft.rewards.types import Score, correct, graded, wrong
from rft.utils.did_you_mean import did_you_mean

Check = Callable[..., bool]


def _words(text: str) -> list[str]:
    return re.findall(r"\b[\w'-]+\b", text)


def _sentences(text: str) -> list[str]:
    return [s for s in re.split(r"(?<=[.!?])[\"')\]]*(?:\s+|$)", text.strip()) if re.search(r"\w", s)]


def _paragraphs(text: str) -> list[str]:
    return [p for p in re.split(r"\n\s*\*\*\*\s*\n|\n\s*\n", text) if p.strip()]


def _compare(n: int, relation: str | None, bound: int) -> bool:
    """Compare with IFEval's relations: `at least` (default) and `less than`."""
    return n < bound if relation == "less than" else n >= bound


def _count(text: str, word: str) -> int:
    return len(re.findall(rf"\b{re.escape(word)}\b", text, re.IGNORECASE))


def _is_json(text: str) -> bool:
    body = re.sub(r"^```(?:json)?\s*|\s*```$", "", text.strip(), flags=re.IGNORECASE)
    try:
        json.loads(body)
    except (ValueError, RecursionError):
        return False
    return True


def _bullets(text: str) -> int:
    return len(re.findall(r"^\s*(?:\*(?!\*)|-)\s+\S", text, re.MULTILINE))


def _capital_words(text: str) -> int:
    return sum(w.isupper() and any(c.isalpha() for c in w) for w in _words(text))


def _nth_starts(text: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    parts = [p for p in re.split(r"\n\s*\n", text) if p.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    words = _words(parts[nth_paragraph - 1])
    return bool(words) and words[0].casefold() == first_word.casefold()


def _has_postscript(text: str, postscript_marker: str) -> bool:
    return re.search(rf"^\s*{re.escape(postscript_marker)}", text, re.IGNORECASE | re.MULTILINE) is not None


def _two(text: str) -> bool:
    parts = [p.strip() for p in text.split("******")]
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


CHECKS: dict[str, Check] = {
    "keywords:existence": lambda t, keywords: all(_count(t, k) for k in keywords),
    "keywords:frequency": lambda t, keyword, frequency, relation=None: _compare(
        _count(t, keyword), relation, frequency
    ),
    "keywords:forbidden_words": lambda t, forbidden_words: not any(_count(t, w) for w in forbidden_words),
    "keywords:letter_frequency": lambda t, letter, let_frequency, let_relation=None: _compare(
        t.casefold().count(letter.casefold()), let_relation, let_frequency
    ),
    "length_constraints:number_words": lambda t, num_words, relation=None: _compare(
        len(_words(t)), relation, num_words
    ),
    "length_constraints:number_sentences": lambda t, num_sentences, relation=None: _compare(
        len(_sentences(t)), relation, num_sentences
    ),
    "length_constraints:number_paragraphs": lambda t, num_paragraphs: len(_paragraphs(t)) == num_paragraphs,
    "length_constraints:nth_paragraph_first_word": _nth_starts,
    "detectable_content:number_placeholders": lambda t, num_placeholders: (
        len(re.findall(r"\[[^\[\]]+\]", t)) >= num_placeholders
    ),
    "detectable_content:postscript": _has_postscript,
    "detectable_format:number_bullet_lists": lambda t, num_bullets: _bullets(t) == num_bullets,
    "detectable_format:number_highlighted_sections": lambda t, num_highlights: (
        len(re.findall(r"\*\*[^\n*]+\*\*|\*[^\n*]+\*", t)) >= num_highlights
    ),
    "detectable_format:multiple_sections": lambda t, section_spliter, num_sections: (
        len(re.findall(rf"^\s*{re.escape(section_spliter)}\s*\d+", t, re.MULTILINE)) >= num_sections
    ),
    "detectable_format:json_format": _is_json,
    "detectable_format:title": lambda t: re.search(r"<<[^\n<>]*\w[^\n<>]*>>", t) is not None,
    "detectable_format:constrained_response": lambda t: any(
        f"My answer is {w}." in t for w in ("yes", "no", "maybe")
    ),
    "change_case:english_capital": lambda t: t.isupper(),
    "change_case:english_lowercase": lambda t: t.islower(),
    "change_case:capital_word_frequency": lambda t, capital_frequency, capital_relation=None: _compare(
        _capital_words(t), capital_relation, capital_frequency
    ),
    "punctuation:no_comma": lambda t: "," not in t,
    "startend:end_checker": lambda t, end_phrase: (
        t.strip().strip('"').casefold().endswith(end_phrase.strip().casefold())
    ),
    "startend:quotation": lambda t: len(t.strip()) > 1 and t.strip()[0] == t.strip()[-1] == '"',
    "combination:repeat_prompt": lambda t, prompt_to_repeat: (
        t.strip().casefold().startswith(prompt_to_repeat.strip().casefold())
    ),
    "combination:two_responses": _two,
}


def instructions(
    completion: str,
    instruction_id_list: Sequence[str],
    kwargs: Any = None,
    *,
    scoring: Literal["all", "fraction"] = "all",
) -> Score:
    """Score 1 if the completion follows all its instructions, or the fraction that it follows.

    instruction_id_list: names of `CHECKS`. kwargs: their arguments, one dict per instruction (or JSON text);
    None values are dropped. Raises ValueError for an unknown name, with the nearest known one.
    """
    arguments = json.loads(kwargs) if isinstance(kwargs, str) else kwargs
    arguments = arguments or [{}] * len(instruction_id_list)
    text = completion.rpartition("</think>")[2]
    failed = []
    for name, given in zip(instruction_id_list, arguments, strict=True):
        if name not in CHECKS:
            raise ValueError(f"unknown instruction check {name!r}{did_you_mean(name, CHECKS)}")
        present = {k: v for k, v in (given or {}).items() if v is not None}
        if not text.strip() or not CHECKS[name](text, **present):
            failed.append(name)
    if not failed:
        return correct(detail=f"{len(instruction_id_list)} followed")
    detail = f"not followed: {', '.join(failed)}"
    if scoring == "all":
        return wrong(detail=detail)
    return graded(1 - len(failed) / len(instruction_id_list), detail, threshold=1.0)
