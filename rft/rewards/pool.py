"""Manage reward workers: a pool of killable processes in one asyncio loop, without threads.

The pool keeps its size: a worker that hangs is killed with its children, a crashed worker is replaced, and a
worker is recycled after `recycle_after` samples. Jobs of several callers interleave. The worker's code is
`worker.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import mmap
import os
import pickle
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rft.config.rewards import RewardConfig
from rft.rewards.types import Outcome, RewardError, Score, Text, TrainerState
from rft.rewards.worker import HEADER, PROGRESS, decode
from rft.utils.keeper import TOO_MUCH_MEMORY, WORKER
from rft.utils.process import Guardian, is_running, kill_tree
from rft.utils.python import SAFE_PYTHON, search_path
from rft.utils.stack import read_stack, stack_of

MAX_HUNG_CALLS = 16
"""Hung calls of one request that are split to isolate the sample; further ones become timeouts."""
MAX_DEATHS_LOADING = 3
"""Successive workers that may die while loading: one death may have an external cause, repeated ones not."""

Logged = dict[str, list[float]]
"""Values passed to `log_metric`, by name."""


@dataclass(frozen=True)
class Spec:
    """A reward function to be loaded by the workers. payload: pickle of a function passed as an object."""

    function: str
    options: Mapping[str, Any] = field(default_factory=dict)
    base_dir: Path = Path(".")
    timeout_s: float = 30.0
    batch_size: int | None = None
    payload: bytes | None = None


def spec_of(c: RewardConfig, base_dir: Path) -> Spec:
    """Return the spec that the workers load for a reward of the config."""
    return Spec(c.function, c.options, base_dir, c.call_timeout_s, c.batch_size, c.payload)


@dataclass(frozen=True)
class Loaded:
    """A worker's description of a function.

    columns: those that it reads (None: all); required: those that it must have; any_of: those of which it
    needs one; per_sample: it judges one sample per call; reads_environments: it takes TRL's `environments`.
    """

    columns: tuple[str, ...] | None
    required: tuple[str, ...]
    any_of: tuple[str, ...]
    per_sample: bool
    reads_environments: bool = False


@dataclass
class _Request:
    """One call of `WorkerPool.score`, completed job by job."""

    spec: int
    prompts: Sequence[Text]
    completions: Sequence[Text]
    columns: Mapping[str, Sequence[Any]]
    state: TrainerState | None
    logged: Logged
    scores: list[Score | None]
    done: asyncio.Future[None]
    left: int
    hung: int = 0  # number of its calls that were killed


@dataclass(frozen=True)
class _Job:
    """Samples `start` to `stop` of a request, judged `batch` per call."""

    request: _Request
    start: int
    stop: int
    batch: int


# -- the pool ------------------------------------------------------------------------------------------


class WorkerPool:
    """Worker processes that all load the same reward functions."""

    def __init__(
        self,
        specs: Sequence[Spec],
        workers: int,
        recycle_after: int = 20_000,
        start_timeout_s: float = 120.0,
        memory: int | None = None,
    ) -> None:
        self.specs = list(specs)
        self.memory = memory  # memory limit of a worker in bytes
        self.size = workers
        self.recycle_after = recycle_after
        self.start_timeout_s = start_timeout_s
        self.counts = {"started": 0, "killed": 0, "crashed": 0, "recycled": 0}
        self.loaded: list[Loaded] = []
        self._workers: set[Worker] = set()
        self._jobs: asyncio.Queue[_Job]
        self._slots: list[asyncio.Task[None]] = []
        self._guardian: Guardian | None = None
        self._closed = False

    async def start(self) -> None:
        """Start all workers and wait until they have loaded. Raises RewardError if one cannot load."""
        self._jobs = asyncio.Queue()
        self._guardian = Guardian()
        results = await asyncio.gather(*(self._spawn() for _ in range(self.size)), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException):
                await self.close()
                raise result
        workers = [w for w in results if isinstance(w, Worker)]
        self._slots = [asyncio.create_task(self._slot(w), name="rft-reward-slot") for w in workers]

    @property
    def pids(self) -> list[int]:
        """Return the process ids of the running workers."""
        return [w.pid for w in self._workers if not w.exited.done()]

    async def score(
        self,
        spec: int,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        columns: Mapping[str, Sequence[Any]],
        state: TrainerState | None = None,
        logged: Logged | None = None,
    ) -> list[Score]:
        """Return one Score per completion, in order.

        A call that hangs is a `timeout`, a crash an `error`, both with the value None. Values passed to
        `log_metric` are added to `logged`.
        """
        if self._closed:
            raise RuntimeError("the reward pool is closed")
        n = len(completions)
        if n == 0:
            return []
        wanted = self.loaded[spec].columns
        given = columns if wanted is None else {k: v for k, v in columns.items() if k in wanted}
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        logged = {} if logged is None else logged
        request = _Request(spec, prompts, completions, given, state, logged, [None] * n, done, n)
        batch = self.specs[spec].batch_size or -(-n // self.size)
        share = max(batch, -(-n // self.size)) // batch * batch
        for start in range(0, n, share):
            self._jobs.put_nowait(_Job(request, start, min(start + share, n), batch))
        try:
            await self._finished(request)
        finally:
            done.cancel()  # the remaining jobs of an abandoned request are skipped
        return [score for score in request.scores if score is not None]

    async def _finished(self, request: _Request) -> None:
        """Wait for the request, or for a slot that failed (a worker that cannot be replaced)."""
        await asyncio.wait({request.done, *self._slots}, return_when="FIRST_COMPLETED")
        if request.done.done():
            return
        for slot in self._slots:
            if slot.done() and not slot.cancelled():
                slot.result()
        raise RuntimeError("the reward pool was closed during a call")

    async def close(self) -> None:
        """Stop all workers with their children, and the guardian."""
        self._closed = True
        for slot in self._slots:
            slot.cancel()
        await asyncio.gather(*self._slots, return_exceptions=True)
        await asyncio.gather(*(self._end(w, grace_s=1.0) for w in list(self._workers)))
        if self._guardian is not None:
            self._guardian.close()

    # -- workers -----------------------------------------------------------------------------------

    async def _spawn(self) -> Worker:
        """Start a worker and wait until it has loaded. Raises RewardError after repeated failures."""
        for _ in range(MAX_DEATHS_LOADING):
            try:
                return await self._launch()
            except Died as death:
                self.counts["crashed"] += 1
                reason = death.reason
        raise RewardError(
            f"{MAX_DEATHS_LOADING} reward workers in a row died while they loaded their rewards: {reason}"
        )

    async def _launch(self) -> Worker:
        """Try once to start a worker. Raises Died if the process ends before it has loaded."""
        assert self._guardian is not None
        worker, sock = Worker.launch(self.memory)
        self._guardian.watch(worker.process.pid)
        self._workers.add(worker)
        self.counts["started"] += 1
        loading = self.specs[0].function
        try:
            await worker.attach(sock)
            worker.send([(s.function, dict(s.options), str(s.base_dir), s.payload) for s in self.specs])
            async with asyncio.timeout(self.start_timeout_s):
                kind, *rest = await worker.receive(self.start_timeout_s, per_call=False)
                while kind == "loading":
                    loading = self.specs[rest[0]].function
                    kind, *rest = await worker.receive(self.start_timeout_s, per_call=False)
        except (Hung, TimeoutError):
            where = await worker.where()
            await self._end(worker)
            raise RewardError(
                f"a reward worker did not load {loading} within start_timeout_s = "
                f"{self.start_timeout_s:g} s{where}"
            ) from None
        except Died as death:
            await self._end(worker)
            raise Died(f"{death.reason} (while it loaded {loading})") from None
        except BaseException:
            await self._end(worker)
            raise
        if kind == "failed":
            await self._end(worker)
            raise RewardError(f"a reward worker could not load {loading}:\n{rest[0]}")
        self.loaded = [Loaded(*row) for row in rest[0]]
        return worker

    async def _end(self, worker: Worker, *, grace_s: float = 0.0) -> None:
        pid = worker.process.pid
        await worker.close(grace_s=grace_s)
        self._workers.discard(worker)
        if self._guardian is not None:
            self._guardian.forget(pid)

    async def _slot(self, worker: Worker) -> None:
        """Process jobs with one worker, replacing it when needed, until cancelled."""
        while True:
            job = await self._jobs.get()
            if job.request.done.done():
                continue
            try:
                await self._run(worker, job)
                worker.judged += job.stop - job.start
                if worker.judged < self.recycle_after:
                    continue
                self.counts["recycled"] += 1
                grace = 1.0
            except Hung as hang:
                self.counts["killed"] += 1
                self._after_hang(job, hang.index + job.start, await worker.where())
                grace = 0.0
            except Died as death:
                self.counts["crashed"] += 1
                index = max(PROGRESS.unpack_from(worker.board)[0], 0) + job.start
                self._after_crash(job, index, death.reason)
                grace = 0.0
            await self._end(worker, grace_s=grace)
            worker = await self._spawn()

    async def _run(self, worker: Worker, job: _Job) -> None:
        r, part = job.request, slice(job.start, job.stop)
        columns = {name: values[part] for name, values in r.columns.items()}
        PROGRESS.pack_into(worker.board, 0, -1, time.monotonic())
        worker.send((r.spec, r.prompts[part], r.completions[part], columns, job.batch, r.state))
        while True:
            kind, *rest = await worker.receive(self.specs[r.spec].timeout_s, per_call=True)
            if kind == "logged":
                for name, values in rest[0].items():
                    r.logged.setdefault(name, []).extend(values)
                continue
            if kind == "done":
                for i in range(job.start, job.stop):  # a missing score would block the caller forever
                    self._fill(r, i, [Score(None, Outcome.error, "its worker gave no score for this sample")])
                return
            first, rows = rest
            self._fill(r, job.start + first, decode(rows))

    def _fill(self, request: _Request, first: int, scores: Sequence[Score]) -> None:
        for i, score in enumerate(scores, first):
            if request.scores[i] is None:
                request.scores[i] = score
                request.left -= 1
        if request.left == 0 and not request.done.done():
            request.done.set_result(None)

    # -- after a failure ---------------------------------------------------------------------------

    def _call_of(self, job: _Job, index: int) -> tuple[int, int]:
        """Return the samples (start, stop) of the call that began at `index`."""
        per_sample = self.loaded[job.request.spec].per_sample
        return index, index + 1 if per_sample else min(index + job.batch, job.stop)

    def _after_hang(self, job: _Job, index: int, where: str) -> None:
        start, stop = self._call_of(job, index)
        timeout = self.specs[job.request.spec].timeout_s
        job.request.hung += 1
        if stop - start == 1 or job.request.hung > MAX_HUNG_CALLS:
            detail = f"no result within timeout_s = {timeout:g} s; its process was killed{where}"
            self._fill(job.request, start, [Score(None, Outcome.timeout, detail, timeout)] * (stop - start))
        else:
            self._split(job, start, stop)
        self._requeue(job, start, stop)

    def _after_crash(self, job: _Job, index: int, reason: str) -> None:
        start, stop = self._call_of(job, index)
        if stop - start == 1:
            detail = f"the worker process died in this call: {reason}"
            self._fill(job.request, start, [Score(None, Outcome.error, detail)])
        else:
            self._split(job, start, stop)
        self._requeue(job, start, stop)

    def _split(self, job: _Job, start: int, stop: int) -> None:
        """Split a failed call into smaller ones, to isolate the sample at fault and keep the others."""
        step = -(-(stop - start) // 8)
        for a in range(start, stop, step):
            b = min(a + step, stop)
            self._jobs.put_nowait(_Job(job.request, a, b, b - a))

    def _requeue(self, job: _Job, start: int, stop: int) -> None:
        """Requeue the unscored rest of a failed job: unsent samples before the call, and those after it."""
        for a, b in ((job.start, start), (stop, job.stop)):
            todo = [i for i in range(a, b) if job.request.scores[i] is None]
            if todo:
                again = _Job(job.request, todo[0], todo[-1] + 1, job.batch)
                self._jobs.put_nowait(again)


# -- one worker ----------------------------------------------------------------------------------------

START = (
    "import mmap, json, sys; sys.path[:] = json.loads(sys.argv[1]); fds = [int(a) for a in sys.argv[4:]]; "
    "from rft.utils.keeper import fork_worker; "
    "fork_worker(mmap.mmap(fds[1], 0), int(sys.argv[2]), int(sys.argv[3]) or None); "
    "from rft.rewards.worker import main; main(*fds)"
)
END_S = 10.0
"""Seconds to wait for a killed process, which may hang in the kernel (on a disk, a device)."""


class Died(Exception):
    """The worker process ended; `reason` says how."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class Hung(Exception):
    """A call exceeded its deadline; `index` is its first sample within the job."""

    def __init__(self, index: int) -> None:
        super().__init__(f"call of sample {index} exceeded its time")
        self.index = index


class Worker:
    """One worker process. All methods run in the event loop that started it."""

    def __init__(
        self, process: subprocess.Popen[bytes], board: mmap.mmap, where_fd: int, memory: int | None
    ) -> None:
        self.process = process  # the worker's keeper, the parent process, which ends as the worker does
        self.memory = memory
        self.board = board
        self._where_fd = where_fd
        self.judged = 0
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter | None = None
        loop = asyncio.get_running_loop()
        self.exited: asyncio.Future[None] = loop.create_future()
        self._pidfd = os.pidfd_open(process.pid)
        loop.add_reader(self._pidfd, self._on_exit)

    @classmethod
    def launch(cls, memory: int | None = None) -> tuple[Worker, socket.socket]:
        """Start the process; return it with the parent's end of the socket. memory: its limit in bytes."""
        ours, theirs = socket.socketpair()
        board_fd, where_fd = os.memfd_create("rft-reward-progress"), os.memfd_create("rft-reward-where")
        os.ftruncate(board_fd, PROGRESS.size + WORKER.size)
        board = mmap.mmap(board_fd, PROGRESS.size + WORKER.size)
        fds = (theirs.fileno(), board_fd, where_fd)
        try:
            process = subprocess.Popen(
                [
                    *SAFE_PYTHON,
                    "-c",
                    START,
                    json.dumps(search_path()),
                    *map(str, (PROGRESS.size, memory or 0, *fds)),
                ],
                stdin=subprocess.DEVNULL,
                stdout=2,  # a reward's prints must not appear in the output of a command
                pass_fds=fds,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            )
        finally:
            theirs.close()
            os.close(board_fd)
        return cls(process, board, where_fd, memory), ours

    @property
    def pid(self) -> int:
        """Process id of the process that runs the rewards; of its keeper until it has started."""
        return int(WORKER.unpack_from(self.board, PROGRESS.size)[0]) or self.process.pid

    async def attach(self, sock: socket.socket) -> None:
        """Take over the socket."""
        self.reader, self.writer = await asyncio.open_connection(sock=sock, limit=1 << 24)

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        if not self.exited.done():
            self.exited.set_result(None)

    def send(self, message: Any) -> None:
        """Queue one message for sending."""
        assert self.writer is not None
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self.writer.write(HEADER.pack(len(data)) + data)

    async def _read(self) -> Any:
        (size,) = HEADER.unpack(await self.reader.readexactly(HEADER.size))
        data = await self.reader.readexactly(size)
        try:
            return pickle.loads(data)
        except Exception as error:  # a reward wrote to a descriptor that it does not own
            raise Died("it wrote something other than messages to its connection") from error

    async def receive(self, timeout_s: float, *, per_call: bool) -> Any:
        """Return the next message. Raises Died; raises Hung once a call (or the wait) exceeds `timeout_s`."""
        read = asyncio.ensure_future(self._read())
        start = time.monotonic()
        try:
            while True:
                index, since = PROGRESS.unpack_from(self.board) if per_call else (0, start)
                since = max(since, start) if index < 0 else since
                left = since + timeout_s - time.monotonic()
                if left <= 0:
                    await asyncio.sleep(0.002)  # index and time are not written atomically: read again
                    if not read.done() and (not per_call or PROGRESS.unpack_from(self.board)[0] == index):
                        raise Hung(max(index, 0))
                    continue
                await asyncio.wait({read, self.exited}, timeout=left + 0.005, return_when="FIRST_COMPLETED")
                if read.done():
                    return read.result()
                if self.exited.done():  # messages sent before it died still count
                    return await asyncio.wait_for(read, 1.0)
        except (asyncio.IncompleteReadError, ConnectionError, TimeoutError):
            await asyncio.wait({self.exited}, timeout=1.0)  # the connection may close before the process ends
            raise Died(self.reason()) from None
        finally:
            read.cancel()
            with contextlib.suppress(asyncio.CancelledError, asyncio.IncompleteReadError, ConnectionError):
                await read

    async def where(self) -> str:
        """Return the stack, innermost frame first, as `; it was at FILE, line N, in f`; "" if unknown."""
        return await stack_of(self.pid, self._where_fd)

    def reason(self) -> str:
        """Describe how the process ended."""
        end = os.waitid(os.P_PID, self.process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if end is None:  # not reaped here: the process id must not be reused until its children are gone
            return "its connection closed"
        if end.si_code == os.CLD_EXITED and end.si_status == TOO_MUCH_MEMORY and self.memory is not None:
            allowed = f"rewards.worker_memory_gib = {self.memory / 2**30:g}"
            return f"it and its child processes used more memory than {allowed} allows"
        if end.si_code == os.CLD_EXITED:
            return f"it exited with status {end.si_status}"
        return f"it was killed by {signal.Signals(end.si_status).name}{read_stack(self._where_fd)}"

    async def close(self, *, grace_s: float = 0.0) -> None:
        """End the process and its children; with a grace period, ask it to exit first."""
        if grace_s and self.writer is not None and not self.exited.done():
            with contextlib.suppress(ConnectionError):
                self.send(None)
                await asyncio.wait({self.exited}, timeout=grace_s)
        if self.process.returncode is None:  # not reaped yet, so its process id cannot have been reused
            killed = kill_tree(self.process.pid)
            await asyncio.shield(self.exited)
            await until_ended(killed)
        self.process.wait()
        if self.writer is not None:
            self.writer.close()
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
            os.close(self._where_fd)
        self.board.close()


async def until_ended(killed: set[int]) -> None:
    """Wait until killed processes have ended, for at most END_S seconds."""
    deadline = time.monotonic() + END_S
    while any(map(is_running, killed)) and time.monotonic() < deadline:
        await asyncio.sleep(0.005)
