"""The Evoformer and the extra MSA stack (Jumper et al. 2021, Suppl. Algs 6 and 18).

Dims: s sequences, r residues (i, j), c channels. MSA ``m[s, r, c_m]``, pair ``z[i, j, c_z]``.
"""

from torch import Tensor, nn

from hairpin.models.alphafold.config import BlockConfig
from hairpin.models.alphafold.msa import (
    MSAColumnAttention,
    MSAColumnGlobalAttention,
    MSARowAttentionWithPairBias,
    OuterProductMean,
)
from hairpin.models.alphafold.pair import PairStack
from hairpin.models.alphafold.primitives import SharedDropout, Transition


class EvoformerBlock(nn.Module):
    """One block: ``m[s, r, c_m], z[i, j, c_z]`` to the same.

    Suppl. Alg. 6 lines 2 to 10, or Alg. 18 with ``config.extra``; with ``config.outer_first`` the
    pair representation learns from the MSA before the MSA is updated (Evans et al. 2021).
    """

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        c = config
        self.outer_first = c.outer_first
        self.msa_row_attention_with_pair_bias = MSARowAttentionWithPairBias(
            c.c_m, c.c_z, c.msa_heads
        )
        if c.extra:
            self.msa_column_global_attention = MSAColumnGlobalAttention(c.c_m, c.msa_heads)
        else:
            self.msa_column_attention = MSAColumnAttention(c.c_m, c.msa_heads)
        self.msa_transition = Transition(c.c_m, c.msa_transition_factor)
        self.outer_product_mean = OuterProductMean(c.c_m, c.c_z, c.c_outer)
        self.pair_stack = PairStack(
            c.c_z,
            c_triangle=c.c_triangle,
            heads=c.pair_heads,
            factor=c.pair_transition_factor,
            dropout=c.pair_dropout,
            fused=c.fused,
        )
        self.msa_dropout = SharedDropout(c.msa_dropout, dim=0)
        self.extra = c.extra

    def forward(
        self, m: Tensor, z: Tensor, msa_mask: Tensor, pair_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``m[s, r, c_m], z[i, j, c_z], msa_mask[s, r], pair_mask[i, j]`` to new ``m, z``."""
        if self.outer_first:
            z = z + self.outer_product_mean(m, msa_mask)
        m = self.msa_dropout(self.msa_row_attention_with_pair_bias(m, z, msa_mask), m)
        m = m + self._column(m, msa_mask)
        m = m + self.msa_transition(m)
        if not self.outer_first:
            z = z + self.outer_product_mean(m, msa_mask)
        return m, self.pair_stack(z, pair_mask)

    def _column(self, m: Tensor, mask: Tensor) -> Tensor:
        column = self.msa_column_global_attention if self.extra else self.msa_column_attention
        return column(m, mask)  # type: ignore[no-any-return]


class EvoformerStack(nn.Module):
    """Blocks one after another: the body of Suppl. Alg. 6, or the whole of Alg. 18."""

    def __init__(self, config: BlockConfig, blocks: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EvoformerBlock(config) for _ in range(blocks))

    def forward(
        self, m: Tensor, z: Tensor, msa_mask: Tensor, pair_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """``m[s, r, c_m], z[i, j, c_z], msa_mask[s, r], pair_mask[i, j]`` to new ``m, z``."""
        for block in self.blocks:
            m, z = block(m, z, msa_mask, pair_mask)
        return m, z
