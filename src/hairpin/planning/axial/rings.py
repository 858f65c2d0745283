"""Parts that pass by the ranks of an axis, and sums that grow on their way: no graph is kept.

Every step is started before what it hides behind: a part is sent on before it is used, a sum while
the next term is computed.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

from torch import Tensor

from hairpin.comm.transport import Link, Wait

ShapeOf = Callable[[int], Sequence[int]]  # of what belongs to the rank at a place
T = TypeVar("T")
Coming = tuple[Wait, Tensor]  # what is on its way here, and where it will lie


def passing(x: Tensor, shape_of: ShapeOf, link: Link) -> Iterator[tuple[int, Tensor]]:
    """(owner, part) of every rank of the axis, this rank's first, which is sent on at once."""
    return _passing(x, _next_part(x, 0, shape_of, link), shape_of, link)


def _passing(
    x: Tensor, coming: Coming | None, shape_of: ShapeOf, link: Link
) -> Iterator[tuple[int, Tensor]]:
    for step in range(link.size):
        yield (link.rank - step) % link.size, x
        if coming is not None:
            x = _landed(coming)
            coming = _next_part(x, step + 1, shape_of, link)


def _next_part(x: Tensor, step: int, shape_of: ShapeOf, link: Link) -> Coming | None:
    """Send on the part of a step, and receive that of the next; none follows the last."""
    if step + 1 == link.size:
        return None
    return _onward(x, shape_of((link.rank - step - 1) % link.size), link, what="parts pass on")


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
    parts: Iterator[tuple[T, Tensor]],
    term: Callable[[T, Tensor], Tensor],
    shape_of: ShapeOf,
    link: Link,
) -> Tensor:
    """The sum of all ranks' terms of this rank's part, each made as the part passes by.

    Args:
        parts: from :func:`passing`, with their owners or what stands for them.
        term: of such a one and its part, of the part's shape.
    """
    total = term(*next(parts))
    coming: Coming | None = None
    for step, (owner, part) in enumerate(parts, start=1):
        mine = term(owner, part)
        if coming is not None:
            mine += _landed(coming)
        shape = shape_of((link.rank - step - 1) % link.size)
        coming = _onward(mine, shape, link, what="gradients of parts pass on")
    return total if coming is None else total + _landed(coming)


def _landed(coming: Coming) -> Tensor:
    wait, room = coming
    wait()
    return room


def _onward(x: Tensor, shape: Sequence[int], link: Link, *, what: str) -> Coming:
    """Send ``x`` to the next rank, and receive from the one before what has ``shape``."""
    room = x.new_empty(tuple(shape))
    none = x.new_empty(0)
    sends, receives = [none] * link.size, [none] * link.size
    sends[(link.rank + 1) % link.size], receives[(link.rank - 1) % link.size] = x, room
    return link.exchange(sends, receives, what=what), room
