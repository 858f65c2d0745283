"""From features to the first representations (Jumper et al. 2021, Suppl. Algs 3 to 5, 32).

Dims: s sequences, r residues (i, j), c channels. MSA ``m[s, r, c_m]``, pair ``z[i, j, c_z]``.
Features go by DeepMind's names.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hairpin.models.alphafold.atoms import pseudo_beta
from hairpin.models.alphafold.config import AlphaFoldConfig
from hairpin.models.alphafold.primitives import Linear

Batch = Mapping[str, Tensor]

_LETTERS = 23  # 20 amino acids, unknown, gap, mask


def one_hot(index: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """``index[...]`` to ``[..., classes]``, all zero where the index is none of the classes."""
    return (index[..., None] == torch.arange(classes, device=index.device)).to(dtype)


def distogram(points: Tensor, first_bin: float, last_bin: float, bins: int) -> Tensor:
    """One-hot distances, Suppl. Algs 5 and 32: ``points[..., r, 3]`` to ``[..., r, r, bins]``.

    In Angstrom. The last bin is open; a distance below the first bin is in none.
    """
    lower = torch.linspace(first_bin, last_bin, bins, dtype=points.dtype, device=points.device) ** 2
    upper = torch.cat([lower[1:], lower.new_tensor([1e8])])
    apart = (points[..., :, None, :] - points[..., None, :, :]).square().sum(-1, keepdim=True)
    return ((apart > lower) & (apart < upper)).to(points.dtype)


def deletion_value(deletions: Tensor) -> Tensor:
    """Counts of deletions squeezed into 0..1 (Suppl. Table 1), of the same shape."""
    return torch.atan(deletions / 3) * (2 / math.pi)


class RelativePosition(nn.Module):
    """Suppl. Alg. 4: how far apart two residues are along the chain, ``[i, j, c_z]``."""

    def __init__(self, c_z: int, reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.linear = Linear(2 * reach + 1, c_z)

    def forward(self, batch: Batch) -> Tensor:
        """``residue_index[r]`` to ``[i, j, c_z]``."""
        position = batch["residue_index"]
        offset = (position[:, None] - position[None, :]).clamp(-self.reach, self.reach)
        return _rows(self.linear.weight, offset + self.reach) + self.linear.bias


class RelativeChainPosition(nn.Module):
    """The multimer's relative encoding: by residue, entity and copy (Evans et al. 2021, Sec. 7.1).

    Residues of different chains share one class of position; chains of different entities share one
    class of copy.
    """

    def __init__(self, c_z: int, reach: int, chain_reach: int) -> None:
        super().__init__()
        self.reach = reach
        self.chain_reach = chain_reach
        self.linear = Linear(2 * reach + 2 + 1 + 2 * chain_reach + 2, c_z)

    def forward(self, batch: Batch) -> Tensor:
        """``residue_index, asym_id, entity_id, sym_id``, each ``[r]``, to ``[i, j, c_z]``."""
        positions = 2 * self.reach + 2
        weight = self.linear.weight
        same_chain = _same(batch["asym_id"])
        same_entity = _same(batch["entity_id"])

        offset = _class(batch["residue_index"], self.reach, same_chain)
        copy = _class(batch["sym_id"], self.chain_reach, same_entity)
        entity = same_entity[..., None] * weight[:, positions]
        by_position = _rows(weight[:, :positions], offset)
        by_copy = _rows(weight[:, positions + 1 :], copy)
        return by_position + entity + by_copy + self.linear.bias


def _same(x: Tensor) -> Tensor:
    return x[:, None] == x[None, :]


def _class(x: Tensor, reach: int, within: Tensor) -> Tensor:
    """Clipped difference of two residues' ``x``, and one class more where they are not within."""
    offset = (x[:, None] - x[None, :]).clamp(-reach, reach) + reach
    return torch.where(within, offset, 2 * reach + 1)


def _rows(weight: Tensor, index: Tensor) -> Tensor:
    """A one-hot vector times a matrix is a row of it: ``weight[c, n], index[...] -> [..., c]``."""
    return F.embedding(index, weight.T)


class InputEmbedder(nn.Module):
    """Suppl. Alg. 3: ``target_feat[r, 22], msa_feat[s, r, 49] -> m[s, r, c_m], z[i, j, c_z]``."""

    def __init__(self, config: AlphaFoldConfig) -> None:
        super().__init__()
        c = config
        self.preprocess_1d = Linear(c.target_features, c.c_m)
        self.preprocess_msa = Linear(c.msa_features, c.c_m)
        self.left_single = Linear(c.target_features, c.c_z)
        self.right_single = Linear(c.target_features, c.c_z)
        self.relative_position = (
            RelativeChainPosition(c.c_z, c.max_relative, c.max_relative_chain)
            if c.multimer
            else RelativePosition(c.c_z, c.max_relative)
        )

    def forward(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features to ``m[s, r, c_m], z[i, j, c_z]``."""
        target = batch["target_feat"]
        m = self.preprocess_1d(target) + self.preprocess_msa(batch["msa_feat"])
        z = self.left_single(target)[:, None] + self.right_single(target)[None]
        return m, z + self.relative_position(batch)


class RecyclingEmbedder(nn.Module):
    """Suppl. Alg. 32: what the last recycle found, for the MSA's first row and the pairs."""

    def __init__(self, config: AlphaFoldConfig) -> None:
        super().__init__()
        c = config
        self.bins = c.recycle_first_bin, c.recycle_last_bin, c.recycle_bins
        self.prev_pos_linear = Linear(c.recycle_bins, c.c_z)
        self.prev_msa_first_row_norm = nn.LayerNorm(c.c_m)
        self.prev_pair_norm = nn.LayerNorm(c.c_z)

    def forward(
        self, aatype: Tensor, positions: Tensor, row: Tensor, pair: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What to add to the first row and to the pairs.

        Args:
            aatype: ``[r]``.
            positions: atoms in Angstrom, ``[r, 37, 3]``; zeros in the first recycle, as are
            row: the MSA's first row ``[r, c_m]`` and
            pair: the pair representation ``[i, j, c_z]``.

        Returns:
            ``[r, c_m], [i, j, c_z]``.
        """
        beta, _ = pseudo_beta(aatype, positions, torch.ones_like(positions[..., 0]))
        near = distogram(beta, *self.bins)
        update = self.prev_pos_linear(near) + self.prev_pair_norm(pair)
        return self.prev_msa_first_row_norm(row), update


class ExtraMSAEmbedder(nn.Module):
    """Line 15 of Suppl. Alg. 2: ``extra_msa[s, r]`` and its deletions to ``[s, r, c_e]``."""

    def __init__(self, config: AlphaFoldConfig) -> None:
        super().__init__()
        self.linear = Linear(config.extra_features, config.c_e)

    def forward(self, batch: Batch) -> Tensor:
        """``extra_msa`` and its two features of deletions, ``[s, r]``, to ``[s, r, c_e]``."""
        weight = self.linear.weight
        letters = _rows(weight[:, :_LETTERS], batch["extra_msa"])
        deletions = torch.stack([batch["extra_has_deletion"], batch["extra_deletion_value"]], -1)
        return letters + F.linear(deletions, weight[:, _LETTERS:], self.linear.bias)
