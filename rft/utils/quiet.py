"""Keep the log output of other libraries out of rft's: the one place where they are silenced."""

from __future__ import annotations

import logging
import os
import sys

# Read when a library is imported. Set before that, and only where the user has not set them.
ENVIRONMENT = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # transformers' bars too: "Loading weights", "Writing model shards"
    "TRANSFORMERS_VERBOSITY": "error",
}
# Libraries that set their loggers' level themselves, so that only a filter lasts.
_LOGGERS = ("DeepSpeed", "accelerate", "datasets")


def quiet_libraries() -> None:
    """Let other libraries print errors only. Call it before they are imported; child processes inherit it."""
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    for name in _LOGGERS:
        logger = logging.getLogger(name)
        if _is_error not in logger.filters:
            logger.addFilter(_is_error)
    transformers = sys.modules.get("transformers")
    if transformers is not None:  # imported before, by the program that calls rft
        transformers.utils.logging.disable_progress_bar()


def _is_error(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.ERROR
