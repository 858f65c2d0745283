"""Bonds, angles and contacts that no protein has: Jumper et al. 2021, Suppl. Sec. 1.9.11.

Dims: r, i, j residues, a, b atoms of atom14. Distances are in Angstrom.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from hairpin.models.alphafold.atoms import by_type
from hairpin.models.alphafold.config import LossConfig
from hairpin.models.alphafold.geometry import distances, norm
from hairpin.proteins import residues, stereochemistry

Violations = dict[str, dict[str, Tensor] | Tensor]

_N, _CA, _C, _SG = 0, 1, 2, 5  # in atom14; SG as cysteine has it


@dataclass(frozen=True)
class Atoms:
    """The atoms to be judged.

    Attributes:
        positions: ``[r, 14, 3]``.
        exists: 1 where a residue has the atom, ``[r, 14]``.
        aatype: residue types ``[r]``.
        residue_index: numbers in the chain ``[r]``; neighbours differ by 1.
        asym_id: chains ``[r]``; all of one chain if None.
    """

    positions: Tensor
    exists: Tensor
    aatype: Tensor
    residue_index: Tensor
    asym_id: Tensor | None = None

    def bonded(self) -> Tensor:
        """1 where a residue is bound to the next row's, ``[r - 1]``."""
        index = self.residue_index
        bonded = index[1:] - index[:-1] == 1
        if self.asym_id is not None:
            bonded = bonded & (self.asym_id[1:] == self.asym_id[:-1])
        return bonded.to(self.positions.dtype)


def find_violations(config: LossConfig, atoms: Atoms) -> Violations:
    """All violations, under DeepMind's names.

    Returns:
        ``between_residues``: of peptide bonds ``bonds_c_n_loss_mean``, ``angles_ca_c_n_loss_mean``,
        ``angles_c_n_ca_loss_mean``, ``connections_per_residue_loss_sum[r]``,
        ``connections_per_residue_violation_mask[r]``; of contacts ``clashes_mean_loss``,
        ``clashes_per_atom_loss_sum[r, 14]``, ``clashes_per_atom_clash_mask[r, 14]``.
        ``within_residues``: ``per_atom_loss_sum[r, 14]``, ``per_atom_violations[r, 14]``.
        ``total_per_residue_violations_mask[r]``: 1 where a residue has any.
    """
    between = connections(config, atoms) | clashes(config, atoms)
    within = within_residues(config, atoms)
    total = torch.stack(
        [
            between["connections_per_residue_violation_mask"],
            between["clashes_per_atom_clash_mask"].amax(-1),
            within["per_atom_violations"].amax(-1),
        ]
    ).amax(0)
    return {
        "between_residues": between,
        "within_residues": within,
        "total_per_residue_violations_mask": total,
    }


def violation_loss(violations: Violations, exists: Float[Tensor, "r 14"]) -> Float[Tensor, ""]:
    """All in one number: eq. 44 to 47, contacts averaged over the atoms."""
    between, within = violations["between_residues"], violations["within_residues"]
    assert isinstance(between, dict)
    assert isinstance(within, dict)
    contacts = between["clashes_per_atom_loss_sum"] + within["per_atom_loss_sum"]
    return (
        between["bonds_c_n_loss_mean"]
        + between["angles_ca_c_n_loss_mean"]
        + between["angles_c_n_ca_loss_mean"]
        + contacts.sum() / (1e-6 + exists.sum())
    )


def violation_metrics(
    violations: Violations, atoms: Atoms, mask: Float[Tensor, " r"]
) -> dict[str, Float[Tensor, ""]]:
    """Parts of the residues in ``mask`` that have each kind of violation, 0 to 1.

    ``violations_extreme_ca_ca_distance`` is the part of neighbours whose CA atoms are 1.5 Angstrom
    further apart than across a trans bond.
    """
    between, within = violations["between_residues"], violations["within_residues"]
    total = violations["total_per_residue_violations_mask"]
    assert isinstance(between, dict)
    assert isinstance(within, dict)
    assert isinstance(total, Tensor)
    ca = atoms.positions[:, _CA]
    apart = distances(ca[1:], ca[:-1], epsilon=1e-6) - residues.CA_CA_DISTANCE
    neighbours = atoms.exists[1:, _CA] * atoms.exists[:-1, _CA] * atoms.bonded()
    return {
        "violations_extreme_ca_ca_distance": _mean((apart > 1.5).to(mask.dtype), neighbours),
        "violations_between_residue_bond": _mean(
            between["connections_per_residue_violation_mask"], mask
        ),
        "violations_between_residue_clash": _mean(
            between["clashes_per_atom_clash_mask"].amax(-1), mask
        ),
        "violations_within_residue": _mean(within["per_atom_violations"].amax(-1), mask),
        "violations_per_residue": _mean(total, mask),
    }


# --------------------------------------------------------------------------------- peptide bonds


def connections(config: LossConfig, atoms: Atoms) -> dict[str, Tensor]:
    """Length of each peptide bond and the angles at its ends: eq. 44 and 45."""
    x, exists, bonded = atoms.positions, atoms.exists, atoms.bonded()
    ca, c, next_n, next_ca = x[:-1, _CA], x[:-1, _C], x[1:, _N], x[1:, _CA]
    has_c_n = exists[:-1, _C] * exists[1:, _N] * bonded
    to_n, to_ca, on = next_n - c, ca - c, next_ca - next_n
    length = norm(to_n, epsilon=1e-6)
    cos_at_c = (to_ca * to_n).sum(-1) / (norm(to_ca, epsilon=1e-6) * length)
    cos_at_n = -(to_n * on).sum(-1) / (length * norm(on, epsilon=1e-6))

    ideal, spread = _peptide_bond(atoms.aatype[1:], x)
    at_c, at_n = stereochemistry.COSINE_CA_C_N, stereochemistry.COSINE_C_N_CA
    bond, angle_c, angle_n = (
        _beyond(config, length, ideal, spread),
        _beyond(config, cos_at_c, *at_c),
        _beyond(config, cos_at_n, *at_n),
    )
    has_ca_c_n, has_c_n_ca = has_c_n * exists[:-1, _CA], has_c_n * exists[1:, _CA]
    losses = F.relu(bond) + F.relu(angle_c) + F.relu(angle_n)
    wrong = torch.stack(
        [has_c_n * (bond > 0), has_ca_c_n * (angle_c > 0), has_c_n_ca * (angle_n > 0)]
    ).amax(0)
    before, after = (1, 0), (0, 1)  # a bond counts for the residues on both of its sides
    return {
        "bonds_c_n_loss_mean": _mean(F.relu(bond), has_c_n, 1e-6),
        "angles_ca_c_n_loss_mean": _mean(F.relu(angle_c), has_ca_c_n, 1e-6),
        "angles_c_n_ca_loss_mean": _mean(F.relu(angle_n), has_c_n_ca, 1e-6),
        "connections_per_residue_loss_sum": 0.5 * (F.pad(losses, before) + F.pad(losses, after)),
        "connections_per_residue_violation_mask": torch.maximum(
            F.pad(wrong, before), F.pad(wrong, after)
        ),
    }


def _beyond(
    config: LossConfig, value: Tensor, mean: Tensor | float, spread: Tensor | float
) -> Tensor:
    """How far values stray beyond what is tolerated; below 0 where they do not."""
    return ((value - mean).square() + 1e-6).sqrt() - config.violation_tolerance * spread


def _peptide_bond(next_type: Int[Tensor, " r"], like: Tensor) -> tuple[Tensor, Tensor]:
    """Mean length and spread of the bond to a residue of each type."""
    proline = next_type == residues.RESTYPES.index("P")
    others, special = stereochemistry.PEPTIDE_BOND, stereochemistry.PEPTIDE_BOND_TO_PROLINE
    mean, spread = (
        torch.where(proline, like.new_tensor(special[k]), like.new_tensor(others[k]))
        for k in (0, 1)
    )
    return mean, spread


# --------------------------------------------------------------------------------------- contacts


def clashes(config: LossConfig, atoms: Atoms) -> dict[str, Tensor]:
    """Overlap of atoms of different residues that are not bound: eq. 46.

    Nearly all pairs of atoms are far apart, so gradients are kept of those that overlap only.
    """
    known = atoms.exists > 0
    x, rows = atoms.positions[known], known.nonzero()  # [n, 3], [n, (residue, atom)]
    types = by_type(residues.atom14_to_atom37(), atoms.aatype)[known]
    radius = torch.tensor(residues.atom37_radii(), dtype=x.dtype, device=x.device)[types]
    may_touch = _may_touch(atoms, rows)
    i, j = (may_touch & _near(x, radius, config.clash_tolerance)).nonzero().unbind(-1)
    least = radius[i] + radius[j] - config.clash_tolerance
    overlap = F.relu(least - distances(x[i], x[j], epsilon=1e-10))

    per_atom = torch.zeros_like(radius).index_add(0, i, overlap).index_add(0, j, overlap)
    wide = torch.zeros_like(atoms.exists)
    return {
        "clashes_mean_loss": overlap.sum() / (1e-6 + may_touch.sum()),
        "clashes_per_atom_loss_sum": wide.masked_scatter(known, per_atom),
        "clashes_per_atom_clash_mask": wide.masked_scatter(known, (per_atom > 0).to(wide.dtype)),
    }


@torch.no_grad()
def _near(x: Tensor, radius: Tensor, tolerance: float) -> Tensor:
    """Pairs of atoms nearer than their radii allow, ``[n, n]``, and a hair more."""
    apart = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    return apart < radius[:, None] + radius[None, :] - tolerance + 1e-3


def _may_touch(atoms: Atoms, rows: Tensor) -> Tensor:
    """Pairs of atoms that count if they overlap, ``[n, n]``: residues i before j.

    Not the atoms of a peptide bond; nor two atoms in the place where cysteine has its sulphur, so
    that disulphide bridges are allowed (as in DeepMind's code, whatever the residues).
    """
    residue, atom = rows.unbind(-1)
    index = atoms.residue_index[residue]
    bound = index[:, None] + 1 == index[None, :]
    if atoms.asym_id is not None:
        chain = atoms.asym_id[residue]
        bound = bound & (chain[:, None] == chain[None, :])
    peptide = bound & (atom == _C)[:, None] & (atom == _N)[None, :]
    sulphur = (atom == _SG)[:, None] & (atom == _SG)[None, :]
    return (residue[:, None] < residue[None, :]) & ~peptide & ~sulphur


def within_residues(config: LossConfig, atoms: Atoms) -> dict[str, Tensor]:
    """Distances of atoms of one residue outside of what bonds, angles and radii allow."""
    x, exists = atoms.positions, atoms.exists
    lower, upper = (
        by_type(table, atoms.aatype, x)
        for table in stereochemistry.distance_bounds(
            overlap_tolerance=config.clash_tolerance, tolerance_factor=config.violation_tolerance
        )
    )
    others = 1 - torch.eye(14, dtype=x.dtype, device=x.device)
    mask = exists[:, :, None] * exists[:, None, :] * others
    apart = distances(x[:, :, None], x[:, None, :], epsilon=1e-10)
    loss = mask * (F.relu(lower - apart) + F.relu(apart - upper))
    wrong = mask * ((apart < lower) | (apart > upper))
    return {
        "per_atom_loss_sum": loss.sum(1) + loss.sum(2),
        "per_atom_violations": torch.maximum(wrong.amax(1), wrong.amax(2)),
    }


def _mean(x: Tensor, mask: Tensor, epsilon: float = 1e-10) -> Tensor:
    return (x * mask).sum() / (mask.sum() + epsilon)
