"""Parts of a dim that overlap: a convolution needs a few more rows than it gives.

An axis of :mod:`hairpin.graph.axes` cuts its inputs in parts that stand side by side. The axes here
ask for ``before`` and ``after`` more elements of an input (its *halo*), as far as the input goes;
what lies beyond the edge is the operation's own padding. Steps on the way pass the halo on.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from hairpin.graph.axis_labels import Axis, Operation, Span, TensorRef, as_list

Halo = tuple[int, int]
NO_HALO: Halo = (0, 0)
_WIDEST = 8  # units of halo on either side; more would be computed over and over

_CONVOLUTIONS = frozenset({"aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution"})
_NEAREST = frozenset(
    {"aten.upsample_nearest1d", "aten.upsample_nearest2d", "aten.upsample_nearest3d"}
)
_GROUP_NORM = "aten.group_norm"
_FIXED = frozenset(
    f"aten.{name}"
    for name in [
        "view",
        "reshape",
        "_unsafe_view",
        "expand",
        "unflatten",
        "full",
        "zeros",
        "ones",
        "empty",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "dropout",
        "native_dropout",
    ]
)  # take a length as a number, or draw by position


def halo_axes(operation: Operation) -> tuple[Axis, ...]:
    """Spatial axes of a convolution whose windows overlap, of nearest upsampling and group norms.

    A group norm takes its statistics from the whole image before the loop begins.
    """
    if operation.name in _CONVOLUTIONS:
        return _windows(operation)
    if operation.name in _NEAREST:
        return _upsampled(operation)
    if operation.name == _GROUP_NORM:
        return tuple(Axis({0: Span(d)}, {0: Span(d)}) for d in range(2, len(operation.outputs[0])))
    return ()


def _windows(operation: Operation) -> tuple[Axis, ...]:
    geometry = Geometry.of(operation)
    if geometry is None:
        return ()
    source, result = operation.inputs[geometry.place], operation.outputs[0]
    rank = len(geometry.kernel)
    axes = []
    for d in range(rank):
        stride, padding = geometry.stride[d], geometry.padding[d]
        after = geometry.after(d)
        dim = len(source) - rank + d
        side_by_side = padding == 0 and after == 0  # has an axis without a halo
        if side_by_side or after < 0 or source[dim] != result[dim] * stride:
            continue
        span = Span(dim, stride, padding, after)
        axes.append(Axis({geometry.place: span}, {0: Span(dim)}))
    return tuple(axes)


class Geometry:
    """Windows of a convolution.

    Attributes:
        place: of the image among the tensor inputs.
        kernel, stride, padding, dilation: for each spatial dim.
    """

    def __init__(self, operation: Operation) -> None:
        arguments = operation.arguments
        self.place = arguments["input"].index
        self.kernel = operation.inputs[arguments["weight"].index][2:]
        self.stride, self.padding, self.dilation = (
            self._each(arguments[name]) for name in ("stride", "padding", "dilation")
        )
        self.groups = arguments["groups"]

    @classmethod
    def of(cls, operation: Operation) -> "Geometry | None":
        """None where the windows are not given by numbers, or it is a transposed convolution."""
        arguments = operation.arguments
        if isinstance(arguments["padding"], str) or arguments.get("transposed"):
            return None
        return cls(operation)

    def _each(self, value: Any) -> list[int]:
        listed = as_list(value)
        return list(listed) * len(self.kernel) if len(listed) == 1 else list(listed)

    def after(self, d: int) -> int:
        """Elements beyond a part's own that its last window reads."""
        window = (self.kernel[d] - 1) * self.dilation[d] + 1
        return int(window - self.stride[d] - self.padding[d])


def _upsampled(operation: Operation) -> tuple[Axis, ...]:
    """Each position is repeated a whole number of times."""
    arguments = operation.arguments
    factors = arguments.get("scale_factors")
    if arguments.get("output_size") is not None or not isinstance(factors, (list, tuple)):
        return ()
    source, result = operation.inputs[0], operation.outputs[0]
    found = []
    for d, factor in enumerate(factors):
        dim = len(source) - len(factors) + d
        if factor == int(factor) >= 1 and result[dim] == source[dim] * int(factor):
            found.append(Axis({0: Span(dim)}, {0: Span(dim, int(factor))}))
    return tuple(found)


def has_halo(span: Span | None) -> bool:
    """Whether parts overlap."""
    return span is not None and (span.before, span.after) != NO_HALO


def halo_for(
    operation: Operation | None, axis: Axis, scale: int, wanted: Iterable[Span]
) -> Halo | None:
    """Elements around its part that a step must give, for the widest of these readers.

    Rounded up to whole positions of the axis; None where the step cannot give more than its part.
    """
    spans = list(wanted)
    before = max((span.before for span in spans), default=0)
    after = max((span.after for span in spans), default=0)
    if (before, after) == NO_HALO:
        return NO_HALO
    if axis.sums or operation is None or operation.name in _FIXED:
        return None
    unit = axis.outputs[0].unit if 0 in axis.outputs else 0
    if not unit or max(before, after) > _WIDEST * unit * scale:
        return None
    return -(-before // unit) * unit, -(-after // unit) * unit


def asked(axis: Axis, place: int, scale: int, halo: Halo) -> Span | None:
    """The part of an input that a part of the result with this halo needs; None for the whole."""
    span = axis.inputs.get(place)
    if span is None:
        return None
    before, after = span.before, span.after
    if halo != NO_HALO:
        unit = axis.outputs[0].unit
        before += halo[0] // unit * span.unit
        after += halo[1] // unit * span.unit
    return Span(span.dim, span.unit * scale, before, after)


# ------------------------------------------------------------------------------------ in a loop


def bounds(span: Span, start: int, count: int, length: int) -> tuple[int, int]:
    """First element, and the one after the last, of the part that begins at unit ``start``."""
    low, high = start * span.unit - span.before, (start + count) * span.unit + span.after
    return max(low, 0), min(high, length)


def part(x: Tensor, span: Span, start: int, count: int) -> Tensor:
    """A view of the part of a tensor, its halo included as far as the tensor goes."""
    if not has_halo(span):
        return x.narrow(span.dim, start * span.unit, count * span.unit)
    low, high = bounds(span, start, count, x.shape[span.dim])
    return x.narrow(span.dim, low, high - low)


def units_of(x: Tensor, dim: int, unit: int) -> int:
    """How many units there are along a dim."""
    return int(x.shape[dim]) // unit


def trimmed(
    x: Tensor, cut: Sequence[int], have: Sequence[int], want: Sequence[int], place: Sequence[int]
) -> Tensor:
    """A part with halo ``have`` cut down to halo ``want``.

    Args:
        cut: the dim, and units of it in one turn.
        place: first unit of the part, how many it has, and how many the whole has.
    """
    start, count, units = place
    dim, unit = cut
    length = units * unit
    first, _ = bounds(Span(dim, unit, *have), start, count, length)
    low, high = bounds(Span(dim, unit, *want), start, count, length)
    return x.narrow(dim, low - first, high - low)


def convolved(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    windows: Sequence[Any],
    turn: Sequence[Any],
) -> Tensor:
    """A part of a convolution from the part of its image that it reads.

    Args:
        windows: stride, padding, dilation for each spatial dim; groups.
        turn: which spatial dim is cut, units of the result in one turn, and the result's halo;
            first unit of the part, how many it has, and how many the whole has.
    """
    stride, padding, dilation, groups = windows
    d, unit, halo, start, count, units = turn
    rank = weight.dim() - 2
    low, high = bounds(Span(0, unit, *halo), start, count, units * unit)
    reach = (weight.shape[2 + d] - 1) * dilation[d] + 1
    top = max(0, padding[d] - low * stride[d])
    bottom = max(0, (high - 1) * stride[d] - padding[d] + reach - units * unit * stride[d])
    if top or bottom:
        pads = [0, 0] * rank
        pads[2 * (rank - 1 - d) : 2 * (rank - d)] = top, bottom
        x = F.pad(x, pads)
    own = [0 if at == d else size for at, size in enumerate(padding)]
    convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[rank - 1]
    return convolve(x, weight, bias, stride, own, dilation, groups)


def write_convolution(
    graph: fx.Graph,
    operation: Operation,
    inputs: Sequence[fx.Node],
    cut: tuple[Axis, int, Halo],
    place: tuple[Any, ...],
) -> fx.Node:
    """Write a convolution of parts into the body of a loop.

    Args:
        inputs: nodes of the operation's tensor inputs, the image a part with its halo.
        cut: the axis, its scale, and the halo that the result has.
        place: nodes of the turn's first unit, of its units and of all.
    """
    axis, scale, halo = cut
    geometry = Geometry(operation)
    rank = len(geometry.kernel)
    weight = inputs[operation.arguments["weight"].index]
    reference = operation.arguments.get("bias")
    bias = inputs[reference.index] if isinstance(reference, TensorRef) else None
    span = axis.outputs[0]
    d = span.dim - (len(operation.outputs[0]) - rank)
    windows = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
    turn = (d, span.unit * scale, halo, *place)
    args: Any = (inputs[geometry.place], weight, bias, windows, turn)
    return graph.call_function(convolved, args)


def is_statistical(operation: Operation | None, axis: Axis) -> bool:
    """Whether an axis is one that a group norm takes its statistics over."""
    return (
        operation is not None
        and operation.name == _GROUP_NORM
        and any(span.dim > 1 for span in axis.outputs.values())
    )


def statistics(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """Of a group norm: what to multiply ``x[n, c, ...]`` by and what to add, ``[2, n, c, ...]``.

    Wu & He 2018, "Group Normalization", eq. 1 and 6; dims of space have length 1.
    """
    parts = x.unflatten(1, (groups, -1))
    variance, mean = torch.var_mean(parts, tuple(range(2, parts.dim())), correction=0)
    shape = (*x.shape[:2], *[1] * (x.dim() - 2))
    each = x.shape[1] // groups
    scale = (variance + eps).rsqrt().repeat_interleave(each, 1).view(shape)
    mean = mean.repeat_interleave(each, 1).view(shape)
    aside = (-1, *shape[2:])
    if weight is not None:
        scale = scale * weight.view(aside)
    shift = -mean * scale
    return torch.stack([scale, shift if bias is None else shift + bias.view(aside)])


def write_group_norm(graph: fx.Graph, operation: Operation, inputs: Sequence[fx.Node]) -> fx.Node:
    """Write the statistics of a group norm into the graph around a loop."""

    def node(name: str) -> fx.Node | None:
        reference = operation.arguments.get(name)
        return inputs[reference.index] if isinstance(reference, TensorRef) else None

    arguments = operation.arguments
    args = (node("input"), arguments["num_groups"], node("weight"), node("bias"), arguments["eps"])
    return graph.call_function(statistics, args)


def normalized(x: Tensor, found: Tensor) -> Tensor:
    """A part of a group norm, from what :func:`statistics` found."""
    return torch.addcmul(found[1], x, found[0])


def is_windowed(operation: Operation | None, axis: Axis) -> bool:
    """Whether an axis is one of a convolution whose windows overlap."""
    overlaps = any(has_halo(span) for span in axis.inputs.values())
    return operation is not None and operation.name in _CONVOLUTIONS and overlaps
