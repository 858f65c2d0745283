"""How one forward's tensors lie on the ranks, and the moves between those layouts.

Dims: s sequences, r residues, i and j residues of a pair, h heads, q queries, k keys, c channels. A
tensor is whole or *held* along one of its dims: split over all ranks, uneven, nothing padded.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from hairpin.comm.eager import eager
from hairpin.comm.mesh import Mesh
from hairpin.comm.pending import Pending
from hairpin.comm.transport import Link
from hairpin.comm.verbs import gather, reduce_scatter, scatter, switch
from hairpin.layout import Layout, shard_offset, shard_size
from hairpin.planning.axial import rings
from hairpin.planning.axial.recomputed import Job, Passage, Use, as_it_passes

LineProduct = Literal["gather", "ring", "channels"]  # on one axis
Product = Literal[LineProduct, "grid"]
Passing = Literal["gather", "ring"]


class Relay(Pending):
    """A transfer in two steps; :func:`advance` goes from one to the other, or else ``wait``."""

    def __init__(self, first: Pending, then: Callable[[Tensor], Pending]) -> None:
        super().__init__(self._end)
        self._first = first
        self._then = then
        self._second: Pending | None = None

    @eager
    def advance(self) -> None:
        """Await the first step and start the second."""
        if self._second is None:
            with torch.set_grad_enabled(self._grad_enabled):
                self._second = self._then(self._first.wait())

    def _end(self) -> Tensor:
        self.advance()
        assert self._second is not None
        return self._second.wait()


def advance(pending: Pending) -> None:
    """Start the second step of a transfer that has two."""
    if isinstance(pending, Relay):
        pending.advance()


@dataclass(frozen=True, kw_only=True)
class Way(ABC):
    """Some ranks of a mesh and one forward's lengths.

    Attributes:
        lengths: global length of every dim that a tensor may be held along.
        product: how triangle products cross the ranks.
        passing: how pair biases and the right operand of the outer product do.
        pieces: in how many pieces work is done that a large transfer follows; on one axis only.
        chunks: in how many parts, one after another, rows are computed that need not meet.
        multiplied: how pairs are held for triangle products.
        updated: how they are held where the monomer's outer product is added.
    """

    mesh: Mesh
    lengths: Mapping[str, int]
    product: Product = "gather"
    passing: Passing = "gather"
    pieces: int = 1
    chunks: int = 1

    multiplied: ClassVar[str]
    updated: ClassVar[str]

    @property
    @abstractmethod
    def degree(self) -> int:
        """Number of ranks."""

    @abstractmethod
    def mine(self, dim: str) -> slice:
        """What this rank holds of ``dim``."""

    @abstractmethod
    def own(self, mask: Tensor) -> Tensor:
        """This rank's part of a whole pair mask ``[i, j]``, held as for triangle products."""

    @abstractmethod
    def drop(self, dropout: nn.Module, update: Tensor, z: Tensor) -> Tensor:
        """``z`` and an update, both held as for triangle products; a mask is the same along i."""

    @abstractmethod
    def part(self, x: Tensor, pattern: str, dim: str) -> Tensor:
        """This rank's part of a tensor that every rank has whole."""

    @abstractmethod
    def turn(self, x: Tensor, pattern: str, src: str, dst: str) -> Pending:
        """Start turning the split of ``x`` from one dim to another."""

    @abstractmethod
    def whole(self, x: Tensor, pattern: str, held: str) -> Pending:
        """Start gathering all parts of ``x`` on every rank, which each may use in its own way."""

    @abstractmethod
    def passage(self, held: str, dim: int) -> Passage:
        """How parts of a tensor whose dim at index ``dim`` is held along ``held`` pass by."""

    def as_it_passes(
        self,
        use: Use,
        x: Tensor,
        split: tuple[str, str],
        *,
        near: Sequence[Tensor],
        dim: int,
        parameters: Sequence[nn.Parameter] = (),
    ) -> Tensor:
        """What becomes of ``x``, whose parts pass by all ranks.

        Args:
            use: gives rows of the result along ``dim``, from which rows those are, the part of
                ``x`` that belongs to them, and ``near``.
            split: pattern of ``x`` and what it is held along, whose rows are those of the result.
            near: what is here already.
            parameters: those that ``use`` has.
        """
        pattern, held = split
        passage = self.passage(held, pattern.split().index(held))
        job = Job(use, passage, dim, self.lengths[held], tuple(parameters))
        return as_it_passes(job, x, near)


@dataclass(frozen=True, kw_only=True)
class Line(Way):
    """The ranks of one mesh axis; parts are balanced runs."""

    axis: str

    multiplied: ClassVar[str] = "i"
    updated: ClassVar[str] = "i"

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
        return self.rows(dim, self.mesh.rank(self.axis))

    def own(self, mask: Tensor) -> Tensor:
        return mask[self.mine("i")]

    def drop(self, dropout: Any, update: Tensor, z: Tensor) -> Tensor:
        return dropout(update, z)  # type: ignore[no-any-return]

    def part(self, x: Tensor, pattern: str, dim: str) -> Tensor:
        layout = self.layout(x, pattern, None).split(dim, self.axis)
        return scatter(x, layout, self.mesh)

    def turn(self, x: Tensor, pattern: str, src: str, dst: str) -> Pending:
        before = self.layout(x, pattern, src)
        return switch(x, before, before.split(dst, self.axis), self.mesh, wait=False)

    def whole(self, x: Tensor, pattern: str, held: str) -> Pending:
        return gather(x, self.layout(x, pattern, held), self.mesh, grad="partial", wait=False)

    def summed(self, x: Tensor, pattern: str, dim: str) -> Pending:
        """Start adding the ranks' terms of a whole tensor, each rank to keep its part."""
        layout = self.layout(x, pattern, None).split(dim, self.axis)
        return reduce_scatter(x, layout, self.mesh, wait=False)

    def passage(self, held: str, dim: int) -> "Ring":
        return Ring(self, held, dim)


@dataclass(frozen=True)
class Ring:
    """The parts of all ranks of a line, each sent on while it is used.

    Attributes:
        held: what the tensor is held along; dim: the index of its dim.
    """

    line: Line
    held: str
    dim: int

    @property
    def link(self) -> Link:
        """The line's ranks."""
        return Link(self.line.mesh, self.line.axis)

    def passing(self, x: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Rows and part of every rank, this rank's first, which is sent on at once."""
        parts = rings.passing(x, self._shape_of(x), self.link)
        return ((self.line.rows(self.held, owner), part) for owner, part in parts)

    def returned(self, x: Tensor, term: Callable[[slice, Tensor], Tensor]) -> Tensor:
        """The sum of all ranks' terms of this rank's part."""
        return self.returned_of(self.passing(x), term, like=x)

    def returned_of(
        self,
        parts: Iterator[tuple[slice, Tensor]],
        term: Callable[[slice, Tensor], Tensor],
        *,
        like: Tensor,
    ) -> Tensor:
        """As :meth:`returned`, of parts that are under way; ``like`` is this rank's."""
        return rings.returned(parts, term, self._shape_of(like), self.link)

    def summed(self, term: Callable[[slice], Tensor], *, like: Tensor) -> Tensor:
        """The sum of all ranks' terms of this rank's rows; ``like`` has their other dims."""

        def of(owner: int) -> Tensor:
            return term(self.line.rows(self.held, owner))

        return rings.summed(of, self._shape_of(like), self.link)

    def _shape_of(self, x: Tensor) -> Callable[[int], list[int]]:
        def shape(owner: int) -> list[int]:
            rows = self.line.rows(self.held, owner)
            return [*x.shape[: self.dim], rows.stop - rows.start, *x.shape[self.dim + 1 :]]

        return shape
