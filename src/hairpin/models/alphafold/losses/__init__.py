"""The losses of AlphaFold 2 and AlphaFold-Multimer, and their weighted sum.

Jumper et al. 2021, Suppl. Sec. 1.9, eq. 7; Evans et al. 2021, Sec. 2.3 and 2.4.

Dims: l layers, s MSA rows, r residues.
"""

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hairpin.errors import DataError
from hairpin.models.alphafold.atoms import atom_features, derived_labels
from hairpin.models.alphafold.config import AlphaFoldConfig
from hairpin.models.alphafold.geometry import own_precision
from hairpin.models.alphafold.losses.chains import chain_centre_loss
from hairpin.models.alphafold.losses.fape import backbone_fape, sidechain_fape
from hairpin.models.alphafold.losses.heads import (
    aligned_error_bins,
    aligned_error_loss,
    distogram_loss,
    masked_msa_loss,
    plddt_loss,
    resolved_loss,
)
from hairpin.models.alphafold.losses.naming import renamed_labels
from hairpin.models.alphafold.losses.torsions import angle_norm_loss, chi_loss
from hairpin.models.alphafold.losses.violations import (
    Atoms,
    find_violations,
    violation_loss,
    violation_metrics,
)
from hairpin.proteins import residues

Batch = Mapping[str, Tensor]
Parts = dict[str, Any]

_CA = residues.ATOM_TYPES.index("CA")


def total_loss(
    config: AlphaFoldConfig, batch: Batch, out: Mapping[str, Any]
) -> tuple[Float[Tensor, ""], Parts]:
    """The weighted sum of all losses of one protein, and each of them.

    Args:
        config: its ``loss`` has the weights; a term of weight 0 is left out.
        batch: features, with ``all_atom_positions[r, 37, 3]`` in Angstrom and
            ``all_atom_mask[r, 37]``; other labels are derived from these unless they are there.
            Of a complex, the labels of copies of a chain must be in the prediction's order (see
            `chains.align_chains`). ``resolution``, in Angstrom, decides whether the losses of
            confidences count; they do if it is left out. ``use_clamped_fape``, 0 to 1, is the share
            of the clamped backbone error; 1 if it is left out.
        out: what the model returned. The hidden letters of the MSA are ``true_msa[s, r]`` and
            ``bert_mask[s, r]`` of the batch, or of ``out["masked_msa"]`` where the model hid them.

    Returns:
        The loss, and the parts as nested dicts named like DeepMind's, such as
        ``parts["structure_module"]["fape"]`` and ``parts["distogram"]["loss"]``.

    Raises:
        DataError: the batch has no labels.
    """
    batch, weights = labelled(batch), config.loss
    with own_precision(batch["all_atom_positions"]):
        parts = _head_losses(config, batch, out)
        parts["structure_module"] = structure_loss(config, batch, out["structure_module"])
    by_name = {
        "structure_module": weights.structure,
        "distogram": weights.distogram,
        "masked_msa": weights.masked_msa,
        "predicted_lddt": weights.plddt,
        "experimentally_resolved": weights.experimentally_resolved,
        "predicted_aligned_error": weights.aligned_error,
    }
    loss = sum((by_name[name] * part["loss"] for name, part in parts.items()), torch.zeros(()))
    return loss, parts


def labelled(batch: Batch) -> dict[str, Tensor]:
    """The batch with every label that its known structure gives (see `derived_labels`)."""
    missing = [name for name in ("all_atom_positions", "all_atom_mask") if name not in batch]
    if missing:
        raise DataError(
            f"the batch lacks {' and '.join(missing)}, so there is nothing to compare with; "
            f"give the known structure, or do not ask for the loss"
        )
    aatype = batch["aatype"]
    derived = derived_labels(aatype, batch["all_atom_positions"], batch["all_atom_mask"])
    return {**atom_features(aatype), **derived, **batch}


def structure_loss(config: AlphaFoldConfig, batch: Batch, out: Mapping[str, Any]) -> Parts:
    """The losses of the structure module: Suppl. Alg. 20, lines 17 to 29, and Sec. 1.9.11.

    ``batch`` has all labels, as from `labelled`; ``out`` is what the structure module returned.
    """
    weights, sides = config.loss, out["sidechains"]
    asym_id = batch["asym_id"] if config.multimer else None
    parts: Parts = dict(renamed_labels(batch, out["final_atom14_positions"]))

    backbone = backbone_fape(
        weights,
        out["traj"],
        batch["backbone_affine_tensor"],
        batch["backbone_affine_mask"],
        clamped=batch.get("use_clamped_fape", 1.0),
        asym_id=asym_id,
    )
    parts["fape"] = backbone[-1]
    parts["sidechain_fape"] = sidechain_fape(
        weights,
        (sides["frames"][-1], sides["atom_pos"][-1]),
        (parts["renamed_rigidgroups_gt_frames"], parts["renamed_atom14_gt_positions"]),
        batch["rigidgroups_gt_exists"],
        parts["renamed_atom14_gt_exists"],
    )
    parts["chi_loss"] = chi_loss(
        sides["angles_sin_cos"], batch["chi_angles"], batch["chi_mask"], batch["aatype"]
    )
    parts["angle_norm_loss"] = angle_norm_loss(
        sides["unnormalized_angles_sin_cos"], batch["seq_mask"]
    )
    share = weights.sidechain_fraction
    loss = (1 - share) * backbone.mean() + share * parts["sidechain_fape"]
    loss = loss + weights.chi * parts["chi_loss"] + weights.angle_norm * parts["angle_norm_loss"]
    if weights.violation:
        parts |= _violation_parts(config, batch, out)
        loss = loss + weights.violation * violation_loss(
            parts["violations"], out["final_atom14_mask"]
        )
    if asym_id is not None and weights.chain_centre:
        parts["chain_centre_loss"] = chain_centre_loss(
            weights,
            out["final_atom_positions"][:, _CA],
            batch["all_atom_positions"][:, _CA],
            batch["all_atom_mask"][:, _CA],
            asym_id,
        )
        loss = loss + weights.chain_centre * parts["chain_centre_loss"]
    return parts | {"loss": loss}


def _violation_parts(config: AlphaFoldConfig, batch: Batch, out: Mapping[str, Any]) -> Parts:
    atoms = Atoms(
        positions=out["final_atom14_positions"],
        exists=out["final_atom14_mask"],
        aatype=batch["aatype"],
        residue_index=batch["residue_index"],
        asym_id=batch.get("asym_id") if config.multimer else None,
    )
    violations = find_violations(config.loss, atoms)
    return {
        "violations": violations,
        "metrics": violation_metrics(violations, atoms, batch["seq_mask"]),
    }


def _head_losses(config: AlphaFoldConfig, batch: Batch, out: Mapping[str, Any]) -> Parts:
    weights, parts = config.loss, dict[str, Any]()
    if weights.distogram:
        head = out["distogram"]
        loss, true_dist = distogram_loss(
            head["logits"], head["bin_edges"], batch["pseudo_beta"], batch["pseudo_beta_mask"]
        )
        parts["distogram"] = {"loss": loss, "true_dist": true_dist}
    if weights.masked_msa:
        hidden = {**batch, **out["masked_msa"]}
        loss = masked_msa_loss(hidden["logits"], hidden["true_msa"], hidden["bert_mask"])
        parts["masked_msa"] = {"loss": loss}
    return parts | _confidence_losses(config, batch, out)


def _confidence_losses(config: AlphaFoldConfig, batch: Batch, out: Mapping[str, Any]) -> Parts:
    """Losses of what is only learnt from structures of good resolution."""
    weights, parts, folded = config.loss, dict[str, Any](), out["structure_module"]
    counts: Tensor | float = 1.0
    if "resolution" in batch:
        resolution = batch["resolution"]
        fine = (resolution >= weights.min_resolution) & (resolution <= weights.max_resolution)
        counts = fine.to(batch["all_atom_positions"].dtype)
    if weights.plddt:
        loss = plddt_loss(
            out["predicted_lddt"]["logits"],
            folded["final_atom_positions"],
            batch["all_atom_positions"],
            batch["all_atom_mask"],
        )
        parts["predicted_lddt"] = {"loss": counts * loss}
    if weights.experimentally_resolved:
        loss = resolved_loss(
            out["experimentally_resolved"]["logits"],
            batch["all_atom_mask"],
            batch["atom37_atom_exists"],
        )
        parts["experimentally_resolved"] = {"loss": counts * loss}
    if weights.aligned_error:
        head = out["predicted_aligned_error"]
        bins = aligned_error_bins(
            head["breaks"], folded["final_affines"], batch["backbone_affine_tensor"]
        )
        loss = aligned_error_loss(head["logits"], bins, batch["backbone_affine_mask"])
        parts["predicted_aligned_error"] = {"loss": counts * loss}
    return parts
