"""Two mesh axes as one grid of ranks, ``a`` rows by ``b`` columns.

Of a dim, row x of the grid has the *block* x, a balanced run; column y has the *deal* y, every b-th
item from y on; and the rank at (x, y) has their common *cell*. Three layouts follow::

    held along i      cell of i, all j         attention around the starting node
    held along "ij"   block of i, deal of j    triangle products
    held along j      all i, cell of j         attention around the ending node

Each is one all-to-all along one axis from the next, and all ranks hold alike: with blocks in both
directions the transposed operand of a product would lie on few of them. Tensors with other dims
move likewise, ``m[s, r]`` from cells of s over (block of s, deal of r) to cells of r.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from hairpin import kernels
from hairpin.comm.maps import LinearMap
from hairpin.comm.pending import Pending
from hairpin.comm.transport import Link
from hairpin.comm.verbs import apply
from hairpin.layout import shard_offset, shard_size
from hairpin.planning.axial.moves import Collect, Side, Turn, taken
from hairpin.planning.axial.rings import passing, returned
from hairpin.planning.axial.way import Relay, Way

BOTH = "ij"  # pairs held along both dims


@dataclass(frozen=True, kw_only=True)
class Grid(Way):
    """The ranks of two mesh axes.

    Attributes:
        rows: axis along which a dim is split into blocks.
        columns: axis along which it is dealt.
    """

    rows: str
    columns: str

    multiplied: ClassVar[str] = BOTH
    updated: ClassVar[str] = "j"

    @property
    def degree(self) -> int:
        return self.mesh.size(self.rows) * self.mesh.size(self.columns)

    @property
    def links(self) -> tuple[Link, Link]:
        """Along the rows' axis, and along the columns'."""
        return Link(self.mesh, self.rows), Link(self.mesh, self.columns)

    # ------------------------------------------------------------------------------- who has what

    def block(self, dim: str, row: int | None = None) -> slice:
        """What a row of the grid has of ``dim``; this rank's, if left out."""
        length, link = self.lengths[dim], self.links[0]
        row = link.rank if row is None else row
        start = shard_offset(length, link.size, row)
        return slice(start, start + shard_size(length, link.size, row))

    def deal(self, dim: str, column: int | None = None) -> slice:
        """What a column has."""
        link = self.links[1]
        return slice(link.rank if column is None else column, self.lengths[dim], link.size)

    def in_block(self, dim: str, row: int | None = None, column: int | None = None) -> slice:
        """Where in a row's block a rank's cell lies."""
        link, block = self.links[1], self.block(dim, row)
        column = link.rank if column is None else column
        return slice((column - block.start) % link.size, block.stop - block.start, link.size)

    def in_deal(self, dim: str, row: int | None = None, column: int | None = None) -> slice:
        """Where in a column's deal a rank's cell lies: a run."""
        cell, deal = self.cell(dim, row, column), self.deal(dim, column)
        start = (cell.start - deal.start) // deal.step
        return slice(start, start + len(range(*cell.indices(self.lengths[dim]))))

    def cell(self, dim: str, row: int | None = None, column: int | None = None) -> slice:
        """What a rank has of a dim that is held."""
        block, inside = self.block(dim, row), self.in_block(dim, row, column)
        return slice(block.start + inside.start, block.stop, inside.step)

    def mine(self, dim: str) -> slice:
        return self.cell(dim)

    def own(self, mask: Tensor) -> Tensor:
        return mask[self.block("i"), self.deal("j")]

    # -------------------------------------------------------------------------------------- moves

    def part(self, x: Tensor, pattern: str, dim: str) -> Tensor:
        mine = taken(x, pattern.split().index(dim), self.cell(dim))
        return mine.clone(memory_format=torch.contiguous_format)  # the whole may go

    def turn(self, x: Tensor, pattern: str, src: str, dst: str) -> Pending:
        if src == dst:
            return Pending(lambda: x)
        dims = pattern.split()
        outer, inner = sorted({"i", "j"} if BOTH in {src, dst} else {src, dst}, key=dims.index)
        along_columns = Turn(self.links[1], self._cells(dims, outer), self._deals(dims, inner))
        along_rows = Turn(
            self.links[0], self._blocks(dims, outer), self._cells_of_deal(dims, inner)
        )
        steps: list[LinearMap] = [along_columns, along_rows]
        if src == inner or dst == outer:
            steps = [along_rows.transpose(), along_columns.transpose()]
        if BOTH in {src, dst}:
            steps = [steps[0] if dst == BOTH else steps[1]]
        return _moved(x, steps)

    def whole(self, x: Tensor, pattern: str, held: str) -> Pending:
        dims = pattern.split()
        if held == BOTH:
            sides = self._deals(dims, "j"), self._blocks(dims, "i")
        else:
            sides = self._cells(dims, held), self._blocks(dims, held)
        steps = [Collect(link, side) for link, side in zip(self.links[::-1], sides, strict=True)]
        return _moved(x, steps)

    def drop(self, dropout: Any, update: Tensor, z: Tensor) -> Tensor:
        """The mask is drawn whole, as one process draws it, by the model's own dropout of ones."""
        if not dropout.training:
            return dropout(update, z)  # type: ignore[no-any-return]
        ones = update.new_ones(1, self.lengths["j"], update.shape[-1])
        kept = dropout(ones, torch.zeros_like(ones))[:, self.deal("j")]
        return kernels.gated_residual(update, kept=kept, residual=z)

    def _blocks(self, dims: list[str], dim: str) -> Side:
        rows = range(self.links[0].size)
        return Side(dims.index(dim), self.lengths[dim], tuple(self.block(dim, x) for x in rows))

    def _deals(self, dims: list[str], dim: str) -> Side:
        columns = range(self.links[1].size)
        return Side(dims.index(dim), self.lengths[dim], tuple(self.deal(dim, y) for y in columns))

    def _cells(self, dims: list[str], dim: str) -> Side:
        """This row's block, over the columns."""
        columns, block = range(self.links[1].size), self.block(dim)
        parts = tuple(self.in_block(dim, column=y) for y in columns)
        return Side(dims.index(dim), block.stop - block.start, parts)

    def _cells_of_deal(self, dims: list[str], dim: str) -> Side:
        """This column's deal, over the rows."""
        rows, length = range(self.links[0].size), self.lengths[dim]
        parts = tuple(self.in_deal(dim, row=x) for x in rows)
        return Side(dims.index(dim), len(range(length)[self.deal(dim)]), parts)

    # ---------------------------------------------------------------------------- what passes by

    def passage(self, held: str, dim: int) -> "Around":
        return Around(self, held, dim)


@dataclass(frozen=True)
class Around:
    """All cells of a dim as they pass by: those of a row of the grid, then the next row's."""

    grid: Grid
    held: str
    dim: int

    def passing(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """The rows of every rank's part, and the part; this rank's first."""
        rows, columns = self.grid.links
        for row, first in passing(x, lambda row: self._shape(x, row, columns.rank), rows):
            shape_of = self._shape_in(x, row)
            for column, part in passing(first, shape_of, columns):
                yield self.grid.cell(self.held, row, column), part

    def returned(self, x: Tensor, term: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """The sum of all ranks' terms of this rank's part."""
        rows, columns = self.grid.links

        def of_row(row: int, first: Tensor) -> Tensor:
            def of_cell(column: int, part: Tensor) -> Tensor:
                return term(self.grid.cell(self.held, row, column), part)

            shape_of = self._shape_in(x, row)
            return returned(passing(first, shape_of, columns), of_cell, shape_of, columns)

        def shape_of_row(row: int) -> list[int]:
            return self._shape(x, row, columns.rank)

        return returned(passing(x, shape_of_row, rows), of_row, shape_of_row, rows)

    def _shape(self, x: Tensor, row: int, column: int) -> list[int]:
        cell = self.grid.cell(self.held, row, column)
        shape = list(x.shape)
        shape[self.dim] = len(range(self.grid.lengths[self.held])[cell])
        return shape

    def _shape_in(self, x: Tensor, row: int) -> Callable[[int], list[int]]:
        return lambda column: self._shape(x, row, column)


def _moved(x: Tensor, steps: Sequence[Any]) -> Pending:
    """Start the steps, one after another; those along an axis of one rank are none."""
    steps = [step for step in steps if step.link.size > 1]
    if not steps:
        return Pending(lambda: x)
    pending = _started(steps[0], x)
    for step in steps[1:]:
        pending = Relay(pending, partial(_started, step))
    return pending


def _started(step: LinearMap, x: Tensor) -> Pending:
    return cast(Pending, apply(x, step, wait=False))
