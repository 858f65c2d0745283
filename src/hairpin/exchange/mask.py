"""Which keys a query sees: for each query an interval of positions, less whole blocks."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hairpin.errors import SequenceError


@dataclass(frozen=True, eq=False)
class BlockSparse:
    """Which blocks of keys the queries of a block see, by position in the whole sequence.

    Query i sees key j where ``table[i // block_size, j // block_size]``. A block that is not seen
    costs nothing. What is left is cut into rectangles that kernels take whole: the larger the
    blocks and the longer the runs of seen ones, the fewer.

    Attributes:
        block_size: positions of a block, of queries and of keys; the last ones may be shorter.
        table: bool ``[query blocks, key blocks]``.

    Raises:
        SequenceError: a block size below 1, or a table that is not two-dimensional and bool.
    """

    block_size: int
    table: Tensor

    def __post_init__(self) -> None:
        if self.block_size < 1:
            raise SequenceError(f"blocks: block_size={self.block_size}; give 1 or more")
        table: Any = self.table
        if not isinstance(table, Tensor) or table.dim() != 2 or table.dtype != torch.bool:
            got = (
                f"{table.dtype} {tuple(table.shape)}" if isinstance(table, Tensor) else repr(table)
            )
            raise SequenceError(
                f"blocks: the table is {got}; give a bool tensor [query blocks, key blocks]"
            )
        object.__setattr__(self, "table", table.detach().cpu().clone())

    def rectangles(self, queries: Tensor, keys: Tensor) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of the scores that are seen.

        Args:
            queries: positions ``[q]``, ascending; keys: ``[k]``, likewise.
        """
        (of_rows, rows), (of_columns, columns) = (self._runs(x) for x in (queries, keys))
        seen = self.table.numpy()[of_rows][:, of_columns]
        changes = np.flatnonzero((seen[1:] != seen[:-1]).any(1)) + 1
        bounds = [0, *changes.tolist(), len(seen)]
        for first, stop in pairwise(bounds):
            edges = np.flatnonzero(np.diff(seen[first].astype(np.int8), prepend=0, append=0))
            for low, high in edges.reshape(-1, 2).tolist():
                yield slice(rows[first], rows[stop]), slice(columns[low], columns[high])

    def _runs(self, positions: Tensor) -> tuple[np.ndarray[Any, Any], list[int]]:
        """Blocks of ascending positions, and where each begins among them, and the end."""
        blocks, counts = np.unique((positions // self.block_size).numpy(), return_counts=True)
        return blocks, [0, *np.cumsum(counts).tolist()]

    @cached_property
    def _key(self) -> tuple[int, tuple[int, ...], bytes]:
        return self.block_size, tuple(self.table.shape), self.table.numpy().tobytes()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BlockSparse) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    def __repr__(self) -> str:
        rows, columns = self.table.shape
        share = float(self.table.double().mean()) if self.table.numel() else 0.0
        return f"BlockSparse({rows} x {columns} blocks of {self.block_size}, {share:.0%} seen)"


@dataclass(frozen=True)
class Mask:
    """Which keys count, by position in the whole sequence. The default lets every key count.

    All restrictions hold together. Positions are global, so a mask means the same however the
    sequence is dealt to ranks.

    Attributes:
        causal: a query sees no key after itself.
        window: a query sees keys at a distance below ``window`` (itself is at distance 0).
        documents: lengths of the documents that the sequence consists of, in order; a query sees
            only its own document.
        prefix: the first ``prefix`` keys are seen by every query, causal or not.
        blocks: which blocks of keys the queries of a block see.

    Raises:
        SequenceError: a window below 1, a negative length or prefix, or a prefix together with a
            window, documents or blocks, which would leave gaps in what a query sees.
    """

    causal: bool = False
    window: int | None = None
    documents: tuple[int, ...] | None = None
    prefix: int = 0
    blocks: BlockSparse | None = None

    def __post_init__(self) -> None:
        if self.documents is not None:
            object.__setattr__(self, "documents", tuple(int(n) for n in self.documents))
        if self.window is not None and self.window < 1:
            raise SequenceError(
                f"mask: window={self.window}; a query sees at least itself, so give 1 or more"
            )
        if min(self.documents or (0,)) < 0 or self.prefix < 0:
            raise SequenceError(
                f"mask: documents={self.documents}, prefix={self.prefix}; lengths are 0 or more"
            )
        if self.prefix and (self.window, self.documents, self.blocks) != (None, None, None):
            raise SequenceError(
                "mask: a prefix together with a window, documents or blocks leaves gaps in what a "
                "query sees; give the prefix alone or with causal=True"
            )

    def interval(self, queries: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        """First key that each query sees and the one after the last, whichever blocks it sees.

        Args:
            queries: global positions ``[q]``, int64.
            keys: of the whole sequence.

        Returns:
            two int64 tensors ``[q]``; the second may not be above the first: nothing is seen.
        """
        first, stop = torch.zeros_like(queries), torch.full_like(queries, keys)
        if self.documents is not None:
            ends = torch.tensor([0, *accumulate(self.documents)])
            document = torch.searchsorted(ends, queries, right=True)
            first, stop = ends[document - 1], ends[document]
        if self.causal:
            stop = torch.minimum(stop, queries + 1)
        if self.window is not None:
            first = torch.maximum(first, queries - self.window + 1)
            stop = torch.minimum(stop, queries + self.window)
        if self.prefix:
            stop = torch.clamp(stop, min=min(self.prefix, keys))
        return first, stop

    def sees(self, queries: Tensor, keys: int) -> Tensor:
        """Which of all keys each query sees: bool ``[q, keys]``."""
        first, stop = self.interval(queries, keys)
        at = torch.arange(keys)
        seen = (at >= first[:, None]) & (at < stop[:, None])
        if self.blocks is not None:
            size = self.blocks.block_size
            seen &= self.blocks.table[queries // size][:, at // size]
        return seen

    def require_length(self, length: int, keys: int) -> None:
        """Raise unless the documents and the blocks fill the sequence.

        Raises:
            SequenceError: naming both lengths.
        """
        if self.blocks is not None:
            size = self.blocks.block_size
            wanted, got = (-(-length // size), -(-keys // size)), tuple(self.blocks.table.shape)
            if got != wanted:
                raise SequenceError(
                    f"mask: the table of blocks is {list(got)}; {length} queries and {keys} "
                    f"keys in blocks of {size} need {list(wanted)}"
                )
        if self.documents is None:
            return
        if sum(self.documents) != length or length != keys:
            raise SequenceError(
                f"mask: the documents have {sum(self.documents)} positions together, the queries "
                f"{length} and the keys {keys}; give the lengths of all documents, padding as one "
                "of its own"
            )
