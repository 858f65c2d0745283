"""How the positions of a sequence are dealt to places, so that causal work is balanced."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor

from hairpin.errors import SequenceError
from hairpin.layout import shard_offset, shard_size

Kind = Literal["contiguous", "zigzag", "striped", "documents"]


@dataclass(frozen=True)
class Order:
    """Which positions of a sequence of ``length`` each of N places holds, ascending.

    ========== ====================================================== =========================
    kind       place i of N holds                                     causal work
    ========== ====================================================== =========================
    contiguous one run of positions                                   grows with i
    zigzag     runs i and 2N-1-i of 2N                                equal
    striped    positions i, i+N, i+2N, ...                            equal but for one row
    documents  runs i and 2N-1-i of 2N of every document              equal in each document
    ========== ====================================================== =========================

    Lengths need divide nothing: runs are balanced as everywhere, and may be empty.

    Raises:
        SequenceError: an unknown kind, a negative length, or documents that do not fill it.
    """

    kind: Kind
    length: int
    documents: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise SequenceError(f"order {self.kind!r}: write one of {', '.join(get_args(Kind))}")
        if self.length < 0:
            raise SequenceError(f"order: length {self.length}; a length is 0 or more")
        if self.kind == "documents" and sum(self.documents or ()) != self.length:
            raise SequenceError(
                f"order 'documents': the documents {self.documents} have "
                f"{sum(self.documents or ())} positions, the sequence {self.length}; give the "
                "length of every document"
            )

    def positions(self, places: int, place: int) -> Tensor:
        """Global positions that ``place`` holds, int64, ascending."""
        if self.kind == "striped":
            return torch.arange(min(place, self.length), self.length, places)
        if self.kind == "contiguous":
            return _run(0, self.length, places, place)
        lengths = (self.documents or ()) if self.kind == "documents" else (self.length,)
        starts = [0, *accumulate(lengths)]
        runs = [
            _run(start, length, 2 * places, index)
            for start, length in zip(starts, lengths, strict=False)
            for index in (place, 2 * places - 1 - place)
        ]
        return torch.cat(runs) if runs else torch.empty(0, dtype=torch.long)


def _run(start: int, length: int, parts: int, part: int) -> Tensor:
    """Positions of one balanced part of ``length`` positions from ``start``."""
    first = start + shard_offset(length, parts, part)
    return torch.arange(first, first + shard_size(length, parts, part))
