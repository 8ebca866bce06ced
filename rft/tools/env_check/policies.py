"""Policies of `rft env check`: scripted replies, random text and tool calls, and a tiny random model."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from rft.batch import Prompt
from rft.config.schema import Config
from rft.data.chat import Renderer
from rft.data.prompts import demonstrations_of
from rft.rollout.engine import EngineSpec, Generate, Generated, Request
from rft.utils.seeds import derive_seed

Tools = Sequence[Mapping[str, Any]]
MODEL_TOKENS = 24  # per turn of the random model: more noise would test nothing new


class Policy(Protocol):
    """name: in the report. longest: sampled tokens of a turn, at most."""

    name: str
    longest: int

    def begin(self, session: str, prompt: Prompt, tools: Tools) -> None:
        """Prepare for the session of this name."""

    def notice(self, session: str, tools: Tools) -> None:
        """Take the tools that an environment passes with a call."""

    async def generate(self, request: Request) -> list[Generated]: ...


@dataclass
class Turn:
    """The state from which a text policy answers. number: of the turn, from 0 on. text: the prompt."""

    prompt: Prompt
    tools: Tools
    place: int
    number: int = 0
    text: str = ""
    rng: random.Random = field(default_factory=random.Random)


class TextPolicy:
    """A policy that answers with text, which the tokenizer encodes. An answer is a function of the session's
    seed, the turn and the prompt, so that two sessions of a seed with equal observations are equal."""

    name = ""
    longest = 1 << 30

    def __init__(self, render: Renderer, parser: str | None) -> None:
        self.render, self.parser = render, parser
        self.sessions: dict[str, Turn] = {}

    def begin(self, session: str, prompt: Prompt, tools: Tools) -> None:
        self.sessions[session] = Turn(prompt, tools, int(session.rpartition("-")[2]))

    def notice(self, session: str, tools: Tools) -> None:
        self.sessions[session].tools = tools

    async def generate(self, request: Request) -> list[Generated]:
        number = int(request.id.rpartition("-")[2])
        seed = derive_seed(request.sampling.seed or 0, "policy")
        text = self.render.tokenizer.decode(list(request.tokens), skip_special_tokens=False)
        turn = replace(self.sessions[request.session], number=number, text=text, rng=random.Random(seed))
        return [encoded(self.render, self.answer(turn), request.sampling.max_tokens)]

    def answer(self, turn: Turn) -> str:
        raise NotImplementedError

    def call(self, name: str, arguments: Mapping[str, Any]) -> str:
        return write_call(self.parser or "json", name, arguments)


def encoded(render: Renderer, text: str, limit: int = 1 << 30, *, ends: bool = True) -> Generated:
    """Return a text as the engine returns it: cut at the limit, or with the end token of a turn."""
    written = text + render.end if ends else text
    ids = tuple(render.tokenizer(written, add_special_tokens=False)["input_ids"])
    cut = ids[:limit]
    finish: Any = "stop" if ends and len(cut) == len(ids) else "length"
    return Generated(cut, (-1.0,) * len(cut), finish, ((0, 0, len(cut)),))


# -- scripted replies ----------------------------------------------------------------------------------


class Scripted(TextPolicy):
    """Gives the replies of a file, or the solution in the data: the demonstration, or the answer."""

    name = "scripted"

    def __init__(self, render: Renderer, parser: str | None, replies: Mapping[int, Sequence[Any]]) -> None:
        """replies: by row, from 1 on; those of row 0 are for all other rows."""
        super().__init__(render, parser)
        self.replies = replies

    def answer(self, turn: Turn) -> str:
        given = self.replies.get(turn.prompt.id + 1, self.replies.get(0)) or [solution(turn.prompt)]
        reply = given[min(turn.number, len(given) - 1)]
        return reply if isinstance(reply, str) else self.call(reply["tool"], reply.get("arguments", {}))


def solution(prompt: Prompt) -> str:
    """Return the text that solves a row, as far as its columns say."""
    shown = demonstrations_of(prompt)
    return shown[0] if shown else str(prompt.columns.get("answer") or "I do not know.")


def read_replies(path: Path) -> dict[int, list[Any]]:
    """Read replies: JSON lines `{"row": 1, "replies": [...]}`; without `row` they are for every row. A reply
    is a text, or a tool call `{"tool": name, "arguments": {...}}`. Raises ValueError."""
    replies: dict[int, list[Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
            row, given = value.get("row", 0), value["replies"]
            valid = type(row) is int and isinstance(given, list) and bool(given)
            valid = valid and all(isinstance(r, str) or isinstance(r.get("tool"), str) for r in given)
        except (ValueError, KeyError, AttributeError):
            valid = False
        if not valid:
            raise ValueError(
                f'{path}, line {number}: write {{"row": 1, "replies": ["text", {{"tool": "name", '
                '"arguments": {}}]}, with at least one reply; leave row out for all rows'
            )
        replies[row] = given
    return replies


# -- random text and tool calls --------------------------------------------------------------------------

ODD_TEXTS = (
    "",
    "   \n\n",
    "a" * 400,
    "héllo, 世界 \U0001f600 \u202e",
    '</think> {"answer": null} \\boxed{} ```',
    "<tool_call>",
    "null",
    "-1e309",
)


class Random(TextPolicy):
    """Writes words of the prompt, numbers and odd texts. With tools, a valid call comes first, and then calls
    with valid, with wrong and with missing arguments, unknown names and malformed calls as well."""

    name = "random"

    def answer(self, turn: Turn) -> str:
        rng = turn.rng
        if not turn.tools or (turn.number and rng.random() < 0.2):
            return self._text(turn)
        tool = turn.tools[(turn.place + turn.number) % len(turn.tools)]
        function = tool.get("function", tool)
        name, schema = str(function["name"]), function.get("parameters") or {}
        arguments = example({"type": "object", **schema}, turn, rng)
        kind = rng.random() if turn.number else 0.0
        if kind < 0.7:
            return self.call(name, arguments)
        if kind < 0.8:
            return self.call(name, _corrupted(arguments, rng))
        if kind < 0.9:
            return self.call(f"{name}_now", arguments)
        return self.call(name, arguments)[: rng.randrange(5, 20)]

    def _text(self, turn: Turn) -> str:
        rng = turn.rng
        if rng.random() < 0.3:
            return rng.choice(ODD_TEXTS)
        if rng.random() < 0.3:
            return str(rng.randint(-20, 100))
        return " ".join(_word(turn.text[-400:], rng) for _ in range(rng.randint(1, 8)))


def _word(text: str, rng: random.Random) -> str:
    return rng.choice(re.findall(r"\w+", text) or ["word"])


def example(schema: Any, turn: Turn, rng: random.Random) -> Any:
    """Return a random value that a JSON schema allows. Words come from the schema's descriptions, which often
    name an example, and from the end of the prompt, the last observation."""
    if not isinstance(schema, Mapping):
        return None
    for key in ("anyOf", "oneOf"):
        if schema.get(key):
            return example(rng.choice(schema[key]), turn, rng)
    if schema.get("enum"):
        return rng.choice(schema["enum"])
    kind = schema.get("type", "string")
    kind = rng.choice(kind) if isinstance(kind, list) else kind
    if kind == "object":
        return {name: example(part, turn, rng) for name, part in (schema.get("properties") or {}).items()}
    if kind == "array":
        return [example(schema.get("items", {}), turn, rng) for _ in range(rng.randint(0, 3))]
    simple = {"integer": rng.randint(-3, 12), "number": rng.randint(-30, 90) / 8, "null": None}
    if kind in simple:
        return simple[kind]
    if kind == "boolean":
        return rng.random() < 0.5
    return _word(str(schema.get("description", "")) if rng.random() < 0.5 else turn.text[-400:], rng)


def _corrupted(arguments: Any, rng: random.Random) -> dict[str, Any]:
    """Return arguments of which one is missing, of another type, or unknown."""
    corrupted = dict(arguments)
    name = rng.choice([*corrupted, "unknown"])
    if name in corrupted and rng.random() < 0.5:
        del corrupted[name]
    else:
        corrupted[name] = rng.choice([None, [], {"a": 1}, "x" * 3000, -1])
    return corrupted


def write_call(format_: str, name: str, arguments: Mapping[str, Any]) -> str:
    """Write a tool call in one of `tool_calls.FORMATS`."""
    if format_ == "pythonic":
        return f"[{name}({', '.join(f'{key}={value!r}' for key, value in arguments.items())})]"
    if format_ == "xml":
        parts = (
            f"<parameter={key}>\n{value if isinstance(value, str) else json.dumps(value)}\n</parameter>\n"
            for key, value in arguments.items()
        )
        return f"<tool_call>\n<function={name}>\n{''.join(parts)}</function>\n</tool_call>"
    if format_ == "llama3":
        return json.dumps({"name": name, "parameters": dict(arguments)}, ensure_ascii=False)
    call = json.dumps({"name": name, "arguments": dict(arguments)}, ensure_ascii=False)
    return f"<tool_call>\n{call}\n</tool_call>"


# -- a tiny random model ---------------------------------------------------------------------------------


class TinyModel:
    """A random model with the tokenizer of the config, on the hf engine: it samples any token, also special
    ones."""

    name, longest = "model", MODEL_TOKENS

    def __init__(self, engine_generate: Generate) -> None:
        self.generate = engine_generate

    def begin(self, session: str, prompt: Prompt, tools: Tools) -> None: ...

    def notice(self, session: str, tools: Tools) -> None: ...


async def tiny_model(
    config: Config, tokenizer: Any, stops: Sequence[int], context: int, folder: Path
) -> TinyModel:
    """Make a random model of one layer in a folder, and start the engine hf with it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from rft.rollout.hf import HFEngine

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=max(tokenizer.get_vocab().values()) + 1,
                hidden_size=32,
                intermediate_size=32,
                num_hidden_layers=1,
                num_attention_heads=1,
                num_key_value_heads=1,
                max_position_embeddings=context,
                tie_word_embeddings=True,
            )
        )
    model.save_pretrained(folder)
    engine = HFEngine(
        EngineSpec(
            config=config.rollout.model_copy(update={"threads": 1, "cores": None}),
            kind="hf",
            model=str(folder),
            tokenizer=str(folder),
            dtype="float32",
            device="cpu",
            max_model_len=context,
            seed=config.seed,
            transport="file",
            stop_token_ids=tuple(stops),
        )
    )
    tokenizer.save_pretrained(folder)
    await engine.start()
    return TinyModel(engine.generate)
