"""Which model a weight file is of, read off its arrays' names and shapes."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hairpin.errors import WeightsError
from hairpin.models.alphafold import presets
from hairpin.models.alphafold.config import (
    AlphaFoldConfig,
    BlockConfig,
    HeadsConfig,
    StructureModuleConfig,
    TemplateConfig,
)

_ROOT = "alphafold/alphafold_iteration"
_TEMPLATES = "evoformer/template_embedding"
_CHAINS = "evoformer/~_relative_encoding/position_activations//weights"
_XYZ = 3


class _Shapes:
    """Shapes of a file's arrays by what follows the root of their names."""

    def __init__(self, arrays: Mapping[str, np.ndarray], at: str = _ROOT) -> None:
        self.arrays = arrays
        self.at = at

    def __contains__(self, name: str) -> bool:
        return f"{self.at}/{name}" in self.arrays

    def __getitem__(self, name: str) -> tuple[int, ...]:
        if name not in self:
            raise WeightsError(
                f"the file has no array {self.at}/{name}, so it is of no AlphaFold model that is "
                f"known; give a params_model_*.npz"
            )
        return self.arrays[f"{self.at}/{name}"].shape

    def under(self, module: str) -> "_Shapes":
        return _Shapes(self.arrays, f"{self.at}/{module}")


def config_from(
    arrays: Mapping[str, np.ndarray], path: str | Path | None = None
) -> AlphaFoldConfig:
    """The settings of the model whose parameters these are.

    Widths, heads, numbers of blocks, templates, predicted aligned error, multimer and fused
    projections are read off the arrays. What arrays do not tell (how many sequences, how many
    times the structure module's layer is repeated) is that of the model named by ``path``
    (``params_model_2_ptm.npz``), or of the first model of its kind.

    Raises:
        WeightsError: an array that every model has is missing.
    """
    shapes = _Shapes(arrays)
    base = _base(shapes, path)
    trunk = shapes.under("evoformer")
    evoformer, blocks = _block(trunk.under("evoformer_iteration"), base.evoformer)
    extra, extra_blocks = _block(trunk.under("extra_msa_stack"), base.extra_msa)
    c_s = trunk["single_activations//weights"][1]
    return replace(
        base,
        c_m=evoformer.c_m,
        c_z=evoformer.c_z,
        c_s=c_s,
        c_e=extra.c_m,
        target_features=trunk["preprocess_1d//weights"][0],
        max_relative=_reach(shapes, base),
        evoformer=evoformer,
        evoformer_blocks=blocks,
        extra_msa=extra,
        extra_msa_blocks=extra_blocks,
        template=_template(shapes, base),
        structure=_structure(shapes, base.structure, c_s=c_s, c_z=evoformer.c_z),
        heads=_heads(shapes, base.heads),
    )


def _base(shapes: _Shapes, path: str | Path | None) -> AlphaFoldConfig:
    """The published model of that name if it is of this kind, else the first of this kind."""
    fused = "evoformer/evoformer_iteration/triangle_multiplication_outgoing/projection//weights"
    kind = {
        "multimer": _CHAINS in shapes,
        "templates": "evoformer/template_projection//weights" in shapes,
        "ptm": "predicted_aligned_error_head/logits//weights" in shapes,
        "fused": fused in shapes,
    }
    name = "" if path is None else Path(path).stem.removeprefix("params_")
    candidates = [name] if name in presets.NAMES else []
    for candidate in (*candidates, *presets.NAMES):
        config = presets.named(candidate)
        if kind == {
            "multimer": config.multimer,
            "templates": config.template is not None,
            "ptm": config.heads.aligned_error,
            "fused": config.evoformer.fused,
        }:
            return config
    raise WeightsError(f"no published model has {kind}; give a params_model_*.npz")


def _block(shapes: _Shapes, base: BlockConfig) -> tuple[BlockConfig, int]:
    """One block's widths, and how many blocks there are."""
    row = "msa_row_attention_with_pair_bias"
    blocks, c_m, msa_heads, _ = shapes[f"{row}/attention//query_w"]
    _, c_z, pair_heads = shapes["triangle_attention_starting_node//feat_2d_weights"]
    config = replace(
        base,
        c_m=c_m,
        c_z=c_z,
        msa_heads=msa_heads,
        pair_heads=pair_heads,
        c_outer=shapes["outer_product_mean//output_w"][1],
        c_triangle=_c_triangle(shapes),
        msa_transition_factor=shapes["msa_transition/transition1//bias"][1] // c_m,
        pair_transition_factor=shapes["pair_transition/transition1//bias"][1] // c_z,
    )
    return config, blocks


def _c_triangle(shapes: _Shapes) -> int:
    return shapes["triangle_multiplication_outgoing/output_projection//weights"][1]


def _template(shapes: _Shapes, base: AlphaFoldConfig) -> TemplateConfig | None:
    if base.template is None:
        return None
    single = shapes.under(f"{_TEMPLATES}/single_template_embedding")
    stack = single.under(
        "template_embedding_iteration"
        if base.multimer
        else "template_pair_stack/__layer_stack_no_state"
    )
    blocks, c_t, pair_heads = stack["triangle_attention_starting_node//feat_2d_weights"]
    config = replace(
        base.template,
        c_t=c_t,
        blocks=blocks,
        pair_heads=pair_heads,
        c_triangle=_c_triangle(stack),
        transition_factor=stack["pair_transition/transition1//bias"][1] // c_t,
    )
    if base.multimer:
        return config
    _, heads, width = shapes[f"{_TEMPLATES}/attention//query_w"]
    return replace(config, attention_heads=heads, c_attention=heads * width)


def _structure(
    shapes: _Shapes, base: StructureModuleConfig, *, c_s: int, c_z: int
) -> StructureModuleConfig:
    fold = shapes.under("structure_module/fold_iteration")
    points = fold.under("invariant_point_attention")
    (heads,) = points["/trainable_point_weights"]
    return replace(
        base,
        c_s=c_s,
        c_z=c_z,
        heads=heads,
        transition_layers=_count(fold, "transition{}//bias"),
        sidechain_channels=fold["rigid_sidechain/input_projection//bias"][0],
        sidechain_blocks=_count(fold, "rigid_sidechain/resblock1{}//bias"),
        **_attention(points, heads, multimer=base.multimer),
    )


def _attention(points: _Shapes, heads: int, *, multimer: bool) -> dict[str, Any]:
    """Channels and points of a head of invariant point attention."""
    if multimer:
        return {
            "scalar_qk": points["q_scalar_projection//weights"][2],
            "scalar_v": points["v_scalar_projection//weights"][2],
            "point_qk": points["q_point_projection/point_projection//bias"][1] // _XYZ,
            "point_v": points["v_point_projection/point_projection//bias"][1] // _XYZ,
        }
    scalar_qk = points["q_scalar//bias"][0] // heads
    point_qk = points["q_point_local//bias"][0] // heads // _XYZ
    return {
        "scalar_qk": scalar_qk,
        "scalar_v": points["kv_scalar//bias"][0] // heads - scalar_qk,
        "point_qk": point_qk,
        "point_v": points["kv_point_local//bias"][0] // heads // _XYZ - point_qk,
    }


def _count(shapes: _Shapes, name: str) -> int:
    """How many layers there are of a name: the first bare, the others numbered from 1."""
    count = 0
    while name.format(f"_{count}" if count else "") in shapes:
        count += 1
    return count


def _heads(shapes: _Shapes, base: HeadsConfig) -> HeadsConfig:
    config = replace(
        base,
        distogram_bins=shapes["distogram_head/half_logits//bias"][0],
        plddt_bins=shapes["predicted_lddt_head/logits//bias"][0],
        plddt_channels=shapes["predicted_lddt_head/act_0//bias"][0],
        masked_msa_classes=shapes["masked_msa_head/logits//bias"][0],
    )
    if not base.aligned_error:
        return config
    return replace(config, error_bins=shapes["predicted_aligned_error_head/logits//bias"][0])


def _reach(shapes: _Shapes, base: AlphaFoldConfig) -> int:
    """Residues beyond which relative positions are alike, from the number of classes."""
    if not base.multimer:
        return (shapes["evoformer/pair_activiations//weights"][0] - 1) // 2
    chains = 2 * base.max_relative_chain + 2
    return (shapes[_CHAINS][0] - chains - 1 - 2) // 2
