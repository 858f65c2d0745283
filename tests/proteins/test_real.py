"""Real alignments and structures against DeepMind's own features of them."""

import numpy as np
import pytest

from hairpin.proteins import msa, pipeline, templates
from hairpin.proteins.alignments import read_alignment
from hairpin.proteins.fasta import read_target
from hairpin.proteins.hhr import read_hhr
from hairpin.proteins.labels import label_features
from hairpin.proteins.residues import HHBLITS_ORDER, RESTYPES
from hairpin.proteins.sizes import Sizes
from hairpin.proteins.structures import read_structure

HHBLITS = np.array([HHBLITS_ORDER.index(letter) for letter in RESTYPES + "X-"])


@pytest.fixture
def deepmind(real):
    return np.load(real / "short73" / "deepmind_features.npz")


@pytest.fixture
def target(real):
    return read_target(real / "short73" / "target.fasta").sequence


def test_msa_and_deletions_are_deepminds(real, deepmind, target):
    names = ["uniref90_hits.sto", "bfd_uniclust_hits.a3m", "mgnify_hits.sto"]
    found = msa.merge(target, [read_alignment(real / "short73" / name, target) for name in names])
    np.testing.assert_array_equal(HHBLITS[found.letters], deepmind["msa"])
    np.testing.assert_array_equal(found.deletions, deepmind["deletion_matrix_int"])
    assert len(found) == deepmind["num_alignments"][0] == 1136


def test_sequence_features_are_deepminds(deepmind, target):
    batch = pipeline.monomer_features(target, sizes=Sizes(recycles=0))[0]
    np.testing.assert_array_equal(np.eye(21)[batch["aatype"]], deepmind["aatype"])
    np.testing.assert_array_equal(batch["residue_index"], deepmind["residue_index"])


def test_templates_are_deepminds(real, deepmind, target):
    """Of its eight templates six structures are here; hits without one are skipped by request."""
    pytest.importorskip("gemmi", reason="needs gemmi: pip install 'hairpin[fold]'")
    folder = real / "short73"
    found = templates.from_hits(target, read_hhr(folder / "pdb70_hits.hhr"), folder, missing="skip")
    here = [name for name in deepmind["template_domain_names"] if name[:4] not in ("1hf9", "2crb")]
    assert [template.name for template in found.templates] == here
    assert len(here) == 6
    features = templates.features(found.templates, len(target), 6)
    for t, name in enumerate(here):
        theirs = list(deepmind["template_domain_names"]).index(name)
        assert found.templates[t].sequence == deepmind["template_sequence"][theirs]
        for key in ("all_atom_positions", "all_atom_masks", "sum_probs"):
            np.testing.assert_array_equal(
                features[f"template_{key}"][t], deepmind[f"template_{key}"][theirs], err_msg=name
            )
        one_hot = np.eye(22)[HHBLITS[features["template_aatype"][t]]]
        np.testing.assert_array_equal(one_hot, deepmind["template_aatype"][theirs])


@pytest.mark.parametrize(
    ("name", "chain", "residues", "seen", "rows"),
    [("102m", "A", 154, 154, 836), ("5zyh", "A", 237, 228, 926)],
)
def test_structures_become_labels(real, name, chain, residues, seen, rows):
    pytest.importorskip("gemmi", reason="needs gemmi: pip install 'hairpin[fold]'")
    alignments = [read_alignment(real / name / f"{a}.a3m") for a in ("pairing", "non_pairing")]
    sequence = alignments[0].target
    structure = read_structure(real / name / f"{name}.cif")
    labels = label_features(sequence, structure, structure.chain(chain))
    target = pipeline.monomer_target(sequence, alignments, labels=labels)
    assert (len(sequence), len(target.msa)) == (residues, rows)
    assert labels["all_atom_mask"][:, 1].sum() == seen
    batch = target.batches(Sizes(max_extra_msa=64, recycles=0, crop_size=100), 0)[0]
    exists, mask = batch["atom37_atom_exists"], batch["all_atom_mask"]
    assert (mask[:, :36] <= exists[:, :36]).all()  # all but OXT
    assert mask[:, :36].sum() > 0.9 * exists[:, :36].sum()


def test_real_species_pair_between_two_proteins(real):
    chains = []
    for name in ("102m", "5zyh"):
        a = read_alignment(real / name / "pairing.a3m")
        chains.append(pipeline.ChainInput(a.target, [a]))
    (batch,) = pipeline.multimer_features(chains, sizes=Sizes(max_templates=4))
    both = (batch["msa"][:, :154] != 21).any(-1) & (batch["msa"][:, 154:] != 21).any(-1)
    assert both.sum() > 20
    assert both[: int(both.sum())].all()
