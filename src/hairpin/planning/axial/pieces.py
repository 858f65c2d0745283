"""Work and its transfer in pieces, so that one piece is under way while the next is computed."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from hairpin.layout import shard_offset, shard_size, shard_sizes
from hairpin.planning.axial.way import Way


def turned_rows(
    rows: Callable[[slice], Tensor], pattern: str, src: str, dst: str, way: Way
) -> Tensor:
    """Compute a tensor some rows at a time, and turn its split, each piece as soon as it is there.

    Args:
        rows: gives rows ``src`` of this rank's part, ``src`` being the first dim of the pattern.
            Every call draws the same random numbers, those of one call for all rows.
        pattern: of the tensor.
        src: dim that it is held along; dst: dim that the result is held along.

    Returns:
        the whole of ``src``, part of ``dst``.
    """
    mine = way.mine(src)
    own = mine.stop - mine.start
    pieces = 1 if way.passing == "ring" else way.pieces  # a bias would pass by once for each
    if pieces == 1 or way.degree == 1:
        return way.turn(rows(slice(0, own)), pattern, src, dst).wait()
    sizes = [
        [shard_size(length, pieces, piece) for length in shard_sizes(way.lengths[src], way.degree)]
        for piece in range(pieces)
    ]  # a piece is dealt to the ranks as evenly as the whole, the larger parts first
    coming = []
    with same_draws() as again:
        for piece, lengths in enumerate(sizes):
            again()
            start = shard_offset(own, pieces, piece)
            x = rows(slice(start, start + shard_size(own, pieces, piece)))
            part = replace(way, lengths={**way.lengths, src: sum(lengths)})
            coming.append(part.turn(x, pattern, src, dst))
    parts = [pending.wait().split(lengths) for pending, lengths in zip(coming, sizes, strict=True)]
    return torch.cat([part[rank] for rank in range(way.degree) for part in parts])


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
