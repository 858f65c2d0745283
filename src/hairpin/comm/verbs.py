"""The verbs: scatter, gather, switch, reduce_scatter, all_reduce, each differentiable.

Every verb is a linear map between two layouts and its backward is the exact adjoint of that map.
The objective is the mean over all ranks of each rank's loss (see docs/gradients.md), so averaging
parameter gradients over every mesh axis, as DDP and FSDP2 do, gives the gradient of one process.

Every verb takes ``wait=False`` to be started now and awaited later: it then returns a ``Pending``.
Do not write to its input before ``wait()``.
"""

from typing import Any, Literal, cast, overload

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from hairpin.comm.eager import eager
from hairpin.comm.maps import (
    AllReduce,
    Chain,
    Identity,
    Land,
    LinearMap,
    Replicated,
    Scale,
    Slice,
    differing_axis,
    map_between,
)
from hairpin.comm.mesh import Mesh, as_mesh
from hairpin.comm.pending import Pending
from hairpin.comm.transport import Link
from hairpin.errors import LayoutError
from hairpin.layout import Layout

Grad = Literal["replicated", "partial"]


def scatter(
    x: Tensor, layout: Layout, mesh: Mesh | DeviceMesh, *, axis: str | None = None
) -> Tensor:
    """Keep this rank's part of a tensor that every rank holds whole. Moves nothing.

    Args:
        x: the whole tensor, shape ``layout.split(None, axis)``.
        layout: the layout afterwards; one dim of it is split over ``axis``.
        axis: needed only where the layout is split over several axes.

    Raises:
        LayoutError: ``x`` has another shape, or the layout is split over no axis or several.
    """
    mesh = as_mesh(mesh)
    axis = _one_axis(layout, axis, "scatter")
    return move(x, layout.split(None, axis), layout, mesh)


@overload
def gather(
    x: Tensor, layout: Layout, mesh: Mesh | DeviceMesh, *, grad: Grad, axis: str | None = ...
) -> Tensor: ...
@overload
def gather(
    x: Tensor,
    layout: Layout,
    mesh: Mesh | DeviceMesh,
    *,
    grad: Grad,
    axis: str | None = ...,
    wait: Literal[False],
) -> Pending: ...
def gather(
    x: Tensor,
    layout: Layout,
    mesh: Mesh | DeviceMesh,
    *,
    grad: Grad,
    axis: str | None = None,
    wait: bool = True,
) -> Tensor | Pending:
    """Make a split tensor whole on every rank. Sends M (N-1)/N bytes per rank.

    Args:
        x: this rank's part, in ``layout``.
        grad: ``"replicated"``: every rank goes on alike, to the same loss, so the backward is
            local. ``"partial"``: ranks go on differently, so the backward is a reduce-scatter.
        axis: needed only where the layout is split over several axes.
        wait: False to return a ``Pending``.

    Raises:
        LayoutError: ``x`` has another shape, or the layout is split over no axis or several.
    """
    mesh = as_mesh(mesh)
    axis = _one_axis(layout, axis, "gather")
    return move(x, layout, layout.split(None, axis), mesh, grad=_checked(grad), wait=wait)


@overload
def switch(x: Tensor, src: Layout, dst: Layout, mesh: Mesh | DeviceMesh) -> Tensor: ...
@overload
def switch(
    x: Tensor, src: Layout, dst: Layout, mesh: Mesh | DeviceMesh, *, wait: Literal[False]
) -> Pending: ...
def switch(
    x: Tensor, src: Layout, dst: Layout, mesh: Mesh | DeviceMesh, *, wait: bool = True
) -> Tensor | Pending:
    """Turn the split from one dim to another: one all-to-all, M (N-1)/N^2 bytes sent per rank.

    Args:
        x: this rank's part, in ``src``.
        src: layout before.
        dst: layout afterwards: the same tensor with another dim split over the same axis.
        wait: False to return a ``Pending``.

    Raises:
        LayoutError: ``x`` has another shape, or the layouts are not one switch apart.
    """
    mesh = as_mesh(mesh)
    axis = differing_axis(src, dst)
    if axis is not None and None in (src.split_dim(axis), dst.split_dim(axis)):
        raise LayoutError(
            f"switch from {src} to {dst}: one side is whole on axis {axis!r}; use scatter to split "
            "a whole tensor and gather to make a split one whole"
        )
    return move(x, src, dst, mesh, wait=wait)


@overload
def reduce_scatter(
    x: Tensor, layout: Layout, mesh: Mesh | DeviceMesh, *, axis: str | None = ...
) -> Tensor: ...
@overload
def reduce_scatter(
    x: Tensor,
    layout: Layout,
    mesh: Mesh | DeviceMesh,
    *,
    axis: str | None = ...,
    wait: Literal[False],
) -> Pending: ...
def reduce_scatter(
    x: Tensor,
    layout: Layout,
    mesh: Mesh | DeviceMesh,
    *,
    axis: str | None = None,
    wait: bool = True,
) -> Tensor | Pending:
    """Add whole tensors over the ranks and keep this rank's part. Sends M (N-1)/N bytes.

    Terms are added in rank order, so the sum does not depend on timing.

    Args:
        x: this rank's term, whole.
        layout: the layout afterwards.
        axis: needed only where the layout is split over several axes.
        wait: False to return a ``Pending``.

    Raises:
        LayoutError: ``x`` has another shape, or the layout is split over no axis or several.
    """
    mesh = as_mesh(mesh)
    axis = _one_axis(layout, axis, "reduce_scatter")
    _require_summable(x, "reduce_scatter")
    return move(x, layout.split(None, axis), layout, mesh, partial=True, wait=wait)


@overload
def all_reduce(x: Tensor, mesh: Mesh | DeviceMesh, *, axis: str, grad: Grad) -> Tensor: ...
@overload
def all_reduce(
    x: Tensor, mesh: Mesh | DeviceMesh, *, axis: str, grad: Grad, wait: Literal[False]
) -> Pending: ...
def all_reduce(
    x: Tensor, mesh: Mesh | DeviceMesh, *, axis: str, grad: Grad, wait: bool = True
) -> Tensor | Pending:
    """Add a tensor over the ranks of an axis; every rank gets the sum.

    Args:
        x: this rank's term, the same shape on every rank.
        grad: as for :func:`gather`: whether ranks go on alike from the sum or differently.
        wait: False to return a ``Pending``.
    """
    mesh = as_mesh(mesh)
    _require_summable(x, "all_reduce")
    linear: LinearMap = Identity()
    is_replicated = _checked(grad) == "replicated"
    if mesh.size(axis) > 1:
        linear = AllReduce(Link(mesh, axis))
        if is_replicated:
            linear = Replicated(linear, Scale(mesh.size(axis)))
    return apply(x, linear, wait=wait)


def global_mean(total: Tensor, count: Tensor | float, mesh: Mesh | DeviceMesh) -> Tensor:
    """The sum of ``total`` over all ranks by the sum of ``count``: a loss over valid tokens.

    Each rank gives the sum over its own tokens and how many they are; ranks may hold different
    numbers, even none. Every token must be counted by as many ranks as every other: by one where
    the tokens are split, by all ranks of an axis along which they are whole. Every rank gets the
    same value.

    Args:
        total: scalar, differentiable.
        count: scalar.
    """
    mesh = as_mesh(mesh)
    dtype = torch.promote_types(total.dtype, torch.float32)  # half precision cannot count far
    weight = torch.as_tensor(count, dtype=dtype, device=total.device)
    pair = torch.stack([total.to(dtype), weight])
    for axis in mesh.axes:
        pair = all_reduce(pair, mesh, axis=axis, grad="replicated")
    return (pair[0] / pair[1]).to(total.dtype)


@overload
def move(
    x: Tensor,
    src: Layout,
    dst: Layout,
    mesh: Mesh,
    *,
    partial: bool = ...,
    grad: Grad = ...,
    wait: Literal[True] = ...,
) -> Tensor: ...
@overload
def move(
    x: Tensor,
    src: Layout,
    dst: Layout,
    mesh: Mesh,
    *,
    partial: bool = ...,
    grad: Grad = ...,
    wait: bool,
) -> Tensor | Pending: ...
@eager
def move(
    x: Tensor,
    src: Layout,
    dst: Layout,
    mesh: Mesh,
    *,
    partial: bool = False,
    grad: Grad = "partial",
    wait: bool = True,
) -> Tensor | Pending:
    """Check ``x`` against ``src``, then apply the map from ``src`` to ``dst``."""
    for axis in dict.fromkeys((*src.axes, *dst.axes)):
        mesh.size(axis)
    check_shape(x, src, mesh)
    axis_moved = differing_axis(src, dst)
    if axis_moved is not None:
        mesh.group(axis_moved)
    linear = map_between(src, dst, mesh, partial=partial)
    if grad == "replicated" and axis_moved is not None and not isinstance(linear, Identity):
        link = Link(mesh, axis_moved)
        linear = Replicated(linear, Chain(Slice(dst, src, link), Scale(link.size)))
    return apply(x, linear, wait=wait)


def check_shape(x: Tensor, layout: Layout, mesh: Mesh) -> None:
    """Refuse a tensor that is not this rank's part of ``layout``.

    Raises:
        LayoutError: names both shapes and where this rank stands.
    """
    expected = layout.local_shape(mesh)
    if tuple(x.shape) != expected:
        where = ", ".join(f"rank {mesh.rank(a)} of {mesh.size(a)} on {a!r}" for a in mesh.axes)
        raise LayoutError(
            f"got a tensor of shape {tuple(x.shape)} where layout {layout} has local shape "
            f"{expected} ({where}); pass the tensor that this layout describes, or correct the "
            "sizes"
        )


@eager
def apply(x: Tensor, linear: LinearMap, *, wait: bool) -> Tensor | Pending:
    """A linear map as a differentiable step: its value, or a ``Pending`` of it."""
    if wait:
        return x if isinstance(linear, Identity) else cast(Tensor, _Apply.apply(x, linear))
    if isinstance(linear, Identity):
        return Pending(lambda: x)
    flight = _Flight(linear)
    token = cast(Tensor, _Start.apply(x, flight))
    return Pending(lambda: cast(Tensor, _Finish.apply(token, flight)))


class _Apply(torch.autograd.Function):
    """A linear map, started and awaited at once."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, linear: LinearMap) -> Tensor:
        ctx.linear = linear
        return linear.start(x)()

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        return cast(Tensor, _Apply.apply(cotangents[0], ctx.linear.transpose())), None


class _Flight:
    """A transfer under way and, during the backward, its transpose under way."""

    def __init__(self, linear: LinearMap) -> None:
        self.linear = linear
        self.land: Land | None = None
        self.reverse: _Flight | None = None


class _Start(torch.autograd.Function):
    """Begin a transfer. Gives an empty token that carries the graph to ``_Finish``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, flight: _Flight) -> Tensor:
        ctx.flight = flight
        flight.land = flight.linear.start(x)
        return x.new_empty(0)

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        reverse = ctx.flight.reverse
        assert reverse is not None
        ctx.flight.reverse = None
        return cast(Tensor, _Finish.apply(cotangents[0], reverse)), None


class _Finish(torch.autograd.Function):
    """Await a transfer that ``_Start`` began."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, flight: _Flight) -> Tensor:
        assert flight.land is not None
        ctx.flight = flight
        result, flight.land = flight.land(), None
        return result

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Tensor, None]:
        reverse = _Flight(ctx.flight.linear.transpose())
        ctx.flight.reverse = reverse
        return cast(Tensor, _Start.apply(cotangents[0], reverse)), None


def _one_axis(layout: Layout, axis: str | None, verb: str) -> str:
    if axis is None:
        if len(layout.axes) != 1:
            raise LayoutError(
                f"{verb} with layout {layout}: it is split over "
                f"{' and '.join(layout.axes) or 'no axis'}; "
                + ("say which with axis=..." if layout.axes else "write the split as 's/sp'")
            )
        return layout.axes[0]
    if axis not in layout.axes:
        raise LayoutError(f"{verb} with layout {layout}: nothing in it is split over axis {axis!r}")
    return axis


_SUMMABLE = (
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64),
    *(torch.complex64, torch.complex128, torch.int8, torch.uint8, torch.int32, torch.int64),
)


def _require_summable(x: Tensor, verb: str) -> None:
    if x.dtype not in _SUMMABLE:
        raise LayoutError(
            f"{verb} of {str(x.dtype).removeprefix('torch.')}: sums over ranks need one of "
            f"{', '.join(str(d).removeprefix('torch.') for d in _SUMMABLE)}; convert the tensor "
            "first"
        )


def _checked(grad: Grad) -> Grad:
    if grad not in ("replicated", "partial"):
        raise LayoutError(f"grad={grad!r}: write 'replicated' or 'partial'")
    return grad
