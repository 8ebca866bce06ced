"""A process between a worker and its owner that limits the worker's memory and kills its leftover processes.

Orphans of the worker, including daemons, become children of the keeper, which runs none of the worker's code.
Standard library only: it starts before anything is imported.
"""

from __future__ import annotations

import contextlib
import os
import resource
import select
import signal
from mmap import mmap
from struct import Struct

from rft.utils.process import PR_SET_CHILD_SUBREAPER, PR_SET_PDEATHSIG, kill_tree, memory_below, prctl

WORKER = Struct("=q")
"""The worker's process id, which the keeper writes into shared memory."""
TOO_MUCH_MEMORY = 97
"""The keeper's exit status after it killed a worker for its memory; otherwise it exits as the worker did."""
CHECK_INTERVAL_S = 1.0


def fork_worker(board: mmap, offset: int, memory: int | None) -> None:
    """Fork a worker: return in the new process; the calling process becomes its keeper and never returns.

    board, offset: where to write the worker's process id. memory: bytes that the worker and its children may
    hold; None: no limit.
    """
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    pid = os.fork()
    if pid == 0:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        return
    WORKER.pack_into(board, offset, pid)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # its owner ends it
    os.closerange(3, 4096)
    poll = select.poll()
    poll.register(os.pidfd_open(pid), select.POLLIN)
    while not poll.poll(None if memory is None else CHECK_INTERVAL_S * 1000):
        if memory is not None and memory_below(os.getpid()) > memory:
            kill_tree(os.getpid())
            os._exit(TOO_MUCH_MEMORY)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    kill_tree(os.getpid())
    if code < 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the worker's core dump is enough
        with contextlib.suppress(OSError):
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code if code >= 0 else 1)
