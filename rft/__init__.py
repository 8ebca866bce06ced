"""rft: reinforcement fine-tuning and preference alignment of language models."""

from __future__ import annotations

import sys

# `python -m rft.cli` puts the working folder first: a `json.py` there, or an `enum.py`, which typing needs,
# would be imported instead of Python's.
if sys.argv[:1] == ["-m"] and not sys.flags.safe_path:
    sys.path.append(sys.path.pop(0))

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rft import algorithms, config, rewards
    from rft.api.runs import Callback, Run
    from rft.api.training import check, evaluate, train
    from rft.config.schema import Config
    from rft.errors import CallbackError, ConfigError
    from rft.rewards.load import load_reward

__version__ = "0.1.0"

__all__ = [
    "Callback",
    "CallbackError",
    "Config",
    "ConfigError",
    "Run",
    "__version__",
    "algorithms",
    "check",
    "config",
    "evaluate",
    "load_reward",
    "rewards",
    "train",
]

# Imported on first use: `import rft` stays quick, and a run's processes load only the modules they need.
_HOMES = {
    "Callback": "rft.api.runs",
    "CallbackError": "rft.errors",
    "Config": "rft.config.schema",
    "ConfigError": "rft.errors",
    "Run": "rft.api.runs",
    "check": "rft.api.training",
    "evaluate": "rft.api.training",
    "load_reward": "rft.rewards.load",
    "train": "rft.api.training",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in __all__:
        return import_module(f"rft.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
