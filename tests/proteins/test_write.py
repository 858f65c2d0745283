"""PDB and mmCIF files written, and read back."""

import gemmi
import numpy as np
import pytest

from hairpin.errors import OutputError
from hairpin.proteins.compare import plddt_of
from hairpin.proteins.structures import Chain, read_structure
from hairpin.proteins.write import chain_names, predicted_chain, write_mmcif, write_pdb


def list_chains(path):
    return list(read_structure(path).chains.values())


def some(sequence, name="A", *, seed=0, first_number=1):
    rng = np.random.default_rng(seed)
    positions = rng.uniform(-90, 90, (len(sequence), 37, 3)).round(3)
    plddt = rng.uniform(20, 99, len(sequence)).round(2)
    return predicted_chain(name, sequence, positions, plddt, first_number=first_number)


def assert_same(found, wanted):
    assert [c.name for c in found] == [c.name for c in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.sequence == theirs.sequence
        np.testing.assert_array_equal(ours.mask, theirs.mask)
        np.testing.assert_array_equal(ours.numbers, theirs.numbers)
        np.testing.assert_allclose(ours.positions, theirs.positions, atol=2e-5)
        np.testing.assert_allclose(ours.b_factors, theirs.b_factors, atol=1e-9)


WRITERS = [(write_pdb, "x.pdb"), (write_mmcif, "x.cif")]


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_what_is_written_is_read_back(tmp_path, write, name):
    chains = [some("ANDCQEGHILKMFPSTWYV"), some("GA", "b", seed=1, first_number=7)]
    write(tmp_path / name, chains, remarks=["made for a test"])
    assert_same(list_chains(tmp_path / name), chains)
    assert "made for a test" in (tmp_path / name).read_text()


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_more_chains_than_letters(tmp_path, write, name):
    names = chain_names()
    chains = [some("GAV", next(names), seed=i) for i in range(70)]
    assert [c.name for c in chains[60:64]] == ["8", "9", "AA", "AB"]
    write(tmp_path / name, chains)
    assert_same(list_chains(tmp_path / name), chains)


def test_pdb_refuses_names_it_has_no_room_for(tmp_path):
    with pytest.raises(OutputError, match=r"one or two letters.*'ABC'; write mmCIF"):
        write_pdb(tmp_path / "x.pdb", [some("GA", "ABC")])
    write_mmcif(tmp_path / "x.cif", [some("GA", "ABC")])
    assert list_chains(tmp_path / "x.cif")[0].name == "ABC"


@pytest.mark.parametrize(("write", "name"), WRITERS)
def test_more_atoms_than_a_pdb_can_count_and_long_numbers(tmp_path, write, name):
    chain = some("W" * 7200 + "G", first_number=4000)  # 100,804 atoms, numbers to 11,200
    write(tmp_path / name, [chain])
    (back,) = list_chains(tmp_path / name)
    assert back.mask.sum() == 7200 * 14 + 4
    assert_same([back], [chain])
    assert (
        all(len(line) <= 80 for line in (tmp_path / "x.pdb").read_text().splitlines())
        if (name == "x.pdb")
        else True
    )


def test_unknown_residues_stand_in_the_sequence_without_atoms(tmp_path):
    write_mmcif(tmp_path / "x.cif", [some("GXA")])
    structure = gemmi.read_structure(str(tmp_path / "x.cif"))
    assert structure.entities[0].full_sequence == ["GLY", "UNK", "ALA"]
    assert [r.name for r in structure[0][0]] == ["GLY", "ALA"]
    assert [r.label_seq for r in structure[0][0]] == [1, 3]


def test_modelcif_holds_the_scores(tmp_path):
    chain = some("GAV")
    write_mmcif(tmp_path / "x.cif", [chain], metrics={"pTM": 0.5})
    block = gemmi.cif.read(str(tmp_path / "x.cif")).sole_block()
    kinds = [list(row) for row in block.find("_ma_qa_metric.", ["id", "mode", "name"])]
    assert kinds == [["1", "global", "pLDDT"], ["2", "local", "pLDDT"], ["3", "global", "pTM"]]
    overall = [
        list(row) for row in block.find("_ma_qa_metric_global.", ["metric_id", "metric_value"])
    ]
    assert overall == [["1", f"{plddt_of(chain).mean():.2f}"], ["3", "0.5000"]]
    columns = ["label_asym_id", "label_seq_id", "metric_value"]
    local = [list(row) for row in block.find("_ma_qa_metric_local.", columns)]
    assert local == [["A", str(i + 1), f"{p:.2f}"] for i, p in enumerate(plddt_of(chain))]


def test_copies_are_one_entity(tmp_path):
    write_mmcif(tmp_path / "x.cif", [some("GAV"), some("GAV", "B"), some("GG", "C")])
    entities = gemmi.read_structure(str(tmp_path / "x.cif")).entities
    assert [list(e.subchains) for e in entities] == [["A", "B"], ["C"]]


def test_b_factors_that_differ_within_a_residue_are_no_plddt():
    chain = some("GAV")
    assert plddt_of(chain) is not None
    b_factors = chain.b_factors.copy()
    b_factors[1, 1] += 1
    assert plddt_of(Chain(**{**vars(chain), "b_factors": b_factors})) is None


@pytest.mark.parametrize("write", [write_pdb, write_mmcif])
def test_a_folder_that_is_not_there(tmp_path, write):
    with pytest.raises(OutputError, match=r"cannot write .*none/x"):
        write(tmp_path / "none/x", [some("GA")])
