"""Check callbacks, and call them as the run is logged."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rft.api.runs import Callback, Metrics, Run
from rft.errors import CallbackError, ConfigError
from rft.utils.signals import StopRequests


def check_callbacks(callbacks: Sequence[object]) -> None:
    """Raise ConfigError for each entry that is not an instance of Callback."""
    problems: list[str] = []
    for i, callback in enumerate(callbacks):
        if isinstance(callback, Callback):
            continue
        if isinstance(callback, type) and issubclass(callback, Callback):
            problems.append(f"callbacks[{i}]: pass an instance: {callback.__name__}()")
        else:
            problems.append(
                f"callbacks[{i}]: {callback!r:.80} is not a callback: write a subclass of rft.Callback, and "
                "pass an instance of it"
            )
    if problems:
        raise ConfigError(problems)


class CallbackObserver:
    """Calls callbacks as an observer of the run's log."""

    def __init__(self, callbacks: Sequence[Callback], folder: Path, stops: StopRequests) -> None:
        self.callbacks, self.folder, self.stops = tuple(callbacks), folder, stops
        self._run: Run | None = None
        self._begun, self._step = False, 0

    @property
    def run(self) -> Run:
        """The run, whose `stop` works while it lasts."""
        if self._run is None:
            self._run = Run(self.folder, stops=self.stops)
        return self._run

    def begin(self) -> None:
        self._begun = True
        self._call("on_train_begin")

    def logged(self, step: int, metrics: Metrics) -> None:
        self._step = step
        if step > 0:
            self._call("on_step_end", metrics)
        if any(name.startswith("eval/") for name in metrics):
            self._call("on_evaluate", metrics)

    def completed(self, step: int, metrics: Metrics) -> None:
        self._step = step  # the process that took the step has called `on_step_end`
        self._call("on_evaluate", metrics)

    def event(self, kind: str, fields: Mapping[str, Any]) -> None:
        if kind == "checkpoint/saved":
            self._call("on_save", Path(fields["path"]))

    def end(self) -> None:
        """Tell that the run ended, complete or stopped, if it began: a complete run does not begin again."""
        if self._begun:
            self._call("on_train_end")

    def _call(self, name: str, *values: Any) -> None:
        for callback in self.callbacks:
            method: Callable[..., None] = getattr(callback, name)
            try:
                method(self.run, *values)
            except Exception as error:
                where = f"{type(callback).__name__}.{name}"
                raise CallbackError(
                    f"the callback {where} raised {type(error).__name__} at step {self._step}: {error}"
                ) from error
