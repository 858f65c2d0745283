"""The facts about residues: counts that chemistry fixes, and geometry that must hang together."""

import numpy as np
import pytest

from hairpin.proteins import residues, stereochemistry

THREE = list(residues.THREE_TO_ONE)[:20]
HEAVY = {  # heavy atoms of each residue, without OXT
    "A": 5, "R": 11, "N": 8, "D": 8, "C": 6, "Q": 9, "E": 9, "G": 4, "H": 10, "I": 8,
    "L": 8, "K": 9, "M": 8, "F": 11, "P": 7, "S": 6, "T": 7, "W": 14, "Y": 12, "V": 7,
}  # fmt: skip
RINGS = {"H": 1, "F": 1, "P": 1, "W": 2, "Y": 1}


def test_residue_types_are_alphabetical_by_three_letters():
    assert sorted(THREE) == THREE
    assert len(residues.ATOM_TYPES) == len(set(residues.ATOM_TYPES)) == 37
    assert sorted(residues.HHBLITS_ORDER) == sorted(residues.RESTYPES + "X-")


@pytest.mark.parametrize("letter", residues.RESTYPES)
def test_atoms_and_bonds_are_as_many_as_chemistry_has(letter):
    three = residues.ONE_TO_THREE[letter]
    names = residues.atom14_names(three)
    assert len(names) == len(set(names)) == HEAVY[letter]
    assert names[:4] == ("N", "CA", "C", "O")
    bonds = stereochemistry.bonds(three)
    assert len(bonds) == HEAVY[letter] - 1 + RINGS.get(letter, 0)
    assert {name for bond in bonds for name in bond.atoms} == set(names)


@pytest.mark.parametrize(
    ("letter", "number"), [("A", 0), ("V", 19), ("X", 20), ("-", 20), ("", 20), ("B", 3), ("U", 4)]
)
def test_letters_have_numbers(letter, number):
    assert residues.restype(letter) == number


def test_tables_are_each_others_inverse_and_cannot_be_changed():
    to37, to14 = residues.atom14_to_atom37(), residues.atom37_to_atom14()
    exists = residues.atom14_exists().astype(bool)
    assert exists.sum() == residues.atom37_exists().sum() == sum(HEAVY.values())
    for a, i in zip(*exists.nonzero(), strict=True):
        assert to14[a, to37[a, i]] == i
        assert residues.atom37_exists()[a, to37[a, i]] == 1
    swap = residues.atom14_swap()
    assert (np.take_along_axis(swap, swap, axis=1) == np.arange(14)).all()
    assert residues.atom14_is_ambiguous().sum() == 12
    with pytest.raises(ValueError, match="read-only"):
        to37[0, 0] = 1


def test_chi_angles():
    assert residues.chi_exists().sum(1).tolist() == [
        0, 4, 2, 2, 1, 3, 3, 0, 2, 2, 2, 4, 3, 2, 2, 1, 1, 2, 2, 1, 0,
    ]  # fmt: skip
    symmetric = [
        (residues.RESTYPES[a], k)
        for a, k in zip(*residues.chi_is_symmetric().nonzero(), strict=True)
    ]
    assert symmetric == [("D", 1), ("E", 2), ("F", 1), ("Y", 1)]
    assert residues.chi_atoms("VAL") == (("N", "CA", "CB", "CG1"),)


@pytest.mark.parametrize("three", THREE)
def test_ideal_positions_have_ideal_bond_lengths(three):
    """Bonds within one rigid group; what the groups' frames join is tested with the model."""
    a = THREE.index(three)
    names = residues.atom14_names(three)
    group, position = residues.atom14_group()[a], residues.atom14_ideal_positions()[a]
    checked = 0
    for bond in stereochemistry.bonds(three):
        i, j = (names.index(name) for name in bond.atoms)
        if group[i] == group[j]:
            length = np.linalg.norm(position[i] - position[j])
            assert abs(length - bond.mean) < 4 * bond.spread, (bond, length)
            checked += 1
    assert checked >= 2


@pytest.mark.parametrize("three", THREE)
def test_group_frames_are_proper_rotations_and_axes_end_at_their_origin(three):
    a = THREE.index(three)
    frames, exists = residues.group_frames()[a], residues.group_exists()[a].astype(bool)
    for g in exists.nonzero()[0]:
        rotation = frames[g, :3, :3]
        np.testing.assert_allclose(rotation @ rotation.T, np.eye(3), atol=1e-12)
        assert np.linalg.det(rotation) > 0
    np.testing.assert_array_equal(frames[:, 3], np.tile([0, 0, 0, 1], (8, 1)))
    assert not frames[4:, :3, :3][~exists[4:]].any()


def test_an_unknown_residue_has_a_backbone_only():
    assert not residues.atom14_exists()[residues.UNKNOWN].any()
    np.testing.assert_array_equal(residues.group_frames()[20, :4], residues.group_frames()[0, :4])
    assert residues.group_exists()[20].tolist() == [1, 0, 0, 1, 0, 0, 0, 0]


def test_distances_across_angles_by_hand():
    """Alanine's N to C: 1.459, 1.525 and 111 degrees."""
    found = {d.atoms: d for d in stereochemistry.distances_across_angles("ALA")}
    wanted = np.sqrt(1.459**2 + 1.525**2 - 2 * 1.459 * 1.525 * np.cos(np.radians(111.0)))
    assert abs(found["N", "C"].mean - wanted) < 1e-12
    samples = np.random.default_rng(0).normal(
        [1.459, 1.525, 111.0], [0.020, 0.026, 2.7], size=(200_000, 3)
    )
    x, y, angle = samples.T
    spread = np.sqrt(x**2 + y**2 - 2 * x * y * np.cos(np.radians(angle))).std()
    assert abs(found["N", "C"].spread / spread - 1) < 0.02


def test_bounds_within_a_residue():
    lower, upper = stereochemistry.distance_bounds()
    ala, n, ca, o = 0, 0, 1, 3
    assert abs(lower[ala, n, ca] - (1.459 - 12 * 0.020)) < 1e-12
    assert abs(upper[ala, ca, n] - (1.459 + 12 * 0.020)) < 1e-12
    assert abs(lower[ala, n, o] - (1.55 + 1.52 - 1.5)) < 1e-12
    assert upper[ala, n, o] == 1e10
    assert (lower <= upper).all()
    np.testing.assert_array_equal(lower, lower.transpose(0, 2, 1))
    assert not lower[20].any()
    assert stereochemistry.bonds("UNK") == ()
