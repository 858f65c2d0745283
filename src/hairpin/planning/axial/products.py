"""Triangle products whose operands are split, as rings: no rank ever holds a whole operand.

Channel by channel, of ``a[i, k, c]`` and ``b[j, k, c]`` held along their first dim:

* outgoing, ``sum_k a[i, k] b[j, k]``: parts of b pass by, each gives some columns of the output;
* incoming, ``sum_k a[k, j] b[k, i]``: each rank has the terms of its own k, for all i. The sums
  pass by, each rank adding its term, and end where their rows belong.

Each is the other's gradient: that of a sum passes by where the forward's terms did, and that of a
part follows one step behind it. What passes by is under way before the rest is made ready. Bytes
are those of a gather or reduce-scatter, M (N-1)/N per rank; what a rank holds is M/N and what is
under way.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hairpin.planning.axial.way import Line, Ring


def ring_outgoing(a: Tensor, b: Tensor, way: Line) -> Tensor:
    """``a[i, k, c], b[j, k, c] -> [i, j, c]``; a, b and the result held along their first dim."""
    return _in_one_dtype(_Outgoing, a, b, way)


def ring_incoming(a: Tensor, b: Tensor, way: Line) -> Tensor:
    """``a[k, j, c], b[k, i, c] -> [i, j, c]``; a, b and the result held along their first dim."""
    return _in_one_dtype(_Incoming, a, b, way)


def _in_one_dtype(product: Any, a: Tensor, b: Tensor, way: Line) -> Tensor:
    """In that of autocast where it is on, as a product of torch would be, and so the backward."""
    kind = a.device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return product.apply(a, b, way)  # type: ignore[no-any-return]
    dtype = torch.get_autocast_dtype(kind)
    a, b = (x if x.dtype == torch.float64 else x.to(dtype) for x in (a, b))
    with torch.autocast(kind, enabled=False):
        return product.apply(a, b, way)  # type: ignore[no-any-return]


class _Outgoing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, way: Line) -> Tensor:
        ctx.way = way
        ctx.save_for_backward(a, b)
        parts = Ring(way, "i", 1).passing(_channels_first(b))
        a = _channels_first(a)
        out = a.new_empty(a.shape[0], a.shape[1], way.lengths["j"])
        for rows, part in parts:
            torch.bmm(a, part.mT, out=out[:, :, rows])
        return out.permute(1, 2, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        ring = Ring(ctx.way, "i", 1)
        a, b = ctx.saved_tensors
        parts = ring.passing(_channels_first(b))
        a, grad = _channels_first(a), _channels_first(grad)
        of_a = torch.zeros_like(a)

        def term(rows: slice, part: Tensor) -> Tensor:
            of_a.baddbmm_(grad[:, :, rows], part)
            return grad[:, :, rows].mT @ a

        of_b = ring.returned_of(parts, term, like=a)
        return of_a.permute(1, 2, 0), of_b.permute(1, 2, 0), None


class _Incoming(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, way: Line) -> Tensor:
        ctx.way = way
        ctx.save_for_backward(a, b)
        a, b = _channels_first(a), _channels_first(b)
        sums = Ring(way, "i", 1).summed(lambda rows: b[:, :, rows].mT @ a, like=a)
        return sums.permute(1, 2, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        parts = Ring(ctx.way, "i", 1).passing(_channels_first(grad))
        a, b = (_channels_first(x) for x in ctx.saved_tensors)
        of_a, of_b = torch.zeros_like(a), torch.empty_like(b)
        for rows, part in parts:
            of_a.baddbmm_(b[:, :, rows], part)
            torch.bmm(a, part.mT, out=of_b[:, :, rows])
        return of_a.permute(1, 2, 0), of_b.permute(1, 2, 0), None


def _channels_first(x: Tensor) -> Tensor:
    """``[i, k, c] -> [c, i, k]``, dense."""
    return x.permute(2, 0, 1).contiguous()
