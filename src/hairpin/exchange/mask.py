"""Which keys a query sees: for each query an interval of positions."""

from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from hairpin.errors import SequenceError


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

    Raises:
        SequenceError: a window below 1, a negative length or prefix, or a prefix together with a
            window or documents, which would leave gaps in what a query sees.
    """

    causal: bool = False
    window: int | None = None
    documents: tuple[int, ...] | None = None
    prefix: int = 0

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
        if self.prefix and (self.window is not None or self.documents is not None):
            raise SequenceError(
                "mask: a prefix together with a window or documents leaves gaps in what a query "
                "sees; give the prefix alone or with causal=True"
            )

    def interval(self, queries: Tensor, keys: int) -> tuple[Tensor, Tensor]:
        """First key that each query sees and the one after the last, among ``keys`` positions.

        Args:
            queries: global positions ``[q]``, int64.

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

    def require_length(self, length: int, keys: int) -> None:
        """Raise unless the documents fill the sequence.

        Raises:
            SequenceError: naming both lengths.
        """
        if self.documents is None:
            return
        if sum(self.documents) != length or length != keys:
            raise SequenceError(
                f"mask: the documents have {sum(self.documents)} positions together, the queries "
                f"{length} and the keys {keys}; give the lengths of all documents, padding as one "
                "of its own"
            )
