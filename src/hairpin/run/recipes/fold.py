"""Recipes of `hairpin train fold`: AlphaFold on structures with alignments."""

from dataclasses import dataclass, replace

from hairpin.errors import RecipeError
from hairpin.models.alphafold.config import (
    AlphaFoldConfig,
    BlockConfig,
    DataConfig,
    HeadsConfig,
    LossConfig,
    StructureModuleConfig,
)
from hairpin.run.recipes.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class FoldRecipe(Schedule):
    """Every setting of the training of a folding model.

    `batch_size` counts proteins of a step. `model.data` says how they are cropped and how much of
    their alignments is seen, `model.loss` what is minimised, `model.recycles` the most recycles.
    Proteins are no longer cropped once `whole_from` steps are done; always cropped if it is None.
    `clamped` is the part of the examples whose backbone FAPE is clamped; `seed` keys weights,
    crops, sampling and dropout. `proteins` are the names of those trained on, so that a run goes on
    with the same; empty for all in the folder.
    """

    model: AlphaFoldConfig
    proteins: tuple[str, ...] = ()
    clamped: float = 0.9
    whole_from: int | None = None

    lr: float = 1e-3
    min_lr: float = 1e-3
    warmup_steps: int = 1000
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip_norm: float = 0.1

    checkpoint_every: int = 100
    validate_every: int = 100

    def __post_init__(self) -> None:
        if self.model.multimer:
            raise RecipeError(
                f"recipe {self.name!r}: model {self.model.name!r} is for complexes, which are not "
                f"trained yet; take a monomer's, such as presets.model_1_ptm()"
            )
        if not 0 <= self.clamped <= 1:
            raise RecipeError(
                f"recipe {self.name!r}: clamped={self.clamped} is a part of the examples; give 0 "
                f"to 1"
            )
        self.require_precision()
        self.require_positive("steps", "batch_size", "checkpoint_every", "validate_every")


def fold_tiny() -> FoldRecipe:
    """One Evoformer block, to learn a handful of proteins by heart on one core.

    It is about whether the model learns at all, not whether it predicts. What costs time is pairs,
    so their representation is narrow and most steps take crops; the last take whole proteins, for
    a model that has seen crops alone does not put whole chains together. Single residues are wide.
    The MSA is one cluster: the target, with the profile of the whole alignment, so that a residue
    looks the same in every step. The backbone FAPE is not clamped, for clamped alone it gives far
    atoms no gradient and sticks, and violations do not count. Relative positions differ up to 256
    residues, so that a residue can tell where it stands. Nothing is dropped, masked or recycled.
    """
    block = BlockConfig(
        c_m=64, c_z=16, msa_heads=4, pair_heads=1, c_outer=8, c_triangle=8,
        msa_transition_factor=2, pair_transition_factor=2, msa_dropout=0.0, pair_dropout=0.0,
    )  # fmt: skip
    model = AlphaFoldConfig(
        name="train_tiny",
        c_m=64,
        c_z=16,
        c_s=256,
        c_e=8,
        max_relative=256,
        evoformer=block,
        evoformer_blocks=1,
        extra_msa=replace(block, c_m=8, msa_heads=1, extra=True),
        extra_msa_blocks=0,
        structure=StructureModuleConfig(
            c_s=256,
            c_z=16,
            layers=4,
            heads=4,
            transition_layers=2,
            sidechain_channels=32,
            sidechain_blocks=1,
            dropout=0.0,
        ),
        heads=HeadsConfig(plddt_channels=32),
        loss=LossConfig(
            distogram=1.0,
            masked_msa=0.0,
            experimentally_resolved=0.0,
            violation=0.0,
            sidechain_clamp=30.0,
        ),
        data=DataConfig(max_msa_clusters=1, max_extra_msa=1, replace_fraction=0.0, crop_size=96),
        recycles=0,
    )
    return FoldRecipe(
        name="fold-tiny",
        model=model,
        clamped=0.0,
        whole_from=4500,
        steps=4900,
        batch_size=1,
        lr=1e-3,
        min_lr=3e-4,
        warmup_steps=30,
        betas=(0.9, 0.99),
        clip_norm=1.0,
        ema_decay=0.99,
        checkpoint_every=500,
        validate_every=500,
    )
