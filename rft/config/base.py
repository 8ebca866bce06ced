"""Base class of all config sections: typed, frozen, unknown keys rejected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, JsonValue, model_validator

UNLISTED: dict[str, JsonValue] = {"listed": False}
"""`json_schema_extra` of a section whose keys are those of another one, and are not listed again."""


class ConfigModel(BaseModel):
    """Config section. Every field has a `description`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _words_not_booleans(cls, values: Any) -> Any:
        """Restore `on` and `off`, which YAML parses as booleans, in fields that accept them as literals."""
        if not isinstance(values, Mapping):
            return values
        return {key: _as_word(cls.model_fields, key, value) for key, value in values.items()}


def _as_word(fields: Mapping[str, Any], key: str, value: Any) -> Any:
    if not isinstance(value, bool) or key not in fields:
        return value
    annotation, word = fields[key].annotation, "on" if value else "off"
    kinds = (annotation, *get_args(annotation))
    known = {choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)}
    return word if word in known else value
