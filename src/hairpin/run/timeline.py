"""Bytes alive along one step of a model, with the module that holds them: before a plan and after.

A step is run on fake tensors, so nothing is allocated and nothing computed, whatever its size. A
model that reads values of its input cannot be run so; it is run for real under the same count.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._pytree import tree_leaves

from hairpin.graph.meter import Meter, Timeline, measure
from hairpin.planning.apply import attach, detach, parallelize, require_bare
from hairpin.planning.example import Example, as_example
from hairpin.planning.loops.looped import attach_loops
from hairpin.planning.plan import Plan
from hairpin.planning.split.attachment import Attachment
from hairpin.planning.split.rehearse import RehearsalMover

BACKWARD = " (backward)"  # ends the label of what a module's backward holds
_TAG = "hairpin module"


def memory_timelines(
    model: nn.Module, example: Any, plan: Plan, *, backward: bool | None = None
) -> tuple[Timeline, Timeline]:
    """Bytes alive along one step of a model as it is, and under a plan. Leaves no plan on it.

    For a plan that splits over ranks the second is what the rank with the largest parts holds. A
    plan read from a file has to trace its blocks again, for which one forward is run for real.

    Args:
        example: a tensor, a tuple of arguments, a dict of keyword arguments, or ``(args, kwargs)``.
        backward: whether the step has a backward; default: whether the plan's loops do.

    Raises:
        PlanError: the plan is for another model, or the model carries one already.
    """
    require_bare(model)
    if backward is None:
        backward = any(block.backward for block in plan.loops)
    before = memory_timeline(model, example, backward=backward)
    _attach(model, plan)
    try:
        if plan.loops and not plan.programs:
            _run(model, as_example(example), backward=backward)
        after = memory_timeline(model, example, backward=backward)
    finally:
        detach(model)
    return before, after


def memory_timeline(model: nn.Module, example: Any, *, backward: bool = False) -> Timeline:
    """Bytes alive along one step of a model as it is now, labelled with the paths of its modules.

    Parameters and inputs are not counted; outputs are and, with a backward, gradients.

    Args:
        example: a tensor, a tuple of arguments, a dict of keyword arguments, or ``(args, kwargs)``.
        backward: go back from the sum of the outputs too. What a module's backward allocates is
            labelled with its path and ``" (backward)"``.
    """
    args, kwargs = as_example(example)
    meter = Meter()
    with labelled(model, meter):
        try:
            return measure(model, args, kwargs, grad=backward, meter=meter)
        except (DataDependentOutputException, DynamicOutputShapeException):
            meter = Meter()
    with labelled(model, meter), torch.random.fork_rng(), _gradients_aside(model), meter:
        output = _run(model, (args, kwargs), backward=backward)
        timeline = meter.timeline()
        del output
    return timeline


class Labelled(Protocol):
    """Something that is told which module runs."""

    label: str


@contextmanager
def labelled(model: nn.Module, meter: Labelled) -> Iterator[None]:
    """While the block lasts, ``meter.label`` is the path of the innermost module that runs."""
    labels = _Labels(model, meter)
    # Hooks on the modules themselves would change what loops were planned for.
    handles = [
        register_module_forward_pre_hook(labels.enter),
        register_module_forward_hook(labels.leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Labels:
    """Hooks that tell a meter which module of one model runs."""

    def __init__(self, model: nn.Module, meter: Labelled) -> None:
        self.meter = meter
        self.paths = {module: path for path, module in model.named_modules()}
        self.running: list[str] = []

    def enter(self, module: nn.Module, args: Any) -> None:
        path = self.paths.get(module)
        if path is not None:
            self.running.append(path)
            self.meter.label = path

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        path = self.paths.get(module)
        if path is None:
            return
        self.running.pop()
        self.meter.label = self.running[-1] if self.running else ""
        for tensor in tree_leaves(output):
            node: Any = tensor.grad_fn if isinstance(tensor, Tensor) else None
            # Autograd goes back in reverse order: what follows a module's output is that module's.
            if node is not None and _TAG not in node.metadata:
                node.metadata[_TAG] = path
                node.register_prehook(partial(self.back, path))

    def back(self, path: str, gradients: Any) -> None:
        self.meter.label = path + BACKWARD


def _attach(model: nn.Module, plan: Plan) -> None:
    if plan.degree == 1:
        parallelize(model, plan)
        return
    plan.require_model(model)
    attach_loops(model, plan.loops, plan.programs)
    attach(model, Attachment(plan, RehearsalMover(0, plan.degree, nullcontext), True))


def _run(model: nn.Module, example: Example, *, backward: bool) -> Any:
    """One real step, from the sum of all outputs that carry a gradient."""
    args, kwargs = example
    with torch.set_grad_enabled(backward):
        output = model(*args, **kwargs)
        if backward:
            tensors = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.requires_grad]
            torch.autograd.backward([tensor.sum() for tensor in tensors])
    return output


@contextmanager
def _gradients_aside(model: nn.Module) -> Iterator[None]:
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    for parameter, _ in gradients:
        parameter.grad = None
    try:
        yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
