"""The gated operands of a triangle multiplication (Jumper et al. 2021, Suppl. Algs 11 and 12).

Dims: i, j residues, k channels in, c channels out of one projection.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from hairpin.kernels.choice import autocasts, learns, why_not


class GatedLinear(NamedTuple):
    """A linear layer and its gate: weights ``[c, k]``, biases ``[c]``."""

    weight: Tensor
    bias: Tensor
    gate_weight: Tensor
    gate_bias: Tensor


def gated_projections(z: Tensor, mask: Tensor, *layers: GatedLinear) -> tuple[Tensor, ...]:
    """``sigmoid(gate(z)) * linear(z) * mask`` of each layer.

    On CUDA all layers are one: ``z`` is read once, neither gates nor projections are written, and
    the results lie in memory channel by channel, as the product over the third residue reads them.

    Args:
        z: ``[i, j, k]``.
        mask: ``[i, j]``.
        layers: their channels out may differ.

    Returns:
        For each layer ``[i, j, c]``.
    """
    if why_not_triton(z, mask, *layers) is None:
        return _on_cuda(z, mask, layers)
    return tuple(_gated(z, layer) * mask[..., None] for layer in layers)


def _gated(z: Tensor, layer: GatedLinear) -> Tensor:
    gate = torch.sigmoid(F.linear(z, layer.gate_weight, layer.gate_bias))
    return gate * F.linear(z, layer.weight, layer.bias)


def why_not_triton(z: Tensor, mask: Tensor, *layers: GatedLinear) -> str | None:
    """Why torch's own operations compute this; None where Triton does."""
    weights = [tensor for layer in layers for tensor in layer]
    reason = why_not(z, mask, *weights)
    if reason is not None:
        return reason
    if autocasts():
        return "autocast picks the dtypes"
    if any(tensor.dtype != z.dtype for tensor in weights):
        return "dtypes differ"
    if mask.shape != z.shape[:-1]:
        return "the mask is broadcast"
    return "the mask learns" if learns(mask) else None


def _on_cuda(z: Tensor, mask: Tensor, layers: tuple[GatedLinear, ...]) -> tuple[Tensor, ...]:
    from hairpin.kernels.cuda import triangle as twin

    merged = [
        torch.cat(parts) if len(parts) > 1 else parts[0] for parts in zip(*layers, strict=True)
    ]
    rows = z.reshape(-1, z.shape[-1]).contiguous()
    out: Tensor = twin.gated_projections(
        rows, mask.reshape(-1).contiguous(), *(tensor.contiguous() for tensor in merged)
    )
    parts = out.split([layer.weight.shape[0] for layer in layers])
    return tuple(part.view(part.shape[0], *z.shape[:-1]).movedim(0, -1) for part in parts)
