"""Cutting the scores of one block of queries and keys into tiles that a kernel takes whole.

Where a query sees an interval of the keys' positions, the scores of sorted queries and keys are
bounded by two staircases. Between them lie rectangles that are seen whole, triangles that a
kernel's causal flag covers, and bands that need a mask. Where it sees some blocks of them, the
rectangles of seen blocks are cut like that, each for itself. What nobody sees is in no tile: it
costs nothing.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from hairpin.exchange.mask import Mask

_BAND_ROWS = 128  # rows of a masked tile: more waste what the window leaves out
_MIN_ROWS = 16  # staircases of fewer rows on average are cheaper as masked tiles

Ints = np.ndarray[tuple[int], np.dtype[np.int64]]


@dataclass(frozen=True)
class Tile:
    """A rectangle of scores: ``rows`` of the queries by ``keys``.

    Attributes:
        kind: ``"full"``: all count; ``"causal"``: row i sees keys 0..i, as many rows as keys;
            ``"masked"``: row i sees ``first[i]..stop[i]``, counted from the tile's first key.
    """

    rows: slice
    keys: slice
    kind: Literal["full", "causal", "masked"]
    first: Tensor | None = None
    stop: Tensor | None = None

    def moved(self, rows: int, keys: int) -> "Tile":
        """The same tile of a block that this one's begins ``rows`` and ``keys`` into."""
        return replace(self, rows=_moved(self.rows, rows), keys=_moved(self.keys, keys))

    @property
    def scores(self) -> int:
        """Scores that a kernel computes for it: half of a causal tile."""
        rows: int = self.rows.stop - self.rows.start
        keys: int = self.keys.stop - self.keys.start
        return rows * (rows + 1) // 2 if self.kind == "causal" else rows * keys


def cut(queries: Tensor, keys: Tensor, mask: Mask, key_length: int) -> list[Tile]:
    """The tiles of one block.

    Args:
        queries: positions ``[q]`` of the block's queries, ascending.
        keys: positions ``[k]`` of its keys, ascending.
        key_length: keys in the whole sequence.
    """
    if not len(queries) or not len(keys):
        return []
    if mask.blocks is not None:
        return _cut_blocks(queries, keys, mask, key_length)
    lower, upper = mask.interval(queries, key_length)
    first = torch.searchsorted(keys, lower).numpy()
    stop = np.maximum(torch.searchsorted(keys, upper).numpy(), first)
    pieces = list(_pieces(first, stop))
    if len(pieces) > max(4, len(queries) // _MIN_ROWS):
        pieces = [(0, len(queries), "other")]
    tiles: list[Tile] = []
    for start, end, kind in pieces:
        tiles += _tiles(start, end, kind, first, stop)
    return tiles


def _cut_blocks(queries: Tensor, keys: Tensor, mask: Mask, key_length: int) -> list[Tile]:
    assert mask.blocks is not None
    rest = replace(mask, blocks=None)
    first, stop = (x.numpy() for x in rest.interval(queries, key_length))
    at = keys.numpy()
    tiles: list[Tile] = []
    for rows, columns in mask.blocks.rectangles(queries, keys):
        low, high = at[columns.start], at[columns.stop - 1]
        if stop[rows].min() > high and first[rows].max() <= low:
            tiles.append(Tile(rows, columns, "full"))
        elif stop[rows].max() > low and first[rows].min() <= high:
            pieces = cut(queries[rows], keys[columns], rest, key_length)
            tiles += [tile.moved(rows.start, columns.start) for tile in pieces]
    return tiles


def _moved(x: slice, by: int) -> slice:
    return slice(x.start + by, x.stop + by)


def _pieces(first: Ints, stop: Ints) -> Iterator[tuple[int, int, str]]:
    """Rows [start, end) in which both staircases go on alike."""
    rises = np.stack([np.diff(first), np.diff(stop)])
    kinds = np.full(rises.shape[1], 2)
    kinds[(rises[0] == 0) & (rises[1] == 0)] = 0
    kinds[(rises[0] == 0) & (rises[1] == 1)] = 1
    names = ("flat", "stairs", "other")
    changes = np.flatnonzero(np.diff(kinds)) + 1
    bounds = [0, *changes.tolist(), len(kinds)]
    row = 0
    for begin, end in pairwise(bounds):
        if begin == end:
            continue
        kind, last = int(kinds[begin]), end  # the steps join rows begin..end
        if kind == 2:  # the last row may begin a flat or a staircase
            last = end - 1 if end < len(kinds) else end
        if last >= row:
            yield row, last + 1, names[kind] if last > row else "flat"
            row = last + 1
    if row < len(first):
        yield row, len(first), "flat"


def _tiles(start: int, end: int, kind: str, first: Ints, stop: Ints) -> Iterator[Tile]:
    if kind == "other":
        for row in range(start, end, _BAND_ROWS):
            yield from _band(row, min(row + _BAND_ROWS, end), first, stop)
        return
    rows = slice(start, end)
    low, high = int(first[start]), int(stop[start])
    if kind == "flat":
        if high > low:
            yield Tile(rows, slice(low, high), "full")
        return
    if high == low:  # the first row sees nothing yet
        rows, high = slice(start + 1, end), high + 1
    if high - 1 > low:
        yield Tile(rows, slice(low, high - 1), "full")
    yield Tile(rows, slice(high - 1, high - 1 + rows.stop - rows.start), "causal")


def _band(start: int, end: int, first: Ints, stop: Ints) -> Iterator[Tile]:
    seen = stop[start:end] > first[start:end]
    if not seen.any():
        return
    low, high = int(first[start:end][seen].min()), int(stop[start:end][seen].max())
    bounds = [torch.from_numpy(x[start:end] - low) for x in (first, stop)]
    yield Tile(slice(start, end), slice(low, high), "masked", *bounds)
