"""The learner's ranks as Ray actors behind one typed handle.

    learner = LearnerGroup(spec, channel)
    metrics = await learner.step(batch, 3)

Every call goes to every rank, in the same order, so that their collectives match; the answer is rank 0's.
"""

from __future__ import annotations

import asyncio
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Concatenate, Generic, ParamSpec, Protocol, TypeVar

import psutil
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
from torch import Tensor

from rft import checkpoint
from rft.batch import Batch
from rft.errors import BrokenWeights, CheckpointError, LearnerError, TransferError, lost_a_peer
from rft.learner.objective import Sums
from rft.learner.offload import move, resident
from rft.learner.parallel import Rendezvous, RendezvousStore, make_parallel
from rft.learner.spec import LearnerInfo, LearnerSpec
from rft.sync.publisher import Publisher
from rft.sync.spec import ChannelSpec, Link, Manifest, Sent, Update, WeightSource, manifest_of
from rft.utils.actors import ActorDied, require_here
from rft.utils.allocator import allocator_environment
from rft.utils.deadlines import Deadline, within
from rft.utils.dotted import load_dotted
from rft.utils.quick_imports import quick_imports

if TYPE_CHECKING:
    from rft.learner.learner import Learner

PRIVATE = "rft.contrib.privacy.PrivateLearner"
P = ParamSpec("P")
R = TypeVar("R")
GRACE_S = 5.0  # for the other ranks to end a call that failed on one


class LearnerHandle(WeightSource, Protocol):
    """The learner, as used by the loops. A call is submitted at once, in call order, and has a deadline;
    awaiting it raises the learner's error, Overdue or ActorDied."""

    def describe(self) -> Awaitable[LearnerInfo]:
        """Wait for the learner to load; return facts for the log."""

    def require_folder(self, path: str) -> Awaitable[None]:
        """Raise NotHere unless the learner's nodes have the folder that checkpoints are written to."""

    def step(self, batch: Batch, step: int) -> Awaitable[dict[str, float]]:
        """Train on a batch; return the step's metrics. See `Learner.step`."""

    def preview(self, batch: Batch) -> Awaitable[None]:
        """Show a batch of later steps to an adapter that is initialised from data."""

    def evaluate(self, batch: Batch, step: int) -> Awaitable[Sums]:
        """Return sums and counts of the held-out measures over a batch."""

    def score_reference(self, batch: Batch) -> Awaitable[Tensor]:
        """Return the reference's log-probs [T] float32."""

    def score_policy(self, batch: Batch) -> Awaitable[Tensor]:
        """Return the policy's log-probs [T] float32, without dropout."""

    def release_reference(self) -> Awaitable[None]:
        """Free the reference's memory: from now on, batches contain `ref_logps`."""

    def pop_messages(self) -> Awaitable[list[str]]:
        """Return the messages for the user since the last call."""

    def begin_save(
        self, root: str, step: int, keep: int, meta: dict[str, Any], config: dict[str, Any] | None = None
    ) -> Awaitable[None]:
        """Copy the state and write it in the background. One at a time; `finish_save` returns the result.
        Raises CheckpointError unless the learner has finished exactly `step` steps."""

    def finish_save(self, wait: bool = True) -> Awaitable[str | None]:
        """Return the folder of the last started checkpoint; None if there is none or, without `wait`, while
        it is being written. Raises CheckpointError if writing it failed."""

    def restore(self, folder: str) -> Awaitable[int]:
        """Load a checkpoint's learner state; return the policy version."""

    def export(self, folder: str) -> Awaitable[str]:
        """Write the policy and its tokenizer as a Hugging Face folder; return it."""

    def kill(self) -> None:
        """Kill all ranks at once and free their resources."""


class LearnerActor:
    """One rank of the learner: the learner, its weight channel and its checkpoints. Every method is called
    on all ranks at once; only rank 0 deals with engines and files.

    The actor is created at once; `load` then builds the learner, which waits for the other ranks.
    """

    def __init__(self, spec: LearnerSpec, channel: ChannelSpec, rank: int = 0) -> None:
        self.spec = spec
        self.rank = rank
        self.publisher = Publisher(channel)
        self._saving: Future[Path] | None = None  # the checkpoint being written
        self._learner: Learner | None = None
        self._store: RendezvousStore | None = None
        self._manifest: Manifest | None = None

    @property
    def learner(self) -> Learner:
        if self._learner is None:
            raise LearnerError("the learner is not loaded")
        return self._learner

    def open_rendezvous(self) -> Rendezvous:
        """Open the store at which the ranks form their group; rank 0 only."""
        self._store = RendezvousStore(ray.util.get_node_ip_address(), self.spec.config.step_timeout_s)
        return self._store.address

    def load(self, address: Rendezvous | None) -> None:
        """Join the other ranks (None: there are none) and load the policy."""
        require_here(self.spec.model.path, "the policy that model.path names")
        spec = self.spec
        parallel = make_parallel(spec.config, spec.device, address, self.rank, self._store)
        with quick_imports():
            from rft.learner.learner import Learner  # transformers' models: seconds, which drivers save

        kind: type[Learner] = Learner if spec.config.privacy is None else load_dotted(PRIVATE)
        self._learner = kind(spec, parallel)
        if spec.algorithm.online:
            self._learner.make_moments()  # while the engines start

    def require_folder(self, path: str) -> None:
        require_here(path, "the run folder (output_dir)")

    # -- training ------------------------------------------------------------------------------------

    def describe(self) -> LearnerInfo:
        return self.learner.describe()

    def step(self, batch: Batch, step: int) -> dict[str, float]:
        return self.learner.step(batch, step)

    def preview(self, batch: Batch) -> None:
        self.learner.preview(batch)

    def evaluate(self, batch: Batch, step: int) -> Sums:
        return self.learner.evaluate(batch, step)

    def score_tokens(self, tokens: Sequence[int]) -> list[float]:
        return self.learner.score_tokens(tokens)

    def score_reference(self, batch: Batch) -> Tensor:
        return self.learner.score_reference(batch)

    def score_policy(self, batch: Batch) -> Tensor:
        return self.learner.score_policy(batch)

    def release_reference(self) -> None:
        self.learner.release_reference()

    def pop_messages(self) -> list[str]:
        return self.learner.pop_messages()

    # -- checkpoints -----------------------------------------------------------------------------------

    def begin_save(
        self, root: str, step: int, keep: int, meta: dict[str, Any], config: dict[str, Any] | None = None
    ) -> None:
        self.finish_save()
        if self.learner.version != step:  # the caller gave up on a step that was finished later
            raise CheckpointError(
                f"the learner holds version {self.learner.version}, not that of step {step}: its last step "
                "was finished too late. Raise learner.step_timeout_s, and resume from the last checkpoint"
            )
        write = self.learner.capture_state()
        if self.rank == 0:
            self._saving = checkpoint.save_in_background(
                Path(root), step, write, keep=keep, meta=meta, config=config
            )

    def finish_save(self, wait: bool = True) -> str | None:
        if self._saving is None or not (wait or self._saving.done()):
            return None
        saving, self._saving = self._saving, None
        return str(saving.result())

    def restore(self, folder: str) -> int:
        self.learner.read_state(Path(folder))
        return self.learner.version

    def export(self, folder: str) -> str:
        return self.learner.export(folder)

    # -- weight sync -----------------------------------------------------------------------------------

    def reserve_address(self) -> tuple[str, int]:
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def open_channel(self, link: Link) -> None:
        if self.rank == 0:
            with _blame_engines():
                self.publisher.open(link)

    def announce(self, version: int) -> Update:
        """Describe the tensors that `send_weights` will send. A publisher that reads at the announcement
        (sparse, files) reads the weights here, any other one in `send_weights`: once per push."""
        learner = self.learner
        if self.publisher.spec.transport == "adapter":
            learner.parallel.reshard()
            adapter = learner.strategy.adapter(learner.parallel.full_tensor)
            return self.publisher.announce_adapter(version, *adapter) if self.rank == 0 else {}
        weights = self._finite_weights() if self._reads_at_announce() else iter(())
        if self._manifest is None:  # it never changes, and making it gathers every weight
            self._manifest = manifest_of(learner.weights(self.publisher.wire_dtype))
        if self.rank == 0:
            return self.publisher.announce(version, self._manifest, weights)
        deque(weights, maxlen=0)  # takes part in gathering each one
        return {}

    def send_weights(self) -> Sent:
        """Send the announced weights, in the engines' precision. Raises LearnerError for non-finite weights:
        no engine may sample from them, and no checkpoint may contain them. Raises TransferError if the
        engines do not accept them: the learner remains usable."""
        weights = iter(()) if self._reads_at_announce() else self._finite_weights()
        try:
            with _blame_engines():
                return self.publisher.send(weights) if self.rank == 0 else Sent(0, 0, {})
        except TransferError:
            self.publisher.close()  # so that engines do not wait for the rest; the channel is reopened
            raise
        finally:
            deque(weights, maxlen=0)  # takes part in gathering each one, also those that are no longer sent

    def _reads_at_announce(self) -> bool:
        """Whether rank 0 reads the weights when it announces them; the other ranks then take part too."""
        return self.learner.parallel.gather(self.rank == 0 and self.publisher.reads_at_announce)[0]

    def _finite_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.learner.weights(self.publisher.wire_dtype):
            if not bool(torch.isfinite(tensor).all()):
                raise BrokenWeights(
                    f"the weights of version {self.learner.version} are not finite, first {name}: not "
                    "pushed, not saved. Lower learner.learning_rate and resume from the last checkpoint, "
                    "which is older."
                )
            yield name, tensor

    # -- sharing a device with an engine ---------------------------------------------------------------

    def offload(self) -> None:
        self.publisher.release()
        move(resident(self.learner), torch.device("cpu"))
        if self.spec.device == "cuda":
            torch.cuda.empty_cache()

    def reload(self) -> None:
        move(resident(self.learner), self.learner.policy.device)

    def device_memory(self) -> float:
        if self.spec.device != "cuda":
            return float(psutil.virtual_memory().used)
        free, total = torch.cuda.mem_get_info()
        return float(total - free)

    def peak_memory(self) -> float:
        """Return the peak bytes on the device since the last call; on CPU, the current ones."""
        if self.spec.device != "cuda":
            return float(psutil.Process().memory_info().rss)
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return float(peak)


@contextmanager
def _blame_engines() -> Iterator[None]:
    """Convert errors of the channel's group about a lost peer to an engine's fault, not a rank's."""
    try:
        yield
    except (LearnerError, TransferError):
        raise
    except RuntimeError as error:
        if not lost_a_peer(error):
            raise
        raise TransferError(f"{type(error).__name__}: {error}") from error


def _remote(
    method: Callable[Concatenate[LearnerActor, P], R],
    seconds: Callable[[LearnerGroup], float] | None = None,
) -> Callable[Concatenate[LearnerGroup, P], Awaitable[R]]:
    """Make a method of the group that calls `method` on every rank, with the same arguments and result."""

    def call(group: LearnerGroup, *args: P.args, **kwargs: P.kwargs) -> Awaitable[R]:
        return group.submit(method, seconds(group) if seconds else group.step_timeout_s, *args, **kwargs)

    return call


class LearnerGroup:
    """`ranks` learner actors, packed on as few machines as possible: a `LearnerHandle`.

    name: used in messages. If a rank dies, or fails while the others do not end their part of the call, the
    group ends: all ranks are killed, and this and every later call raises the error, with the rank's
    number.
    """

    _at = ""  # the step of the newest step call, for messages

    def __init__(
        self,
        spec: LearnerSpec,
        channel: ChannelSpec,
        start_timeout_s: float = 600.0,
        name: str = "the learner",
    ) -> None:
        self.name = name
        self.start_timeout_s = start_timeout_s
        self.step_timeout_s = Deadline(spec.config.step_timeout_s, "learner.step_timeout_s")
        self.push_timeout_s = Deadline(channel.config.timeout_s, "sync.timeout_s")
        self._bundles: PlacementGroup | None = None
        self._ended: ActorDied | None = None
        ranks = spec.config.ranks
        if ranks > 1:
            self._bundles = _reserve(spec)
        self._actors = [self._start(spec, channel, rank) for rank in range(ranks)]
        address = self._actors[0].open_rendezvous.remote() if spec.config.parallel != "single" else None
        self._loads = [actor.load.remote(address) for actor in self._actors]
        self._loading: asyncio.Task[list[None]] | None = None

    def _start(self, spec: LearnerSpec, channel: ChannelSpec, rank: int) -> Any:
        threads = spec.config.threads  # none: the actor counts the cores of its machine
        env = {"OMP_WAIT_POLICY": "PASSIVE", **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
        env |= allocator_environment() if spec.device == "cpu" else {}
        gpus = channel.gpu_share if spec.device == "cuda" else 0
        options: dict[str, Any] = {"num_gpus": gpus, "num_cpus": gpus, "runtime_env": {"env_vars": env}}
        if self._bundles is not None:
            options["num_cpus"] = 1
            options["scheduling_strategy"] = PlacementGroupSchedulingStrategy(
                self._bundles, placement_group_bundle_index=rank
            )
        return ray.remote(LearnerActor).options(**options).remote(spec, channel, rank)

    # -- the handle ------------------------------------------------------------------------------------

    def step(self, batch: Batch, step: int) -> Awaitable[dict[str, float]]:
        self._at = f" at step {step}"
        return self.submit(LearnerActor.step, self.step_timeout_s, batch, step)

    describe = _remote(LearnerActor.describe)
    preview = _remote(LearnerActor.preview)
    evaluate = _remote(LearnerActor.evaluate)
    score_reference = _remote(LearnerActor.score_reference)
    score_policy = _remote(LearnerActor.score_policy)
    release_reference = _remote(LearnerActor.release_reference)
    pop_messages = _remote(LearnerActor.pop_messages)
    begin_save = _remote(LearnerActor.begin_save)
    finish_save = _remote(LearnerActor.finish_save)
    restore = _remote(LearnerActor.restore)
    require_folder = _remote(LearnerActor.require_folder, lambda group: 60.0)
    export = _remote(LearnerActor.export, lambda group: 600.0)
    reserve_address = _remote(LearnerActor.reserve_address, lambda group: group.push_timeout_s)
    open_channel = _remote(LearnerActor.open_channel, lambda group: group.push_timeout_s)
    announce = _remote(LearnerActor.announce, lambda group: group.push_timeout_s)
    send_weights = _remote(LearnerActor.send_weights, lambda group: group.push_timeout_s)
    score_tokens = _remote(LearnerActor.score_tokens, lambda group: group.push_timeout_s)
    offload = _remote(LearnerActor.offload, lambda group: group.push_timeout_s)
    reload = _remote(LearnerActor.reload, lambda group: group.push_timeout_s)
    device_memory = _remote(LearnerActor.device_memory, lambda group: group.push_timeout_s)
    peak_memory = _remote(LearnerActor.peak_memory, lambda group: group.push_timeout_s)

    def kill(self) -> None:
        for actor in self._actors:
            ray.kill(actor)
        if self._bundles is not None:
            remove_placement_group(self._bundles)
            self._bundles = None
        if self._ended is None:
            self._ended = ActorDied(f"{self.name} was ended")

    # -- calls -----------------------------------------------------------------------------------------

    def submit(
        self,
        method: Callable[Concatenate[LearnerActor, P], R],
        seconds: float,
        *args: P.args,
        **kwargs: P.kwargs,
    ) -> Awaitable[R]:
        """Submit a call to every rank now; the result is rank 0's. Loading has an additional deadline."""
        if self._ended is not None:
            raise self._ended
        name = method.__name__
        what = f"{name} on {self.name}{self._at}"
        shared: tuple[Any, ...] = args
        if len(self._actors) > 1:
            shared = tuple(ray.put(value) for value in args)  # once, not once per rank
        calls = [getattr(actor, name).remote(*shared, **kwargs) for actor in self._actors]

        async def answer() -> R:
            await self._loaded()
            results: list[R] = await within(seconds, what, self._all(name, calls))
            return results[0]

        return _Answer(answer)

    async def _loaded(self) -> None:
        if self._loading is None:
            self._loading = asyncio.ensure_future(self._all("load", self._loads))
            # The task may never be awaited: without this, asyncio logs its exception as unhandled.
            self._loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        # Several calls may wait for it, and any of them may be cancelled.
        loading = asyncio.shield(self._loading)
        await within(self.start_timeout_s, f"loading {self.name}", loading)

    async def _all(self, name: str, calls: list[Any]) -> list[Any]:
        """Wait for all ranks' answers; raise the error of the rank that failed first."""
        waiting = [asyncio.ensure_future(call) for call in calls]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_EXCEPTION)
            if not any(_failed(task) for task in waiting):
                return [task.result() for task in waiting]
            await asyncio.wait(waiting, timeout=GRACE_S)
            raise self._root_error(name, waiting)
        finally:
            for task in waiting:
                task.cancel()

    def _root_error(self, name: str, waiting: list[asyncio.Task[Any]]) -> BaseException:
        """Return the error to raise; end the group unless all ranks have ended the call and are alive."""
        errors = {rank: error for rank, task in enumerate(waiting) if (error := _failed(task))}
        busy = [rank for rank, task in enumerate(waiting) if not task.done()]
        rank, error = min(errors.items(), key=lambda item: (_priority(item[1]), item[0]))
        dead = isinstance(error, RayActorError)
        if len(waiting) == 1 and not dead:
            return _unwrap(error)
        torn = any(_priority(e) == 2 for e in errors.values())  # a rank was interrupted in a collective
        if not dead and not busy and not torn:
            return _with_rank(_unwrap(error), rank, len(waiting))
        who = self.name if len(waiting) == 1 else f"learner rank {rank} of {len(waiting)}"
        self._ended = ActorDied(f"{who} {_describe(error)} in {name}; all its ranks were ended")
        self.kill()
        return self._ended if dead else _with_rank(_unwrap(error), rank, len(waiting))


class _Answer(Generic[R]):
    """The result of a submitted call. Unlike a coroutine or a task, it does not have to be awaited."""

    def __init__(self, wait: Callable[[], Coroutine[Any, Any, R]]) -> None:
        self._wait = wait

    def __await__(self) -> Generator[Any, None, R]:
        return self._wait().__await__()


def _reserve(spec: LearnerSpec) -> PlacementGroup:
    """Reserve a bundle for each rank. Raises LearnerError if the cluster lacks the resources."""
    kind, ranks = ("GPU" if spec.device == "cuda" else "CPU"), spec.config.ranks
    available = int(ray.cluster_resources().get(kind, 0))
    if available < ranks:
        raise LearnerError(
            f"learner.ranks: {ranks} ranks need {ranks} {kind}s, but the Ray cluster has "
            f"{available}; lower learner.ranks"
        )
    bundle = {"CPU": 1.0, "GPU": 1.0} if kind == "GPU" else {"CPU": 1.0}
    return placement_group([dict(bundle) for _ in range(ranks)], strategy="PACK")


def _failed(task: asyncio.Task[Any]) -> BaseException | None:
    return task.exception() if task.done() and not task.cancelled() else None


def _priority(error: BaseException) -> int:
    """0: died. 1: failed itself. 2: failed because another rank did. The lowest is the root error."""
    if isinstance(error, RayActorError):
        return 0
    if isinstance(_unwrap(error), TransferError):  # an engine's fault, whatever the message
        return 1
    return 2 if lost_a_peer(_unwrap(error)) else 1


def _unwrap(error: BaseException) -> BaseException:
    """Return the rank's original error, with its traceback as the cause."""
    if not isinstance(error, RayTaskError):
        return error
    cause: BaseException = error.cause
    cause.__cause__ = error
    return cause


def _with_rank(error: BaseException, rank: int, ranks: int) -> BaseException:
    error.add_note(f"raised on learner rank {rank} of {ranks}")
    return error


def _describe(error: BaseException) -> str:
    if isinstance(error, RayActorError):
        return f"died ({str(error).strip().splitlines()[0]})"
    return f"failed ({type(_unwrap(error)).__name__}: {_unwrap(error)})"
