"""rft's worker extension without the tied-head repair in one engine of a run, the first to start."""

from __future__ import annotations

import os

from rft.sync.vllm_worker import ChannelEngine, Extension

__all__ = ["Extension"]

try:
    os.close(os.open(os.environ["RFT_TEST_UNREPAIRED"], os.O_CREAT | os.O_EXCL))
    ChannelEngine.repack_tied_head = False
except FileExistsError:
    pass
