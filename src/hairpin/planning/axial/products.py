"""Triangle products whose operands are split, as rings: no rank ever holds a whole operand.

Channel by channel, of ``a[i, k, c]`` and ``b[j, k, c]`` held along their first dim:

* outgoing, ``sum_k a[i, k] b[j, k]``: parts of b pass by, each gives some columns of the output;
* incoming, ``sum_k a[k, j] b[k, i]``: each rank has the terms of its own k, for all i. The sums
  pass by, each rank adding its term, and end where their rows belong.

Each is the other's gradient: that of a sum passes by where the forward's terms did. Bytes are those
of a gather or reduce-scatter, M (N-1)/N per rank; what a rank holds is M/N and what is under way.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hairpin.comm.transport import Link, Wait
from hairpin.planning.axial.way import Line


def ring_outgoing(a: Tensor, b: Tensor, way: Line) -> Tensor:
    """``a[i, k, c], b[j, k, c] -> [i, j, c]``; a, b and the result held along their first dim."""
    return _Outgoing.apply(a, b, way)  # type: ignore[no-any-return]


def ring_incoming(a: Tensor, b: Tensor, way: Line) -> Tensor:
    """``a[k, j, c], b[k, i, c] -> [i, j, c]``; a, b and the result held along their first dim."""
    return _Incoming.apply(a, b, way)  # type: ignore[no-any-return]


class _Outgoing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, way: Line) -> Tensor:
        ctx.way = way
        ctx.save_for_backward(a, b)
        a, b = _channels_first(a), _channels_first(b)
        out = a.new_empty(a.shape[0], a.shape[1], way.lengths["j"])
        for rows, part in _passing_by(b, way):
            torch.bmm(a, part.mT, out=out[:, :, rows])
        return out.permute(1, 2, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        way = ctx.way
        a, b, grad = (_channels_first(x) for x in (*ctx.saved_tensors, grad))
        of_a = torch.zeros_like(a)
        for rows, part in _passing_by(b, way):
            of_a.baddbmm_(grad[:, :, rows], part)
        of_b = _summed(lambda rows: grad[:, :, rows].mT @ a, way)
        return of_a.permute(1, 2, 0), of_b.permute(1, 2, 0), None


class _Incoming(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, way: Line) -> Tensor:
        ctx.way = way
        ctx.save_for_backward(a, b)
        a, b = _channels_first(a), _channels_first(b)
        return _summed(lambda rows: b[:, :, rows].mT @ a, way).permute(1, 2, 0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        way = ctx.way
        a, b, grad = (_channels_first(x) for x in (*ctx.saved_tensors, grad))
        of_a, of_b = torch.zeros_like(a), torch.empty_like(b)
        for rows, part in _passing_by(grad, way):
            of_a.baddbmm_(b[:, :, rows], part)
            torch.bmm(a, part.mT, out=of_b[:, :, rows])
        return of_a.permute(1, 2, 0), of_b.permute(1, 2, 0), None


def _channels_first(x: Tensor) -> Tensor:
    """``[i, k, c] -> [c, i, k]``, dense."""
    return x.permute(2, 0, 1).contiguous()


def _passing_by(x: Tensor, way: Line) -> Iterator[tuple[slice, Tensor]]:
    """The parts ``[c, rows, k]`` of every rank and their rows, this rank's first."""
    link = Link(way.mesh, way.axis)
    for step in range(link.size):
        owner, following = ((link.rank - step - more) % link.size for more in (0, 1))
        wait, room = None, x
        if step + 1 < link.size:
            wait, room = _onward(x, following, way, link, what="operands pass on")
        yield way.rows("i", owner), x
        if wait is not None:
            wait()
            x = room


def _summed(term: Callable[[slice], Tensor], way: Line) -> Tensor:
    """The sum of all ranks' terms ``[c, rows, k]`` of this rank's rows."""
    link = Link(way.mesh, way.axis)
    total = term(way.rows("i", (link.rank - 1) % link.size))
    for step in range(2, link.size + 1):
        owner = (link.rank - step) % link.size
        wait, room = _onward(total, owner, way, link, what="sums pass on")
        total = term(way.rows("i", owner))
        wait()
        total += room
    return total


def _onward(x: Tensor, coming: int, way: Line, link: Link, *, what: str) -> tuple[Wait, Tensor]:
    """Send ``x[c, rows, k]`` to the next rank and receive what has ``coming``'s rows."""
    rows = way.rows("i", coming)
    room = x.new_empty(x.shape[0], rows.stop - rows.start, x.shape[2])
    none = x.new_empty(0)
    sends, receives = [none] * link.size, [none] * link.size
    sends[(link.rank + 1) % link.size], receives[(link.rank - 1) % link.size] = x, room
    return link.exchange(sends, receives, what=what), room
