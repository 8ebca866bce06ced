"""Writing checkpoints off the training path, on a thread of their own."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rft.checkpoint import CheckpointError, Write, save


class BackgroundWriter:
    """Writes checkpoints on a thread of its own, one at a time.

    `submit` returns at once, except that it waits while the one before is still being written, so
    memory holds one snapshot at most. The writer must own its data: hand it copies. An error is
    raised by the next `submit`, `wait` or `close`. Use as a context manager, or call `close`.
    """

    def __init__(self, root: Path, *, keep: int) -> None:
        self.root, self.keep = root, keep
        self._pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: Future[Path] | None = None

    def submit(
        self, step: int, write: Write, *, meta: Mapping[str, Any], config: Mapping[str, Any] | None = None
    ) -> None:
        """Start writing the checkpoint of `step`, as `save` would. Raises what the one before raised."""
        self.wait()
        self._pending = self._pool.submit(
            save, self.root, step, write, keep=self.keep, meta=meta, config=config
        )

    def wait(self) -> Path | None:
        """Wait for the checkpoint in progress; its folder, or None where there is none."""
        pending, self._pending = self._pending, None
        return None if pending is None else pending.result()

    def done(self) -> bool:
        """Whether no checkpoint is being written at the moment."""
        return self._pending is None or self._pending.done()

    def close(self) -> None:
        """Finish the checkpoint in progress and end the thread."""
        try:
            self.wait()
        finally:
            self._pool.shutdown()

    def __enter__(self) -> BackgroundWriter:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        try:
            self.close()
        except CheckpointError as failed:
            if error is None:
                raise
            error.add_note(f"besides: {failed}")  # the first error is the one to report
