"""Use trained models as rewards: scalar, pairwise and per-step, each in a separate worker process.

The templates of the scalar and pairwise models put a principle (SALMON's principle-following reward models,
arXiv:2310.05910) before the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    AutoTokenizer,
)

from rft.contrib.rewards.steps import Aggregate, judged_steps, split_steps
from rft.contrib.rewards.trained import TrainedTexts, Unreadable
from rft.data.groups import PAIR_TEMPLATE
from rft.rewards.types import Score, Text, abstain, graded, text_of

Rendered = str | list[int]  # a text, or token ids for models that rft trained


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
        self.trained = TrainedTexts.of(self.model, self.tokenizer)

    def render(self, prompt: Text, completion: Text) -> Rendered:
        """Render prompt and completion with the chat template, or as plain text if there is none.

        For a model that rft trained, the format of its training data. Raises Unreadable.
        """
        if self.trained is not None:
            return self.trained.response(prompt, completion)
        if self.tokenizer.chat_template is None:
            return text_of(prompt) + text_of(completion)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if isinstance(completion, str):
            messages.append({"role": "assistant", "content": completion})
        else:
            messages.extend(completion)
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))

    def batches(self, texts: Sequence[Rendered]) -> Iterator[tuple[list[int], Any, torch.Tensor]]:
        """Yield (indices, encoding, logits on the CPU in float32), shortest texts first."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(order), self.batch_size):
            index = order[start : start + self.batch_size]
            encoded = self._encode([texts[i] for i in index])
            with torch.inference_mode():
                logits = self.model(**encoded).logits.float().cpu()
            yield index, encoded, logits

    def _encode(self, texts: Sequence[Rendered]) -> Any:
        """Encode texts as a padded batch on the model's device.

        Token ids are padded on the right with an id that is not the last id of any row, because
        transformers looks for the last token that is not padding.
        """
        if isinstance(texts[0], str):
            options = {"return_tensors": "pt", "padding": True, "truncation": True}
            encoded = self.tokenizer(texts, max_length=self.max_length, **options)
            return encoded.to(self.model.device)
        rows = [row[-self.max_length :] for row in cast(Sequence[list[int]], texts)]
        pad = min(set(range(len(rows) + 1)) - {row[-1] for row in rows})
        self.model.config.get_text_config().pad_token_id = pad
        width = max(map(len, rows))
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
        mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        return {"input_ids": ids.to(self.model.device), "attention_mask": mask.to(self.model.device)}

    def scores(self, texts: Sequence[Rendered], label: int | None) -> list[float]:
        """Return one number per text: the single logit, or that of `label` if there are several.

        Logits of a regression model are returned unchanged, those of a classifier as log-odds.
        """
        result = [0.0] * len(texts)
        for index, _, logits in self.batches(texts):
            if logits.shape[-1] > 1 and label is None:
                raise ValueError(
                    f"the model has {logits.shape[-1]} labels: set the option `label` to the one to use as "
                    "the reward"
                )
            if self.model.config.problem_type == "regression":
                values = logits[:, label or 0]
            else:
                values = _log_odds(logits, label or 0)
            for i, value in zip(index, values.tolist(), strict=True):
                result[i] = value
        return result


def _log_odds(logits: torch.Tensor, label: int) -> torch.Tensor:
    """Return log p(label) - log(1 - p(label)) along the last axis; a single logit already is the log-odds."""
    if logits.shape[-1] == 1:
        return logits[..., 0]
    others = torch.cat([logits[..., :label], logits[..., label + 1 :]], dim=-1)
    return logits[..., label] - torch.logsumexp(others, dim=-1)


def _conditioned(prompt: Text, principle: str) -> Text:
    if not principle:
        return prompt
    if isinstance(prompt, str):
        return f"{principle}\n\n{prompt}"
    return [{"role": "system", "content": principle}, *prompt]


class RewardModel:
    """Score with a sequence-classification reward model: the value is its logit (or log-odds of `label`).

    sigmoid: map to 0..1. offset, scale: (value - offset) * scale. threshold: lowest value that is `correct`.
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
        """Return one Score per completion."""
        principles = principle if principle is not None else [self.principle] * len(prompts)
        texts: dict[int, Rendered] = {}
        refused: dict[int, str] = {}
        for i, (p, c, text) in enumerate(zip(prompts, completions, principles, strict=True)):
            try:
                texts[i] = self.classifier.render(_conditioned(p, text), c)
            except Unreadable as error:
                refused[i] = str(error)
        values = dict(zip(texts, self.classifier.scores(list(texts.values()), self.label), strict=True))
        return [self._score(values[i]) if i in values else abstain(refused[i]) for i in range(len(prompts))]

    def _score(self, value: float) -> Score:
        value = _sigmoid(value) if self.sigmoid else value
        return graded((value - self.offset) * self.scale, threshold=self.threshold)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))


class PairwiseModel:
    """Score the probability that a completion beats the others of its prompt (PairRM, SPPO's win rate).

    head: `pair`: the model reads prompt and two candidates in `template`, and its logit says that the
    first is better; both orders are evaluated and averaged. `bradley_terry`: a scalar model, with
    sigmoid(r_i - r_j). The value is the mean over the other completions of the same prompt in the
    call; a completion without others abstains.
    """

    required: Sequence[str] = ()

    def __init__(
        self,
        *,
        model: str,
        head: Literal["pair", "bradley_terry"] = "pair",
        template: str = PAIR_TEMPLATE,
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
        """Return one Score per completion, in 0..1."""
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
        """Return the probability that i beats j for each (i, j)."""
        conditioned = [_conditioned(p, self.principle) for p in prompts]
        if self.head == "bradley_terry":
            texts = [self.classifier.render(p, c) for p, c in zip(conditioned, completions, strict=True)]
            values = self.classifier.scores(texts, self.label)
            return [_sigmoid(values[i] - values[j]) for i, j in pairs]
        contents = [text_of(completion) for completion in completions]
        unequal = [(i, j) for i, j in pairs if contents[i] != contents[j]]  # others are a tie, without a call
        texts = [self._text(text_of(conditioned[i]), contents[i], contents[j]) for i, j in unequal]
        logits = dict(zip(unequal, self.classifier.scores(texts, self.label), strict=True))
        return [
            (_sigmoid(logits[i, j]) + 1 - _sigmoid(logits[j, i])) / 2 if (i, j) in logits else 0.5
            for i, j in pairs
        ]

    def _text(self, prompt: str, a: str, b: str) -> Rendered:
        trained = self.classifier.trained
        return trained.pair(prompt, a, b) if trained else self.template.format(prompt=prompt, a=a, b=b)


class ProcessRewardModel:
    """Score every step of a completion with a token-classification model.

    The probability of `label` is read at the last token of each step. Steps end with `separator`: by
    default a line break for a model that rft trained, and an empty line for others. The value is the
    `aggregate` over the steps, whose values are reported too; steps cut off by `max_length` do not count.
    """

    required: Sequence[str] = ()

    def __init__(
        self,
        *,
        model: str,
        separator: str | None = None,
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
            raise ValueError(
                f"{model} has no fast tokenizer, which is needed to map tokens to steps; use a "
                "model with a tokenizer.json"
            )
        self.separator = separator or ("\n" if self.classifier.trained else "\n\n")
        self.aggregate, self.label = aggregate, label

    def score(self, prompts: Sequence[Text], completions: Sequence[Text]) -> list[Score]:
        """Return one Score per completion; one without steps abstains."""
        marked: dict[int, tuple[Rendered, list[int]]] = {}
        result = [abstain("no step found")] * len(prompts)
        for i, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
            if steps := split_steps(text_of(completion), self.separator):
                try:
                    marked[i] = self._marked(prompt, steps)
                except Unreadable as error:
                    result[i] = abstain(str(error))
        keys = list(marked)
        for index, encoded, logits in self.classifier.batches([text for text, _ in marked.values()]):
            odds = torch.sigmoid(_log_odds(logits, self.label))
            for row, at in enumerate(index):
                text, ends = marked[keys[at]]
                tokens = [self._token(encoded, row, text, end) for end in ends]
                values = [None if token is None else odds[row, token].item() for token in tokens]
                result[keys[at]] = judged_steps(values, self.aggregate)
        return result

    def _marked(self, prompt: Text, steps: Sequence[str]) -> tuple[Rendered, list[int]]:
        """Return the model's input, and the index of the last character or token of each step."""
        if self.classifier.trained is not None:
            return self.classifier.trained.steps(prompt, steps)
        text, ends = text_of(prompt) + "\n", []
        for step in steps:
            text += step + self.separator
            ends.append(len(text) - len(self.separator) - 1)
        return text, ends

    def _token(self, encoded: Any, row: int, text: Rendered, end: int) -> int | None:
        """Return the index of a step's last token in its row; None if `max_length` cut it off on the left."""
        if isinstance(text, str):
            token: int | None = encoded.char_to_token(row, end)
            return token
        at = end - max(0, len(text) - self.classifier.max_length)
        return at if at >= 0 else None
