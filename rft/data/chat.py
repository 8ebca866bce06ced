"""Text to tokens: chat templates, and which tokens of a conversation the assistant wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rft.data.config import DataConfig
from rft.data.errors import DataError

Messages = list[dict[str, Any]]
Text = str | Messages
Piece = tuple[str, bool]  # (text, written by the assistant)


def is_messages(value: Any) -> bool:
    """Whether a value is a non-empty list of chat messages."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
    )


class Renderer:
    """Renders prompts and responses with one tokenizer, the way they are seen at generation time.

    Raises DataError where a chat template is asked for and the tokenizer has none.
    """

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        self.config, self.tokenizer = config, tokenizer
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if config.chat_template == "always" and not has_template:
            raise DataError(
                "`chat_template: always`, but the tokenizer has none; give the model's chat tokenizer, or "
                "`chat_template: never` to train on plain text"
            )
        self.chat = has_template and config.chat_template != "never"
        self.template = str(tokenizer.chat_template) if self.chat else ""
        # What may end an assistant's turn: special tokens, as text.
        special = set(tokenizer.all_special_tokens) | set(_added_tokens(tokenizer))
        self.closers = tuple(sorted(special))

    # -- prompts -----------------------------------------------------------------------------------

    def prompt(self, text: Text, number: int = 0) -> tuple[str, list[int]]:
        """A prompt as (rendered text, token ids), ready for the response to follow."""
        messages = text if isinstance(text, list) else [{"role": "user", "content": text}]
        if isinstance(text, list) and not self.chat:
            why = "`chat_template` is `never`" if self._has_template else "the tokenizer has no chat template"
            raise DataError(f"the prompt is a list of messages, but {why}", row=number + 1, column="prompt")
        if not self.chat:
            rendered = f"{self.config.system}\n\n{text}" if self.config.system else str(text)
            return rendered, self.encode(rendered)
        rendered = self.render(self.with_system(messages), generate=True)
        return rendered, self.encode(rendered)

    @property
    def _has_template(self) -> bool:
        return bool(getattr(self.tokenizer, "chat_template", None))

    def with_system(self, messages: Messages) -> Messages:
        """The messages behind the config's system message, unless they bring their own."""
        if self.config.system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": self.config.system}, *messages]

    def render(self, messages: Messages, *, generate: bool = False) -> str:
        """Messages as the template writes them. Raises DataError with the template's own complaint."""
        from jinja2 import TemplateError

        prefill = generate and messages[-1]["role"] == "assistant"
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tokenize=False,
                    add_generation_prompt=generate and not prefill,
                    continue_final_message=prefill,
                    **self.config.chat_template_options,
                )
            )
        except TemplateError as error:
            roles = ", ".join(m["role"] for m in messages)
            raise DataError(f"the chat template refuses these messages (roles: {roles}): {error}") from None

    def generation_spans(self, messages: Messages) -> list[tuple[int, int]]:
        """Where in the rendered text the template's `generation` marks stand, as (start, end)."""
        from transformers.utils.chat_template_utils import render_jinja_template

        options: dict[str, Any] = {**self.tokenizer.special_tokens_map, **self.config.chat_template_options}
        spans: Any = render_jinja_template(
            conversations=[messages],
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **options,
        )[1][0]
        return [(int(start), int(end)) for start, end in spans]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text from its start. A rendered chat brings its own special tokens; plain
        text gets the tokenizer's (a BOS), but no end token: something is to follow."""
        ids = list(self.tokenizer(text, add_special_tokens=not self.chat)["input_ids"])
        eos = self.tokenizer.eos_token_id
        if not self.chat and ids and ids[-1] == eos and not text.endswith(self.tokenizer.eos_token):
            ids.pop()
        return ids

    def follow(self, text: str, ids: Sequence[int], piece: str) -> list[int]:
        """Token ids of `piece` after `text` (whose ids are `ids`).

        The two are encoded together where that keeps `ids` as they are, which is what tokenizers
        that mark the start of a word need; else apart, since a model that generates cannot merge its
        first token into the prompt either.
        """
        joint = self.encode(text + piece)
        if joint[: len(ids)] == list(ids):
            return joint[len(ids) :]
        return list(self.tokenizer(piece, add_special_tokens=False)["input_ids"])

    def pieces(self, prompt: str, ids: Sequence[int], rest: Sequence[Piece]) -> tuple[list[int], list[bool]]:
        """Token ids of the pieces that follow a prompt, and for each whether it has a loss."""
        text, so_far, mask = prompt, list(ids), []
        for piece, trained in rest:
            new = self.follow(text, so_far, piece)
            text, so_far = text + piece, so_far + new
            mask += [trained] * len(new)
        return so_far[len(ids) :], mask


def _added_tokens(tokenizer: Any) -> list[str]:
    return [str(token) for token in getattr(tokenizer, "get_added_vocab", dict)()]
