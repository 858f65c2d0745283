"""Row attention whose rows are split and whose pair bias is, too."""

from dataclasses import replace
from typing import Any

from torch import Tensor

from hairpin import kernels
from hairpin.comm.pending import Pending
from hairpin.planning.axial.way import Way

_PATTERN = "h q k"


def crossing(bias: Tensor, held: str, way: Way) -> Pending:
    """Start making a bias ``[h, q, k]``, held along ``q`` or ``k``, ready for rows of all ranks.

    It is the same for all rows and is made where pairs are split. All of it is gathered; or each
    rank gets that of its own queries, which then pass by.
    """
    way = _with_queries(way)
    if _gathers(way):
        return way.whole(bias, _PATTERN, held)
    return way.turn(bias, _PATTERN, held, "q")


def attend(attention: Any, x: Tensor, mask: Tensor, bias: Pending, way: Way) -> Tensor:
    """Gated attention along the second dim of ``x``, whose rows are this rank's.

    Args:
        attention: has the submodules of the model's ``Attention``.
        x: ``[b, q, c]``, normalised; mask: ``[b, q]``.
        bias: from :func:`crossing`.

    Returns:
        ``[b, q, c]``.
    """
    if _gathers(way):
        return attention(x, mask, bias.wait())  # type: ignore[no-any-return]
    q, k, v = (
        layer(x).unflatten(-1, (attention.heads, -1)).transpose(-2, -3)
        for layer in (attention.query, attention.key, attention.value)
    )
    k, v = k.contiguous(), v.contiguous()  # once: else each part's products keep copies of them
    split, near = (_PATTERN, "q"), (q, k, v, mask)
    found = _with_queries(way).as_it_passes(_attended, bias.wait(), split, near=near, dim=2)
    y = found.transpose(-2, -3).flatten(-2)
    return attention.output(kernels.gated_residual(y, gate=attention.gate(x)))  # type: ignore[no-any-return]


def _attended(  # noqa: PLR0917  # in the order in which they pass by
    rows: slice, bias: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor
) -> Tensor:
    """The queries that a part of the bias belongs to, with all keys."""
    return kernels.attention(q[:, :, rows], k, v, mask=mask, bias=bias)


def _gathers(way: Way) -> bool:
    return way.passing == "gather" or way.degree == 1


def _with_queries(way: Way) -> Way:
    residues = way.lengths["r"]
    return replace(way, lengths={**way.lengths, "q": residues, "k": residues})
