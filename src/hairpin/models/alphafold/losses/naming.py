"""Which of the two names of symmetric atoms fits a prediction better.

Jumper et al. 2021, Suppl. Alg. 26 "renameSymmetricGroundTruthAtoms".

Dims: r residues. Positions are in Angstrom.
"""

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from hairpin.models.alphafold.geometry import distances


def renamed_labels(
    labels: Mapping[str, Tensor], positions: Float[Tensor, "r 14 3"]
) -> dict[str, Tensor]:
    """The known structure with the names that fit ``positions`` best.

    Args:
        labels: as from `atoms.derived_labels`.
        positions: predicted, in the order of atom14; no gradient flows to them.

    Returns:
        ``alt_naming_is_better[r]``, 1 where names are swapped; ``renamed_atom14_gt_positions``,
        ``renamed_atom14_gt_exists`` and ``renamed_rigidgroups_gt_frames[r, 8, 12]``.
    """
    better = alt_naming_is_better(labels, positions)

    def either(name: str, alt_name: str) -> Tensor:
        ours, theirs = labels[name], labels[alt_name]
        swap = better.reshape(-1, *(1 for _ in ours.shape[1:]))
        return (1 - swap) * ours + swap * theirs

    return {
        "alt_naming_is_better": better,
        "renamed_atom14_gt_positions": either("atom14_gt_positions", "atom14_alt_gt_positions"),
        "renamed_atom14_gt_exists": either("atom14_gt_exists", "atom14_alt_gt_exists"),
        "renamed_rigidgroups_gt_frames": either(
            "rigidgroups_gt_frames", "rigidgroups_alt_gt_frames"
        ),
    }


@torch.no_grad()
def alt_naming_is_better(
    labels: Mapping[str, Tensor], positions: Float[Tensor, "r 14 3"]
) -> Float[Tensor, " r"]:
    """1 where distances to atoms without a twin are nearer the truth under the other names."""
    ambiguous = labels["atom14_atom_is_ambiguous"].bool()
    exists = labels["atom14_gt_exists"].bool()
    rows, columns = exists & ambiguous, exists & ~ambiguous
    predicted = _distances(positions, rows, columns)
    ours = (predicted - _distances(labels["atom14_gt_positions"], rows, columns)).abs().sum(-1)
    alt = labels["atom14_alt_gt_positions"]
    theirs = (predicted - _distances(alt, rows, columns)).abs().sum(-1)
    residue = rows.nonzero()[:, 0]
    gain = torch.zeros_like(positions[:, 0, 0]).index_add_(0, residue, ours - theirs)
    return (gain > 0).to(positions.dtype)


def _distances(atoms: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Distances of the atoms ``[r, 14, 3]`` in the mask ``rows`` to those in ``columns``."""
    return distances(atoms[rows][:, None], atoms[columns][None, :], epsilon=1e-10)
