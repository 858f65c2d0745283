"""Sizes and settings of AlphaFold 2 and AlphaFold-Multimer as frozen values.

The defaults are those of Jumper et al. 2021 (Suppl. Sec. 1.6 to 1.9); `presets` gives the published
models. Widths: c_m MSA, c_z pair, c_s single, c_e extra MSA, c_t template pair.
"""

from dataclasses import dataclass, field

from hairpin.proteins.sizes import DataConfig

__all__ = [
    "AlphaFoldConfig",
    "BlockConfig",
    "DataConfig",
    "HeadsConfig",
    "LossConfig",
    "StructureModuleConfig",
    "TemplateConfig",
]


@dataclass(frozen=True, kw_only=True)
class BlockConfig:
    """One Evoformer block (Jumper et al. 2021, Suppl. Alg. 6), or one block of the extra stack.

    Attributes:
        c_m: channels of the MSA representation; ``c_z``: of the pair representation.
        msa_heads: heads of row and column attention; ``pair_heads``: of triangle attention.
        c_outer: channels of the two projections of the outer product mean.
        c_triangle: channels of the two operands of triangle multiplication.
        msa_dropout: rate after row attention; ``pair_dropout``: after each triangle update.
        extra: column attention is the global one of the extra MSA stack (Suppl. Alg. 18).
        outer_first: the outer product mean comes first, as in AlphaFold-Multimer.
        fused: both operands of triangle multiplication come from one projection (multimer v3).
    """

    c_m: int = 256
    c_z: int = 128
    msa_heads: int = 8
    pair_heads: int = 4
    c_outer: int = 32
    c_triangle: int = 128
    msa_transition_factor: int = 4
    pair_transition_factor: int = 4
    msa_dropout: float = 0.15
    pair_dropout: float = 0.25
    extra: bool = False
    outer_first: bool = False
    fused: bool = False


@dataclass(frozen=True, kw_only=True)
class TemplateConfig:
    """Template embedding (Suppl. Algs 16 and 17; Evans et al. 2021 for the multimer's).

    Attributes:
        pair_heads: heads of triangle attention in the template pair stack.
        attention_heads: heads of the pointwise attention over templates, monomer only.
        c_attention: channels of all those heads together.
        first_bin, last_bin, bins: the template distogram, in Angstrom.
    """

    c_t: int = 64
    blocks: int = 2
    pair_heads: int = 4
    c_triangle: int = 64
    transition_factor: int = 2
    attention_heads: int = 4
    c_attention: int = 64
    dropout: float = 0.25
    fused: bool = False
    first_bin: float = 3.25
    last_bin: float = 50.75
    bins: int = 39


@dataclass(frozen=True, kw_only=True)
class StructureModuleConfig:
    """The structure module (Suppl. Algs 20 to 24).

    Attributes:
        scalar_qk, scalar_v: channels a head has in invariant point attention.
        point_qk, point_v: points a head has there.
        position_scale: Angstrom to one unit of the backbone frames' translations.
        multimer: parameters are laid out and positions scaled as in AlphaFold-Multimer.
    """

    c_s: int = 384
    c_z: int = 128
    layers: int = 8
    heads: int = 12
    scalar_qk: int = 16
    scalar_v: int = 16
    point_qk: int = 4
    point_v: int = 8
    transition_layers: int = 3
    sidechain_channels: int = 128
    sidechain_blocks: int = 2
    position_scale: float = 10.0
    dropout: float = 0.1
    multimer: bool = False


@dataclass(frozen=True, kw_only=True)
class HeadsConfig:
    """The heads (Suppl. Sec. 1.9.6 to 1.9.10).

    Attributes:
        first_break, last_break, distogram_bins: the distogram's inner bin edges, in Angstrom.
        max_error, error_bins: the inner bin edges of the predicted aligned error, in Angstrom.
        aligned_error: there is a predicted aligned error head (the ptm and multimer models).
    """

    distogram_bins: int = 64
    first_break: float = 2.3125
    last_break: float = 21.6875
    plddt_bins: int = 50
    plddt_channels: int = 128
    masked_msa_classes: int = 23
    aligned_error: bool = False
    error_bins: int = 64
    max_error: float = 31.0


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights and constants of the losses (Suppl. Sec. 1.9; Evans et al. 2021, Sec. 2.3).

    Distances are in Angstrom. ``fape_clamp`` and ``fape_unit`` hold within a chain,
    ``interface_clamp`` and ``interface_unit`` between chains. ``chain_centre`` weighs the distance
    between chains' centres of a complex, of which ``chain_centre_slack`` is free.
    """

    structure: float = 1.0
    distogram: float = 0.3
    masked_msa: float = 2.0
    plddt: float = 0.01
    experimentally_resolved: float = 0.01
    aligned_error: float = 0.0
    violation: float = 1.0
    sidechain_fraction: float = 0.5
    chi: float = 0.5
    angle_norm: float = 0.01
    fape_clamp: float = 10.0
    fape_unit: float = 10.0
    sidechain_clamp: float = 10.0
    sidechain_unit: float = 10.0
    interface_clamp: float = 30.0
    interface_unit: float = 20.0
    chain_centre: float = 0.05
    chain_centre_slack: float = 4.0
    clash_tolerance: float = 1.5
    violation_tolerance: float = 12.0
    min_resolution: float = 0.1
    max_resolution: float = 3.0


@dataclass(frozen=True, kw_only=True)
class AlphaFoldConfig:
    """The whole model.

    Attributes:
        name: the preset's name.
        multimer: AlphaFold-Multimer: relative encoding by chains, MSA sampled in the model.
        target_features: channels of ``target_feat``.
        max_relative: residues beyond which relative positions are alike.
        max_relative_chain: the same for copies of one chain, multimer only.
        template: None for a model without templates.
        recycles: times the model runs before the last, unless told otherwise.
        recycle_tolerance: recycling stops when C-alpha distances change by less than this,
            in Angstrom; None to never stop early.
        recycle_first_bin, recycle_last_bin, recycle_bins: the recycled distogram, in Angstrom.
    """

    name: str = "model_3"
    multimer: bool = False
    c_m: int = 256
    c_z: int = 128
    c_s: int = 384
    c_e: int = 64
    target_features: int = 22
    msa_features: int = 49
    extra_features: int = 25
    max_relative: int = 32
    max_relative_chain: int = 2
    evoformer: BlockConfig = field(default_factory=BlockConfig)
    evoformer_blocks: int = 48
    extra_msa: BlockConfig = field(default_factory=lambda: BlockConfig(c_m=64, extra=True))
    extra_msa_blocks: int = 4
    template: TemplateConfig | None = None
    structure: StructureModuleConfig = field(default_factory=StructureModuleConfig)
    heads: HeadsConfig = field(default_factory=HeadsConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    data: DataConfig = field(default_factory=DataConfig)
    recycles: int = 3
    recycle_tolerance: float | None = None
    recycle_first_bin: float = 3.25
    recycle_last_bin: float = 20.75
    recycle_bins: int = 15
