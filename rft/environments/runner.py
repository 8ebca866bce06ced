"""Run episodes of an environment in killable worker processes, from one asyncio loop, without threads."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import pickle
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Coroutine, Mapping
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from rft.config.environment import EnvironmentConfig
from rft.config.rewards import RewardConfig
from rft.environments.types import (
    ContextFull,
    Ending,
    Endpoint,
    EnvironmentFault,
    Episode,
    OperationFailed,
    Reply,
    Row,
    Session,
    TurnLimit,
    WorkerDied,
    WorkerHung,
)
from rft.environments.zygote import PACKET, Spec
from rft.rewards.pool import until_ended
from rft.rewards.worker import HEADER
from rft.utils.dotted import load_dotted
from rft.utils.process import Guardian, kill_tree
from rft.utils.python import SAFE_PYTHON, search_path
from rft.utils.stack import read_stack, stack_of

KINDS = {
    "tools": "rft.environments.tools",
    "class": "rft.environments.classes",
    "text": "rft.environments.text",
    "function": "rft.environments.function",
    "reasoning_gym": "rft.environments.text",
    "command": "rft.contrib.environments.command",
    "mcp": "rft.contrib.environments.mcp",
    "openenv": "rft.contrib.environments.openenv",
    "verifiers": "rft.contrib.environments.verifiers",
}
"""Module of each kind: `Host`, its operations in the worker, and `play`, one episode."""
BUILT_IN = {"reasoning_gym": "rft.contrib.environments.reasoning_gym:ReasoningGym"}
"""Classes of the kinds that are themselves environments of another kind."""
START = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from rft.environments.zygote import main; main(*map(int, sys.argv[2:]))"
)
MAX_MESSAGE = 16 << 20  # bytes of one message of a worker
ENDPOINT = "rft.endpoint.handle.Endpoint"  # of kinds whose agents call the policy by HTTP
END_S = 10.0  # to wait for a killed process, which may hang in the kernel

R = TypeVar("R")


class EnvironmentRunner:
    """Episodes of one environment; calls of `run` may overlap up to `concurrency`.

    If this process dies, its workers and their children are killed. After `start`, `tools` are the JSON
    schemas of the policy's tools, and `gives_reward` says whether the environment gives a reward itself.
    """

    def __init__(self, config: EnvironmentConfig, base_dir: Path | str = ".") -> None:
        self.config = config
        self.kind = import_module(KINDS[config.kind])
        gib = config.worker_memory_gib
        self.spec = Spec(
            host=f"{KINDS[config.kind]}.Host",
            path=BUILT_IN.get(config.kind, config.path),
            tools=tuple(config.tools),
            python=config.python,
            command=() if config.command is None else tuple(config.command),
            options=config.options,
            base_dir=Path(base_dir).resolve(),
            step_timeout_s=config.step_timeout_s,
            payloads=config.payloads,
            memory=None if gib is None else int(gib * 2**30),
        )
        self.tools: list[dict[str, Any]] = []
        self.gives_reward = True
        self.over_http = False  # its agents call the policy by HTTP
        self.columns: list[str] | None = None  # those that `reset` of kind class takes; None: any
        self.rewards: list[RewardConfig] = []  # of the config: those that read the environment (kind class)
        self.counts = {"started": 0, "killed": 0, "crashed": 0, "recycled": 0}
        self._tally = _Tally()
        self._places = asyncio.Semaphore(config.concurrency)
        self._idle: list[Worker] = []
        self._zygote: _Zygote | None = None
        self._starting: asyncio.Task[None] | None = None
        self._restart = asyncio.Lock()
        self._endpoint: Endpoint | None = None

    async def __aenter__(self) -> EnvironmentRunner:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def start(self) -> None:
        """Load the environment. Raises EnvironmentFault if that fails."""
        if self._starting is None:
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        zygote = _Zygote(self.spec, self.config)
        report, threads = await zygote.load()
        if threads > 1:  # a process with threads must not fork: each worker loads the environment itself
            await zygote.close()
            self.spec = replace(self.spec, preload=False)
            zygote = _Zygote(self.spec, self.config)
            await zygote.load()
        self.tools, self.gives_reward = report["tools"], report["gives_reward"]
        self.columns = report.get("columns")
        self.over_http = report.get("over_http", False)
        self._zygote = zygote

    async def close(self) -> None:
        """Stop all workers with their children."""
        if self._starting is not None:
            self._starting.cancel()
            await asyncio.gather(self._starting, return_exceptions=True)
        if self._endpoint is not None:
            await self._endpoint.close()
        if self._zygote is not None:
            await self._zygote.close()

    @property
    def pids(self) -> list[int]:
        """Return the process ids of the running workers."""
        return [] if self._zygote is None else [w.pid for w in self._zygote.workers.values() if w.pid]

    @property
    def endpoint(self) -> Endpoint:
        """Return the HTTP endpoint, for kinds whose agents call the policy by HTTP. It starts when used."""
        if self._endpoint is None:
            self._endpoint = load_dotted(ENDPOINT)()
        return self._endpoint

    async def run(self, row: Row, session: Session) -> Episode:
        """Play one episode; faults of the environment are endings of the Episode.

        row: the columns and `prompt`. Raises the session's errors unchanged (an engine that died).
        """
        await self.start()
        async with self._places:
            remote = Remote(self, session)
            try:
                async with asyncio.timeout(self.config.episode_timeout_s) as limit:
                    episode = await self._play(dict(row), session, remote)
            except TimeoutError:
                if not limit.expired():
                    raise
                seconds = self.config.episode_timeout_s
                detail = f"the episode took longer than environment.episode_timeout_s = {seconds:g} s"
                episode = Episode(None, Ending.timeout, detail=detail)
            finally:
                await asyncio.shield(remote.release())
            self._tally.add(remote)
            return episode

    async def _play(self, row: Row, session: Session, remote: Remote) -> Episode:
        play: Callable[[Row, Session, Remote], Coroutine[Any, Any, Episode]] = self.kind.play
        try:
            return await play(row, session, remote)
        except WorkerHung as error:
            return Episode(None, Ending.timeout, detail=str(error))
        except (OperationFailed, WorkerDied) as error:
            tool = remote.operation == "call"
            ending = Ending.tool_error if tool else Ending.environment_error
            return Episode(None, ending, detail=str(error))

    def take_metrics(self) -> dict[str, float]:
        """Return and reset the metrics since the last call."""
        metrics = self._tally.take()
        metrics |= {
            "environment/workers/started": float(self.counts["started"]),
            "environment/workers/killed": float(self.counts["killed"]),
            "environment/workers/crashed": float(self.counts["crashed"]),
            "environment/workers/recycled": float(self.counts["recycled"]),
        }
        counts = {} if self._endpoint is None else self._endpoint.counts
        metrics |= {f"environment/endpoint/{name}": float(value) for name, value in counts.items()}
        return metrics

    # -- workers -----------------------------------------------------------------------------------

    async def take_worker(self) -> Worker:
        """Return an idle worker, or a new one."""
        while self._idle:
            worker = self._idle.pop()
            if not worker.exited.done():
                return worker
        async with self._restart:
            if self._zygote is None or not self._zygote.alive:
                if self._zygote is not None:
                    await self._zygote.close()
                self._zygote = _Zygote(self.spec, self.config)
                await self._zygote.load()
        self.counts["started"] += 1
        return await self._zygote.fork()

    async def give_back(self, worker: Worker, *, clean: bool) -> None:
        """Keep a worker for a later episode, or end it."""
        worker.episodes += 1
        if clean and worker.episodes < self.config.recycle_after and not worker.exited.done():
            self._idle.append(worker)
            return
        if clean:
            self.counts["recycled"] += 1
        await worker.end()


class Remote:
    """The worker of one episode, which runs operations with a deadline each. A killed one is replaced."""

    def __init__(self, runner: EnvironmentRunner, session: Session) -> None:
        self.runner, self.config, self.tools = runner, runner.config, runner.tools
        self.session = session
        # Of an environment that owns its loop: its transcript, and the rewards that it gave the session.
        self.messages: list[dict[str, Any]] = []
        self.start = 0
        self.given: list[float] = []
        self.scores: dict[str, float] = {}
        self.tool_calls = self.tool_errors = 0
        self.seconds = 0.0  # in the environment, without the model's calls
        self.operation = ""  # the last one
        self._worker: Worker | None = None
        self._asks: set[asyncio.Task[Any]] = set()  # model calls in flight
        self._asked = asyncio.Event()

    async def call(self, operation: str, *arguments: Any, setup: bool = False) -> Any:
        """Return the result of an operation. Raises OperationFailed, WorkerHung, WorkerDied.

        setup: the deadline is `setup_timeout_s` until the first model call.
        """
        name = "setup_timeout_s" if setup else "step_timeout_s"
        try:
            if self._worker is None:
                self._worker = await self.runner.take_worker()
                await self._exchange("begin", (self.session.seed,), "setup_timeout_s")
            return await self._exchange(operation, arguments, name)
        except WorkerHung:
            self.runner.counts["killed"] += 1
            await self._drop()
            raise
        except WorkerDied:
            self.runner.counts["crashed"] += 1
            await self._drop()
            raise

    async def _drop(self) -> None:
        worker, self._worker = self._worker, None
        if worker is not None:
            await worker.end()

    async def release(self) -> None:
        """Close the episode in the worker, and give the worker back, or end it if that fails."""
        if self._worker is None:
            return
        clean = False
        if not self._worker.busy:
            with contextlib.suppress(OperationFailed, WorkerHung, WorkerDied):
                clean = await self._exchange("end", (), "step_timeout_s")
        worker, self._worker = self._worker, None
        if worker.busy:
            self.runner.counts["killed"] += 1
        await self.runner.give_back(worker, clean=clean)

    async def _exchange(self, operation: str, arguments: tuple[Any, ...], deadline: str) -> Any:
        """Send an operation, answer its requests to the session, and return its result."""
        worker = self._worker
        assert worker is not None
        worker.busy, self.operation = True, operation
        worker.send(("call", operation, arguments))
        asks, asked = self._asks, asyncio.ensure_future(self._asked.wait())
        read: asyncio.Task[Any] | None = None
        spent, since = 0.0, time.monotonic()
        try:
            while True:
                idle = not asks
                timeout = getattr(self.config, deadline) - spent if idle else None
                read = read or asyncio.ensure_future(worker.receive())
                wanted: set[asyncio.Future[Any]] = {read, asked, *asks}
                done, _ = await asyncio.wait(wanted, timeout=timeout, return_when="FIRST_COMPLETED")
                if idle:
                    self.seconds += time.monotonic() - since
                    spent += time.monotonic() - since
                since = time.monotonic()
                if not done:
                    raise WorkerHung(
                        f"{operation} took longer than environment.{deadline} = "
                        f"{getattr(self.config, deadline):g} s; its process was killed{await worker.where()}"
                    )
                for task in done & asks:
                    asks.discard(task)
                    if not task.cancelled():  # else its client is gone
                        task.result()  # an error of the session itself ends the episode
                    spent, deadline = 0.0, "step_timeout_s"
                if asked in done:
                    self._asked.clear()
                    asked = asyncio.ensure_future(self._asked.wait())
                if read not in done:
                    continue
                kind, *rest = read.result()
                read = None
                if kind == "ask" and rest[0] < 0:
                    self.reward(**rest[2])
                elif kind == "ask":
                    self.follow(self._answer(worker, *rest))
                else:
                    worker.busy = False
                    return _result(kind, *rest)
        finally:
            left = [*asks, asked, *([] if read is None else [read])]
            for task in left:
                task.cancel()
            await asyncio.gather(*left, return_exceptions=True)
            asks.clear()

    def follow(self, call: Coroutine[Any, Any, R]) -> asyncio.Task[R]:
        """Start a model call, during which no deadline of an operation runs. Its errors end the episode."""
        task = asyncio.create_task(call)
        self._asks.add(task)
        self._asked.set()
        return task

    async def chat(self, **arguments: Any) -> Reply:
        """Ask the session, and keep the transcript."""
        reply = await self.session.chat(**arguments)
        if arguments.get("trained", True):
            self.start = self.start or len(arguments["messages"])
            self.messages = [*arguments["messages"], reply.message()]
        return reply

    def reward(self, value: float, name: str = "reward", call: int | None = None) -> None:
        """Give the session a reward."""
        self.session.reward(value, name=name, call=call)
        if name == "reward":
            self.given.append(value)
        else:
            self.scores[name] = self.scores.get(name, 0.0) + value

    @property
    def gives_reward(self) -> bool:
        return self.runner.gives_reward

    @property
    def running(self) -> bool:
        """Whether the worker that played the episode so far still has its state."""
        return self._worker is not None

    async def _answer(self, worker: Worker, number: int, method: str, arguments: Mapping[str, Any]) -> None:
        """Ask the session, and send its answer. Errors that the environment did not cause are raised."""
        try:
            if method == "chat":
                answer: tuple[str, Any] = ("ok", await self.chat(**arguments))
            else:
                call = await self.session.generate(**arguments)
                index = next(i for i, other in enumerate(self.session.calls) if other is call)
                row = (index, [*call.prompt], [*call.sampled], [*call.logps], call.finish)
                answer = ("ok", row)
        except ContextFull as limit:
            answer = ("context_full", str(limit))
        except TurnLimit as limit:
            answer = ("turn_limit", str(limit))
        except (ValueError, TypeError) as error:  # the environment gave wrong arguments
            answer = ("error", str(error))
        worker.send(("reply", number, *answer))


def _result(kind: str, value: Any) -> Any:
    if kind == "result":
        return value
    if kind == "unusable":
        raise EnvironmentFault(value)
    if kind == "limit":
        raise (ContextFull if value == "context_full" else TurnLimit)(value)
    raise OperationFailed(value)


# -- processes -----------------------------------------------------------------------------------------


class Worker:
    """One worker process, as seen from the controller."""

    def __init__(self, zygote: _Zygote, number: int, where_fd: int) -> None:
        self.zygote, self.number = zygote, number
        self.pid = 0
        self.episodes = 0
        self.busy = False
        self.started: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.exited: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.where_fd = where_fd
        self.reader: asyncio.StreamReader
        self.writer: asyncio.StreamWriter

    def send(self, message: Any) -> None:
        data = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
        self.writer.write(HEADER.pack(len(data)) + data)

    async def receive(self) -> list[Any]:
        """Return the next message. Raises WorkerDied if the process ends, or writes anything else."""
        try:
            (size,) = HEADER.unpack(await self.reader.readexactly(HEADER.size))
            if size > MAX_MESSAGE:
                raise WorkerDied(f"it sent a message of {size} bytes; the limit is {MAX_MESSAGE}")
            message = json.loads(await self.reader.readexactly(size))
            if isinstance(message, list) and len(message) in (2, 4):
                return message
        except (asyncio.IncompleteReadError, ConnectionError):
            await asyncio.wait({self.exited}, timeout=2.0)  # the connection closes before the process ends
            how = self.exited.result() if self.exited.done() else "its connection closed"
            raise WorkerDied(f"the worker process of the environment died: {how}") from None
        except ValueError:
            pass
        raise WorkerDied("the environment wrote something other than messages to its worker's connection")

    async def where(self) -> str:
        """Return the stack of a hung worker, as `; it was at FILE, line N, in f`; "" if unknown."""
        return await stack_of(self.pid, self.where_fd)

    async def end(self) -> None:
        """Kill the process with its children, and wait for its end."""
        if not self.exited.done():
            await self.zygote.send({"kill": self.number})
            await asyncio.wait({self.exited}, timeout=END_S)
        self.writer.close()
        if self.where_fd >= 0:
            os.close(self.where_fd)
            self.where_fd = -1


class _Zygote:
    """The process that forks workers, as seen from the controller (see `zygote.py`)."""

    def __init__(self, spec: Spec, config: EnvironmentConfig) -> None:
        self.spec, self.config = spec, config
        self.workers: dict[int, Worker] = {}
        self.loaded: asyncio.Future[int | None] = asyncio.get_running_loop().create_future()
        self._numbers = 0
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.setblocking(False)
        spec_fd, self._report = os.memfd_create("rft-environment"), os.memfd_create("rft-environment-report")
        self._where_fd = os.memfd_create("rft-environment-where")
        os.write(spec_fd, pickle.dumps(spec))
        fds = (theirs.fileno(), spec_fd, self._report, self._where_fd)
        try:
            self.process = subprocess.Popen(
                [*SAFE_PYTHON, "-c", START, json.dumps(search_path()), *map(str, fds)],
                stdin=subprocess.DEVNULL,
                stdout=2,  # an environment's prints must not appear in the output of a command
                pass_fds=fds,
                start_new_session=True,
                env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            )
        finally:
            theirs.close()
            os.close(spec_fd)
        self._guardian = Guardian()
        self._guardian.watch(self.process.pid)
        asyncio.get_running_loop().add_reader(self._control, self._on_message)

    @property
    def alive(self) -> bool:
        return self._control.fileno() >= 0

    async def load(self) -> tuple[dict[str, Any], int]:
        """Wait for the environment; return its description, and the number of threads of the process."""
        path = self.spec.path or ", ".join(self.spec.tools) or " ".join(self.spec.command)
        limit = self.config.load_timeout_s
        try:
            threads = await asyncio.wait_for(asyncio.shield(self.loaded), limit)
        except TimeoutError:
            where = await stack_of(self.process.pid, self._where_fd)
            await self.close()
            raise EnvironmentFault(
                f"{path} did not load within environment.load_timeout_s = {limit:g} s{where}"
            ) from None
        report = json.loads(os.pread(self._report, os.fstat(self._report).st_size, 0) or b"{}")
        if threads is None:
            await self.close()
            status = self.process.wait()
            how = f"the process that loaded it ended ({status})"
            why = report.get("error", how)
            named = any(name in why for name in (self.spec.path, *self.spec.tools) if name)
            raise EnvironmentFault(why if named else f"{path} could not be loaded: {why}")
        return report, threads

    async def fork(self) -> Worker:
        """Start a worker. Raises WorkerDied if the zygote has ended."""
        self._numbers += 1
        ours, theirs = socket.socketpair()
        worker = Worker(self, self._numbers, os.memfd_create("rft-environment-where"))
        self.workers[worker.number] = worker
        worker.reader, worker.writer = await asyncio.open_connection(sock=ours, limit=1 << 24)
        try:
            await self.send({"start": worker.number}, theirs.fileno(), worker.where_fd)
            either: set[asyncio.Future[Any]] = {worker.started, worker.exited}
            await asyncio.wait(either, return_when="FIRST_COMPLETED")
        except BaseException:
            asyncio.get_running_loop().create_task(worker.end())
            raise
        finally:
            theirs.close()
        if worker.exited.done():
            raise WorkerDied(f"the environment's worker did not start: {worker.exited.result()}")
        worker.pid = worker.started.result()
        return worker

    async def send(self, command: Mapping[str, Any], *fds: int) -> None:
        """Send a command, unless the process has ended."""
        while self.alive:
            try:
                socket.send_fds(self._control, [json.dumps(command).encode()], fds)
            except BlockingIOError:  # it is busy, and many commands wait
                await asyncio.sleep(0.005)
            except (BrokenPipeError, ConnectionResetError):
                return
            else:
                return

    def _on_message(self) -> None:
        try:
            data = self._control.recv(PACKET)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            self._ended()
            return
        message = json.loads(data)
        if "loaded" in message or "failed" in message:
            self.loaded.set_result(message.get("loaded"))
        elif "started" in message:
            self.workers[message["started"]].started.set_result(message["pid"])
        else:
            worker = self.workers.pop(message["exited"])
            worker.exited.set_result(self._describe(worker, message["status"], message["memory"]))

    def _describe(self, worker: Worker, status: int, memory: bool) -> str:
        """Describe how a worker ended."""
        if memory:
            allowed = f"environment.worker_memory_gib = {self.config.worker_memory_gib:g}"
            return f"it and its child processes used more memory than {allowed} allows"
        if status >= 0:
            return f"it exited with status {status}"
        return f"it was killed by {signal.Signals(-status).name}{read_stack(worker.where_fd)}"

    def _ended(self) -> None:
        """The zygote has ended, and its workers with it."""
        asyncio.get_running_loop().remove_reader(self._control)
        self._control.close()
        if not self.loaded.done():
            self.loaded.set_result(None)
        for worker in self.workers.values():
            if worker.pid:
                kill_tree(worker.pid)  # it may have cleared its parent-death signal
            worker.exited.set_result("the process that forked it ended")
        self.workers.clear()

    async def close(self) -> None:
        """End the process and its workers, with their children: there is nothing to finish."""
        if self.process.poll() is None:
            await until_ended(kill_tree(self.process.pid))
            self.process.wait()
        if self.alive:
            self._ended()
        for fd in (self._report, self._where_fd):
            with contextlib.suppress(OSError):
                os.close(fd)
        self._guardian.close()


class _Tally:
    """Counts of episodes since the last `take`."""

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self.episodes = self.calls = self.errors = 0
        self.seconds = 0.0

    def add(self, remote: Remote) -> None:
        self.episodes += 1
        self.calls += remote.tool_calls
        self.errors += remote.tool_errors
        self.seconds += remote.seconds

    def take(self) -> dict[str, float]:
        n = self.episodes
        metrics = {"environment/episodes": float(n)}
        if n:
            metrics["environment/tool_calls"] = self.calls / n
            metrics["environment/tool_errors"] = self.errors / max(1, self.calls)
            metrics["environment/seconds"] = self.seconds / n
        self._clear()
        return metrics
