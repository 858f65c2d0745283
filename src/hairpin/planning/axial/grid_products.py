"""Triangle products on a grid: no rank ever holds more of an operand than its part and one more.

Channel by channel a triangle product is one of matrices, of ``a`` and ``b`` held as pairs are: a
block of rows, a deal of columns. Outgoing it is ``a bᵀ``, incoming ``bᵀ a``, and the gradients of
both are products of the same three kinds. Blocks of rows, *panels*, cross the rows' axis; what
belongs to a panel's cells crosses the columns' axis while the next panel is under way, as in SUMMA
(van de Geijn and Watts 1997). With a x b ranks each sends ``(a - 1 + b - 1) r² c / (a b)`` elements
a product, holds ``r² c / (a b)`` of each operand, and has as much under way.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hairpin.layout import shard_size
from hairpin.planning.axial.grid import Grid
from hairpin.planning.axial.rings import passing, summed


def grid_outgoing(a: Tensor, b: Tensor, grid: Grid) -> Tensor:
    """``a[i, k, c], b[j, k, c] -> [i, j, c]``; all three held along both dims."""
    return _Outgoing.apply(a, b, grid)  # type: ignore[no-any-return]


def grid_incoming(a: Tensor, b: Tensor, grid: Grid) -> Tensor:
    """``a[k, j, c], b[k, i, c] -> [i, j, c]``; all three held along both dims."""
    return _Incoming.apply(a, b, grid)  # type: ignore[no-any-return]


class _Outgoing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, grid: Grid) -> Tensor:
        ctx.grid = grid
        ctx.save_for_backward(a, b)
        return _on(_by_transposed, grid, a, b)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (a, b), grid = ctx.saved_tensors, ctx.grid
        return _on(_by, grid, grad, b), _on(_transposed_by, grid, grad, a), None


class _Incoming(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, b: Tensor, grid: Grid) -> Tensor:
        ctx.grid = grid
        ctx.save_for_backward(a, b)
        return _on(_transposed_by, grid, b, a)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        (a, b), grid = ctx.saved_tensors, ctx.grid
        return _on(_by, grid, b, grad), _on(_by_transposed, grid, a, grad), None


Matrices = Callable[[Tensor, Tensor, "_Sizes"], Tensor]


def _on(product: Matrices, grid: Grid, x: Tensor, y: Tensor) -> Tensor:
    """A product of ``[i, j, c]``, channels first meanwhile."""
    x, y = (operand.permute(2, 0, 1).contiguous() for operand in (x, y))
    return product(x, y, _Sizes(grid)).permute(1, 2, 0)


class _Sizes:
    """Where cells lie, and how large blocks, deals and cells are, of any residues."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.rows, self.columns = grid.links

    def in_block(self, row: int, column: int) -> slice:
        return self.grid.in_block("i", row, column)

    def in_deal(self, row: int) -> slice:
        return self.grid.in_deal("i", row)

    def block(self, row: int) -> int:
        length, rows = self.grid.lengths["i"], self.rows.size
        return shard_size(length, rows, row)

    def cell(self, row: int, column: int) -> int:
        return len(range(self.block(row))[self.in_block(row, column)])


def _by_transposed(x: Tensor, y: Tensor, at: _Sizes) -> Tensor:
    """``x yᵀ``: panels of y pass by; columns of the result are sums over the columns' axis."""
    out = x.new_empty(x.shape)
    for row, panel in passing(y, lambda row: (len(y), at.block(row), y.shape[2]), at.rows):

        def term(column: int, row: int = row, panel: Tensor = panel) -> Tensor:
            return x @ panel[:, at.in_block(row, column)].mT

        def shape_of(column: int, row: int = row) -> tuple[int, ...]:
            return (*x.shape[:2], at.cell(row, column))

        out[:, :, at.in_deal(row)] = summed(term, shape_of, at.columns)
    return out


def _by(x: Tensor, y: Tensor, at: _Sizes) -> Tensor:
    """``x y``: panels of y pass by, and along the columns' axis the columns of x that they meet."""
    out = y.new_zeros(len(x), x.shape[1], y.shape[2])
    for row, panel in passing(y, lambda row: (len(y), at.block(row), y.shape[2]), at.rows):
        for column, part in _columns(x, row, at):
            out.baddbmm_(part, panel[:, at.in_block(row, column)])
    return out


def _transposed_by(x: Tensor, y: Tensor, at: _Sizes) -> Tensor:
    """``xᵀ y``: panels of the result are sums over the rows' axis."""

    def shape_of(row: int) -> tuple[int, ...]:
        return len(y), at.block(row), y.shape[2]

    def term(row: int) -> Tensor:
        panel = y.new_empty(shape_of(row))
        for column, part in _columns(x, row, at):
            panel[:, at.in_block(row, column)] = part.mT @ y
        return panel

    return summed(term, shape_of, at.rows)


def _columns(x: Tensor, row: int, at: _Sizes) -> Any:
    """The columns of x that belong to a panel's cells, as they pass by."""
    own = x[:, :, at.in_deal(row)]
    return passing(own, lambda column: (*x.shape[:2], at.cell(row, column)), at.columns)
