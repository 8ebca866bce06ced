"""A rank of the learner as a Ray actor: the learner itself, plus its weight channel and its checkpoints.

Every method is called on all ranks at once (`parallel/group.py`); engines and files are rank 0's business.
"""

from __future__ import annotations

import socket
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from rft import checkpoint
from rft.errors import BrokenWeights, LearnerError, TransferError, lost_a_peer
from rft.learner.learner import Learner, LearnerSpec
from rft.learner.parallel.make import make_parallel
from rft.learner.parallel.ranks import Meeting, Rendezvous
from rft.learner.resting import move, resident
from rft.sync.broadcast import Manifest, manifest_of
from rft.sync.link import Link
from rft.sync.publisher import Publisher
from rft.sync.spec import ChannelSpec, Sent, Update
from rft.utils.actors import require_here


class LearnerActor(Learner):
    """The actor's class. It is made at once; `load` then builds the learner."""

    def __init__(self, spec: LearnerSpec, channel: ChannelSpec, rank: int = 0) -> None:
        self.spec = spec
        self.rank = rank
        self.publisher = Publisher(channel)
        self.saving: Future[Path] | None = None  # the checkpoint that is being written
        self.meeting: Meeting | None = None
        self.shapes: Manifest | None = None

    def meet(self) -> Rendezvous:
        """Open the place where the ranks meet; rank 0 only."""
        import ray

        self.meeting = Meeting(ray.util.get_node_ip_address(), self.spec.config.step_timeout_s)
        return self.meeting.place

    def load(self, place: Rendezvous | None) -> None:
        """Join the other ranks (None: there are none) and load the policy."""
        require_here(self.spec.model, "the policy that model.path names")
        super().__init__(self.spec, make_parallel(self.spec, place, self.rank, self.meeting))

    def require_folder(self, path: str) -> None:
        """Raises NotHere unless this node has the folder that checkpoints are to be written to."""
        require_here(path, "the run folder (output_dir)")

    def reserve_address(self) -> tuple[str, int]:
        """An address of this machine and a free port, for the group's rendezvous."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def policy_version(self) -> int:
        """The version that `send_weights` sends: one per finished step."""
        return self.version

    def open_channel(self, link: Link) -> None:
        """Open the sending end of the channel that engines join; replaces an earlier one."""
        if self.rank == 0:
            with self._engines_to_blame():
                self.publisher.open(link)

    def manifest(self) -> Manifest:
        """Names, dtypes and shapes of the weights, in sending order."""
        if self.shapes is None:  # it never changes, and making it gathers every weight
            self.shapes = manifest_of(self.weights())
        return self.shapes

    def announce(self, version: int) -> Update:
        """What `send_weights` is about to bring to the engines. An early publisher (sparse, files) reads
        the weights here, any other one in `send_weights`: once per push."""
        if self.publisher.spec.transport == "adapter":
            self.parallel.settle()
            found = self.strategy.adapter(self.parallel.whole)
            return self.publisher.announce_adapter(version, *found) if self.rank == 0 else {}
        weights = self._finite_weights() if self._early() else iter(())
        manifest = self.manifest()
        if self.rank == 0:
            return self.publisher.announce(version, manifest, weights)
        deque(weights, maxlen=0)  # takes part in gathering each
        return {}

    def send_weights(self) -> Sent:
        """Send what was announced, in the engines' precision. Raises LearnerError for weights that are not
        finite: no engine is to sample from them, and no checkpoint to hold them. Raises TransferError where
        the engines do not take them: the ranks are none the worse for it."""
        weights = iter(()) if self._early() else self._finite_weights()
        try:
            with self._engines_to_blame():
                return self.publisher.send(weights) if self.rank == 0 else Sent(0, 0, {})
        except TransferError:
            self.publisher.close()  # so that no engine waits for the rest; the channel is opened anew
            raise
        finally:
            deque(weights, maxlen=0)  # takes part in gathering each, also those that are not sent any more

    @staticmethod
    @contextmanager
    def _engines_to_blame() -> Iterator[None]:
        """What the channel's group says of a peer that is gone is said of an engine, not of a rank."""
        try:
            yield
        except (LearnerError, TransferError):
            raise
        except RuntimeError as error:
            if not lost_a_peer(error):
                raise
            raise TransferError(f"{type(error).__name__}: {error}") from error

    def _early(self) -> bool:
        """Whether rank 0 reads the weights when it announces them; the other ranks read along."""
        return self.parallel.gather(self.rank == 0 and self.publisher.early)[0]

    def _finite_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.weights():
            if not bool(torch.isfinite(tensor).all()):
                raise BrokenWeights(
                    f"the weights of version {self.version} are not finite, first {name}: not pushed, not "
                    "saved. Lower learner.learning_rate and go on from the last checkpoint, which is older."
                )
            yield name, tensor

    # -- taking turns with an engine on one device ----------------------------------------------------

    def rest(self) -> None:
        """Leave the device to the engine: all that the learner holds there goes to host memory."""
        self.publisher.release()
        move(resident(self), torch.device("cpu"))
        if self.spec.device == "cuda":
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Take the device back."""
        move(resident(self), self.policy.device)

    def device_memory(self) -> float:
        """Bytes in use on the device, by whatever process."""
        if self.spec.device != "cuda":
            return float(psutil.virtual_memory().used)
        free, total = torch.cuda.mem_get_info()
        return float(total - free)

    def peak_memory(self) -> float:
        """Bytes that this process held at most on its device since the last call; on CPU, holds now."""
        if self.spec.device != "cuda":
            return float(psutil.Process().memory_info().rss)
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        return float(peak)

    def save(
        self, root: str, step: int, keep: int, meta: dict[str, Any], config: dict[str, Any] | None = None
    ) -> str:
        """Write a checkpoint of learner and run state (`meta`); returns its folder."""
        self.finish_save()
        write = self.capture_state()
        if self.rank:
            return ""
        return str(checkpoint.save(Path(root), step, write, keep=keep, meta=meta, config=config))

    def begin_save(
        self, root: str, step: int, keep: int, meta: dict[str, Any], config: dict[str, Any] | None = None
    ) -> None:
        """Copy the state and write it on a thread of its own, while training goes on. One at a time:
        `finish_save` tells how it ended."""
        self.finish_save()
        write = self.capture_state()
        if self.rank == 0:
            self.saving = checkpoint.save_in_background(
                Path(root), step, write, keep=keep, meta=meta, config=config
            )

    def finish_save(self, wait: bool = True) -> str | None:
        """The folder of the checkpoint that was begun; None where none was, or, without `wait`, while
        it is being written. Raises CheckpointError where writing it failed."""
        if self.saving is None or not (wait or self.saving.done()):
            return None
        saving, self.saving = self.saving, None
        return str(saving.result())

    def restore(self, folder: str) -> int:
        """Take over a checkpoint's learner state; returns the policy version."""
        self.read_state(Path(folder))
        return self.version
