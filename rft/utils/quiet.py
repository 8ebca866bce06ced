"""Keep the log output of other libraries out of rft's: the one place where they are silenced."""

from __future__ import annotations

import logging
import os
import sys
from contextlib import ExitStack

# Read when a library is imported. Set before that, and only where the user has not set them.
ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bars too: "Loading weights", "Writing model shards"
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",  # else tokenizers warns in each process that is forked later
}
# Libraries that set their loggers' level themselves, so that only a filter lasts.
_LOGGERS = ("DeepSpeed", "accelerate", "datasets")


def quiet_libraries() -> ExitStack:
    """Let other libraries print errors only; child processes inherit it.

    For a command, call it before they are imported. A program may have imported them before it calls rft: its
    settings return when the result is closed. Libraries that are first imported in between stay quiet.
    """
    undo = ExitStack()
    if "transformers" in sys.modules:
        settings = sys.modules["transformers"].utils.logging
        if "TRANSFORMERS_VERBOSITY" not in os.environ:
            undo.callback(settings.set_verbosity, settings.get_verbosity())
            settings.set_verbosity_error()
        if settings.is_progress_bar_enabled():
            undo.callback(settings.enable_progress_bar)
            settings.disable_progress_bar()
    if "datasets" in sys.modules:
        bars = sys.modules["datasets"].utils
        if not bars.are_progress_bars_disabled():
            undo.callback(bars.enable_progress_bars)
            bars.disable_progress_bars()
    for name, value in ENVIRONMENT.items():
        if name not in os.environ:
            undo.callback(os.environ.pop, name, None)
            os.environ[name] = value
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if _is_error not in logger.filters:
            undo.callback(logger.removeFilter, _is_error)
            logger.addFilter(_is_error)
    return undo


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
