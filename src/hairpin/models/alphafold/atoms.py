"""Between atoms, torsion angles and rigid groups of residues.

Jumper et al. 2021, Suppl. Sec. 1.8.4 and Tables 1 to 3. The tables come from
`hairpin.proteins.residues`; a residue type above 20 is read as unknown.

Dims: ... any leading dims, r residues, g rigid groups (8), t torsions (7: pre-omega, phi, psi and
chi 1 to 4), k chi angles (4). Positions are in Angstrom; masks are floats, 1 where something is.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from hairpin.models.alphafold.geometry import (
    Rigid,
    backbone_frames,
    rigid_from_three_points,
    rotation_to_quaternion,
)
from hairpin.proteins import residues

# ------------------------------------------------------------------------------ atom14 and atom37


def by_type(table: NDArray[Any], aatype: Int[Tensor, "..."], like: Tensor | None = None) -> Tensor:
    """Rows of a table of 21 residue types, one for each residue: ``[..., *table.shape[1:]]``.

    Numbers take the dtype of ``like``; without it the table's own is kept, as indices need.
    """
    rows = torch.tensor(table, device=aatype.device, dtype=None if like is None else like.dtype)
    return rows[aatype.clamp(max=residues.UNKNOWN)]


def pick_atoms(data: Tensor, indices: Int[Tensor, "..."]) -> Tensor:
    """``data[..., n, *rest]`` at ``indices[..., m]`` of each residue: ``[..., m, *rest]``."""
    rest = data.shape[indices.ndim :]
    wide = indices.reshape(*indices.shape, *(1 for _ in rest)).expand(*indices.shape, *rest)
    return data.gather(indices.ndim - 1, wide)


def atom14_to_atom37(atoms: Tensor, aatype: Int[Tensor, "..."]) -> Tensor:
    """``atoms[..., 14, *rest]`` as ``[..., 37, *rest]``, 0 where a residue has no such atom."""
    picked = pick_atoms(atoms, by_type(residues.atom37_to_atom14(), aatype))
    return _masked(picked, by_type(residues.atom37_exists(), aatype, atoms))


def atom37_to_atom14(atoms: Tensor, aatype: Int[Tensor, "..."]) -> Tensor:
    """``atoms[..., 37, *rest]`` as ``[..., 14, *rest]``, 0 where a residue has no such atom."""
    picked = pick_atoms(atoms, by_type(residues.atom14_to_atom37(), aatype))
    return _masked(picked, by_type(residues.atom14_exists(), aatype, atoms))


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    return x * mask.reshape(*mask.shape, *(1 for _ in x.shape[mask.ndim :]))


def atom_features(aatype: Int[Tensor, "..."]) -> dict[str, Tensor]:
    """Which atoms each residue has, and where they lie in the other order.

    ``residx_atom14_to_atom37[..., 14]`` and ``residx_atom37_to_atom14[..., 37]`` are indices;
    ``atom14_atom_exists`` and ``atom37_atom_exists`` are masks, float32.
    """
    like = torch.empty((), dtype=torch.float32)
    return {
        "residx_atom14_to_atom37": by_type(residues.atom14_to_atom37(), aatype),
        "residx_atom37_to_atom14": by_type(residues.atom37_to_atom14(), aatype),
        "atom14_atom_exists": by_type(residues.atom14_exists(), aatype, like),
        "atom37_atom_exists": by_type(residues.atom37_exists(), aatype, like),
    }


def pseudo_beta(
    aatype: Int[Tensor, "..."],
    positions: Float[Tensor, "... 37 3"],
    mask: Float[Tensor, "... 37"],
) -> tuple[Float[Tensor, "... 3"], Float[Tensor, "..."]]:
    """CB of each residue, or CA of glycine, and whether it is known (Suppl. Sec. 1.2.9)."""
    is_glycine = aatype == residues.RESTYPES.index("G")
    ca, cb = (residues.ATOM_TYPES.index(name) for name in ("CA", "CB"))
    beta = torch.where(is_glycine[..., None], positions[..., ca, :], positions[..., cb, :])
    return beta, torch.where(is_glycine, mask[..., ca], mask[..., cb])


# -------------------------------------------------------------------------------- torsion angles


def atom37_to_torsion_angles(
    aatype: Int[Tensor, "... r"],
    positions: Float[Tensor, "... r 37 3"],
    mask: Float[Tensor, "... r 37"],
) -> dict[str, Float[Tensor, "..."]]:
    """The seven torsion angles of each residue (Suppl. Table 2).

    Returns:
        ``torsion_angles_sin_cos[..., r, 7, 2]``; ``alt_torsion_angles_sin_cos``, the same under
        the other names of symmetric atoms; ``torsion_angles_mask[..., r, 7]``, 1 where all four
        atoms of an angle are known. The angles of a residue and the one before it are computed
        whether or not the chain has a gap between them.
    """
    atoms, known = _torsion_atoms(aatype, positions, mask)
    a, b, c, d = atoms.unbind(-2)
    frame = rigid_from_three_points(b, c, a)
    last = frame.apply_inverse(d)
    sin_cos = torch.stack([last[..., 2], last[..., 1]], dim=-1)
    sin_cos = sin_cos / (sin_cos.square().sum(-1, keepdim=True) + 1e-8).sqrt()
    # psi was measured to O, which lies opposite to the next residue's N
    sin_cos = sin_cos * sin_cos.new_tensor([1.0, 1.0, -1.0, 1.0, 1.0, 1.0, 1.0])[:, None]
    symmetric = by_type(residues.chi_is_symmetric(), aatype, positions)
    flip = torch.cat([torch.ones_like(symmetric[..., :3]), 1 - 2 * symmetric], dim=-1)
    return {
        "torsion_angles_sin_cos": sin_cos,
        "alt_torsion_angles_sin_cos": sin_cos * flip[..., None],
        "torsion_angles_mask": known,
    }


def _torsion_atoms(aatype: Tensor, positions: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The four atoms of each torsion ``[..., r, t, 4, 3]`` and whether all are known."""
    before, before_mask = _previous(positions, 3), _previous(mask, 2)
    index = by_type(residues.chi_atom37(), aatype).flatten(-2)  # [..., r, 16]
    chi = pick_atoms(positions, index).unflatten(-2, (4, 4))
    chi_mask = pick_atoms(mask, index).unflatten(-1, (4, 4)).prod(-1)
    n_ca, n_ca_c, n_ca_c_o = [0, 1], [0, 1, 2], [0, 1, 2, 4]
    backbone = [  # N CA C CB O are atoms 0 to 4
        torch.cat([before[..., 1:3, :], positions[..., n_ca, :]], dim=-2),
        torch.cat([before[..., 2:3, :], positions[..., n_ca_c, :]], dim=-2),
        positions[..., n_ca_c_o, :],
    ]
    backbone_mask = [
        before_mask[..., 1:3].prod(-1) * mask[..., n_ca].prod(-1),
        before_mask[..., 2] * mask[..., n_ca_c].prod(-1),
        mask[..., n_ca_c_o].prod(-1),
    ]
    chi_mask = chi_mask * by_type(residues.chi_exists(), aatype, mask)
    atoms = torch.cat([torch.stack(backbone, dim=-3), chi], dim=-3)
    return atoms, torch.cat([torch.stack(backbone_mask, dim=-1), chi_mask], dim=-1)


def _previous(x: Tensor, dims: int) -> Tensor:
    """``x[..., r, *rest]`` shifted by a residue, zeros first; r is the ``dims``-th from the end."""
    r = x.ndim - dims
    return torch.cat([torch.zeros_like(x.narrow(r, 0, 1)), x.narrow(r, 0, x.shape[r] - 1)], dim=r)


# ---------------------------------------------------------------------------- frames to positions


@dataclass(frozen=True)
class IdealGeometry:
    """What each residue's atoms are built from: tables looked up once for a chain.

    Attributes:
        frames: each group's frame in its parent's at torsion 0, ``[r, g]``.
        group: the group of each atom, ``[r, 14]``.
        positions: of each atom in its group's frame, ``[r, 14, 3]``.
        exists: 1 where a residue has the atom, ``[r, 14]``.
    """

    frames: Rigid
    group: Tensor
    positions: Tensor
    exists: Tensor

    @staticmethod
    def of(aatype: Int[Tensor, " r"], like: Tensor) -> "IdealGeometry":
        """The ideal geometry of residues, in the dtype of ``like``."""
        frames = by_type(residues.group_frames(), aatype, like)
        return IdealGeometry(
            frames=Rigid(frames[..., :3, :3], frames[..., :3, 3]),
            group=by_type(residues.atom14_group(), aatype),
            positions=by_type(residues.atom14_ideal_positions(), aatype, like),
            exists=by_type(residues.atom14_exists(), aatype, like),
        )


def torsions_to_frames(
    ideal: IdealGeometry, backbone: Rigid, sin_cos: Float[Tensor, "r 7 2"]
) -> Rigid:
    """The frames of all rigid groups, ``[r, g]``: Suppl. Alg. 24, lines 1 to 10, and Alg. 25.

    Args:
        ideal: the residues' ideal geometry.
        backbone: the frames of the backbone ``[r]``, in Angstrom.
        sin_cos: sine and cosine of each torsion, of length 1.
    """
    zero, one = torch.zeros_like(sin_cos[:, :1, 0]), torch.ones_like(sin_cos[:, :1, 0])
    sin = torch.cat([zero, sin_cos[..., 0]], dim=-1)  # the backbone group does not turn
    cos = torch.cat([one, sin_cos[..., 1]], dim=-1)
    x, y, z = ideal.frames.rotation.unbind(-1)  # columns [r, g, 3]
    turned = torch.stack(
        [x, cos[..., None] * y + sin[..., None] * z, cos[..., None] * z - sin[..., None] * y],
        dim=-1,
    )
    local = Rigid(turned, ideal.frames.translation)
    chain = [local[:, 4]]
    for k in (5, 6, 7):
        chain.append(chain[-1].compose(local[:, k]))
    to_backbone = Rigid(
        torch.cat([local.rotation[:, :4], torch.stack([f.rotation for f in chain], 1)], dim=1),
        torch.cat(
            [local.translation[:, :4], torch.stack([f.translation for f in chain], 1)], dim=1
        ),
    )
    return backbone[:, None].compose(to_backbone)


def frames_to_atom14(ideal: IdealGeometry, frames: Rigid) -> Float[Tensor, "r 14 3"]:
    """Each atom's position by the frame ``[r, g]`` of its group: Suppl. Alg. 24, line 11."""
    of_atom = Rigid(
        pick_atoms(frames.rotation, ideal.group), pick_atoms(frames.translation, ideal.group)
    )
    return of_atom.apply(ideal.positions) * ideal.exists[..., None]


# ----------------------------------------------------------------------------------------- labels


def derived_labels(
    aatype: Int[Tensor, " r"],
    positions: Float[Tensor, "r 37 3"],
    mask: Float[Tensor, "r 37"],
) -> dict[str, Tensor]:
    """Everything that the losses derive from a known structure.

    Returns:
        ``atom14_gt_positions``, ``atom14_gt_exists``, ``atom14_alt_gt_positions``,
        ``atom14_alt_gt_exists`` (symmetric atoms swapped), ``atom14_atom_is_ambiguous``,
        ``rigidgroups_*`` (see `rigid_groups`), ``backbone_affine_tensor[r, 7]`` and
        ``backbone_affine_mask[r]``, ``chi_angles[r, 4]`` in radians and ``chi_mask[r, 4]``,
        ``pseudo_beta[r, 3]`` and ``pseudo_beta_mask[r]``.
    """
    labels = atom14_labels(aatype, positions, mask) | rigid_groups(aatype, positions, mask)
    frame = Rigid.from_flat12(labels["rigidgroups_gt_frames"][:, 0])
    quaternion = rotation_to_quaternion(frame.rotation)
    torsions = atom37_to_torsion_angles(aatype, positions, mask)
    sin, cos = torsions["torsion_angles_sin_cos"][:, 3:].unbind(-1)
    beta, beta_mask = pseudo_beta(aatype, positions, mask)
    chi_mask = torsions["torsion_angles_mask"][:, 3:]
    return labels | {
        "backbone_affine_tensor": torch.cat([quaternion, frame.translation], dim=-1),
        "backbone_affine_mask": labels["rigidgroups_gt_exists"][:, 0],
        "chi_angles": torch.atan2(sin, cos) * chi_mask,
        "chi_mask": chi_mask,
        "pseudo_beta": beta,
        "pseudo_beta_mask": beta_mask,
    }


def atom14_labels(
    aatype: Int[Tensor, " r"],
    positions: Float[Tensor, "r 37 3"],
    mask: Float[Tensor, "r 37"],
) -> dict[str, Tensor]:
    """Known atoms in the order of atom14, under both namings (Suppl. Table 3)."""
    exists = atom37_to_atom14(mask, aatype)
    gt = atom37_to_atom14(positions, aatype) * exists[..., None]
    swap = by_type(residues.atom14_swap(), aatype)
    return {
        "atom14_gt_positions": gt,
        "atom14_gt_exists": exists,
        "atom14_alt_gt_positions": pick_atoms(gt, swap),
        "atom14_alt_gt_exists": pick_atoms(exists, swap),
        "atom14_atom_is_ambiguous": by_type(residues.atom14_is_ambiguous(), aatype, positions),
    }


def rigid_groups(
    aatype: Int[Tensor, " r"],
    positions: Float[Tensor, "r 37 3"],
    mask: Float[Tensor, "r 37"],
) -> dict[str, Tensor]:
    """The frames of all rigid groups of a known structure (Suppl. Sec. 1.8.4).

    Returns:
        ``rigidgroups_gt_frames[r, 8, 12]`` (see `Rigid.to_flat12`) and
        ``rigidgroups_alt_gt_frames``, with symmetric groups turned by 180 degrees;
        ``rigidgroups_gt_exists[r, 8]``, ``rigidgroups_group_exists``: known, and possible at all;
        ``rigidgroups_group_is_ambiguous``.
    """
    index = by_type(residues.group_atom37(), aatype).flatten(-2)  # [r, 24]
    a, b, c = pick_atoms(positions, index).unflatten(-2, (8, 3)).unbind(-2)
    chi = rigid_from_three_points(a, b, c)
    backbone = backbone_frames(c[:, 0], b[:, 0], a[:, 0])
    rotation = torch.cat([backbone.rotation[:, None], chi.rotation[:, 1:]], dim=1)
    possible = by_type(residues.group_exists(), aatype, positions)
    known = pick_atoms(mask, index).unflatten(-1, (8, 3)).amin(-1) * possible
    symmetric = by_type(residues.chi_is_symmetric(), aatype, positions)
    ambiguous = torch.cat([torch.zeros_like(symmetric), symmetric], dim=-1)
    flip = torch.stack([torch.ones_like(ambiguous), 1 - 2 * ambiguous, 1 - 2 * ambiguous], dim=-1)
    return {
        "rigidgroups_gt_frames": Rigid(rotation, b).to_flat12(),
        "rigidgroups_alt_gt_frames": Rigid(rotation * flip[..., None, :], b).to_flat12(),
        "rigidgroups_gt_exists": known,
        "rigidgroups_group_exists": possible,
        "rigidgroups_group_is_ambiguous": ambiguous,
    }
