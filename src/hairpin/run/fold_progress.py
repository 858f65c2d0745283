"""Showing a person on stderr how a fold goes: a bar on a terminal, a line at times elsewhere."""

import sys
import time
from types import TracebackType
from typing import TYPE_CHECKING, Self

from hairpin.units import format_time

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_LINE_EVERY_S = 10.0


class FoldProgress:
    """Called with (recycle, blocks done in it, blocks of it) while the block it guards runs.

    Args:
        name: of the target and the model.
        times: that the model runs: recycles and once more.
    """

    def __init__(self, name: str, times: int) -> None:
        self.name, self.times = name, times
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._began_s = self._told_s = time.monotonic()

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self._bar = _bar()
            self._bar.start()
            self._task = self._bar.add_task(self.name, total=None, recycle="")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, recycle: int, done: int, blocks: int) -> None:
        where = f"recycle {recycle}/{self.times - 1}"
        total, sofar = self.times * blocks, recycle * blocks + done
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=sofar, total=total, recycle=where)
            return
        now_s = time.monotonic()
        if now_s - self._told_s < _LINE_EVERY_S:
            return
        self._told_s = now_s
        left_s = (now_s - self._began_s) / sofar * (total - sofar)
        self.say(f"{where}, block {done}/{blocks}, at most {format_time(left_s)} left")

    def say(self, text: str) -> None:
        """A line between the bars."""
        if self._bar is not None:
            self._bar.console.print(f"{self.name}: {text}", highlight=False, markup=False)
            return
        sys.stderr.write(f"{self.name}: {text}\n")
        sys.stderr.flush()


def _bar() -> "Progress":
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[recycle]}"),
        TextColumn("{task.percentage:3.0f} %"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        expand=True,
    )
