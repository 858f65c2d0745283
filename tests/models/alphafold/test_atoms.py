"""Atoms, torsions and rigid groups: against DeepMind's labels, and there and back."""

import torch

import structure_oracle as oracle
from hairpin.models.alphafold import atoms
from hairpin.proteins import residues

NAME = "monomer_ptm_templates_recycle1"


def test_labels_are_deepminds():
    features = oracle.features(NAME)
    found = atoms.derived_labels(
        features["aatype"], features["all_atom_positions"], features["all_atom_mask"]
    )
    found |= atoms.atom_features(features["aatype"])
    assert {*found} <= {*features}
    for key, value in found.items():
        wanted = features[key]
        if key == "backbone_affine_tensor":  # a quaternion and its negative turn alike
            sign = torch.sign((value[:, :4] * wanted[:, :4]).sum(-1, keepdim=True))
            wanted = torch.cat([sign * wanted[:, :4], wanted[:, 4:]], dim=-1)
        torch.testing.assert_close(value, wanted.to(value), rtol=1e-5, atol=2e-5, msg=key)


def test_torsions_survive_the_way_to_atoms_and_back():
    aatype = torch.arange(20)
    angles = (torch.rand(20, 7, generator=torch.Generator().manual_seed(0)) * 6 - 3).double()
    positions = atoms.atom14_to_atom37(oracle.built(angles, aatype), aatype)
    mask = atoms.by_type(residues.atom37_exists(), aatype, angles)
    found = atoms.atom37_to_torsion_angles(aatype, positions, mask)
    known = found["torsion_angles_mask"][:, 2:]  # each residue alone has no omega and phi
    wanted = torch.stack([angles.sin(), angles.cos()], dim=-1)[:, 2:]
    error = (found["torsion_angles_sin_cos"][:, 2:] - wanted).norm(dim=-1) * known
    assert error.max() < 0.05  # ideal positions have three decimals and small out-of-plane parts
    assert known.sum() == 20 + residues.chi_exists().sum()
    flipped = found["alt_torsion_angles_sin_cos"] != found["torsion_angles_sin_cos"]
    symmetric = [residues.RESTYPES[i] for i in flipped.any(-1).any(-1).nonzero()[:, 0]]
    assert sorted(symmetric) == ["D", "E", "F", "Y"]


def test_a_right_angled_torsion_by_hand():
    """Serine's chi 1 of +90 degrees: looking from CB to CA, OG lies clockwise of N."""
    position = torch.zeros(1, 37, 3)
    mask = torch.zeros(1, 37)
    for name, at in {"N": (1, 1, 0), "CA": (0, 0, 0), "CB": (0, 0, 1), "OG": (-1, 1, 1)}.items():
        position[0, residues.ATOM_TYPES.index(name)] = torch.tensor(at, dtype=torch.float32)
        mask[0, residues.ATOM_TYPES.index(name)] = 1
    aatype = torch.tensor([residues.RESTYPES.index("S")])
    found = atoms.atom37_to_torsion_angles(aatype, position, mask)
    sin, cos = found["torsion_angles_sin_cos"][0, 3]
    # axis z from CA to CB; N at 45 degrees, OG at 135 degrees about it
    assert abs(float(sin) - 1) < 1e-4
    assert abs(float(cos)) < 1e-4
    assert found["torsion_angles_mask"][0].tolist() == [0, 0, 0, 1, 0, 0, 0]


def test_neighbours_give_omega_and_phi_whatever_the_leading_dims():
    features = oracle.features(NAME)
    many = [
        features[key].expand(3, *features[key].shape)
        for key in ("aatype", "all_atom_positions", "all_atom_mask")
    ]
    found = atoms.atom37_to_torsion_angles(*many)
    single = atoms.atom37_to_torsion_angles(*(x[0] for x in many))
    for key, value in single.items():
        assert torch.equal(found[key][1], value)
    assert single["torsion_angles_mask"][0, :3].tolist() == [0, 0, 1]
    assert single["torsion_angles_mask"][1:, :3].all()


def test_the_orders_of_atoms_are_each_others_inverse():
    aatype = torch.arange(21)
    exists = atoms.by_type(residues.atom14_exists(), aatype, torch.empty(0))
    x = torch.randn(21, 14, 3) * exists[..., None]
    assert torch.equal(atoms.atom37_to_atom14(atoms.atom14_to_atom37(x, aatype), aatype), x)
    wide = atoms.atom14_to_atom37(exists, aatype)
    assert torch.equal(wide, atoms.by_type(residues.atom37_exists(), aatype, wide))


def test_pseudo_beta_of_glycine_is_ca():
    aatype = torch.tensor([residues.RESTYPES.index("G"), residues.RESTYPES.index("A"), 20, 21])
    positions = torch.arange(4 * 37 * 3, dtype=torch.float32).reshape(4, 37, 3)
    mask = torch.ones(4, 37)
    mask[1, residues.ATOM_TYPES.index("CB")] = 0
    beta, known = atoms.pseudo_beta(aatype, positions, mask)
    ca, cb = (residues.ATOM_TYPES.index(name) for name in ("CA", "CB"))
    assert torch.equal(beta[0], positions[0, ca])
    assert torch.equal(beta[1:], positions[1:, cb])
    assert known.tolist() == [1, 0, 1, 1]


def test_swapping_names_turns_the_group_by_half_a_turn():
    """The alternative frame of a symmetric group is that of the structure with names swapped."""
    aatype = torch.tensor([residues.RESTYPES.index(letter) for letter in "DEFY"])
    angles = torch.rand(4, 7, generator=torch.Generator().manual_seed(1)).double()
    here = oracle.built(angles, aatype)
    swapped = atoms.pick_atoms(here, atoms.by_type(residues.atom14_swap(), aatype))
    mask = atoms.by_type(residues.atom37_exists(), aatype, angles)
    groups, alt = (
        atoms.rigid_groups(aatype, atoms.atom14_to_atom37(x, aatype), mask) for x in (here, swapped)
    )
    error = groups["rigidgroups_alt_gt_frames"] - alt["rigidgroups_gt_frames"]
    assert error.abs().max() < 0.02  # ideal positions are a little asymmetric
    assert groups["rigidgroups_group_is_ambiguous"].sum() == 4
