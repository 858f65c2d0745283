"""Running a model on shapes alone: whole, and as one rank of a planned split would run it."""

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._pytree import tree_flatten

from hairpin.comm.verbs import Grad
from hairpin.errors import LayoutError, PlanError
from hairpin.graph.dims import Fault
from hairpin.graph.trace import OpCall, Recording, Shape, fake_inputs, recording
from hairpin.layout import Layout
from hairpin.planning.apply import attach, detach
from hairpin.planning.example import Example, plainly
from hairpin.planning.plan import Plan
from hairpin.planning.split.attachment import Attachment
from hairpin.planning.split.seam import Table, bind, manner, stream_name


@dataclass(frozen=True)
class StageCall:
    """One call of a listed module, as seen in a run.

    Attributes:
        stream: shape of its stream; ``args``: shapes of its listed side arguments.
        outputs: shapes of its outputs, None for one that is not a tensor.
        element_bytes: bytes per element of the stream and of the first output.
    """

    module: str
    stream: Shape
    args: Mapping[str, Shape]
    outputs: tuple[Shape | None, ...]
    element_bytes: tuple[int, int]


@dataclass
class Run:
    """What one run showed."""

    recording: Recording
    calls: list[StageCall] = field(default_factory=list)
    dropouts: dict[str, list[tuple[str, Shape]]] = field(default_factory=dict)
    outputs: list[Shape] = field(default_factory=list)
    inputs: dict[str, Shape] = field(default_factory=dict)
    manner: dict[str, str] = field(default_factory=dict)
    fault: Fault | None = None

    def ops(self, model: nn.Module) -> list[OpCall]:
        """All operations but those of ``nn.Dropout`` modules, which a plan replaces."""
        own = {path for path, module in model.named_modules() if isinstance(module, nn.Dropout)}
        return [call for call in self.recording.calls if call.module not in own]


@dataclass(frozen=True)
class RehearsalMover:
    """Stands in for the transfers of one rank: right shapes, no data."""

    rank: int
    degree: int
    quietly: Callable[[], Any]

    def coordinates(self, axes: tuple[str, ...]) -> Mapping[str, tuple[int, int]]:
        """(rank, degree) on each of ``axes``."""
        return dict.fromkeys(axes, (self.rank, self.degree))

    def move(self, x: Tensor, src: Layout, dst: Layout, grad: Grad) -> Tensor:
        """An empty tensor of the shape that ``x`` has in layout ``dst``."""
        expected = src.local_shape_at(self.coordinates(src.axes))
        if tuple(x.shape) != expected:
            raise LayoutError(f"got shape {tuple(x.shape)} where layout {src} has {expected}")
        if src == dst:
            return x
        with self.quietly():
            return x.new_zeros(dst.local_shape_at(self.coordinates(dst.axes)))

    def agree(self, statement: Callable[[], str]) -> None:
        """One process agrees with itself."""


def rehearse(
    model: nn.Module, example: Example, table: Table, plan: Plan | None = None, rank: int = 0
) -> Run:
    """Run the model on fake tensors, as it is or as ``rank`` of ``plan`` would.

    A model whose code reads values of its input (``if mask.any()``) cannot run on fake tensors; it
    is copied and run for real.

    Raises:
        PlanError: the model itself cannot run on the example.
    """
    device = next((t.device for t in model.parameters()), torch.device("cpu"))
    try:
        with quiet_fakes(), fake_inputs(example, device) as (args, kwargs):
            return _run(model, (args, kwargs), table, plan, rank)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        if device.type == "meta":
            raise PlanError(
                f"{type(model).__name__} reads values of its input ({error}), so it cannot be "
                "planned on the meta device; build it with real parameters"
            ) from error
        return _run(copy.deepcopy(model), example, table, plan, rank)


@contextmanager
def quiet_fakes() -> Iterator[None]:
    """Keep torch from logging the errors that a rehearsal is there to find."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    was_disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = was_disabled


def _run(model: nn.Module, example: Example, table: Table, plan: Plan | None, rank: int) -> Run:
    args, kwargs = example
    with torch.no_grad(), plainly(), recording(model) as recorder:
        run = Run(recorder.recording)

        if plan is not None:
            attach(
                model, Attachment(plan, RehearsalMover(rank, plan.degree, recorder.quietly), True)
            )
        handles = _observe(model, table, run, recorder)
        try:
            bound = bind(model, args, kwargs)
            run.inputs = {n: tuple(x.shape) for n, x in bound.items() if isinstance(x, Tensor)}
            run.manner = manner(model, args, kwargs)
            output = model(*args, **kwargs)
            run.outputs = [
                tuple(leaf.shape) for leaf in tree_flatten(output)[0] if isinstance(leaf, Tensor)
            ]
        except (DataDependentOutputException, DynamicOutputShapeException):
            raise
        except (RuntimeError, ValueError, IndexError, TypeError, AssertionError) as error:
            if plan is None:
                raise PlanError(
                    f"{type(model).__name__} failed on the example, in module "
                    f"'{recorder.path[-1]}': {_first_line(error)}. Give one that the model runs"
                ) from error
            run.fault = Fault(None, recorder.path[-1], recorder.place, _first_line(error))
        finally:
            for handle in handles:
                handle.remove()
            if plan is not None:
                detach(model)
    return run


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"


def _observe(model: nn.Module, table: Table, run: Run, recorder: Any) -> list[Any]:
    """Hooks that note every call of a listed module and every dropout."""
    handles: list[Any] = []
    pending: list[tuple[Shape, dict[str, Shape], int]] = []

    def begin(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
            bound = bind(module, args, kwargs)
            seam = table.seams[path]
            x = bound[stream_name(path, seam, bound)]
            sides = {
                n: tuple(bound[n].shape) for n in seam.args if isinstance(bound.get(n), Tensor)
            }
            pending.append((tuple(x.shape), sides, x.element_size()))
            recorder.place = (recorder.place[0] + 1, recorder.place[1])

        return hook

    def end(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            outputs = output if isinstance(output, tuple) else (output,)
            shapes = tuple(tuple(o.shape) if isinstance(o, Tensor) else None for o in outputs)
            stream, sides, size = pending.pop()
            out_size = outputs[0].element_size() if shapes[0] is not None else size
            run.calls.append(StageCall(path, stream, sides, shapes, (size, out_size)))
            recorder.place = (recorder.place[0], recorder.place[1] + 1)

        return hook

    def drop(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any) -> None:
            stage = next((p for p in reversed(recorder.path) if p in table.seams), "")
            run.dropouts.setdefault(path, []).append((stage, tuple(args[0].shape)))

        return hook

    for path, module in model.named_modules():
        if path in table.seams:
            handles.append(module.register_forward_pre_hook(begin(path), with_kwargs=True))
            handles.append(module.register_forward_hook(end(path), with_kwargs=True))
        if isinstance(module, nn.Dropout):
            handles.append(module.register_forward_pre_hook(drop(path)))
    return handles
