"""Moves between layouts whose parts are slices, with steps: runs, or every n-th item.

The verbs know balanced runs alone. These are the same maps on any slices, each with its transpose.
"""

from dataclasses import dataclass

from torch import Tensor

from hairpin.comm.maps import Land, LinearMap
from hairpin.comm.transport import Link


@dataclass(frozen=True)
class Side:
    """How a dim is split over the places of a link.

    Attributes:
        dim: index of the dim.
        length: of all parts together.
        parts: what each place holds of it.
    """

    dim: int
    length: int
    parts: tuple[slice, ...]

    def at(self, x: Tensor, place: int) -> Tensor:
        """What a place holds of ``x``, which has the dim whole: a view."""
        return taken(x, self.dim, self.parts[place])

    def held(self, place: int) -> int:
        """How many items a place holds."""
        return len(range(self.length)[self.parts[place]])


@dataclass(frozen=True)
class Turn:
    """Split along one dim to split along another: one all-to-all."""

    link: Link
    before: Side
    after: Side

    def start(self, x: Tensor) -> Land:
        here, peers = self.link.rank, range(self.link.size)
        out = _room(x, {self.before.dim: self.before.length, self.after.dim: self.after.held(here)})
        sends = [self.after.at(x, peer) for peer in peers]
        receives = [self.before.at(out, peer) for peer in peers]
        wait = self.link.exchange(sends, receives, what=f"turn {self.before} to {self.after}")
        receives[here].copy_(sends[here])

        def land() -> Tensor:
            wait()
            return out

        return land

    def transpose(self) -> LinearMap:
        return Turn(self.link, self.after, self.before)


@dataclass(frozen=True)
class Collect:
    """Split to whole on every rank."""

    link: Link
    side: Side

    def start(self, x: Tensor) -> Land:
        x = x.contiguous()
        out = _room(x, {self.side.dim: self.side.length})
        receives = [self.side.at(out, peer) for peer in range(self.link.size)]
        wait = self.link.exchange([x] * self.link.size, receives, what=f"collect {self.side}")
        receives[self.link.rank].copy_(x)

        def land() -> Tensor:
            wait()
            return out

        return land

    def transpose(self) -> LinearMap:
        return SumApart(self.link, self.side)


@dataclass(frozen=True)
class SumApart:
    """Whole terms to their sum, split; added in rank order."""

    link: Link
    side: Side

    def start(self, x: Tensor) -> Land:
        here, peers = self.link.rank, range(self.link.size)
        terms = [_room(x, {self.side.dim: self.side.held(here)}) for _ in peers]
        sends = [self.side.at(x, peer) for peer in peers]
        wait = self.link.exchange(sends, terms, what=f"sum {self.side}")
        terms[here].copy_(sends[here])

        def land() -> Tensor:
            wait()
            total = terms[0]
            for term in terms[1:]:
                total += term
            return total

        return land

    def transpose(self) -> LinearMap:
        return Collect(self.link, self.side)


def taken(x: Tensor, dim: int, where: slice) -> Tensor:
    """A slice of ``x`` along one dim."""
    return x[(slice(None),) * dim + (where,)]


def _room(x: Tensor, sizes: dict[int, int]) -> Tensor:
    return x.new_empty([sizes.get(dim, size) for dim, size in enumerate(x.shape)])
