"""Scores of structures, against cases that can be worked out by hand."""

from pathlib import Path

import numpy as np
import pytest

from hairpin.proteins import metrics
from hairpin.proteins.compare import compare
from hairpin.proteins.residues import ATOM_TYPES
from hairpin.proteins.structures import Chain, read_structure
from hairpin.proteins.write import predicted_chain

PROTEINS = Path(__file__).parents[2] / "../shared/data/proteins"
N, CA, C = (ATOM_TYPES.index(name) for name in ("N", "CA", "C"))


def list_chains(path):
    return list(read_structure(path).chains.values())


def trace(n=40, seed=0):
    """C-alpha atoms of a chain that wanders, steps of 3.8 Angstrom."""
    steps = np.random.default_rng(seed).normal(size=(n, 3))
    return np.cumsum(3.8 * steps / np.linalg.norm(steps, axis=1, keepdims=True), axis=0)


def turned(points, seed=1):
    """The same points somewhere else, turned but not mirrored."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return points @ (q * np.linalg.det(q)).T + [10.0, -20.0, 30.0]


def chain(sequence, positions, *, name="A", numbers=None, mask=None):
    atoms = np.zeros((len(sequence), 37, 3))
    known = np.zeros((len(sequence), 37))
    for i, residue in enumerate(positions):
        for atom, where in residue.items():
            atoms[i, ATOM_TYPES.index(atom)] = where
            known[i, ATOM_TYPES.index(atom)] = 1
    numbers = np.arange(1, len(sequence) + 1) if numbers is None else np.array(numbers)
    return Chain(
        name=name,
        label=name,
        sequence=sequence,
        positions=atoms,
        mask=known,
        b_factors=known * 50,
        numbers=numbers,
    )


# ---------------------------------------------------------------------------------------- lDDT


def test_lddt_of_three_points_on_a_line():
    """Distances 1, 2, 1 become 1, 3.5, 2.5: off by 0, 1.5, 1.5, so 4, 2 and 2 thresholds of 4."""
    true = np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0]])
    predicted = np.array([[0.0, 0, 0], [1, 0, 0], [3.5, 0, 0]])
    total, each = metrics.lddt(predicted, true)
    assert total == pytest.approx(2 / 3)
    np.testing.assert_allclose(each, [0.75, 0.75, 0.5])


def test_lddt_leaves_out_far_pairs_and_pairs_within_a_residue():
    true = np.array([[0.0, 0, 0], [1, 0, 0], [16.5, 0, 0]])
    moved = np.array([[0.0, 0, 0], [9, 0, 0], [16.5, 0, 0]])
    assert metrics.lddt(moved, true)[0] == 0  # only the first pair is below 15 Angstrom
    alone = metrics.lddt(moved, true, groups=np.array([0, 0, 1]))[0]
    assert np.isnan(alone)


def test_lddt_counts_atoms_that_are_missing_as_wrong():
    true = trace(3)
    present = np.array([True, True, False])
    assert metrics.lddt(true, true, present=present)[0] == pytest.approx(1 / 3)


def test_lddt_does_not_feel_a_turn_but_a_mirror_image_of_a_part():
    true = trace(60)
    assert metrics.lddt(turned(true), true)[0] == pytest.approx(1)
    bent = true.copy()
    bent[30:] *= [1, 1, -1]
    assert metrics.lddt(bent, true)[0] < 0.95


def test_lddt_in_blocks_is_the_same(monkeypatch):
    true, other = trace(50), trace(50, seed=3)
    whole = metrics.lddt(other, true)[0]
    monkeypatch.setattr(metrics, "_BLOCK", 7)
    assert metrics.lddt(other, true)[0] == pytest.approx(whole, abs=1e-12)


def test_atoms_that_look_alike_are_named_as_they_fit():
    """Aspartate's two oxygens swapped is no error; swapping two other atoms is."""
    atoms = {"CA": [0, 0, 0], "CB": [1.5, 0, 0], "OD1": [3, 1, 0], "OD2": [3, -1, 0]}
    swapped = atoms | {"OD1": atoms["OD2"], "OD2": atoms["OD1"]}
    wrong = atoms | {"CA": atoms["CB"], "CB": atoms["CA"]}
    other = {"CA": [-2, 2, 1], "C": [-3, 2, 2]}
    true = chain("DG", [atoms, other])
    for positions, alike in ((swapped, True), (wrong, False)):
        predicted = chain("DG", [positions, other])
        assert (compare([predicted], [true]).lddt > 0.999) == alike


# ------------------------------------------------------------------------------- superposition


def test_superposing_finds_a_turn_back():
    true = trace()
    rotation, translation = metrics.superpose(turned(true), true)
    np.testing.assert_allclose(turned(true) @ rotation.T + translation, true, atol=1e-9)
    assert np.linalg.det(rotation) == pytest.approx(1)


def test_superposing_does_not_mirror():
    true = trace()
    assert metrics.rmsd(true * [1, 1, -1], true) > 1


def test_rmsd_of_two_points_twice_as_far_apart():
    """2 and 4 Angstrom apart: laid centre on centre, each is off by 1."""
    assert metrics.rmsd(np.array([[0.0, 0, 0], [4, 0, 0]]), np.array([[9.0, 0, 0], [9, 2, 0]])) == (
        pytest.approx(1)
    )


def test_tm_score_of_itself_is_one_however_turned():
    true = trace()
    found = metrics.tm_score(turned(true), true, len(true))
    assert (found.tm_score, found.gdt_ts) == (pytest.approx(1), 1)


def test_tm_score_of_one_residue_far_off():
    """The other 99 lie exactly; the one counts 1 / (1 + (100 / d0)^2)."""
    true = trace(100)
    predicted = true.copy()
    predicted[60] += [100, 0, 0]
    d0 = 1.24 * 85 ** (1 / 3) - 1.8
    by_hand = (99 + 1 / (1 + (100 / d0) ** 2)) / 100
    found = metrics.tm_score(turned(predicted), true, 100)
    assert found.tm_score == pytest.approx(by_hand, abs=1e-4)
    assert found.gdt_ts == pytest.approx(0.99)


def test_tm_score_finds_the_larger_of_two_domains_that_moved():
    """Superposing on everything fits neither; the search must find the 70 residues that agree."""
    true = trace(100)
    predicted = true.copy()
    predicted[70:] = turned(true[70:]) + 200
    found = metrics.tm_score(predicted, true, 100)
    assert 0.70 <= found.tm_score < 0.71
    assert metrics.rmsd(predicted, true) > 20
    assert found.gdt_ts == pytest.approx(0.70)


def test_tm_score_is_divided_by_the_length_asked_for():
    true = trace(50)
    assert metrics.tm_score(true, true, 100).tm_score == pytest.approx(0.5)


@pytest.mark.parametrize(("length", "d0"), [(5, 0.5), (15, 0.5), (19, 0.5), (100, 3.6522)])
def test_the_distance_that_scores_one_half(length, d0):
    assert metrics.tm_d0(length) == pytest.approx(d0, abs=1e-3)


# ---------------------------------------------------------------------------------- violations

PEPTIDE = [
    {"N": [-0.525, 1.363, 0], "CA": [0, 0, 0], "C": [1.525, 0, 0]},
    {
        "N": [1.525 + 1.329 * 0.4473, 1.329 * 0.8944, 0],
        "CA": [1.525 + 1.329 * 0.4473 + 1.46, 1.329 * 0.8944 - 0.05, 0],
        "C": [4.13, 2.56, 0],
    },
]


def test_a_good_peptide_bond_violates_nothing():
    """Angle 116.6 at C by construction, 119 at N."""
    found = metrics.violations([chain("GG", PEPTIDE)])
    assert (found.bonds, found.angles, found.clashes, found.residues) == (0, 0, 0, 0)


def test_a_broken_peptide_bond_is_one():
    away = [PEPTIDE[0], {name: np.add(at, [3.0, 3, 0]) for name, at in PEPTIDE[1].items()}]
    found = metrics.violations([chain("GG", away)])
    assert (found.bonds, found.residues) == (1, 2)


def test_residues_that_do_not_follow_each_other_are_not_bonded():
    away = [PEPTIDE[0], {name: np.add(at, [30.0, 0, 0]) for name, at in PEPTIDE[1].items()}]
    found = metrics.violations([chain("GG", away, numbers=[1, 9])])
    assert (found.bonds, found.residues) == (0, 0)


def test_atoms_of_two_chains_in_one_place_clash():
    one, two = chain("G", [{"CA": [0, 0, 0]}]), chain("G", [{"CA": [1.0, 0, 0]}], name="B")
    found = metrics.violations([one, two])
    assert found.clashes == 1
    assert found.worst_overlap == pytest.approx(2 * 1.7 - 1)
    assert found.residues == 2


def test_a_disulfide_bridge_is_no_clash():
    pair = [chain("C", [{"SG": [x, 0, 0]}], name=n) for x, n in ((0, "A"), (2.05, "B"))]
    assert metrics.violations(pair).clashes == 0
    near = [chain("C", [{"SG": [x, 0, 0]}], name=n) for x, n in ((0, "A"), (1.2, "B"))]
    assert metrics.violations(near).clashes == 1


def test_a_stretched_bond_within_a_residue():
    good = {"N": [0, 0, 0], "CA": [1.459, 0, 0]}
    assert metrics.violations([chain("A", [good])]).within_residues == 0
    assert metrics.violations([chain("A", [good | {"CA": [1.9, 0, 0]}])]).within_residues == 1


@pytest.mark.skipif(not PROTEINS.is_dir(), reason="shared/data/proteins is absent")
@pytest.mark.parametrize("name", ["102m", "1k1a", "5zyh", "7zzx"])
def test_experimental_structures_violate_nothing(name):
    assert metrics.violations(list_chains(PROTEINS / name / f"{name}.cif")).residues == 0


# -------------------------------------------------------------------------------------- chains


def folded(n, seed, name="A", letters="ACDEFGHIKLMNPQRSTVWY"):
    """A chain of N, CA and C about a trace, with a sequence of its own."""
    points = trace(n, seed)
    offsets = np.random.default_rng(seed + 100).normal(size=(n, 37, 3))
    kinds = np.random.default_rng(seed + 200).integers(0, len(letters), n)
    sequence = "".join(letters[i] for i in kinds)
    return predicted_chain(name, sequence, points[:, None] + offsets, np.full(n, 50.0))


def renamed(part, name):
    return Chain(**{**vars(part), "name": name})


def test_residues_that_the_structure_lacks_are_left_out():
    whole = folded(60, 0)
    kept = np.r_[0:20, 27:60]
    part = Chain(
        name="X",
        label="X",
        sequence="".join(whole.sequence[i] for i in kept),
        **{n: getattr(whole, n)[kept] for n in ("positions", "mask", "b_factors", "numbers")},
    )
    found = compare([whole], [part])
    assert (found.residues, found.matched, found.predicted_residues) == (53, 53, 60)
    assert (found.identity, found.lddt, found.tm_score) == (1, 1, pytest.approx(1))
    assert found.ca_rmsd == pytest.approx(0, abs=1e-9)
    assert found.tm_score_predicted == pytest.approx(53 / 60, abs=1e-3)
    back = compare([part], [whole])
    assert back.lddt < 0.9
    assert back.tm_score == pytest.approx(53 / 60, abs=1e-3)


def test_copies_of_a_chain_pair_as_they_lie():
    one = folded(40, 0, "A")
    two = Chain(**{**vars(one), "name": "B", "positions": turned(one.positions) + 40})
    other = folded(30, 5, "C")
    found = compare([renamed(two, "Q"), renamed(other, "R"), renamed(one, "P")], [one, two, other])
    assert dict(found.chains) == {"A": "P", "B": "Q", "C": "R"}
    assert found.ca_rmsd == pytest.approx(0, abs=1e-9)
    assert found.lddt == 1


@pytest.mark.skipif(not PROTEINS.is_dir(), reason="shared/data/proteins is absent")
def test_a_published_prediction_against_itself():
    path = PROTEINS / "6kwc/predicted_model_1_ptm_unrelaxed.pdb"
    chains = list_chains(path)
    found = compare(chains, chains)
    assert (found.lddt, found.lddt_ca, found.gdt_ts) == (1, 1, 1)
    assert found.tm_score == pytest.approx(1)
    assert found.ca_rmsd < 1e-6
    lines = [line for line in path.read_text().splitlines() if line[12:16] == " CA "]
    by_hand = [float(line[60:66]) for line in lines]
    assert found.plddt == pytest.approx(sum(by_hand) / 191)
