"""mmCIF and PDB in: which atoms count, and what is said of bad files."""

import gzip
import sys
from datetime import date

import numpy as np
import pytest

from hairpin.errors import FoldInputError, MissingExtraError
from hairpin.proteins.residues import ATOM_TYPES
from hairpin.proteins.structures import gap_between_neighbours, read_structure
from proteins.tiny import atoms_of, mmcif, names_of, simple

pytest.importorskip("gemmi", reason="needs gemmi: pip install 'hairpin[fold]'")
AT = {name: i for i, name in enumerate(ATOM_TYPES)}


def test_a_structure_with_residues_that_were_not_seen(write):
    residues = names_of("GACDE")
    found = read_structure(
        write("1abc.cif", mmcif({"Q": (residues, atoms_of(residues, unseen=[1]))}))
    )
    assert (found.entry, found.released, found.resolution) == ("1ABC", date(2010, 5, 6), 1.8)
    assert (found.method, list(found.chains)) == ("X-RAY DIFFRACTION", ["Q"])
    chain = found.chain("Q")
    assert found.chain("Ax") is chain  # by its label
    assert chain.sequence == "GACDE"
    assert chain.mask.sum(axis=1).tolist() == [4, 0, 5, 5, 5]
    assert chain.numbers.tolist() == [101, -9999, 103, 104, 105]
    assert chain.positions[2, AT["CA"]].tolist() == pytest.approx([7.6, 0, 0])
    assert not chain.positions[1].any()
    assert gap_between_neighbours(chain) == pytest.approx(3.8)


def test_modified_and_unknown_residues(write):
    residues = ["MSE", "SEP", "UNK", "QQQ", "ALA"]
    atoms = [*atoms_of(residues), ("MSE", 1, "SE", ".", 1.0, 9.0, 9.0, 9.0)]
    chain = read_structure(write("a.cif", mmcif({"A": (residues, atoms)}))).chain("A")
    assert chain.sequence == "MSXXA"
    assert chain.positions[0, AT["SD"]].tolist() == [9, 9, 9]
    assert chain.mask[0, AT["SD"]] == 1


def test_of_several_places_the_fullest_counts_and_the_first_of_equals(write):
    residues = names_of("ACD")
    places = [("A", 0.3, 1.0), ("B", 0.4, 2.0), ("C", 0.3, 3.0)]
    atoms = [("ALA", 1, "CA", alt, occupancy, x, 0.0, 0.0) for alt, occupancy, x in places]
    atoms += [("CYS", 2, "CA", alt, 0.5, x, 0.0, 0.0) for alt, x in (("A", 4.0), ("B", 5.0))]
    chain = read_structure(write("a.cif", mmcif({"A": (residues, atoms)}))).chain("A")
    assert chain.positions[:2, AT["CA"], 0].tolist() == [2.0, 4.0]


def test_arginine_is_named_by_distance(write):
    atoms = [
        ("ARG", 1, name, ".", 1.0, x, 0.0, 0.0)
        for name, x in (("CD", 0.0), ("NH1", 5.0), ("NH2", 3.0))
    ]
    chain = read_structure(write("a.cif", mmcif({"A": (["ARG"], atoms)}))).chain("A")
    assert chain.positions[0, [AT["NH1"], AT["NH2"]], 0].tolist() == [3.0, 5.0]


def test_gzip_windows_line_ends_and_pdb_agree(write):
    import gemmi

    text = simple("ACDEFG")
    plain = read_structure(write("1abc.cif", text)).chain("A")
    packed = read_structure(write("b.cif.gz", gzip.compress(text.replace("\n", "\r\n").encode())))
    as_pdb = gemmi.make_structure_from_block(gemmi.cif.read_string(text).sole_block())
    pdb = read_structure(write("c.pdb", as_pdb.make_pdb_string()))
    atoms_only = "\n".join(
        line for line in as_pdb.make_pdb_string().splitlines() if not line.startswith("SEQRES")
    )
    for other in (packed, pdb, read_structure(write("d.pdb", atoms_only))):
        assert other.chain("A").sequence == plain.sequence
        np.testing.assert_allclose(other.chain("A").positions, plain.positions, atol=1e-3)
        assert (other.chain("A").mask == plain.mask).all()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.cif: the file is empty; download it again"),
        ("not a structure\n", "is no mmCIF or PDB file that can be read .*; download it again"),
        (simple()[: simple().index("ATOM 9") + 20], "is no mmCIF .* can be read"),
        (simple()[:-40], r"is no mmCIF or PDB file that can be read"),
        ("data_x\n_entry.id x\n", "no atoms in it; give a file with coordinates"),
        (simple().replace("polypeptide(L)", "polyribonucleotide").replace("polymer", "water"),
         "no protein chain in it; give a structure of a protein"),
    ],
)  # fmt: skip
def test_bad_files(write, content, message):
    with pytest.raises(FoldInputError, match=message):
        read_structure(write("a.cif", content))


def test_without_gemmi_the_extra_is_named(write, monkeypatch):
    monkeypatch.setitem(sys.modules, "gemmi", None)
    with pytest.raises(
        MissingExtraError, match=r"structure files need gemmi: pip install 'hairpin"
    ):
        read_structure(write("a.cif", simple()))


def test_a_chain_that_is_not_there(write):
    found = read_structure(write("1abc.cif", simple(chain="B")))
    with pytest.raises(FoldInputError, match=r"1abc.cif: no protein chain 'A'; the chains are B"):
        found.chain("A")


def test_letters_beyond_ascii_do_no_harm(write):
    text = simple("ACDEFG").replace("'X-RAY DIFFRACTION'", "'Röntgen'")
    assert read_structure(write("a.cif", text)).method == "R??ntgen"
