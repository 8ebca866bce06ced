"""The process that loads an environment once and forks a worker for each session.

It never shares a thread with the environment: if loading starts threads, its parent starts it again without
loading, and each worker loads for itself. Orphans of a worker stay below it, and are killed with it. Commands
are JSON packets: `{"start": n}` with two descriptors, `{"kill": n}`; answers are `{"loaded": threads}`,
`{"failed": true}`, `{"started": n, "pid": p}`, `{"exited": n, "status": s, "memory": bool}`.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import json
import os
import pickle
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rft.environments.worker import serve
from rft.rewards.load import SpecError, describe_error, resolve, unpickled
from rft.rewards.worker import open_streams
from rft.utils.dotted import load_dotted
from rft.utils.process import (
    PR_SET_CHILD_SUBREAPER,
    PR_SET_PDEATHSIG,
    children,
    kill_tree,
    memory_of_trees,
    prctl,
)
from rft.utils.signals import restore_defaults
from rft.utils.stack import WHERE

CHECK_INTERVAL_S = 1.0
PACKET = 1 << 16


@dataclass(frozen=True)
class Spec:
    """An environment to be loaded by workers.

    host: dotted path of its kind's class, which takes this spec and runs operations. memory: bytes that a
    worker with its children may hold; None: no limit. preload: load in the zygote, before workers are forked.
    payloads: pickles of objects that were passed from Python, by name.
    """

    host: str
    path: str | None = None
    tools: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    python: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    base_dir: Path = Path(".")
    step_timeout_s: float = 30.0
    memory: int | None = None
    preload: bool = True
    payloads: Mapping[str, bytes] = field(default_factory=dict)

    def load(self) -> Any:
        return load_dotted(self.host)(self)

    def resolve(self, name: str) -> Any:
        """Return the class or function that the config names. Raises SpecError."""
        if name not in self.payloads:
            return resolve(name, self.base_dir)
        return unpickled(name, self.payloads[name], self.base_dir)


class Zygote:
    """Fork workers on request, report their ends, and end the processes that they leave behind."""

    def __init__(self, spec: Spec, host: Any, control: socket.socket) -> None:
        self.spec, self.host, self.control = spec, host, control
        self.workers: dict[int, int] = {}  # pid -> number
        self.over_memory: set[int] = set()
        self._wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(self._wakeup[1], warn_on_full_buffer=False)

    def run(self) -> None:
        poll = select.poll()
        poll.register(self.control, select.POLLIN)
        poll.register(self._wakeup[0], select.POLLIN)
        looked = 0.0
        while True:
            watching = self.spec.memory is not None and bool(self.workers)
            ready = poll.poll(CHECK_INTERVAL_S * 1000 if watching else None)
            for fd, _ in ready:
                if fd == self._wakeup[0]:
                    with contextlib.suppress(BlockingIOError):
                        os.read(fd, 4096)
                elif not self._command():
                    return
            self._reap()
            if watching and time.monotonic() - looked > CHECK_INTERVAL_S:
                self._watch_memory()
                looked = time.monotonic()

    def _command(self) -> bool:
        """Execute one command; False once the parent is gone."""
        data, fds, _, _ = socket.recv_fds(self.control, PACKET, 2)
        if not data:
            for _ in range(2):  # a worker that ended meanwhile has left its children to this process
                for pid in children(os.getpid()):
                    kill_tree(pid)
            return False
        command = json.loads(data)
        if "start" in command:
            self._start(command["start"], *fds)
        for pid, number in list(self.workers.items()):
            if number == command.get("kill"):
                kill_tree(pid)
        return True

    def _start(self, number: int, connection: int, where: int) -> None:
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                self._become_worker(connection, where)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(connection)
        os.close(where)
        self.workers[pid] = number
        self._send(started=number, pid=pid)

    def _become_worker(self, connection: int, where: int) -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        prctl(PR_SET_CHILD_SUBREAPER, 1)
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        self.control.close()
        for fd in self._wakeup:
            os.close(fd)
        restore_defaults()  # the environment and its children may send and handle the signals that stop a run
        host = self.spec.load() if self.host is None else self.host
        serve(host, socket.socket(fileno=connection), where)

    def _reap(self) -> None:
        """Report the workers that have ended, and kill the processes that they left behind."""
        ended = []
        with contextlib.suppress(ChildProcessError):
            while (result := os.waitpid(-1, os.WNOHANG))[0] != 0:
                pid, status = result
                if pid in self.workers:
                    ended.append((self.workers.pop(pid), pid, os.waitstatus_to_exitcode(status)))
        if not ended:
            return
        for orphan in children(os.getpid()) - set(self.workers):  # a living worker keeps its orphans
            kill_tree(orphan)
        for number, pid, status in ended:
            self._send(exited=number, status=status, memory=pid in self.over_memory)
            self.over_memory.discard(pid)

    def _watch_memory(self) -> None:
        """Kill the workers above the memory limit; pages shared with this process do not count."""
        assert self.spec.memory is not None
        for pid, used in memory_of_trees(self.workers, shared_with=os.getpid()).items():
            if used > self.spec.memory:
                self.over_memory.add(pid)
                kill_tree(pid)

    def _send(self, **message: Any) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self.control.send(json.dumps(message).encode())


def main(control_fd: int, spec_fd: int, report_fd: int, where: int) -> None:
    """Load the environment, report, and fork workers until the parent closes the control socket."""
    # Not killed with its parent: it would leave the processes that its workers started. It sees the control
    # socket closed, and the guardian ends it with all its descendants.
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # its owner ends it
    open_streams()
    faulthandler.enable(where, all_threads=False)
    faulthandler.register(WHERE, where, all_threads=False)
    control = socket.socket(fileno=control_fd)
    size = os.fstat(spec_fd).st_size
    spec: Spec = pickle.loads(os.pread(spec_fd, size, 0))
    host, report, failed = None, {}, False
    try:
        if spec.preload:
            host = spec.load()
            report = host.describe()
    except BaseException as error:  # including SystemExit
        failed = True
        report = {"error": str(error) if isinstance(error, SpecError) else describe_error(error)}
    os.pwrite(report_fd, json.dumps(report).encode(), 0)
    threads = len(os.listdir("/proc/self/task"))
    for fd in (spec_fd, report_fd):
        os.close(fd)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    control.send(json.dumps({"failed": True} if failed else {"loaded": threads}).encode())
    if failed:
        return
    gc.collect()
    gc.freeze()  # workers share its pages for longer
    Zygote(spec, host if spec.preload else None, control).run()
