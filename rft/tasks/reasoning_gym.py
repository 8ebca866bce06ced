"""Any task of the reasoning-gym package, by name, judged by that task's verifier."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal

from rft.config.tasks import ReasoningGymConfig
from rft.utils.did_you_mean import did_you_mean
from rft.utils.hashing import hash64

TEST_SHARE = 10  # one question in ten is held out
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@lru_cache(maxsize=64)
def _dataset(task: str, options: str, seed: int) -> Any:
    """Return the reasoning-gym dataset; `options` as JSON, so that it can be a cache key."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        hint = did_you_mean(task, DATASETS)
        raise ValueError(f"reasoning-gym {reasoning_gym.__version__} has no task {task!r}{hint}")
    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=2**31 - 1, **json.loads(options))
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"reasoning-gym rejects the options {options} of task {task!r}: {error}") from error


class ReasoningGym:
    """The task. Options: see `ReasoningGymConfig`."""

    name = "reasoning_gym"

    def __init__(self, **options: Any) -> None:
        """Raise ValueError for an unknown task or option."""
        self.config = ReasoningGymConfig(**options)
        self._options = json.dumps(self.config.options, sort_keys=True)
        _dataset(self.config.task, self._options, seed=0)

    def rows(self, split: Literal["train", "test"], n: int, seed: int) -> list[dict[str, Any]]:
        """Return `n` rows, deterministic in the arguments.

        prompt: the question. answer: one right answer. completion: that answer, tagged.
        task, options, metadata: the data that `score` needs to judge any other answer.
        A hash of the question decides its split. Raises ValueError for an unknown split, and if
        the task generates too few different questions to fill this one.
        """
        if split not in ("train", "test"):
            raise ValueError(f'split must be "train" or "test", not {split!r}')
        # Entry i of a dataset is drawn from seed + i: distant seeds keep the entries of two calls apart.
        source = _dataset(self.config.task, self._options, seed=seed * 10_000_019)
        rows: list[dict[str, Any]] = []
        for index in range(100 + 100 * n):
            if len(rows) == n:
                break
            entry = source[index]
            if _split(entry["question"]) == split:
                rows.append(self._row(entry))
        if len(rows) < n:
            raise ValueError(f"task {self.config.task!r} made only {len(rows)} {split} questions of {n}")
        return rows

    def _row(self, entry: dict[str, Any]) -> dict[str, Any]:
        return {
            "prompt": entry["question"] + self.config.suffix,
            "answer": entry["answer"],
            "completion": f"<answer>{entry['answer']}</answer>",
            "task": self.config.task,
            "options": self._options,
            "metadata": entry["metadata"],
        }


def _split(question: str) -> str:
    return "test" if hash64(question) % TEST_SHARE == 0 else "train"


def score(
    prompts: Sequence[Any],
    completions: Sequence[Any],
    *,
    task: Sequence[str],
    options: Sequence[str],
    answer: Sequence[str],
    metadata: Sequence[dict[str, Any]],
    **columns: Any,
) -> list[float | None]:
    """Return a reward in [0, 1] for each completion, from the verifier of the question's task.

    The last <answer>...</answer> is judged, or the text after the last ####. A completion with neither
    counts as empty, which verifiers score 0 or close to it. In a chat, the
    last message is judged.
    """
    scores: list[float | None] = []
    for completion, name, opts, right, data in zip(completions, task, options, answer, metadata, strict=True):
        text = completion if isinstance(completion, str) else completion[-1]["content"]
        entry = {"answer": right, "metadata": data}
        scores.append(float(_dataset(name, opts, 0).score_answer(final_answer(text), entry)))
    return scores


def final_answer(text: str) -> str | None:
    tagged = _ANSWER.findall(text)
    if tagged:
        return tagged[-1].strip()
    _, marker, tail = text.rpartition("####")
    return tail.strip() if marker else None
