"""Plans with a budget of bytes: on one device, and beside a split."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)

from hairpin.errors import PlanError
from hairpin.graph.meter import measure
from hairpin.planning.apply import attach, detach
from hairpin.planning.example import Example, as_example, plainly
from hairpin.planning.loops.blocks import forward_bytes
from hairpin.planning.loops.budget import Fitted, Progress, fit
from hairpin.planning.loops.budget_training import fit_training
from hairpin.planning.loops.data import block_loops
from hairpin.planning.plan import Plan, fingerprint
from hairpin.planning.speeds import Speeds, speeds_of
from hairpin.planning.split.attachment import Attachment
from hairpin.planning.split.rehearse import RehearsalMover


def plan_loops(
    model: nn.Module,
    example: Example,
    budget_bytes: int,
    *,
    axis: str,
    backward: bool,
    progress: Progress | None,
) -> Plan:
    """A plan of loops alone, for one device.

    Raises:
        MemoryBudgetError: the budget cannot be met.
    """
    speeds = speeds_of(_device(model))
    if backward:
        say = progress or (lambda _: None)
        fitted = fit_training(model, example, budget_bytes, speeds=speeds, progress=say)
    else:
        fitted = fit(model, example, budget_bytes, speeds=speeds, progress=progress)
    base = Plan(
        model=type(model).__name__,
        fingerprint=fingerprint(model),
        axis=axis,
        degree=1,
        sizes={},
        lengths=(),
        manners=(),
        inputs={},
        training=model.training,
        draws=False,
        stages=(),
    )
    return _with(base, fitted, fitted.whole_peak_bytes)


def with_loops(
    model: nn.Module,
    example: Example,
    plan: Plan,
    budget_bytes: int,
    *,
    backward: bool,
    progress: Progress | None,
) -> Plan:
    """A split plan whose stages run as loops where one rank's share is over the budget.

    Every rank must come to the same plan, so that the choice weighs the fixed speeds.

    The rank with the largest parts is planned for; on others the same loops take larger chunks.

    Raises:
        MemoryBudgetError: the budget cannot be met.
    """
    if backward and plan.degree > 1:
        raise PlanError(
            "a budget for forward and backward beside a split is not built yet; plan the split "
            "without memory=, or the loops without a mesh"
        )
    speeds = Speeds() if plan.degree > 1 else speeds_of(_device(model))
    if backward:
        say = progress or (lambda _: None)
        fitted = fit_training(model, example, budget_bytes, speeds=speeds, progress=say)
        return _with(plan, fitted, fitted.whole_peak_bytes)
    if plan.peak_bytes <= budget_bytes:
        return replace(plan, memory_bytes=budget_bytes)
    stages = tuple(dict.fromkeys(stage.module for stage in plan.stages))
    fitted = fit(
        model,
        example,
        budget_bytes,
        speeds=speeds,
        progress=progress,
        blocks=stages if plan.degree > 1 else None,
        attached=lambda: _as_rank(model, plan) if plan.degree > 1 else nullcontext(),
    )
    return _with(plan, fitted, plan.whole_peak_bytes)


def _device(model: nn.Module) -> torch.device:
    """Where it will run: where its parameters lie; a CPU where that is nowhere."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def estimate(model: nn.Module, inputs: Any, *, backward: bool = False) -> int:
    """Bytes that one forward of ``model`` as it is now would hold, counted on fake tensors.

    Outputs are counted, parameters and inputs are not. Loops that are attached run as they would at
    these lengths. From the first repeated block on nothing is computed and nothing is allocated;
    what comes before it (embeddings, masks) is run where ``inputs`` and parameters have values,
    since some code looks at them.

    Args:
        inputs: a tensor, a tuple of arguments, a dict of keyword arguments, or ``(args, kwargs)``;
            fake tensors will do.
        backward: count a backward of the sum of all outputs too, with all gradients.

    Raises:
        PlanError: the model reads values of its inputs, or ``inputs`` is something else.
        MemoryBudgetError: attached loops cannot keep to their budget at these lengths.
    """
    args, kwargs = as_example(inputs)
    try:
        with plainly():
            if backward:
                return measure(model, args, kwargs, grad=True).peak_bytes
            return forward_bytes(model, (args, kwargs))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise PlanError(
            f"{type(model).__name__} reads values of its input ({error}), so what it holds cannot "
            "be told from shapes alone; measure it with hp.profile"
        ) from error


@contextmanager
def _as_rank(model: nn.Module, plan: Plan) -> Iterator[None]:
    """While the block lasts the model runs as rank 0 of the plan would, on shapes alone."""
    attach(model, Attachment(plan, RehearsalMover(0, plan.degree, nullcontext), True))
    try:
        yield
    finally:
        detach(model)


def _with(plan: Plan, fitted: Fitted, whole_peak_bytes: int) -> Plan:
    loops = tuple(
        block_loops(program, fitted.paths[path], fitted.whole[path])
        for path, program in fitted.programs.items()
    )
    return replace(
        plan,
        peak_bytes=fitted.peak_bytes,
        whole_peak_bytes=whole_peak_bytes,
        memory_bytes=fitted.budget_bytes,
        loops=loops,
        left=dict(fitted.left),
        programs=dict(fitted.programs),
    )
