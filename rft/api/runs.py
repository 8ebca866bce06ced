"""`Run`: a run folder, as a program reads it and resumes it; `Callback`: follows a run that trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from rft import checkpoint, run_dir
from rft.api.inputs import EnvironmentArgument, RewardArgument, Sections, ToolArgument
from rft.config.load import load_config
from rft.config.schema import Config
from rft.errors import ConfigError
from rft.report.history import CONFIG_FILE, NoRun
from rft.report.history import Run as History
from rft.utils.dotted import load_dotted
from rft.utils.signals import StopRequests

if TYPE_CHECKING:
    import pandas


Metrics = Mapping[str, float | None]

SHOWN_CHARTS = 2


class Run:
    """A run: finished, stopped, or still training in this process or another one.

    All properties are read from the folder when they are used. Raises ConfigError if it is not a run folder.
    """

    def __init__(self, path: Path | str, *, stops: StopRequests | None = None) -> None:
        self.path = Path(path)
        self._stops = stops
        try:
            self._history = History(self.path)
        except NoRun as error:
            raise ConfigError([str(error)]) from None

    # -- files of the run folder -------------------------------------------------------------------

    @property
    def name(self) -> str:
        """The name of the run and of its folder."""
        return self._history.name

    @property
    def config(self) -> Config:
        """The resolved config."""
        return load_config(self.path / CONFIG_FILE)

    @property
    def state(self) -> str:
        """ "running", "ended: done", "ended: stopped", or how it ended otherwise."""
        self._history.refresh()
        return self._history.state()

    @property
    def step(self) -> int:
        """The number of finished steps."""
        self._history.refresh()
        return self._history.step

    @property
    def result(self) -> dict[str, Any] | None:
        """`steps` and the last evaluation (offline without held-out rows: the last step's metrics); None for
        a run that is not complete."""
        return run_dir.read_result(self.path)

    @property
    def metrics(self) -> list[dict[str, Any]]:
        """One dict per step: `step`, `time/wall`, and the metrics; null values are None."""
        self._history.refresh()
        return [dict(row) for row in self._history.metrics]

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The logged completions: `step`, `split`, `prompt`, `completion`, `reward`, `scores`, ..."""
        self._history.refresh()
        return [dict(row) for row in self._history.samples]

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events of the run with their times: checkpoints, faults, guards, ..."""
        self._history.refresh()
        return [dict(row) for row in self._history.events]

    @property
    def model_path(self) -> Path | None:
        """The final model, a Hugging Face folder; None for a run that is not complete: see `export`."""
        return run_dir.final_model(self.path)

    @property
    def checkpoint(self) -> Path | None:
        """The newest complete checkpoint."""
        newest = checkpoint.latest(self.path / "checkpoints")
        return None if newest is None else newest.path

    def to_pandas(self) -> pandas.DataFrame:
        """Return the metrics as a data frame with one row per step, indexed by `step`."""
        import pandas

        return pandas.DataFrame(self.metrics).set_index("step") if self.metrics else pandas.DataFrame()

    def report(self, out: Path | str | None = None) -> Path:
        """Write one HTML page about the run; returns its path (default: RUN/report.html)."""
        path: Path = load_dotted("rft.report.report.write_report")(self.path, out)
        return path

    def export(self, out: Path | str) -> Path:
        """Write the final model, or that of the newest checkpoint, to a folder; returns the folder."""
        load_dotted("rft.tools.export.export_run")(self.path, Path(out))
        return Path(out)

    # -- actions -----------------------------------------------------------------------------------

    def stop(self, reason: str = "run.stop()") -> None:
        """Ask the run to finish its step, save a checkpoint and end. In a callback, or from another thread.

        Raises RuntimeError for a run that this object does not train.
        """
        if self._stops is None:
            raise RuntimeError(
                f"{self.path} is not trained by this call: stop it where it is trained (a signal to its "
                "process saves a checkpoint)"
            )
        self._stops.stop(reason)

    def resume(
        self,
        *,
        rewards: Sequence[RewardArgument] = (),
        environment: EnvironmentArgument | None = None,
        tools: Sequence[ToolArgument] = (),
        callbacks: Sequence[Callback] = (),
        **sections: Unpack[Sections],
    ) -> Run:
        """Go on from the newest checkpoint, or from the start where there is none; returns the run.

        rewards, environment, tools: those that were passed as objects, again. sections: settings that a
        resumed run may change, such as `steps`. Raises ConfigError, and the errors of `rft.train`.
        """
        resume = load_dotted("rft.api.training.resume")
        resumed: Run = resume(self.path, rewards, environment, tools, callbacks, sections)
        return resumed

    # -- how it is shown ---------------------------------------------------------------------------

    def __repr__(self) -> str:
        self._history.refresh()
        total = self._history.total_steps
        numbers = [
            f"{name} {value:.3f}"
            for name in ("eval/accuracy", "reward/mean", "train/loss")
            if (value := self._history.last(name)) is not None
        ]
        return " · ".join([f"Run {str(self.path)!r}", f"step {self.step}/{total}", self.state, *numbers])

    def _repr_html_(self) -> str:
        """Return headline numbers and the main charts, for a notebook."""
        from rft.report.charts import draw_all
        from rft.report.report import facts

        self._history.refresh()
        cells = "".join(
            f"<td style='text-align:left;padding:4px 16px 4px 0'><small>{escape(fact.label)}</small><br>"
            f"<b>{escape(fact.value)}</b><br><small>{escape(fact.remark)}</small></td>"
            for fact in facts(self._history)
        )
        charts = "".join(
            f"<div style='display:inline-block;width:380px'>{chart.svg}</div>"
            for chart in draw_all(self._history, SHOWN_CHARTS)
        )
        head = f"<b>{escape(self.name)}</b> · {escape(self.state)} · <code>{escape(str(self.path))}</code>"
        return f"<div>{head}<table><tr>{cells}</tr></table>{charts}</div>"


class Callback:
    """Follows a run; subclass it and override the methods that you need.

    They are called between two steps, on the thread that trains, and hold it up while they run. `run.stop()`
    ends the run after the step, with a checkpoint. An exception ends the run with CallbackError.
    """

    def on_train_begin(self, run: Run) -> None:
        """The run begins; engines and learner are not started yet."""

    def on_step_end(self, run: Run, metrics: Metrics) -> None:
        """A training step was finished. metrics: its line of metrics.jsonl, with `step`."""

    def on_evaluate(self, run: Run, metrics: Metrics) -> None:
        """The policy was evaluated. metrics: the line with `eval/...`, after `on_step_end` of its step; the
        evaluation before the first step has `step` 0."""

    def on_save(self, run: Run, path: Path) -> None:
        """A checkpoint is complete. path: its folder."""

    def on_train_end(self, run: Run) -> None:
        """The run is complete, or was stopped (`run.result` is None); not called after an error."""
