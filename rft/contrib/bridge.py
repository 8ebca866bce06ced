"""Extend a conversation's token ids by the rules of a model family, from the package `renderers`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rft.data.chat import Renderer
    from rft.data.messages import Messages

_PROBE: Messages = [{"role": "user", "content": "What is 1 + 2?"}]
_logger = logging.getLogger(__name__)


def find(render: Renderer) -> tuple[FamilyBridge | None, str]:
    """Return the rules of the model's family, and which ones they are. None, and why: the package does not
    know the model, or writes a prompt differently than its chat template, as if that was replaced."""
    package = "renderers"
    try:
        package += f" {version('renderers')}"
        from pydantic import TypeAdapter
        from renderers import RendererConfig, create_renderer
        from renderers.base import MODEL_RENDERER_MAP

        name = str(render.tokenizer.name_or_path)
        family = next((MODEL_RENDERER_MAP[n] for n in hub_names(name) if n in MODEL_RENDERER_MAP), "default")
        if family == "default":  # its renderer calls the chat template, and never extends a conversation
            return None, f"{package} does not know the model {name}"
        options = render.config.chat_template_options or None
        config = TypeAdapter[Any](RendererConfig).validate_python({"name": family})
        renderer = create_renderer(render.tokenizer, config, chat_template_kwargs=options)
        messages = render.as_messages(_PROBE)
        ids = list(renderer.render_ids(messages, add_generation_prompt=True))
    except (
        Exception
    ) as error:  # of the package, which asserts and raises many kinds; a run goes on without it
        return None, f"{package} cannot be used: {type(error).__name__}: {error}"
    if ids != render.encode(render.render(messages, generate=True)):
        return None, f"{package} writes a prompt of {family} differently than the chat template"
    return FamilyBridge(f"{package}, {family}", renderer), f"{package} knows the family {family}"


@dataclass(frozen=True)
class FamilyBridge:
    """The rules of one family. name: of package and family. renderer: the package's object for it."""

    name: str
    renderer: Any

    def extension(
        self,
        prompt: Sequence[int],
        sampled: Sequence[int],
        new: Messages,
        tools: Sequence[Mapping[str, Any]] | None,
    ) -> tuple[int, ...] | None:
        """Return the ids that follow a prompt and its answer up to the next answer. None: the family's
        rules do not keep these ids."""
        before = [*prompt, *sampled]
        schemas = [dict(tool.get("function", tool)) for tool in tools] if tools else None
        try:
            bridged = self.renderer.bridge_to_next_turn(
                list(prompt), list(sampled), [dict(m) for m in new], tools=schemas
            )
        except Exception as error:  # of the package: whatever it raises, nothing is proved
            _logger.warning("%s: a conversation cannot be extended: %r", self.name, error)
            return None
        ids = [] if bridged is None else list(bridged.token_ids)
        if len(ids) <= len(before) or ids[: len(before)] != before:
            return None
        return tuple(ids[len(before) :])


def hub_names(path: str) -> list[str]:
    """Return the names on the Hugging Face Hub that the name or folder of a model may stand for:
    `Qwen/Qwen3-8B`, `/models/Qwen/Qwen3-8B`, `.../models--Qwen--Qwen3-8B/snapshots/...`."""
    parts = Path(path).parts
    cached = [p.removeprefix("models--").replace("--", "/", 1) for p in parts if p.startswith("models--")]
    return [path, *cached, "/".join(parts[-2:])]
