"""The published models as settings (Jumper et al. 2021, Suppl. Tables 4 and 5; Evans et al. 2021).

Each function of no arguments gives one; `named` finds it by name. `initial_training` and
`fine_tuning` turn any into what it is trained with.
"""

from dataclasses import replace
from typing import Any

from hairpin.errors import RecipeError
from hairpin.models.alphafold.config import (
    AlphaFoldConfig,
    BlockConfig,
    DataConfig,
    HeadsConfig,
    LossConfig,
    StructureModuleConfig,
    TemplateConfig,
)

MONOMERS = tuple(f"model_{i}{ptm}" for ptm in ("", "_ptm") for i in range(1, 6))
MULTIMERS = tuple(f"model_{i}_multimer{v}" for v in ("", "_v2", "_v3") for i in range(1, 6))
NAMES = (*MONOMERS, *MULTIMERS)


def named(name: str) -> AlphaFoldConfig:
    """The settings of a published model, such as ``model_1_ptm`` or ``model_2_multimer_v3``.

    Raises:
        RecipeError: there is no such model.
    """
    if name == "tiny":
        return tiny()
    if name not in NAMES:
        raise RecipeError(f"there is no model {name!r}; the models are {', '.join(NAMES)}, tiny")
    number = int(name.split("_")[1])
    if "multimer" in name:
        return _multimer(name, number)
    return _monomer(name, number)


def model_1() -> AlphaFoldConfig:
    """Monomer with templates and 5120 extra sequences."""
    return named("model_1")


def model_2() -> AlphaFoldConfig:
    """Monomer with templates and 1024 extra sequences."""
    return named("model_2")


def model_3() -> AlphaFoldConfig:
    """Monomer without templates, 5120 extra sequences."""
    return named("model_3")


def model_4() -> AlphaFoldConfig:
    """Like model 3, from another training."""
    return named("model_4")


def model_5() -> AlphaFoldConfig:
    """Monomer without templates, 1024 extra sequences."""
    return named("model_5")


def model_1_ptm() -> AlphaFoldConfig:
    """Model 1 with a predicted aligned error head."""
    return named("model_1_ptm")


def model_2_ptm() -> AlphaFoldConfig:
    """Model 2 with a predicted aligned error head."""
    return named("model_2_ptm")


def model_3_ptm() -> AlphaFoldConfig:
    """Model 3 with a predicted aligned error head."""
    return named("model_3_ptm")


def model_4_ptm() -> AlphaFoldConfig:
    """Model 4 with a predicted aligned error head."""
    return named("model_4_ptm")


def model_5_ptm() -> AlphaFoldConfig:
    """Model 5 with a predicted aligned error head."""
    return named("model_5_ptm")


def multimer_v3(number: int = 1) -> AlphaFoldConfig:
    """AlphaFold-Multimer, third training; ``number`` 1 to 5."""
    return named(f"model_{number}_multimer_v3")


def multimer_v2(number: int = 1) -> AlphaFoldConfig:
    """AlphaFold-Multimer, second training; ``number`` 1 to 5."""
    return named(f"model_{number}_multimer_v2")


def multimer_v1(number: int = 1) -> AlphaFoldConfig:
    """AlphaFold-Multimer as first published; ``number`` 1 to 5."""
    return named(f"model_{number}_multimer")


def tiny(*, multimer: bool = False) -> AlphaFoldConfig:
    """The smallest model with every part in it, for tests and rehearsals."""
    base = multimer_v3() if multimer else model_1_ptm()
    small: dict[str, Any] = {
        "c_m": 16,
        "c_z": 16,
        "msa_heads": 2,
        "pair_heads": 2,
        "c_outer": 8,
        "c_triangle": 16,
    }
    structure = replace(
        base.structure, c_s=16, c_z=16, layers=2, heads=2, scalar_qk=4, scalar_v=4,
        point_qk=2, point_v=2, sidechain_channels=16,
    )  # fmt: skip
    return replace(
        base,
        name="tiny_multimer" if multimer else "tiny",
        c_m=16,
        c_z=16,
        c_s=16,
        c_e=8,
        evoformer=replace(base.evoformer, **small),
        evoformer_blocks=2,
        extra_msa=replace(base.extra_msa, **{**small, "c_m": 8}),
        extra_msa_blocks=1,
        template=replace(
            TemplateConfig() if multimer else TemplateConfig(attention_heads=2, c_attention=8),
            c_t=8,
            blocks=1,
            pair_heads=2,
            c_triangle=8,
            fused=multimer,
        ),
        structure=structure,
        heads=replace(base.heads, plddt_channels=16),
        data=replace(base.data, max_msa_clusters=16, max_extra_msa=32, max_templates=2),
        recycles=1,
    )


def initial_training(config: AlphaFoldConfig) -> AlphaFoldConfig:
    """What a model is first trained with (Jumper et al. 2021, Suppl. Table 4): no violations."""
    data = replace(config.data, crop_size=256, max_msa_clusters=128, max_extra_msa=1024)
    loss = replace(config.loss, violation=0.0, experimentally_resolved=0.0)
    return replace(config, data=data, loss=loss)


def fine_tuning(config: AlphaFoldConfig) -> AlphaFoldConfig:
    """What a model is then trained with: larger crops, more sequences, all losses."""
    data = replace(config.data, crop_size=384, max_msa_clusters=512, max_extra_msa=5120)
    loss = replace(config.loss, violation=1.0, experimentally_resolved=0.01)
    return replace(config, data=data, loss=loss)


def _monomer(name: str, number: int) -> AlphaFoldConfig:
    templates = number in {1, 2}
    ptm = name.endswith("_ptm")
    return AlphaFoldConfig(
        name=name,
        template=TemplateConfig() if templates else None,
        heads=HeadsConfig(aligned_error=ptm),
        loss=LossConfig(aligned_error=0.1 if ptm else 0.0),
        data=DataConfig(
            max_extra_msa=5120 if number in {1, 3, 4} else 1024,
            max_templates=4 if templates else 0,
            clusters_hold_templates=templates,
        ),
    )


def _multimer(name: str, number: int) -> AlphaFoldConfig:
    third = name.endswith("_v3")
    extra = 2048 if third and number <= 3 else 1152
    return AlphaFoldConfig(
        name=name,
        multimer=True,
        target_features=21,
        evoformer=BlockConfig(outer_first=True, fused=third),
        extra_msa=BlockConfig(c_m=64, extra=True, outer_first=True, fused=third),
        template=TemplateConfig(fused=third),
        structure=StructureModuleConfig(position_scale=20.0, multimer=True),
        heads=HeadsConfig(aligned_error=True, masked_msa_classes=22),
        loss=LossConfig(aligned_error=0.1),
        data=DataConfig(
            max_msa_clusters=508 if third else 252, max_extra_msa=extra, max_templates=4
        ),
        recycles=20,
        recycle_tolerance=0.5,
    )
