"""What every rank does and sends along a run, as a file for chrome://tracing or Perfetto.

The format is Chrome's Trace Event Format: JSON, times in microseconds. A rank is a process. Its
first line has the modules that compute, and waits; the lines below it have transfers, each from its
start until it was awaited and there. A transfer whose wait is short was hidden behind the work
above it.
"""

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch.distributed as dist
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hairpin.comm.mesh import Mesh, Transfer
from hairpin.errors import OutputError
from hairpin.run.timeline import labelled

_OUTSIDE = "outside the model's modules"
_WORK_LINE = 0

T = TypeVar("T")
Event = dict[str, Any]  # times in nanoseconds until they are written


@contextmanager
def trace(model: nn.Module, mesh: Mesh, path: str | Path) -> Iterator[None]:
    """Write down what all ranks do while the block lasts, for chrome://tracing or ui.perfetto.dev.

    Every rank enters and leaves the block; the first one writes the file, when all have left.
    Kernels of a GPU run after their call: there the spans of modules are those of the calls.

    Args:
        model: its modules, by path, are what spans of work are named after; ``" (backward)"`` is
            added to those of a backward.
        mesh: live; its transfers are shown.
        path: of the file; one that is there is replaced.

    Raises:
        OutputError: the file cannot be written. On all ranks, and before the block runs; after it
            only where something has changed meanwhile, such as a disk that is full now.
    """
    path, recording = Path(path), Recording()
    _on_first(mesh, lambda: _require_writable(path))
    with recording.of(model, mesh):
        yield
    _on_first(mesh, lambda: recording.write(path))


@dataclass
class Recording:
    """What every rank did and sent while a block lasted.

    Attributes:
        ranks: events of each rank, the same on all of them; empty until they have left the block.
    """

    ranks: list[list[Event]] = field(default_factory=list)

    @contextmanager
    def of(self, model: nn.Module, mesh: Mesh) -> Iterator[None]:
        """Record the block, which every rank of the mesh enters and leaves."""
        work = _Work()
        with mesh.watched() as transfers, labelled(model, work), work:
            yield
        self.ranks = _all_of(mesh, [*work.spans, *_waits(transfers), *_lines(transfers)])

    def write(self, path: Path) -> None:
        """Write it in Chrome's format.

        Raises:
            OutputError: the file cannot be written.
        """
        with _refusing(path):
            path.write_text(json.dumps(_chrome(self.ranks)) + "\n")


def _all_of(mesh: Mesh, mine: T) -> list[T]:
    """What every rank has, by rank."""
    if mesh.world == 1:
        return [mine]
    all_: list[Any] = [None] * mesh.world
    dist.all_gather_object(all_, mine)
    return all_


def _on_first(mesh: Mesh, do: Callable[[], None]) -> None:
    """Have the first rank do something; that it cannot be written is then raised on all alike."""
    problem = ""
    if mesh.global_rank == 0:
        try:
            do()
        except OutputError as error:
            problem = str(error)
    (of_first, *_) = _all_of(mesh, problem)
    if of_first:
        raise OutputError(of_first)


def _require_writable(path: Path) -> None:
    """Raise if the file cannot be written; it is left as it is, or away."""
    with _refusing(path):
        new = not path.exists()
        with path.open("a"):
            pass
        if new:
            path.unlink()


@contextmanager
def _refusing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror}; name a file in a folder you may write to"
        ) from error


class _Work(TorchDispatchMode):
    """Operations one after another; those of one module without another between are one span.

    Attributes:
        label: the module that runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.label = ""
        self.spans: list[Event] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        start_ns = time.time_ns()
        out = func(*args, **(kwargs or {}))
        self._add(self.label or _OUTSIDE, start_ns, time.time_ns())
        return out

    def _add(self, name: str, start_ns: int, end_ns: int) -> None:
        last = self.spans[-1] if self.spans else None
        if last is None or last["name"] != name:
            self.spans.append(_span(name, "work", start_ns, end_ns, operations=1))
        else:
            last["dur"] = end_ns - last["ts"]
            last["args"]["operations"] += 1


def _span(name: str, kind: str, start_ns: int, end_ns: int, **about: Any) -> Event:
    span = {"ph": "X", "name": name, "cat": kind, "ts": start_ns, "args": about}
    return {**span, "dur": end_ns - start_ns, "tid": _WORK_LINE}


def _ended(transfers: Iterable[Transfer]) -> Iterator[tuple[Transfer, int, int]]:
    """Those that were awaited: when, and when they were there."""
    for transfer in transfers:
        if transfer.awaited_ns is not None and transfer.done_ns is not None:
            yield transfer, transfer.awaited_ns, transfer.done_ns


def _waits(transfers: Iterable[Transfer]) -> list[Event]:
    return [_span(f"wait: {t.what}", "wait", start, end) for t, start, end in _ended(transfers)]


def _lines(transfers: Iterable[Transfer]) -> list[Event]:
    """Transfers, those under way at once on lines of their own."""
    free_ns: list[int] = []
    spans = []
    for transfer, awaited_ns, done_ns in _ended(transfers):
        start_ns = transfer.started_ns
        line = next((n for n, end in enumerate(free_ns) if end <= start_ns), len(free_ns))
        free_ns[line : line + 1] = [done_ns]
        waited_ns = done_ns - awaited_ns
        about = {"axis": transfer.axis, "sent bytes": transfer.sent_bytes}
        about["hidden"] = 1 - waited_ns / max(done_ns - start_ns, 1)
        kind = "control" if transfer.control else "transfer"
        span = _span(transfer.what, kind, start_ns, done_ns, **about)
        spans.append({**span, "tid": _WORK_LINE + 1 + line})
    return spans


def _chrome(ranks: list[list[Event]]) -> dict[str, Any]:
    """The events of all ranks in microseconds since the first, as the format has them."""
    start = min((event["ts"] for events in ranks for event in events), default=0)
    events: list[Event] = []
    for rank, found in enumerate(ranks):
        events += _names(rank, max((event["tid"] for event in found), default=_WORK_LINE))
        for event in found:
            times_us = {"ts": (event["ts"] - start) / 1e3, "dur": event["dur"] / 1e3}
            events.append({**event, **times_us, "pid": rank})
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _names(rank: int, last: int) -> list[Event]:
    def name(what: str, line: int, text: str) -> Mapping[str, Any]:
        return {"ph": "M", "name": what, "pid": rank, "tid": line, "args": {"name": text}}

    lines = [name("thread_name", line, f"transfers {line}") for line in range(1, last + 1)]
    head = [name("process_name", 0, f"rank {rank}"), name("thread_name", 0, "work")]
    return [dict(one) for one in (*head, *lines)]
