"""Templates: structures of similar proteins, embedded into pairs and as rows of the MSA.

Jumper et al. 2021, Suppl. Sec. 1.7.1 and Algs 16 and 17; Evans et al. 2021, Sec. 7.3, for the
multimer. Dims: t templates, r residues (i, j), c channels. Features go by DeepMind's names.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hairpin.errors import DataError
from hairpin.models.alphafold.atoms import atom37_to_torsion_angles, pseudo_beta
from hairpin.models.alphafold.config import AlphaFoldConfig, TemplateConfig
from hairpin.models.alphafold.embedders import distogram, one_hot
from hairpin.models.alphafold.geometry import backbone_frames
from hairpin.models.alphafold.pair import PairStack
from hairpin.models.alphafold.primitives import Attention, Linear

_LETTERS = 22  # 20 amino acids, unknown, gap
_N, _CA, _C = 0, 1, 2  # in the 37 atom types
_PSI = 2  # among the seven torsion angles
_CHI = slice(3, 7)


class TemplatePairStack(nn.Module):
    """Suppl. Alg. 16: ``t[i, j, c_t] -> [i, j, c_t]``; the multimer multiplies first."""

    def __init__(self, config: TemplateConfig, *, multimer: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            PairStack(
                config.c_t,
                c_triangle=config.c_triangle,
                heads=config.pair_heads,
                factor=config.transition_factor,
                dropout=config.dropout,
                fused=config.fused,
                attention_first=not multimer,
            )
            for _ in range(config.blocks)
        )
        self.output_layer_norm = nn.LayerNorm(config.c_t)

    def forward(self, t: Tensor, mask: Tensor) -> Tensor:
        """``t[i, j, c_t], mask[i, j] -> [i, j, c_t]``."""
        for block in self.blocks:
            t = block(t, mask)
        return self.output_layer_norm(t)  # type: ignore[no-any-return]


class TemplateEmbedder(nn.Module):
    """Lines 9 to 13 of Suppl. Alg. 2: every template embedded alone, then chosen by the pairs."""

    def __init__(self, config: AlphaFoldConfig, template: TemplateConfig) -> None:
        super().__init__()
        c = template
        self.bins = c.first_bin, c.last_bin, c.bins
        self.embedding2d = Linear(c.bins + 1 + 2 * _LETTERS + 3 + 1, c.c_t, init="relu")
        self.template_pair_stack = TemplatePairStack(c, multimer=False)
        self.attention = Attention(
            config.c_z,
            c.attention_heads,
            c_heads=c.c_attention,
            c_memory=c.c_t,
            gated=False,
        )

    def forward(self, z: Tensor, batch: Mapping[str, Tensor], mask: Tensor) -> Tensor:
        """The update of ``z[i, j, c_z]`` from ``template_*[t, ...]``; zero without templates."""
        exists = batch["template_mask"]
        if not len(exists):
            return torch.zeros_like(z)
        pairs = [
            self.template_pair_stack(self.embedding2d(self._features(batch, t)), mask)
            for t in range(len(exists))
        ]
        return self._attend(z, torch.stack(pairs, 2), exists) * (exists.sum() > 0)

    def _attend(self, z: Tensor, templates: Tensor, exists: Tensor) -> Tensor:
        """Suppl. Alg. 17, pair by pair: ``templates[i, j, t, c_t]``, ``exists[t]``."""
        query, memory = z.flatten(0, 1)[:, None], templates.flatten(0, 1)
        update: Tensor = self.attention(query, exists[None], memory=memory)
        return update.reshape(z.shape)

    def _features(self, batch: Mapping[str, Tensor], t: int) -> Tensor:
        """The 88 channels of Suppl. Table 1, ``[i, j, 88]``; unit vectors are not used: zeros."""
        near = distogram(batch["template_pseudo_beta"][t], *self.bins)
        letters = one_hot(batch["template_aatype"][t], _LETTERS, near.dtype)
        beta = _outer(batch["template_pseudo_beta_mask"][t])[..., None]
        backbone = _outer(_backbone_mask(batch["template_all_atom_masks"][t]))[..., None]
        by_column, by_row = letters.expand(len(letters), -1, -1), letters[:, None]
        by_row = by_row.expand(-1, len(letters), -1)
        unit = near.new_zeros(*near.shape[:2], 3)
        return torch.cat([near, beta, by_column, by_row, unit, backbone], -1) * backbone


class TemplateRows(nn.Module):
    """Lines 7 and 8 of Suppl. Alg. 2: torsion angles of every template as a row of the MSA."""

    def __init__(self, config: AlphaFoldConfig) -> None:
        super().__init__()
        self.multimer = config.multimer
        angles = 12 if config.multimer else 35
        self.template_single_embedding = Linear(_LETTERS + angles, config.c_m, init="relu")
        self.template_projection = Linear(config.c_m, config.c_m, init="relu")

    def forward(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """``template_*[t, ...]`` to rows ``[t, r, c_m]`` and their mask ``[t, r]``."""
        make = self._chi if self.multimer else self._torsions
        features, mask = make(batch)
        rows = self.template_projection(F.relu(self.template_single_embedding(features)))
        return rows, mask

    def _torsions(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Seven torsions and their alternatives, ``[t, r, 57]``; the mask is that of psi."""
        aatype, positions = batch["template_aatype"], batch["template_all_atom_positions"]
        torsions = atom37_to_torsion_angles(aatype, positions, batch["template_all_atom_masks"])
        mask = torsions["torsion_angles_mask"]
        features = [
            one_hot(aatype, _LETTERS, positions.dtype),
            torsions["torsion_angles_sin_cos"].flatten(-2),
            torsions["alt_torsion_angles_sin_cos"].flatten(-2),
            mask,
        ]
        return torch.cat(features, -1), mask[..., _PSI]

    def _chi(self, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Four side-chain torsions, ``[t, r, 34]``; the mask is that of chi 1."""
        aatype, positions = batch["template_aatype"], batch["template_all_atom_positions"]
        torsions = atom37_to_torsion_angles(aatype, positions, batch["template_all_atom_mask"])
        mask = torsions["torsion_angles_mask"][..., _CHI]
        sin, cos = torsions["torsion_angles_sin_cos"][..., _CHI, :].unbind(-1)
        letters = one_hot(aatype, _LETTERS, positions.dtype)
        return torch.cat([letters, sin * mask, cos * mask, mask], -1), mask[..., 0]


class MultimerTemplateEmbedder(nn.Module):
    """The multimer's: the pairs are an input of each template, and the mean over all is added.

    Evans et al. 2021, Sec. 7.3. Features between chains are masked: a template is of one chain.
    """

    def __init__(self, config: AlphaFoldConfig, template: TemplateConfig) -> None:
        super().__init__()
        c = template
        self.bins = c.first_bin, c.last_bin, c.bins
        self.query_embedding_norm = nn.LayerNorm(config.c_z)
        widths = [c.bins, 1, _LETTERS, _LETTERS, 1, 1, 1, 1, config.c_z]
        self.template_pair_embedding = nn.ModuleList(
            Linear(width, c.c_t, init="relu") for width in widths
        )
        self.template_pair_stack = TemplatePairStack(c, multimer=True)
        self.output_linear = Linear(c.c_t, config.c_z, init="relu")

    def forward(self, z: Tensor, batch: Mapping[str, Tensor], mask: Tensor) -> Tensor:
        """The update of ``z[i, j, c_z]`` from ``template_*[t, ...]``.

        Raises:
            DataError: there are no rows for templates; an absent template is one fully masked.
        """
        templates = len(batch["template_aatype"])
        if not templates:
            raise DataError(
                "the multimer model got template features of 0 templates; give at least one, "
                "masked everywhere where there is none"
            )
        within = batch["asym_id"][:, None] == batch["asym_id"][None, :]
        query = self.query_embedding_norm(z)
        total = sum(
            self.template_pair_stack(self._embed(query, batch, t, within), mask)
            for t in range(templates)
        )
        return self.output_linear(F.relu(total / templates))  # type: ignore[no-any-return]

    def _embed(self, query: Tensor, batch: Mapping[str, Tensor], t: int, within: Tensor) -> Tensor:
        """Each feature through its own linear layer, and the sum: ``[i, j, c_t]``."""
        aatype = batch["template_aatype"][t]
        positions = batch["template_all_atom_positions"][t]
        mask = batch["template_all_atom_mask"][t]

        points, known = pseudo_beta(aatype, positions, mask)
        beta = _outer(known) * within
        near = distogram(points, *self.bins) * beta[..., None]
        letters = one_hot(aatype, _LETTERS, near.dtype)
        backbone = (_outer(_backbone_mask(mask)) * within)[..., None]
        unit = unit_vectors(positions) * backbone

        scalars = unit.split(1, -1)
        features = [
            near,
            beta[..., None],
            letters[None],
            letters[:, None],
            *scalars,
            backbone,
            query,
        ]
        layers = zip(self.template_pair_embedding, features, strict=True)
        total: Tensor = sum(layer(feature) for layer, feature in layers)
        return total


def unit_vectors(positions: Tensor) -> Tensor:
    """Where j lies from i's backbone frame: atoms ``[r, 37, 3]`` to unit ``[i, j, 3]``."""
    frames = backbone_frames(positions[:, _N], positions[:, _CA], positions[:, _C])
    apart = frames[:, None].apply_inverse(positions[None, :, _CA])
    return apart / apart.square().sum(-1, keepdim=True).clamp_min(1e-12).sqrt()


def _outer(mask: Tensor) -> Tensor:
    return mask[:, None] * mask[None, :]


def _backbone_mask(mask: Tensor) -> Tensor:
    return mask[:, _N] * mask[:, _CA] * mask[:, _C]
