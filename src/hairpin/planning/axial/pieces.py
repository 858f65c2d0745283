"""Rows a few at a time: what they need meanwhile is small, and what they send goes behind the next.

In a split block every stage treats the rows that a rank holds alike and apart from each other. So
the dim that is split over ranks can be split once more, in time.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from hairpin.layout import shard_offset, shard_size, shard_sizes
from hairpin.planning.axial.way import Line, Way

Rows = Callable[[slice], Tensor]


def by_rows(rows: Rows, length: int, way: Way) -> Tensor:
    """Compute a tensor in ``way.chunks`` parts of its first dim, one after another.

    Where gradients are wanted, each part is computed again in the backward, so that nothing of it
    is kept meanwhile.

    Args:
        rows: gives some rows; it may not talk to other ranks.
        length: of the first dim.
    """
    if way.chunks == 1:
        return rows(slice(0, length))
    return torch.cat([_forgotten(rows, part) for part in _parts(length, way.chunks)])


def turned_rows(rows: Rows, length: int, turn: tuple[str, str, str], way: Way) -> Tensor:
    """Compute a tensor some rows at a time, and turn its split, each piece as soon as it is there.

    Args:
        rows: gives some rows of this rank's part. Every call draws the same random numbers, those
            of one call for all rows.
        length: of this rank's rows.
        turn: pattern of the tensor, the dim that it is held along, which is the first of them, and
            the dim that the result is held along.

    Returns:
        all rows, this rank's part of the other dim.
    """
    pieces = 1 if way.passing == "ring" else max(way.pieces, way.chunks)
    if not isinstance(way, Line) or pieces == 1 or way.degree == 1:
        return way.turn(_at_once(rows, length, way), *turn).wait()
    _, src, _ = turn
    sizes = [
        [shard_size(held, pieces, piece) for held in shard_sizes(way.lengths[src], way.degree)]
        for piece in range(pieces)
    ]  # a piece is dealt to the ranks as evenly as the whole, the larger parts first
    coming = []
    with same_draws() as again:
        for part, lengths in zip(_parts(length, pieces), sizes, strict=True):
            again()
            x = rows(part) if way.chunks == 1 else _forgotten(rows, part)
            piece = replace(way, lengths={**way.lengths, src: sum(lengths)})
            coming.append(piece.turn(x, *turn))
    parts = [pending.wait().split(lengths) for pending, lengths in zip(coming, sizes, strict=True)]
    return torch.cat([part[rank] for rank in range(way.degree) for part in parts])


def _at_once(rows: Rows, length: int, way: Way) -> Tensor:
    """All rows, to be turned together: in chunks, unless they meet what passes by."""
    if way.chunks == 1 or (way.passing == "ring" and way.degree > 1):
        return rows(slice(0, length))
    with same_draws() as again:

        def drawn(part: slice) -> Tensor:
            again()
            return rows(part)

        return by_rows(drawn, length, way)


def _parts(length: int, count: int) -> list[slice]:
    starts = [shard_offset(length, count, part) for part in range(count + 1)]
    return [slice(start, stop) for start, stop in pairwise(starts)]


def _forgotten(rows: Rows, part: slice) -> Tensor:
    """Some rows; computed again in a backward."""
    if not torch.is_grad_enabled():
        return rows(part)
    result: Tensor = checkpoint(rows, part, use_reentrant=False)
    return result


@contextmanager
def same_draws() -> Iterator[Callable[[], None]]:
    """The function given starts torch's random numbers again from where they were."""
    on_cpu = torch.get_rng_state()
    on_cuda = torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None

    def again() -> None:
        torch.set_rng_state(on_cpu)
        if on_cuda is not None:
            torch.cuda.set_rng_state(on_cuda)

    yield again
