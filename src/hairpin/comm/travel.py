"""Parts that pass by all ranks of an axis, one after another, each sent on while it is used."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import Tensor

from hairpin.comm.maps import Land
from hairpin.comm.mesh import Mesh
from hairpin.comm.pending import Pending
from hairpin.comm.transport import Link
from hairpin.comm.verbs import apply, check_shape
from hairpin.layout import Layout


@dataclass(frozen=True)
class Shift:
    """Every rank's part moves to the next rank of the ring, or back to the one before it.

    Attributes:
        layout: of the whole tensor; one dim is split over the link's axis.
        turns: how far the parts have moved already.
        onward: to the next rank; else back. The two are each other's transpose.
    """

    layout: Layout
    link: Link
    turns: int
    onward: bool = True

    def start(self, x: Tensor) -> Land:
        link, way = self.link, 1 if self.onward else -1
        shape = local_shape(self.layout, link, (link.rank - self.turns - way) % link.size)
        room = x.new_empty(shape)
        none = x.new_empty(0)
        sends, receives = [none] * link.size, [none] * link.size
        sends[(link.rank + way) % link.size] = x.contiguous()
        receives[(link.rank - way) % link.size] = room
        sends[link.rank] = receives[link.rank] = none
        wait = link.exchange(sends, receives, what=f"parts of {self.layout} move on")

        def land() -> Tensor:
            wait()
            return room

        return land

    def transpose(self) -> "Shift":
        turns = self.turns + (1 if self.onward else -1)
        return Shift(self.layout, self.link, turns, not self.onward)


def local_shape(layout: Layout, link: Link, place: int) -> tuple[int, ...]:
    """Shape of the part that the rank at ``place`` of a link holds, this rank's place elsewhere."""
    coordinates = dict(link.mesh.coordinates(layout.axes))
    coordinates[link.axis] = place, link.size
    return layout.local_shape_at(coordinates)


def travel(x: Tensor, layout: Layout, mesh: Mesh, axis: str) -> Iterator[tuple[int, Tensor]]:
    """(owner, part) of every rank of the axis, this rank's first; M (N-1)/N bytes sent per rank.

    The next part is under way while one is used. Gradients go the same way back, each added to
    that of the part before it, and end at the owner.

    Args:
        x: this rank's part, in ``layout``.

    Raises:
        LayoutError: ``x`` has another shape.
    """
    check_shape(x, layout, mesh)
    link = Link(mesh, axis)
    for turns in range(link.size):
        coming: Pending | None = None
        if turns + 1 < link.size:
            coming = cast(Pending, apply(x, Shift(layout, link, turns), wait=False))
        yield (link.rank - turns) % link.size, x
        if coming is not None:
            x = coming.wait()
