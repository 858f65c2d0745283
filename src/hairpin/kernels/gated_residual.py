"""What ends an attention or a triangle update: bias, gate, dropout, residual connection.

Dims: a, b two dims of places, c channels.
"""

import torch
from torch import Tensor

from hairpin.kernels.choice import learns, why_not

WIDEST = 4096  # channels that the Triton kernel takes: one place is one row of a tile


def gated_residual(
    x: Tensor,
    *,
    gate: Tensor | None = None,
    x_bias: Tensor | None = None,
    gate_bias: Tensor | None = None,
    kept: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """``residual + kept * sigmoid(gate + gate_bias) * (x + x_bias)``; what is left out is skipped.

    Args:
        x: the update ``[a, b, c]``.
        gate: logits of the gate, ``[a, b, c]``.
        x_bias: ``[c]``, of the layer that made ``x``.
        gate_bias: ``[c]``, of the layer that made ``gate``.
        kept: dropout's factors, 0 or 1 / (1 - rate), any shape that broadcasts to ``x``'s.
        residual: ``[a, b, c]``.

    Returns:
        ``[a, b, c]``.
    """
    if why_not_triton(x, gate, x_bias, gate_bias, kept, residual) is None:
        return _on_cuda(x, gate, x_bias, gate_bias, kept, residual)
    if x_bias is not None:
        x = x + x_bias
    if gate is not None:
        x = torch.sigmoid(gate if gate_bias is None else gate + gate_bias) * x
    if kept is not None:
        x = x * kept
    return x if residual is None else residual + x


def why_not_triton(  # noqa: PLR0917  # in the order of the custom operation
    x: Tensor,
    gate: Tensor | None,
    x_bias: Tensor | None,
    gate_bias: Tensor | None,
    kept: Tensor | None,
    residual: Tensor | None,
) -> str | None:
    """Why torch's own operations compute this; None where Triton does."""
    reason = why_not(x, gate, x_bias, gate_bias, kept, residual)
    if reason is not None:
        return reason
    if gate is None and kept is None:
        return "there is nothing to fuse but a sum"
    if gate is None and gate_bias is not None:
        return "a gate's bias without a gate counts for nothing"
    if x.dim() != 3 or x.shape[-1] > WIDEST:
        return f"the shape is {list(x.shape)}"
    if any(t is not None and (t.shape != x.shape or t.dtype != x.dtype) for t in (gate, residual)):
        return "shapes or dtypes differ"
    return "the dropout mask learns" if learns(kept) else None


def _on_cuda(  # noqa: PLR0917  # the same
    x: Tensor,
    gate: Tensor | None,
    x_bias: Tensor | None,
    gate_bias: Tensor | None,
    kept: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    from hairpin.kernels.cuda import gated_residual as twin

    tensors = [t if t is None or t.stride(-1) == 1 else t.contiguous() for t in (x, gate, residual)]
    kept = None if kept is None else kept.expand(x.shape)
    out: Tensor = twin.gated_residual(tensors[0], tensors[1], x_bias, gate_bias, kept, tensors[2])
    return out
