"""What an Evoformer block does to the MSA representation (Jumper et al. 2021, Suppl. Sec. 1.6).

Dims: s sequences, r residues (i, j where a pair needs two), c channels, h heads. MSA
``m[s, r, c_m]``, pair representation ``z[i, j, c_z]``, masks ``[s, r]`` with 1 for what exists.
"""

import torch
from torch import Tensor, nn

from hairpin.models.alphafold.primitives import (
    Attention,
    GlobalAttention,
    LayerNorm,
    Linear,
    PairBias,
)

_FEWEST = 1e-3  # keeps the mean over no sequences finite
Operand = tuple[Tensor, Tensor]  # ``[s, r, c_outer]`` and its mask ``[s, r]``


class MSARowAttentionWithPairBias(nn.Module):
    """Suppl. Alg. 7: ``m[s, r, c_m], z[i, j, c_z] -> [s, r, c_m]``, along the residues."""

    def __init__(self, c_m: int, c_z: int, heads: int) -> None:
        super().__init__()
        self.query_norm = LayerNorm(c_m)
        self.pair_bias = PairBias(c_z, heads, norm=True)
        self.attention = Attention(c_m, heads)

    def forward(self, m: Tensor, z: Tensor, mask: Tensor) -> Tensor:
        """``m[s, r, c_m], z[r, r, c_z], mask[s, r] -> [s, r, c_m]``."""
        bias = self.pair_bias(z)  # [h, r, r]
        return self.attention(self.query_norm(m), mask, bias)  # type: ignore[no-any-return]


class MSAColumnAttention(nn.Module):
    """Suppl. Alg. 8: ``m[s, r, c_m] -> [s, r, c_m]``, along the sequences."""

    def __init__(self, c_m: int, heads: int) -> None:
        super().__init__()
        self.query_norm = LayerNorm(c_m)
        self.attention = Attention(c_m, heads)

    def forward(self, m: Tensor, mask: Tensor) -> Tensor:
        """``m[s, r, c_m], mask[s, r] -> [s, r, c_m]``."""
        columns = self.query_norm(m.transpose(0, 1))  # [r, s, c_m]
        update: Tensor = self.attention(columns, mask.transpose(0, 1))
        return update.transpose(0, 1)


class MSAColumnGlobalAttention(nn.Module):
    """Suppl. Alg. 19: ``m[s, r, c_e] -> [s, r, c_e]``, along many extra sequences."""

    def __init__(self, c_m: int, heads: int) -> None:
        super().__init__()
        self.query_norm = LayerNorm(c_m)
        self.attention = GlobalAttention(c_m, heads)

    def forward(self, m: Tensor, mask: Tensor) -> Tensor:
        """``m[s, r, c_e], mask[s, r] -> [s, r, c_e]``."""
        columns = self.query_norm(m.transpose(0, 1))  # [r, s, c_e]
        update: Tensor = self.attention(columns, mask.transpose(0, 1))
        return update.transpose(0, 1)


class OuterOperand(nn.Module):
    """One side of the outer product, masked, with its mask (line 2 of Suppl. Alg. 10).

    A module of its own, because where residues are split the right side must be whole.
    """

    def __init__(self, c_m: int, c_outer: int) -> None:
        super().__init__()
        self.linear = Linear(c_m, c_outer)

    def forward(self, m: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """``m[s, r, c_m], mask[s, r] -> [s, r, c_outer], [s, r]``."""
        return self.linear(m) * mask[..., None], mask


class OuterProductMean(nn.Module):
    """Suppl. Alg. 10: ``m[s, r, c_m] -> [i, j, c_z]``, over the sequences.

    The mean is over the sequences that have both residues.
    """

    def __init__(self, c_m: int, c_z: int, c_outer: int) -> None:
        super().__init__()
        self.norm = LayerNorm(c_m)
        self.left = OuterOperand(c_m, c_outer)
        self.right = OuterOperand(c_m, c_outer)
        self.output = Linear(c_outer**2, c_z, init="final", heads_in=c_outer)

    def forward(self, m: Tensor, mask: Tensor) -> Tensor:
        """``m[s, r, c_m], mask[s, r] -> [r, r, c_z]``."""
        m = self.norm(m)
        return self.update(self.left(m, mask), self.right(m, mask))

    def update(self, left: Operand, right: Operand) -> Tensor:
        """Lines 3 and 4, of all residues i and j that the operands have: ``[i, j, c_z]``."""
        outer, count = _outer(left, right)
        return self.output(outer.flatten(-2)) / (_FEWEST + count)[..., None]  # type: ignore[no-any-return]


def _outer(left: Operand, right: Operand) -> tuple[Tensor, Tensor]:
    """Sums over the sequences: ``[i, j, c, d]``, and how many have both residues ``[i, j]``."""
    (a, mask_a), (b, mask_b) = left, right
    return torch.einsum("sic,sjd->ijcd", a, b), mask_a.T @ mask_b
