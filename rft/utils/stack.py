"""Read the stack that a worker process writes on a signal, to say where it hung or crashed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
from pathlib import Path

WHERE = signal.SIGRTMAX
"""On this signal a worker writes its stack to a file in memory, even if it never releases the interpreter."""
_FRAME = re.compile(r'^  File "(.+)", line (\d+) in (.+)$', re.MULTILINE)
_RFT = str(Path(__file__).parents[1]) + "/"


def read_stack(fd: int) -> str:
    """Return the frames outside rft, innermost first, as `; it was at FILE, line N, in f`; "" if unknown."""
    text = os.pread(fd, 1 << 16, 0).decode("utf-8", "replace")
    frames = [f for f in _FRAME.findall(text) if not f[0].startswith((_RFT, "<frozen", "<string>"))]
    if not frames:
        return ""
    places = (f"{file}, line {line}, in {name}" for file, line, name in frames[:6])
    return "; it was at " + ", called from ".join(places)


async def stack_of(pid: int, fd: int) -> str:
    """Return the stack of a hung worker process, which writes it to `fd`, as `read_stack` does."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, WHERE)
    for _ in range(20):
        begun = read_stack(fd) != ""
        await asyncio.sleep(0.02)  # the stack is written line by line
        if begun:
            break
    return read_stack(fd)
