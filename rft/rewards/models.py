"""Trained models as rewards: scalar, pairwise and per-step. Each lives in a worker process of its own.

A principle (SALMON's principle-following reward models, arXiv:2310.05910) is put before the prompt by
the template of the scalar and pairwise models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from rft.rewards.steps import Aggregate, aggregate, split_steps
from rft.rewards.types import Score, Text, abstain, graded, text_of


class _Classifier:
    """A transformer with a classification head: texts in, logits out, batched by length."""

    def __init__(
        self, kind: Any, model: str, device: str, dtype: str, batch_size: int, max_length: int
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        self.tokenizer = AutoTokenizer.from_pretrained(model)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.model = kind.from_pretrained(model, dtype=getattr(torch, dtype)).to(device).eval()
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.tokenizer.truncation_side = "left"  # the end of the completion matters most
        self.batch_size, self.max_length = batch_size, max_length

    def render(self, prompt: Text, completion: Text) -> str:
        """The chat template over prompt and completion where there is one, else their texts."""
        if self.tokenizer.chat_template is None:
            return text_of(prompt) + text_of(completion)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if isinstance(completion, str):
            messages.append({"role": "assistant", "content": completion})
        else:
            messages.extend(completion)
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))

    def batches(self, texts: Sequence[str]) -> Iterator[tuple[list[int], Any, torch.Tensor]]:
        """(indices, encoding, logits on the CPU in float32), shortest texts first."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), self.batch_size):
            index = order[start : start + self.batch_size]
            encoded = self.tokenizer(
                [texts[i] for i in index],
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self.max_length,
            ).to(self.model.device)
            with torch.inference_mode():
                logits = self.model(**encoded).logits.float().cpu()
            yield index, encoded, logits

    def scores(self, texts: Sequence[str], label: int | None) -> list[float]:
        """One number per text: the single logit, or the log-odds of `label` among several."""
        result = [0.0] * len(texts)
        for index, _, logits in self.batches(texts):
            if logits.shape[-1] > 1 and label is None:
                raise ValueError(
                    f"the model has {logits.shape[-1]} labels: say which one counts with `label`"
                )
            values = logits[:, 0] if logits.shape[-1] == 1 else _log_odds(logits, label or 0)
            for i, value in zip(index, values.tolist(), strict=True):
                result[i] = value
        return result


def _log_odds(logits: torch.Tensor, label: int) -> torch.Tensor:
    """log p(label) - log(1 - p(label)) along the last axis."""
    others = torch.cat([logits[..., :label], logits[..., label + 1 :]], dim=-1)
    return logits[..., label] - torch.logsumexp(others, dim=-1)


def _conditioned(prompt: Text, principle: str) -> Text:
    if not principle:
        return prompt
    if isinstance(prompt, str):
        return f"{principle}\n\n{prompt}"
    return [{"role": "system", "content": principle}, *prompt]


class RewardModel:
    """A sequence-classification reward model: the value is its logit (or log-odds of `label`).

    sigmoid: squash to 0..1. offset, scale: (value - offset) * scale. threshold: `correct` from there.
    """

    required: Sequence[str] = ()
    optional: Sequence[str] = ("principle",)

    def __init__(
        self,
        *,
        model: str,
        device: str = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        batch_size: int = 8,
        max_length: int = 4096,
        label: int | None = None,
        principle: str = "",
        sigmoid: bool = False,
        offset: float = 0.0,
        scale: float = 1.0,
        threshold: float = 0.0,
    ) -> None:
        kind = AutoModelForSequenceClassification
        self.classifier = _Classifier(kind, model, device, dtype, batch_size, max_length)
        self.label, self.principle = label, principle
        self.sigmoid, self.offset, self.scale, self.threshold = sigmoid, offset, scale, threshold

    def score(
        self, prompts: Sequence[Text], completions: Sequence[Text], principle: Sequence[str] | None = None
    ) -> list[Score]:
        """One Score per completion."""
        principles = principle if principle is not None else [self.principle] * len(prompts)
        texts = [
            self.classifier.render(_conditioned(p, rule), c)
            for p, c, rule in zip(prompts, completions, principles, strict=True)
        ]
        values = self.classifier.scores(texts, self.label)
        if self.sigmoid:
            values = [_sigmoid(v) for v in values]
        return [graded((v - self.offset) * self.scale, threshold=self.threshold) for v in values]


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


class PairwiseModel:
    """The probability that a completion beats the others of its prompt (PairRM, SPPO's win rate).

    head: `pair`: the model reads prompt and two candidates in `template` and its logit says that the
    first is better; both orders are asked and averaged. `bradley_terry`: a scalar model, with
    sigmoid(r_i - r_j). The value is the mean over the other completions of the same prompt in the
    call; a completion without others abstains.
    """

    required: Sequence[str] = ()

    def __init__(
        self,
        *,
        model: str,
        head: Literal["pair", "bradley_terry"] = "pair",
        template: str = "{prompt}\n\nCandidate A: {a}\n\nCandidate B: {b}",
        device: str = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        batch_size: int = 8,
        max_length: int = 4096,
        label: int | None = None,
        principle: str = "",
    ) -> None:
        kind = AutoModelForSequenceClassification
        self.classifier = _Classifier(kind, model, device, dtype, batch_size, max_length)
        self.head, self.template, self.label, self.principle = head, template, label, principle

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[Score]:
        """One Score per completion, in 0..1."""
        groups: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            groups.setdefault(text_of(prompt), []).append(i)
        pairs = [(i, j) for g in groups.values() for i in g for j in g if i != j]
        wins = self._wins(prompts, completions, pairs)
        rates: dict[int, list[float]] = {}
        for (i, _), win in zip(pairs, wins, strict=True):
            rates.setdefault(i, []).append(win)
        return [
            graded(sum(rates[i]) / len(rates[i]), f"win rate against {len(rates[i])} others")
            if i in rates
            else abstain("no other completion of this prompt")
            for i in range(len(completions))
        ]

    def _wins(
        self, prompts: Sequence[Text], completions: Sequence[Text], pairs: Sequence[tuple[int, int]]
    ) -> list[float]:
        """For each (i, j), the probability that i beats j."""
        ruled = [_conditioned(p, self.principle) for p in prompts]
        if self.head == "bradley_terry":
            texts = [self.classifier.render(p, c) for p, c in zip(ruled, completions, strict=True)]
            values = self.classifier.scores(texts, self.label)
            return [_sigmoid(values[i] - values[j]) for i, j in pairs]
        texts = [
            self.template.format(
                prompt=text_of(ruled[i]), a=text_of(completions[i]), b=text_of(completions[j])
            )
            for i, j in pairs
        ]
        logits = dict(zip(pairs, self.classifier.scores(texts, self.label), strict=True))
        return [(_sigmoid(logits[i, j]) + 1 - _sigmoid(logits[j, i])) / 2 for i, j in pairs]


class ProcessRewardModel:
    """A token-classification model that judges every step of a completion.

    The probability of `label` is read at the last token of each step (steps end with `separator`);
    the value is their `aggregate`. The steps' scores are in the detail.
    """

    required: Sequence[str] = ()

    def __init__(
        self,
        *,
        model: str,
        separator: str = "\n\n",
        aggregate: Aggregate = "min",
        label: int = 1,
        device: str = "auto",
        dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        batch_size: int = 8,
        max_length: int = 4096,
    ) -> None:
        kind = AutoModelForTokenClassification
        self.classifier = _Classifier(kind, model, device, dtype, batch_size, max_length)
        if not self.classifier.tokenizer.is_fast:
            raise ValueError(f"{model} has no fast tokenizer: its tokens cannot be matched with steps")
        self.separator, self.aggregate, self.label = separator, aggregate, label

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[Score]:
        """One Score per completion; one without steps abstains."""
        texts, ends = [], []
        for prompt, completion in zip(prompts, completions, strict=True):
            text, at = text_of(prompt) + "\n", []
            for step in split_steps(text_of(completion), self.separator):
                text += step + self.separator
                at.append(len(text) - len(self.separator) - 1)  # the step's last character
            texts.append(text)
            ends.append(at)
        steps: list[list[float]] = [[] for _ in texts]
        for index, encoded, logits in self.classifier.batches(texts):
            odds = torch.sigmoid(_log_odds(logits, self.label))
            for row, i in enumerate(index):
                for end in ends[i]:
                    token = encoded.char_to_token(row, end)
                    if token is not None:  # None: cut off on the left by max_length
                        steps[i].append(odds[row, token].item())
        return [
            graded(aggregate(values, self.aggregate), f"steps: {[round(v, 3) for v in values]}")
            if values
            else abstain("no step found")
            for values in steps
        ]
