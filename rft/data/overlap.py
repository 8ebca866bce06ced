"""Find training rows that overlap evaluation rows: equal prompts, and shared 13-grams of words.

The n-grams are those of GPT-3's appendix C (arXiv:2005.14165): 13 words, lower-cased, without punctuation;
n-grams in more than ten training rows are common text, such as a template, and do not count.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from rft.batch import Group, Prompt
from rft.config.mixture import COLUMN
from rft.data.messages import Text

WORDS = 13
COMMON = 10  # most training rows with an n-gram that counts
EXAMPLES = 3
REASON = "it overlaps an evaluation row (data.decontaminate)"
Item = Prompt | Group


@dataclass(frozen=True)
class Overlap:
    """Overlap of one training source with one evaluation source.

    rows: indices of the training rows that overlap; equal: those of them with an equal prompt. hit: number of
    evaluation rows that they overlap. sizes: rows of both sources.
    """

    train: str
    evaluation: str
    rows: Sequence[int]
    equal: frozenset[int]
    hit: int
    sizes: tuple[int, int]
    examples: Sequence[str] = ()

    def lines(self) -> list[str]:
        """Describe the overlap, with three examples."""
        both = f"{self.train} and {self.evaluation}"
        if not self.rows:
            return [f"{both}: none"]
        count, near = len(self.rows), len(self.rows) - len(self.equal)
        head = (
            f"{both}: {count} of {self.sizes[0]} training rows overlap {self.hit} of {self.sizes[1]} "
            f"evaluation rows; {len(self.equal)} have an equal prompt, {near} share {WORDS} words"
        )
        return [head, *self.examples]


def find_overlaps(train: Sequence[Item], held_out: Mapping[str, Sequence[Item]]) -> list[Overlap]:
    """Return the overlap of each training source with each evaluation set.

    train: rows of one dataset, or of the sources of a mixture. held_out: rows of each set by name; a set of
    several sources is split into them. Training texts are prompts and responses, evaluation texts prompts.
    """
    names = {name: "" for name in (_source(row) for row in train)}
    sources = {name: [i for i, row in enumerate(train) if _source(row) == name] for name in names}
    words = cache(lambda i: _words(_whole_text(train[i])))  # split only where there are n-grams to find
    keys = [_key(plain_text(_prompt(row).text)) for row in train]
    out = []
    for set_name, rows in held_out.items():
        for source in dict.fromkeys(map(_source, rows)):
            label = f"{set_name} ({source})" if source else set_name
            chosen = [row for row in rows if _source(row) == source]
            index = _Index([plain_text(_prompt(row).text) for row in chosen])
            for name, numbers in sources.items():
                overlapping_rows = index.find({i: keys[i] for i in numbers}, words)
                shown = [
                    f"row {_prompt(train[i]).id + 1} and evaluation row {_prompt(chosen[j]).id + 1}: "
                    f"{_excerpt(plain_text(_prompt(train[i]).text))}"
                    for i, j in [(i, min(hits)) for i, (hits, _) in list(overlapping_rows.items())[:EXAMPLES]]
                ]
                equal = frozenset(i for i, (_, same) in overlapping_rows.items() if same)
                hit = len({j for hits, _ in overlapping_rows.values() for j in hits})
                sizes = len(numbers), len(chosen)
                out.append(
                    Overlap(name or "training", label, list(overlapping_rows), equal, hit, sizes, shown)
                )
    return out


def overlapping(train: Sequence[Item], held_out: Mapping[str, Sequence[Item]]) -> set[int]:
    """Return the indices of the training rows that overlap any evaluation row."""
    return {i for overlap in find_overlaps(train, held_out) for i in overlap.rows}


class _Index:
    """Prompts of an evaluation set, by their key and by the hashes of their n-grams."""

    def __init__(self, rows: Sequence[str]) -> None:
        self.whole: dict[str, set[int]] = {}
        self.grams: dict[int, set[int]] = {}
        for number, text in enumerate(rows):
            self.whole.setdefault(_key(text), set()).add(number)
            for gram in _grams(_words(text)):
                self.grams.setdefault(gram, set()).add(number)

    def find(
        self, keys: Mapping[int, str], words: Callable[[int], Sequence[str]]
    ) -> dict[int, tuple[set[int], bool]]:
        """Return (evaluation rows, whether one of them has an equal prompt) of the rows that overlap.

        keys: of the prompts by row. words: returns the words of a row's whole text.
        """
        shared = {i: self.grams.keys() & _grams(words(i)) for i in keys} if self.grams else {}
        counts = Counter(gram for grams in shared.values() for gram in grams)
        overlapping_rows = {}
        for i, key in keys.items():
            same = self.whole.get(key, set())
            near = {j for gram in shared.get(i, ()) if counts[gram] <= COMMON for j in self.grams[gram]}
            if same or near:
                overlapping_rows[i] = (same or near, bool(same))
        return overlapping_rows


def _grams(words: Sequence[str]) -> Iterable[int]:
    return (hash(tuple(words[i : i + WORDS])) for i in range(len(words) - WORDS + 1))


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.casefold())


def _key(text: str) -> str:
    """Return a text without spaces and case: texts with the same key count as equal."""
    return "".join(text.casefold().split())


def plain_text(text: Text) -> str:
    """Return a text, or the contents of messages one after the other."""
    if isinstance(text, str):
        return text
    return "\n".join(str(message.get("content") or "") for message in text)


def _whole_text(row: Item) -> str:
    """Return a training row's prompt with its responses."""
    if isinstance(row, Group):
        return "\n".join([plain_text(row.prompt.text), *(c.text for c in row.completions)])
    given = row.columns.get("completion")
    return "\n".join([plain_text(row.text), *([given] if isinstance(given, str) else [])])


def _prompt(row: Item) -> Prompt:
    return row.prompt if isinstance(row, Group) else row


def _source(row: Item) -> str:
    return str(_prompt(row).columns.get(COLUMN, ""))


def _excerpt(text: str, most: int = 80) -> str:
    flat = " ".join(text.split())
    return repr(flat if len(flat) <= most else flat[: most - 3] + "...")
