"""`hairpin score`: what it prints, and what it refuses."""

import json

import numpy as np
import pytest

from hairpin.proteins.write import predicted_chain, write_mmcif, write_pdb


@pytest.fixture
def files(folder):
    """A prediction as PDB with chains A and B, its first chain as mmCIF under another name."""
    rng = np.random.default_rng(0)
    made = [
        predicted_chain(name, sequence, rng.uniform(-20, 20, (20, 37, 3)), np.full(20, plddt))
        for name, sequence, plddt in (
            ("A", "ARNDCQEGHILKMFPSTWYV", 80.0),
            ("B", "GAVGAVGGAAVVGGAAVVGA", 60.0),
        )
    ]
    write_pdb("ours.pdb", made)
    write_mmcif(
        "true.cif", [predicted_chain("Q", made[0].sequence, made[0].positions, np.ones(20))]
    )
    return folder


def test_scores_as_text_and_as_json(run, files):
    done = run("score", "ours.pdb", "true.cif")
    assert done.code == 0
    assert "A on Q (prediction on structure)" in done.out
    assert "by the structure's length" in done.out
    data = json.loads(run("score", "ours.pdb", "true.cif", "--json").out)
    assert data["lddt"] == 1
    assert data["plddt"] == 80
    assert data["chains"] == {"Q": "A"}


def test_chains_can_be_picked(run, files):
    assert run("score", "ours.pdb", "true.cif", "--chain", "A:Q").code == 0
    done = run("score", "ours.pdb", "true.cif", "--chain", "C")
    assert (done.code, done.out) == (2, "")
    assert "no protein chain 'C'" in done.err
    done = run("score", "ours.pdb", "true.cif", "--chain", "B")
    assert done.code == 2
    assert "less than 30% of the residues are the same" in done.err


def test_a_file_that_is_not_there(run, files):
    done = run("score", "ours.pdb", "none.cif")
    assert (done.code, done.out) == (2, "")
    assert "none.cif" in done.err
