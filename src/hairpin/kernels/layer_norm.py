"""Layer normalisation over the last dim (Ba et al. 2016, arXiv 1607.06450)."""

import torch
from torch import Tensor
from torch.nn import functional as F

from hairpin.kernels.choice import autocasts, why_not

WIDEST = 4096  # channels that the Triton kernel takes: one row is one tile


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float = 1e-5) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias``.

    Args:
        x: ``[..., c]``; on CUDA read as it lies, also channel by channel.
        weight: ``[c]``.
        bias: ``[c]``.
        eps: keeps the variance away from zero.

    Returns:
        ``[..., c]``, contiguous.
    """
    if why_not_triton(x, weight, bias) is None:
        return _on_cuda(x, weight, bias, eps)
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def why_not_triton(x: Tensor, weight: Tensor, bias: Tensor) -> str | None:
    """Why torch's own operation computes this; None where Triton does."""
    reason = why_not(x, weight, bias)
    if reason is None and not 1 <= x.shape[-1] <= WIDEST:
        return f"there are {x.shape[-1]} channels"
    if reason is None and autocasts() and x.dtype != torch.float32:
        return "autocast picks the dtypes"
    return reason


def _on_cuda(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    from hairpin.kernels.cuda import layer_norm as twin

    rows = x.reshape(-1, x.shape[-1])
    if 0 in rows.stride():  # the gradient is laid out as the rows are
        rows = rows.contiguous()
    out: Tensor = twin.layer_norm(rows, weight, bias, eps)[0]
    return out.view(x.shape)
