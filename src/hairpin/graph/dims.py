"""Where a split gives wrong results: the table of axes, asked about two runs of one model.

The same run is recorded twice, at the global shape and at the shape one rank of a split sees. A
dim whose length differs between the two is split there. An operation is right on such a part where
the split dims of its inputs and outputs are those of axes of it (:mod:`hairpin.graph.axes`) that
are not summed over. An operation without a rule is refused where it meets a split.
"""

from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, zip_longest
from math import prod
from operator import mul
from types import MappingProxyType
from typing import Any

import torch

from hairpin.graph.axes import (
    Axis,
    Operation,
    Shape,
    Span,
    TensorRef,
    axes,
    reads_nothing,
)
from hairpin.graph.dim_words import reason
from hairpin.graph.trace import OpCall


@dataclass(frozen=True)
class Fault:
    """Why a run on a part cannot equal the part of a run on the whole."""

    call: OpCall | None
    module: str
    place: tuple[int, int]
    reason: str


Place = tuple[int, int]


def differing(whole: Shape, part: Shape) -> list[int]:
    """Positions at which two shapes differ."""
    return [i for i, (n, m) in enumerate(zip(whole, part, strict=True)) if n != m]


# A reshape is a view or a copy depending on strides, which may change where a length becomes 1.
_STRIDES_ONLY = frozenset(
    f"aten.{name}"
    for name in ["alias", "clone", "contiguous", "detach", "view", "_reshape_alias", "_unsafe_view"]
)


def first_fault(
    whole: Sequence[OpCall], part: Sequence[OpCall], *, passed_over: Container[Place] = ()
) -> Fault | None:
    """The first reason why the run on a part is not a part of the run on the whole.

    Args:
        passed_over: places where this rank's part is empty: nothing can come out wrong there, and
            kernels take other ways.
    """
    by_place = {place: list(calls) for place, calls in groupby(part, lambda call: call.place)}
    for place, calls in groupby(whole, lambda call: call.place):
        theirs = by_place.pop(place, [])
        fault = None if place in passed_over else _first_fault_at(calls, theirs)
        if fault is not None:
            return fault
    for place, left in by_place.items():
        fault = None if place in passed_over else _first_fault_at([], left)
        if fault is not None:
            return fault
    return None


def _first_fault_at(whole: Iterable[OpCall], part: Iterable[OpCall]) -> Fault | None:
    pairs = zip_longest(
        (call for call in whole if call.name not in _STRIDES_ONLY),
        (call for call in part if call.name not in _STRIDES_ONLY),
    )
    for ours, theirs in pairs:
        if (
            ours is None
            or theirs is None
            or (ours.name, ours.module) != (theirs.name, theirs.module)
        ):
            return _diverged(ours, theirs)
        reason = _judge(ours, theirs)
        if reason is not None:
            return Fault(theirs, theirs.module, theirs.place, reason)
    return None


def _diverged(whole: OpCall | None, part: OpCall | None) -> Fault:
    here = part or whole
    assert here is not None
    words = [f"{c.name} in '{c.module}'" if c else "nothing more" for c in (whole, part)]
    reason = (
        f"it runs {words[0]} on the whole but {words[1]} on a part: the code branches on a length "
        "that the split changes"
    )
    module = whole.module if whole else here.module
    return Fault(here, module, here.place, reason)


# Arguments that give lengths, which are compared through the shapes that come out.
_LENGTHS = frozenset(["size", "shape", "sizes", "split_sizes", "output_size", "length", "N", "HxW"])

# Names under which the table knows an operation whose lengths are seen in both runs.
_KNOWN_AS: Mapping[str, str] = MappingProxyType(
    {
        "aten.squeeze": "aten.reshape",
        "aten.empty_strided": "aten.empty",
        "aten.new_empty_strided": "aten.new_empty",
    }
)


def _judge(whole: OpCall, part: OpCall) -> str | None:
    """Why this call is wrong on a part, or None."""
    number = _changed_number(whole, part)
    if number is not None:
        return f"{whole.name} is given {number}, a number taken from a length that is split"
    operation, other = _in_the_table(whole.operation), part.operation
    inputs = list(zip(operation.inputs, other.inputs, strict=False))
    outputs = list(zip(operation.outputs, other.outputs, strict=False))
    if all(ours == theirs for ours, theirs in (*inputs, *outputs)):
        return None
    if any(len(ours) != len(theirs) for ours, theirs in (*inputs, *outputs)):
        return f"{whole.name} gives tensors of different rank on the whole and on a part"
    found, draws = axes(operation, in_blocks=True), _draws(whole)
    if not draws and (reads_nothing(operation.name) or _is_covered(operation, other, found)):
        return None
    return reason(whole.name, operation, other, found, draws=draws)


def _changed_number(whole: OpCall, part: OpCall) -> str | None:
    """The first plain argument that differs between the runs, as ``name=whole or part``."""
    if whole.name == "reshape":
        return None
    for name, ours in whole.operation.arguments.items():
        theirs = part.operation.arguments.get(name)
        is_length = name in _LENGTHS or (name == "end" and whole.name == "aten.slice")
        if not is_length and not _has_tensor(ours) and repr(ours) != repr(theirs):
            return f"{name}={ours} on the whole and {name}={theirs} on a part"
    return None


def _has_tensor(value: Any) -> bool:
    leaves = value if isinstance(value, list) else [value]
    return any(isinstance(leaf, TensorRef) for leaf in leaves)


def _in_the_table(operation: Operation) -> Operation:
    """The call by the name that the table has for it: that of its twin that writes nothing."""
    name = operation.name
    if name.endswith("_") and not name.endswith("__"):
        name = name[:-1]
    return replace(operation, name=_KNOWN_AS.get(name, name))


def _draws(call: OpCall) -> bool:
    """Whether it draws random numbers; attention kernels do so only with dropout."""
    if "dropout_p" in call.operation.arguments:
        return bool(call.operation.arguments["dropout_p"])
    return torch.Tag.nondeterministic_seeded in call.tags


def _is_covered(whole: Operation, part: Operation, found: Iterable[Axis]) -> bool:
    """Whether every split dim, where there are elements, is that of an axis cut there."""
    if len(whole.outputs) != len(part.outputs):
        return False
    cut = [
        axis
        for axis in found
        if not axis.sums and _is_cut(axis, whole, part) and _may_lie_apart(axis, whole)
    ]
    sides = (
        (whole.inputs, part.inputs, [axis.inputs for axis in cut]),
        (whole.outputs, part.outputs, [axis.outputs for axis in cut]),
    )
    return not any(map(prod, whole.outputs)) or all(
        any(at in spans and spans[at].dim == dim for spans in named)
        for ours, theirs, named in sides
        for at, shapes in enumerate(zip(ours, theirs, strict=True))
        if prod(shapes[0])
        for dim in differing(*shapes)
    )


def _is_cut(axis: Axis, whole: Operation, part: Operation) -> bool:
    """Whether all that an axis names is split, into parts of equally many positions."""
    sides = ((whole.inputs, part.inputs, axis.inputs), (whole.outputs, part.outputs, axis.outputs))
    counts = {
        tuple(divmod(shape[span.dim], span.unit * span.blocks) for shape in (ours[at], theirs[at]))
        for ours, theirs, spans in sides
        for at, span in spans.items()
    }
    (before, after), *others = counts
    return not others and before != after and before[1] == after[1] == 0


def _may_lie_apart(axis: Axis, operation: Operation) -> bool:
    """Whether an axis serves a part that lies in its dim in pieces, as one of t does in (b t).

    Neighbours that are taken together, as windows take them, may lie in different pieces. A dim
    taken apart into dims of its own is taken to have been put together of them.
    """
    source = axis.inputs.get(0, Span(0))
    if source.unit == 1 or "attention" in operation.name:
        return True
    if operation.name != "aten.reshape":
        return False
    step = prod(operation.inputs[0][source.dim + 1 :])
    return step in accumulate((1, *reversed(operation.outputs[0])), mul)
