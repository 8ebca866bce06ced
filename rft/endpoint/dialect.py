"""The interface of a dialect, and the parts that dialects share."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rft.endpoint.types import Answer, Ask, Refused
from rft.environments.types import Message

UNTRAINED = "rft-untrained"
"""A header, and a name of the model: calls that are answered but not trained on."""
MODEL = "rft"

Event = tuple[str, Mapping[str, Any] | str]
"""An event of a stream: its name ("" for none) and its data."""


class Body(BaseModel):
    """The fields of a request that rft reads; others are ignored, as servers of these dialects do."""

    model_config = ConfigDict(extra="ignore", strict=False)

    model: str = MODEL
    stream: bool = False

    def ask(self) -> Ask:
        """Return the call to the session. Raises Refused."""
        raise NotImplementedError


RequestT = TypeVar("RequestT", bound=Body)


@dataclass(frozen=True)
class Sent(Generic[RequestT]):
    """A request with the id and time of its response."""

    id: str
    created: int
    body: RequestT


class Dialect(Protocol[RequestT]):
    """How clients of one API write requests and read responses."""

    prefix: str  # of response ids

    def read(self, body: Mapping[str, Any]) -> RequestT:
        """Check a request. Raises Refused."""
        ...

    def write(self, sent: Sent[RequestT], answer: Answer) -> dict[str, Any]:
        """Return the whole response."""
        ...

    def opening(self, sent: Sent[RequestT]) -> Iterator[Event]:
        """Yield the events of a stream that precede the answer."""
        ...

    def answering(self, sent: Sent[RequestT], answer: Answer) -> Iterator[Event]:
        """Yield all further events."""
        ...

    def error(self, problem: Refused) -> dict[str, Any]:
        """Return the body of an error."""
        ...

    def failure(self, problem: Refused) -> Iterator[Event]:
        """Yield the events that end a stream by an error."""
        ...


def validated(kind: type[RequestT], body: Mapping[str, Any]) -> RequestT:
    """Read a request. Raises Refused, naming the field."""
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise invalid(f"{where}: {first['msg']}" if where else first["msg"], where or None) from None
    except RecursionError:
        raise invalid("the request is nested too deeply") from None


def invalid(message: str, param: str | None = None) -> Refused:
    return Refused(400, "invalid_request", message, param)


def encode(event: Event) -> bytes:
    """Write an event in the format of server-sent events."""
    name, data = event
    text = data if isinstance(data, str) else json.dumps(data)
    return (f"event: {name}\ndata: {text}\n\n" if name else f"data: {text}\n\n").encode()


# -- parts of messages -------------------------------------------------------------------------------------


class Function(BaseModel):
    """The schema of a function."""

    name: str = Field(min_length=1)
    description: str | None = None
    parameters: dict[str, Any] | None = None

    def schema_of(self) -> dict[str, Any]:
        """Return the tool as chat templates read it."""
        properties = (self.parameters or {}).get("properties", {})
        if not isinstance(properties, dict):
            raise invalid(f"tools: the properties of {self.name} must be an object", "tools")
        return {"type": "function", "function": self.model_dump(exclude_none=True)}


def text_of(content: Any, where: str, kinds: Sequence[str] = ("text",)) -> str:
    """Return the text of a message: a string, or a list of parts. Raises Refused for other media."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise invalid(f"{where}.content must be a text or a list of parts", where)
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        text = part.get("text", part.get("refusal")) if isinstance(part, dict) else part
        if (kind is not None and kind not in (*kinds, "refusal")) or not isinstance(text, str):
            raise invalid(f"{where}.content has a part of type {kind!r}; only text is supported", where)
        texts.append(text)
    return "".join(texts)


def tool_call(name: Any, arguments: Any, call_id: Any, where: str) -> dict[str, Any]:
    """Return a tool call of an assistant's message, its arguments as an object. Raises Refused."""
    if not isinstance(name, str) or not name:
        raise invalid(f"{where}: a tool call needs the name of its function", where)
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}", parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise invalid(f"{where}: the arguments of {name} are not JSON", where) from None
    if not isinstance(arguments, dict):
        raise invalid(f"{where}: the arguments of {name} must be an object", where)
    call: dict[str, Any] = {"type": "function"}
    if call_id is not None:
        call["id"] = str(call_id)
    return {**call, "function": {"name": name, "arguments": arguments}}


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def conversation(messages: list[Message]) -> list[Message]:
    """Check that there is something to answer. Raises Refused."""
    if not messages:
        raise invalid("the conversation has no messages", "messages")
    return messages


def arguments_text(arguments: Mapping[str, Any]) -> str:
    return json.dumps(arguments, ensure_ascii=False)
