"""Row attention whose rows are split and whose pair bias is, too."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from hairpin import kernels
from hairpin.comm.pending import Pending
from hairpin.planning.axial.way import Way

_PATTERN = "h q k"
Bias = Tensor | Pending  # held along the queries, to pass by; or whole, once it has arrived


def crossing(bias: Tensor, held: str, way: Way) -> Bias:
    """Start making a bias ``[h, q, k]``, held along ``q`` or ``k``, ready for rows of all ranks.

    It is the same for all rows and is made where pairs are split. All of it is gathered; or each
    rank gets that of its own queries, which then pass by.
    """
    way = _with_queries(way)
    if way.passing == "gather" or way.degree == 1:
        return way.whole(bias, _PATTERN, held)
    return bias if held == "q" else way.turn(bias, _PATTERN, held, "q").wait()


def attend(attention: Any, x: Tensor, mask: Tensor, bias: Bias, way: Way) -> Tensor:
    """Gated attention along the second dim of ``x``, whose rows are this rank's.

    Args:
        attention: has the submodules of the model's ``Attention``.
        x: ``[b, q, c]``, normalised; mask: ``[b, q]``.
        bias: from :func:`crossing`.

    Returns:
        ``[b, q, c]``.
    """
    if isinstance(bias, Pending):
        return attention(x, mask, bias.wait())  # type: ignore[no-any-return]
    q, k, v = (
        layer(x).unflatten(-1, (attention.heads, -1)).transpose(-2, -3)
        for layer in (attention.query, attention.key, attention.value)
    )
    found = {
        (rows.start, rows.stop): kernels.attention(q[:, :, rows], k, v, mask=mask, bias=part)
        for rows, part in _with_queries(way).passing_by(bias, _PATTERN, "q")
    }  # empty parts too: the backward goes the same way on every rank
    y = torch.cat([found[rows] for rows in sorted(found)], 2).transpose(-2, -3).flatten(-2)
    return attention.output(kernels.gated_residual(y, gate=attention.gate(x)))  # type: ignore[no-any-return]


def _with_queries(way: Way) -> Way:
    residues = way.lengths["r"]
    return replace(way, lengths={**way.lengths, "q": residues, "k": residues})
