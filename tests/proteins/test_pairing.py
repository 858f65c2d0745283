"""Alignments of complexes: species told from names, rows paired and laid side by side."""

import numpy as np
import pytest

from hairpin.proteins.msa import Msa
from hairpin.proteins.pairing import ChainRows, merge_chains, pair_rows, species
from hairpin.proteins.residues import GAP


def rows(names, letters=None, residues=4):
    """An MSA whose first row is the target and whose n-th row has n mismatches by default."""
    if letters is None:
        letters = np.ones((len(names) + 1, residues), dtype=np.uint8)
        for i in range(len(names) + 1):
            letters[i, :i] = 2 + i
    letters = np.asarray(letters, dtype=np.uint8)
    return Msa(letters, np.zeros(letters.shape, dtype=np.int32), ("target", *names))


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("tr|A0A2A6NXF8|A0A2A6NXF8_9BRAD Uncharacterized OS=B. sp. C9 OX=142585", "9BRAD"),
        ("sp|P69905|HBA_HUMAN/2-142", "HUMAN"),
        ("sp|P69905_1|HBA_HUMAN_7", "HUMAN"),
        ("A0A1F2V377 Uncharacterized protein OX=1797188 GN=x", "taxon 1797188"),
        ("UniRef90_D7BIZ4/1-73 [subseq from] n=1 TaxID=526227 RepID=D7BIZ4_MEISD", "taxon 526227"),
        ("UniRef100_A0A2T9WJQ3_1987490/\t243\t0.294", "taxon 1987490"),
        ("UniRef100_UPI00186459A6_118141/", "taxon 118141"),
        ("UniRef100_A0A2L2TCV1", ""),
        ("MGYP000406148242/1-68", ""),
        ("tr|A0A|not one", ""),
        ("", ""),
    ],
)
def test_species_by_name(name, found):
    assert species(name) == found


def uniprot(*mnemonics):
    return [f"tr|A0A0A0{i:03}|X_{mnemonic}" for i, mnemonic in enumerate(mnemonics)]


def test_rows_of_a_species_are_paired_by_likeness():
    first = rows(uniprot("HUMAN", "HUMAN", "MOUSE"))
    letters = np.ones((4, 4))
    letters[1, :3], letters[3, :1] = 5, 5  # row 1 is the least like the target, row 2 the most
    second = rows(uniprot("HUMAN", "HUMAN", "YEAST"), letters)
    assert pair_rows([first, second]).tolist() == [[0, 0], [1, 2], [2, 1]]


def test_species_in_more_chains_come_first_and_one_chain_alone_never():
    a = rows(uniprot("YEAST", "HUMAN", "MOUSE"))
    b = rows(uniprot("YEAST", "HUMAN"))
    c = rows(uniprot("RAT", "HUMAN"))
    assert pair_rows([a, b, c]).tolist() == [[0, 0, 0], [2, 2, 2], [1, 1, -1]]


def test_species_with_very_many_rows_are_left_out():
    many = Msa(
        np.ones((602, 4), np.uint8), np.zeros((602, 4), np.int32), ("t", *uniprot(*["HUMAN"] * 601))
    )
    assert pair_rows([many, rows(uniprot("HUMAN"))]).tolist() == [[0, 0]]


def test_two_chains_paired_above_and_apart_below():
    a = rows(uniprot("HUMAN", "MOUSE"), residues=3)
    b = rows(uniprot("YEAST", "HUMAN"), residues=2)
    merged, known = merge_chains([ChainRows(1, a, a), ChainRows(2, b, b)], 100)
    g = GAP
    expected = [
        [*a.letters[0], *b.letters[0]],
        [*a.letters[1], *b.letters[2]],
        [*a.letters[2], g, g],
        [g, g, g, *b.letters[1]],
    ]
    assert merged.letters.tolist() == [list(map(int, row)) for row in expected]
    assert known.tolist() == [[1] * 5, [1] * 5, [1, 1, 1, 0, 0], [0, 0, 0, 1, 1]]


def test_copies_share_their_rows():
    a = rows(uniprot("HUMAN", "MOUSE"), residues=3)
    merged, known = merge_chains([ChainRows(1, a, a)] * 2, 100)
    assert (merged.letters == np.concatenate([a.letters, a.letters], axis=1)).all()
    assert known.all()

    b = rows(uniprot("HUMAN"), residues=2)
    merged, known = merge_chains([ChainRows(1, a, a), ChainRows(2, b, b), ChainRows(1, a, a)], 100)
    g = GAP
    letters = merged.letters.tolist()
    assert letters[1] == [*a.letters[1], *b.letters[1], *a.letters[1]]
    assert letters[2] == [*a.letters[2], g, g, *a.letters[2]]
    assert len(letters) == 3
    assert known.all()  # copies of a count as partners of each other, as in the published pipeline


def test_rows_are_limited_and_half_may_be_paired():
    a = rows(uniprot(*[f"S{i}" for i in range(40)]), residues=60)
    b = rows(uniprot(*[f"S{i}" for i in range(20)]), residues=60)
    merged, known = merge_chains([ChainRows(1, a, a), ChainRows(2, b, b)], 16)
    assert known[:8].all()
    assert (merged.letters[:8] != GAP).all()
    assert len(merged) == 8 + 8 + 8
    assert merged.letters[0].tolist() == [*a.letters[0], *b.letters[0]]


def test_deletions_travel_with_their_rows():
    a, b = rows(uniprot("HUMAN"), residues=3), rows(uniprot("HUMAN", "MOUSE"), residues=2)
    a.deletions[1, 2], b.deletions[1, 0], b.deletions[2, 1] = 4, 5, 6
    merged, _ = merge_chains([ChainRows(1, a, a), ChainRows(2, b, b)], 100)
    assert merged.deletions.tolist() == [[0] * 5, [0, 0, 4, 5, 0], [0, 0, 0, 0, 6]]
