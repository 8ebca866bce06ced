"""Config of a run: its sections (`schema` and one module per section), loading, and cross-section checks."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rft.utils.dotted import load_dotted

if TYPE_CHECKING:
    from rft.config.load import apply_overrides, describe_fields, load_config, parse_config
    from rft.config.schema import Config
    from rft.errors import ConfigError

__all__ = ["Config", "ConfigError", "apply_overrides", "describe_fields", "load_config", "parse_config"]

# Imported on first use: packages that need one section only do not load all of them.
_HOMES = {"Config": "rft.config.schema", "ConfigError": "rft.errors"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return load_dotted(f"{_HOMES.get(name, 'rft.config.load')}.{name}")
