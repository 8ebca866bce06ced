"""The base of every config section: typed, frozen, unknown keys forbidden."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A frozen part of the config tree. Every field carries a one-line `description`."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)
