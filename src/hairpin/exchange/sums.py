"""Adding up gradients that come in terms, without copies that can be spared."""

from collections.abc import Callable, Sequence

from torch import Tensor

from hairpin.exchange.port import wide

Tensors = tuple[Tensor, ...]


class Sum:
    """Terms of some tensors ``[b, h, s, .]``, each of some of the s rows, added up.

    A first term is kept as it came, and a single one of all rows is the sum. Terms become as wide
    as a state when they are added.

    Args:
        length: s.
        zeros: makes tensors of zeros, as wide as a state.
        homes: (rows, tensors of those rows) where terms are to go at once; they hold zeros.
    """

    def __init__(
        self,
        length: int,
        zeros: Callable[[], Tensors],
        homes: Sequence[tuple[slice, Tensors]] = (),
    ) -> None:
        self.whole, self.zeros, self.homes = slice(0, length), zeros, homes
        self.rows: slice | None = None
        self.held: Tensors = ()

    def add(self, rows: slice, terms: Tensors) -> None:
        """Add a term of some rows. It is given away: it may become part of the sum."""
        if self.homes:
            for at, tensors in self.homes:
                _add(tensors, at, terms, rows)
        elif self.rows is None:
            self.rows, self.held = rows, terms
        else:
            self._spread()
            _add(self.held, self.whole, terms, rows)

    def add_onto(self, tensors: Tensors) -> None:
        """Add the sum to tensors of all rows."""
        if self.rows is not None:
            _add(tensors, self.whole, self.held, self.rows)

    def put_into(self, tensors: Tensors) -> None:
        """Write the sum over tensors of all rows."""
        for x in tensors if self.rows != self.whole else ():
            x.zero_()
        if self.rows is not None:
            for x, term in zip(tensors, self.held, strict=True):
                x[:, :, self.rows] = term

    def total(self) -> Tensors:
        """The sum, where it is not at its homes."""
        if self.rows != self.whole:
            self._spread()
        return self.held

    def _spread(self) -> None:
        """Make what is held of all rows, and wide."""
        if self.rows == self.whole and all(x.dtype == wide(x.dtype) for x in self.held):
            return
        full = self.zeros()
        self.put_into(full)
        self.rows, self.held = self.whole, full


def _add(tensors: Tensors, at: slice, terms: Tensors, rows: slice) -> None:
    """Add terms of some rows to tensors of the rows ``at``, where they overlap."""
    first, stop = max(at.start, rows.start), min(at.stop, rows.stop)
    if first < stop:
        for x, term in zip(tensors, terms, strict=True):
            x[:, :, first - at.start : stop - at.start] += term[
                :, :, first - rows.start : stop - rows.start
            ]
