"""How one forward's tensors lie on the ranks, and the moves between those layouts."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from hairpin.comm.mesh import Mesh
from hairpin.comm.pending import Pending
from hairpin.comm.travel import travel
from hairpin.comm.verbs import gather, reduce_scatter, scatter, switch
from hairpin.layout import Layout, shard_offset, shard_size

Product = Literal["gather", "ring", "channels"]
Passing = Literal["gather", "ring"]


@dataclass(frozen=True)
class Way:
    """One mesh axis and one forward's lengths.

    Dims: s sequences, r residues, i and j residues of a pair, h heads, c channels. A tensor is
    whole or *held* along one of its dims: split over the axis, balanced, uneven, nothing padded.

    Attributes:
        lengths: global length of every dim that a tensor may be held along.
        product: how triangle products cross the ranks.
        passing: how pair biases and the right operand of the outer product do.
        pieces: in how many pieces work is done that a large transfer follows.
        chunks: in how many parts, one after another, rows are computed that need not meet.
    """

    mesh: Mesh
    axis: str
    lengths: Mapping[str, int]
    product: Product = "gather"
    passing: Passing = "gather"
    pieces: int = 1
    chunks: int = 1

    @property
    def degree(self) -> int:
        """Ranks along the axis."""
        return self.mesh.size(self.axis)

    def layout(self, x: Tensor, pattern: str, held: str | None) -> Layout:
        """Layout of ``x``, this rank's part of a tensor held along ``held``."""
        sizes = dict(zip(pattern.split(), x.shape, strict=True))
        if held is not None:
            sizes[held] = self.lengths[held]
        return Layout(pattern, **sizes).split(held, self.axis)

    def rows(self, dim: str, place: int) -> slice:
        """What the rank at ``place`` holds of ``dim``."""
        start = shard_offset(self.lengths[dim], self.degree, place)
        return slice(start, start + shard_size(self.lengths[dim], self.degree, place))

    def mine(self, dim: str) -> slice:
        """What this rank holds of ``dim``."""
        return self.rows(dim, self.mesh.rank(self.axis))

    def part(self, x: Tensor, pattern: str, dim: str) -> Tensor:
        """This rank's part of a tensor that every rank has whole."""
        layout = self.layout(x, pattern, None).split(dim, self.axis)
        return scatter(x, layout, self.mesh)

    def turn(self, x: Tensor, pattern: str, src: str, dst: str) -> Pending:
        """Start turning the split of ``x`` from one dim to another."""
        before = self.layout(x, pattern, src)
        return switch(x, before, before.split(dst, self.axis), self.mesh, wait=False)

    def whole(self, x: Tensor, pattern: str, held: str) -> Pending:
        """Start gathering all parts of ``x`` on every rank, which each may use in its own way."""
        return gather(x, self.layout(x, pattern, held), self.mesh, grad="partial", wait=False)

    def summed(self, x: Tensor, pattern: str, dim: str) -> Pending:
        """Start adding the ranks' terms of a whole tensor, each rank to keep its part."""
        layout = self.layout(x, pattern, None).split(dim, self.axis)
        return reduce_scatter(x, layout, self.mesh, wait=False)

    def passing_by(self, x: Tensor, pattern: str, held: str) -> Iterator[tuple[slice, Tensor]]:
        """Each rank's part of ``x`` and which rows of ``held`` it has: this rank's first."""
        layout = self.layout(x, pattern, held)
        for owner, part in travel(x, layout, self.mesh, self.axis):
            yield self.rows(held, owner), part
