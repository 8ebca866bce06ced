"""The learner as a Ray actor: the learner itself, plus its weight channel and its checkpoints."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rft import checkpoint
from rft.checkpoint_writer import BackgroundWriter
from rft.learner.learner import Learner, LearnerError, LearnerSpec
from rft.remote import require_here
from rft.rollout.engine import Link
from rft.sync.broadcast import Manifest, manifest_of
from rft.sync.publisher import Publisher
from rft.sync.spec import ChannelSpec, Sent, Update


class LearnerActor(Learner):
    """The actor's class: `ray.remote(LearnerActor)`."""

    def __init__(self, spec: LearnerSpec, channel: ChannelSpec) -> None:
        super().__init__(spec)
        self.publisher = Publisher(channel)
        self.writer: BackgroundWriter | None = None

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
        self.publisher.open(link)

    def manifest(self) -> Manifest:
        """Names, dtypes and shapes of the weights, in sending order."""
        return manifest_of(self.weights())

    def announce(self, version: int) -> Update:
        """What `send_weights` is about to bring to the engines. An early publisher (sparse, files) reads
        the weights here, any other one in `send_weights`: once per push."""
        weights = self._finite_weights() if self.publisher.early else ()
        return self.publisher.announce(version, self.manifest(), weights)

    def send_weights(self) -> Sent:
        """Send what was announced, in the engines' precision. Raises LearnerError for weights that are not
        finite: no engine is to sample from them, and no checkpoint to hold them."""
        return self.publisher.send(() if self.publisher.early else self._finite_weights())

    def _finite_weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, tensor in self.weights():
            if not bool(torch.isfinite(tensor).all()):
                raise LearnerError(
                    f"the weights of version {self.version} are not finite, first {name}: not pushed, not "
                    "saved. Lower learner.learning_rate and go on from the last checkpoint, which is older."
                )
            yield name, tensor

    def save(
        self, root: str, step: int, keep: int, meta: dict[str, Any], config: dict[str, Any] | None = None
    ) -> str:
        """Write a checkpoint of learner and run state (`meta`); returns its folder."""
        self.finish_save()
        saved = checkpoint.save(Path(root), step, self.write_state, keep=keep, meta=meta, config=config)
        return str(saved)

    def begin_save(
        self, root: str, step: int, keep: int, meta: dict[str, Any], config: dict[str, Any] | None = None
    ) -> None:
        """Copy the state and write it on a thread of its own, while training goes on. One at a time:
        `finish_save` tells how it ended."""
        self.finish_save()
        self.writer = BackgroundWriter(Path(root), keep=keep)
        self.writer.submit(step, self.capture_state(), meta=meta, config=config)

    def finish_save(self, wait: bool = True) -> str | None:
        """The folder of the checkpoint that was begun; None where none was, or, without `wait`, while
        it is being written. Raises CheckpointError where writing it failed."""
        if self.writer is None or not (wait or self.writer.done()):
            return None
        writer, self.writer = self.writer, None
        with writer:
            written = writer.wait()
        return None if written is None else str(written)

    def restore(self, folder: str) -> int:
        """Take over a checkpoint's learner state; returns the policy version."""
        self.read_state(Path(folder))
        return self.version
