"""The attention whose cost is asked for, and the work of it that kernels really do.

Work is counted on the tiles that kernels compute, so causal masks, windows, documents, and how an
order balances them, are what they are.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from hairpin.errors import PlanError
from hairpin.exchange.mask import Mask
from hairpin.exchange.order import Kind, Order
from hairpin.exchange.tiles import cut

_COUNTED_LENGTH = 1 << 15  # longer sequences are counted at a smaller scale
_COUNTED_PLACES = 48  # and only so many places, evenly chosen

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True, kw_only=True)
class AttentionShape:
    """One attention layer over the whole sequence.

    Attributes:
        length: queries.
        heads: of the queries, h.
        head_dim: channels of a head, d; the values have as many.
        groups: heads of keys and values, g; the default is h.
        keys: their number; the default is ``length``.
        batch: sequences.
        element_bytes: of an element of q, k and v.
        mask: which keys count.

    Raises:
        PlanError: a number below 1, or h no multiple of g.
    """

    length: int
    heads: int
    head_dim: int
    groups: int | None = None
    keys: int | None = None
    batch: int = 1
    element_bytes: int = 4
    mask: Mask = field(default_factory=Mask)

    def __post_init__(self) -> None:
        for name in ("length", "heads", "head_dim", "batch", "element_bytes"):
            if getattr(self, name) < 1:
                raise PlanError(f"attention: {name}={getattr(self, name)}; give 1 or more")
        if self.key_heads < 1 or self.heads % self.key_heads:
            raise PlanError(
                f"attention: {self.heads} heads and {self.groups} key/value heads; the first must "
                "be a multiple of the second"
            )
        self.mask.require_length(self.length, self.key_length)

    @property
    def key_heads(self) -> int:
        """g, with its default."""
        return self.heads if self.groups is None else self.groups

    @property
    def key_length(self) -> int:
        """Keys, with their default."""
        return self.length if self.keys is None else self.keys


@dataclass(frozen=True)
class Counts:
    """What kernels compute for places' queries and each place's keys, ``[place, steps away]``.

    Attributes:
        places: the places that were counted.
        scores: that are computed.
        calls: of a kernel.
        rows, columns: of those calls together.
    """

    places: tuple[int, ...]
    scores: Array
    calls: Array
    rows: Array
    columns: Array


def count_work(kind: Kind, shape: AttentionShape, places: int) -> Counts:
    """Count the tiles of every pair of places.

    A long sequence is counted at a smaller scale, and of many places only some.
    """
    mask, scale = shape.mask, 1
    if mask.documents is None and mask.blocks is None and shape.length > _COUNTED_LENGTH:
        scale = shape.length // _COUNTED_LENGTH
        window = None if mask.window is None else -(-mask.window // scale)
        mask = replace(mask, window=window, prefix=mask.prefix // scale)
    length, keys = shape.length // scale, shape.key_length // scale
    step = max(1, places // _COUNTED_PLACES)
    counted = tuple(sorted({*range(0, places, step), places - 1}))
    queries = Order(kind, length, mask.documents)
    others = queries if keys == length else Order("contiguous", keys)
    held = [others.positions(places, place) for place in range(places)]
    table = np.zeros((4, len(counted), places))
    for row, place in enumerate(counted):
        mine = queries.positions(places, place)
        if mask == Mask():
            width = np.array([len(held[(place - away) % places]) for away in range(places)])
            of_each = len(mine) * width * scale**2, 1, len(mine) * scale, width * scale
            table[:, row] = np.stack(np.broadcast_arrays(*of_each))
            continue
        for away in range(places):
            for tile in cut(mine, held[(place - away) % places], mask, keys):
                height, width = (s.stop - s.start for s in (tile.rows, tile.keys))
                table[:, row, away] += tile.scores * scale**2, 1, height * scale, width * scale
    return Counts(counted, *table)
