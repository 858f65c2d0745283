"""Parts that pass by the ranks of an axis, and sums that grow on their way: no graph is kept.

Every step is started before what it hides behind: a part is sent on before it is used, a sum while
the next term is computed.
"""

from collections.abc import Callable, Iterator, Sequence

from torch import Tensor

from hairpin.comm.transport import Link, Wait

ShapeOf = Callable[[int], Sequence[int]]  # of what belongs to the rank at a place


def passing(x: Tensor, shape_of: ShapeOf, link: Link) -> Iterator[tuple[int, Tensor]]:
    """(owner, part) of every rank of the axis, this rank's first."""
    for step in range(link.size):
        owner, following = ((link.rank - step - more) % link.size for more in (0, 1))
        wait, room = None, x
        if step + 1 < link.size:
            wait, room = _onward(x, shape_of(following), link, what="parts pass on")
        yield owner, x
        if wait is not None:
            wait()
            x = room


def summed(term: Callable[[int], Tensor], shape_of: ShapeOf, link: Link) -> Tensor:
    """The sum of all ranks' terms of what belongs to this rank; ``term`` takes a place."""
    total = term((link.rank - 1) % link.size)
    for step in range(2, link.size + 1):
        owner = (link.rank - step) % link.size
        wait, room = _onward(total, shape_of(owner), link, what="sums pass on")
        total = term(owner)
        wait()
        total += room
    return total


def returned(
    x: Tensor, term: Callable[[int, Tensor], Tensor], shape_of: ShapeOf, link: Link
) -> Tensor:
    """The sum of all ranks' terms of this rank's part, each made as the part passes by.

    Args:
        term: of an owner and its part, of the part's shape.
    """
    parts = passing(x, shape_of, link)
    total = term(*next(parts))
    coming: tuple[Wait, Tensor] | None = None
    for owner, part in parts:
        mine = term(owner, part)
        if coming is not None:
            mine += _landed(coming)
        shape = shape_of((owner - 1) % link.size)
        coming = _onward(mine, shape, link, what="gradients of parts pass on")
    return total if coming is None else total + _landed(coming)


def _landed(coming: tuple[Wait, Tensor]) -> Tensor:
    wait, room = coming
    wait()
    return room


def _onward(x: Tensor, shape: Sequence[int], link: Link, *, what: str) -> tuple[Wait, Tensor]:
    """Send ``x`` to the next rank, and receive from the one before what has ``shape``."""
    room = x.new_empty(tuple(shape))
    none = x.new_empty(0)
    sends, receives = [none] * link.size, [none] * link.size
    sends[(link.rank + 1) % link.size], receives[(link.rank - 1) % link.size] = x, room
    return link.exchange(sends, receives, what=what), room
