"""Write the record of each step of an online run, within the bounds of `tracking.record_*`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rft.batch import Group
from rft.checkpoint import library_versions
from rft.learner.workers import LearnerHandle
from rft.metrics import RunLog, record
from rft.metrics.record import Source, StepRecord
from rft.plan import OnlinePlan
from rft.rollout.buffer import Work
from rft.utils.seeds import derive_seed


class Recorder:
    """Records the steps of one run. A record that cannot be written (a full disk) does not stop the run."""

    def __init__(self, plan: OnlinePlan, learner: LearnerHandle, log: RunLog) -> None:
        self.plan, self.learner, self.log = plan, learner, log
        self.settings = plan.config.tracking
        self.folder = log.run_dir / record.FOLDER
        self._config = plan.config.to_dict()
        self._facts: dict[str, Any] = {}
        self._held: StepRecord | None = None

    @property
    def on(self) -> bool:
        return self.settings.record_steps != 0

    async def open(self, step: int) -> None:
        """Set the records of the steps after `step` aside: an earlier process wrote them, and these steps are
        repeated."""
        info = asdict(await self.learner.describe()) if self.on else {}
        self._facts = {name: info[name] for name in ROUNDING if name in info}
        self._facts["tokens_per_micro_batch"] = self.plan.learner_spec().config.tokens_per_micro_batch
        if moved := record.set_aside(self.folder, step):
            fields = {"lines": len(moved), "first_step": moved[0], "last_step": moved[-1]}
            self.log.event("run/superseded", file=f"{record.FOLDER}/", **fields)

    def hold(
        self, step: int, works: Sequence[Work], groups: Sequence[Group], metrics: Mapping[str, float]
    ) -> None:
        """Make the record of a step, for `flush`. groups: those trained on; works: where the new ones came
        from. metrics: the learner's; {}: the step failed, and its record is written at once."""
        seed = self.plan.config.seed
        sources = {
            id(w.group): Source(*w.key, w.version, derive_seed(seed, *w.key, w.version)) for w in works
        }
        self._held = StepRecord(
            step,
            groups,
            [sources.get(id(group)) for group in groups],
            dict(metrics),
            self._config,
            self._facts,
            library_versions(),
        )
        if not metrics:
            self.flush()

    def flush(self) -> None:
        """Write the record that is held, if there is one: while engines sample, and before a checkpoint."""
        held, self._held = self._held, None
        if held is None or not self.on:
            return
        try:
            record.write(self.folder, held)
            for folder in (self.folder, self.folder / record.SUPERSEDED):
                limit = int(self.settings.record_gib * 2**30)
                record.prune(folder, self.settings.record_steps, limit)
        except OSError as error:
            action = "training goes on; `rft replay` cannot compute this step again"
            self.log.event("fault/record", part="record", step=held.step, what=str(error), action=action)


ROUNDING = ("device", "processor", "ranks", "threads", "compute_dtype")
"""Facts about a learner that decide how its numbers are rounded."""
