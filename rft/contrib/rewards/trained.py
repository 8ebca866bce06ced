"""Render texts for reward models that rft trained as token ids, with the code that made their training data.

The config of such a model records how its texts were rendered (`rft_texts`): system message, chat template
and kind of row. Otherwise a score would depend on a line break after the last turn, or on the presence of the
end token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rft.algorithms.base import DataKind
from rft.batch import Group
from rft.config.data import DataConfig
from rft.data import GroupMaker
from rft.data.errors import BadRows
from rft.data.reward_texts import TEXTS
from rft.rewards.types import Text

SOURCE = "completion"


class Unreadable(ValueError):
    """A completion cannot be rendered for this reward model; the message says why."""


class TrainedTexts:
    """Render prompts and completions for one model."""

    def __init__(self, texts: Mapping[str, Any], tokenizer: Any) -> None:
        config = DataConfig(kind="file", path=SOURCE, **texts["data"])
        # a single response is rendered the same way whether its row has a label, a score or a second response
        kind: DataKind = texts["kind"] if texts["kind"] in ("pairwise", "steps") else "unpaired"
        self.maker = GroupMaker(config, tokenizer, kind, SOURCE)

    @classmethod
    def of(cls, model: Any, tokenizer: Any) -> TrainedTexts | None:
        """Create the renderer for a model that rft trained; None for any other model."""
        texts = getattr(model.config, TEXTS, None)
        return None if texts is None else cls(texts, tokenizer)

    def response(self, prompt: Text, completion: Text) -> list[int]:
        """Return the ids of a prompt with its completion; an empty one is rendered as the end of the turn."""
        if isinstance(completion, str) and not completion.strip():
            return [*self.maker.render.prompt(prompt)[1], *self.maker.render.end_ids]
        return _ids(self._group({"prompt": prompt, "completion": completion, "label": True}))

    def pair(self, prompt: str, a: str, b: str) -> list[int]:
        """Return the ids of a prompt with two candidates, which must differ."""
        return _ids(self._group({"prompt": prompt, "chosen": a, "rejected": b}))

    def steps(self, prompt: Text, steps: Sequence[str]) -> tuple[list[int], list[int]]:
        """Return (ids of a prompt with its steps, the index of each step's last token)."""
        row = {"prompt": prompt, "completions": list(steps), "labels": [True] * len(steps)}
        group = self._group(row)
        mask, start = group.completions[0].mask, len(group.prompt.tokens)
        ends = (
            range(len(group.completions[0].tokens)) if mask is None else [i for i, m in enumerate(mask) if m]
        )
        return _ids(group), [start + i for i in ends]

    def _group(self, row: dict[str, Any]) -> Group:
        group = self.maker.make(row, 0)
        if group is None:
            bad, self.maker.bad = self.maker.bad, BadRows(SOURCE)
            raise Unreadable("; ".join(bad.rows))
        return group


def _ids(group: Group) -> list[int]:
    """Return prompt and first completion, up to the last token at which the model was trained to judge."""
    tokens, mask = group.completions[0].tokens, group.completions[0].mask
    end = len(tokens) if mask is None else max(i for i, m in enumerate(mask) if m) + 1
    return [*group.prompt.tokens, *tokens[:end]]
