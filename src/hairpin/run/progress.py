"""Showing a person on stderr how a run goes: a bar on a terminal, now and then a line elsewhere."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from hairpin.run.metrics import StepMetrics
from hairpin.units import format_bytes, format_time

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LINE_EVERY_S = 10.0


class StepProgress:
    """Called with each step's metrics while the block it guards runs."""

    def __init__(
        self, first_step: int, last_step: int, *, figures: Callable[[Any], str] | None = None
    ) -> None:
        """``figures`` says what is shown of a step's metrics; by default `clip_figures`."""
        self.first_step = first_step
        self.last_step = last_step
        self.figures = figures or clip_figures
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._told_s = 0.0

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._bar = _bar()
            self._bar.start()
            self._task = self._bar.add_task(
                "training", total=self.last_step, completed=self.first_step, figures=""
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, row: StepMetrics) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=row.step, figures=self.figures(row))
            return
        now_s = time.monotonic()
        if now_s - self._told_s >= _LINE_EVERY_S or row.step == self.last_step:
            self._told_s = now_s
            left = format_time((self.last_step - row.step) * row.time_s)
            sys.stderr.write(
                f"step {row.step}/{self.last_step}  {self.figures(row)}  {left} left\n"
            )
            sys.stderr.flush()


def clip_figures(row: StepMetrics) -> str:
    """Loss, clips per second, bytes that the busiest rank sent, and the largest rank's memory."""
    return (
        f"loss {row.loss:.4f}  {row.samples_per_s:.1f} clips/s  "
        f"sent {format_bytes(max(row.bytes_sent))}  peak {format_bytes(max(row.peak_memory_bytes))}"
    )


def _bar() -> "Progress":
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        expand=True,
    )
