"""Training examples: functions of seed and number, made ahead by other processes."""

import pytest
import torch

from hairpin.errors import FoldInputError
from hairpin.proteins import loader
from hairpin.proteins.sizes import Sizes
from proteins.tiny import hhr, simple

pytest.importorskip("gemmi", reason="needs gemmi: pip install 'hairpin[fold]'")
SIZES = Sizes(max_msa_clusters=4, max_extra_msa=4, max_templates=2, crop_size=9, recycles=2)
SEQUENCES = {"1abc": "ACDEFGHIKLMNPQ", "2abc": "GGDEFGHIKLMNPQRS", "3abc": "MKKLMNPQRSTVWY"}


@pytest.fixture
def folder(write, tmp_path):
    for name, sequence in SEQUENCES.items():
        write(f"p/{name}/{name}.cif", simple(sequence, entry=name.upper()))
        write(
            f"p/{name}/a.a3m", f">t\n{sequence}\n>o\n{sequence[::-1]}\n>g\n{'-' * len(sequence)}\n"
        )
    write("p/notes/readme.txt", "no protein")
    row = SEQUENCES["1abc"]
    write("p/1abc/templates/9abc.cif", simple(row + "WW"))
    write("p/1abc/templates/a.hhr", hhr(row, [("9ABC_A", 3.0, 2, row[1:12], 2, row[1:12])]))
    return tmp_path / "p"


def same(a, b):
    return a.number == b.number and a.name == b.name and len(a.batches) == len(b.batches) and all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
        for x, y in zip(a.batches, b.batches, strict=True)
    )  # fmt: skip


def test_every_protein_once_before_any_comes_again(folder):
    data = loader.Proteins(loader.find_proteins(folder), sizes=SIZES, seed=1)
    names = [data[i].name for i in range(12)]
    for start in range(0, 12, 3):
        assert sorted(names[start : start + 3]) == sorted(SEQUENCES)
    assert len({tuple(names[start : start + 3]) for start in range(0, 12, 3)}) > 1


def test_examples_follow_from_seed_and_number_alone(folder):
    proteins = loader.find_proteins(folder)
    one, two = (loader.Proteins(proteins, sizes=SIZES, seed=1, keep=k) for k in (1, 9))
    assert all(same(one[i], two[i]) for i in (5, 0, 7, 5))
    other = loader.Proteins(proteins, sizes=SIZES, seed=2)
    assert not all(same(one[i], other[i]) for i in range(6))


def test_draws_vary_as_they_should(folder):
    data = loader.Proteins(loader.find_proteins(folder, ["1abc"]), sizes=SIZES, clamped=0.5)
    examples = [data[i] for i in range(40)]
    assert {len(e.batches) for e in examples} == {1, 2, 3}
    assert {float(e.batches[0]["use_clamped_fape"]) for e in examples} == {0.0, 1.0}
    assert {int(e.batches[0]["template_mask"].sum()) for e in examples} == {0, 1}
    assert {int(e.batches[0]["residue_index"][0]) for e in examples} == set(range(6))
    for example in examples:
        assert all(len(batch["aatype"]) == 9 for batch in example.batches)
        first = example.batches[0]
        assert (first["true_msa"][0] == first["aatype"]).all()
        assert first["all_atom_mask"][:, 1].all()


def test_ranks_share_the_steps_out_and_agree_on_recycles(folder):
    data = loader.Proteins(loader.find_proteins(folder), sizes=SIZES, ranks=2)
    parts = [list(loader.load(data, start=1, stop=4, rank=r, workers=0)) for r in (0, 1)]
    assert [[e.number for e in part] for part in parts] == [[2, 4, 6], [3, 5, 7]]
    for a, b in zip(*parts, strict=True):
        assert len(a.batches) == len(b.batches)


def test_workers_give_the_same_and_training_goes_on_from_any_step(folder):
    data = loader.Proteins(loader.find_proteins(folder), sizes=SIZES)
    here = list(loader.load(data, start=0, stop=6, workers=0))
    there = list(loader.load(data, start=0, stop=6, workers=2))
    later = list(loader.load(data, start=4, stop=6, workers=1))
    assert all(same(a, b) for a, b in zip(here, there, strict=True))
    assert all(same(a, b) for a, b in zip(here[4:], later, strict=True))


def test_validation_sees_the_whole_protein_alike(folder):
    data = loader.Proteins(loader.find_proteins(folder), sizes=SIZES)
    one, two = data.whole(1, recycles=1), data.whole(1, recycles=1)
    assert len(one) == 2
    assert len(one[0]["aatype"]) == 16
    assert all(torch.equal(one[1][k], two[1][k]) for k in one[1])


def test_the_chain_most_like_the_target_is_taken(write, tmp_path):
    text = simple("WWWWWWWWACDEFGHIKLMNPQRV")
    write("p/1abc/1abc.cif", text)
    write("p/1abc/a.a3m", ">t\nACDEFGHIKLMNPQRS\n")
    target = loader.read_protein(*loader.find_proteins(tmp_path / "p"))
    assert target.labels["all_atom_mask"][:, 1].all()


def test_folders_that_cannot_be(folder, write, tmp_path):
    with pytest.raises(FoldInputError, match="there is no such folder"):
        loader.find_proteins(tmp_path / "none")
    with pytest.raises(FoldInputError, match=r"p.1abc: no protein in it; make a folder for each"):
        loader.find_proteins(folder / "1abc")
    with pytest.raises(FoldInputError, match=r"notes: no structure in it; put notes.cif there"):
        loader.find_proteins(folder, ["notes"])
    write("p/4abc/4abc.cif", simple())
    with pytest.raises(FoldInputError, match=r"4abc: no alignment in it; put an .a3m or .sto"):
        loader.find_proteins(folder)


def test_an_error_of_a_worker_says_which_file(folder, write):
    proteins = loader.find_proteins(folder, ["2abc"])
    write("p/2abc/a.a3m", ">t\nAC1\n")
    data = loader.Proteins(proteins, sizes=SIZES)
    with pytest.raises(FoldInputError, match=r"a.a3m, line 2: '1' at character 3"):
        next(iter(loader.load(data, start=0, stop=1, workers=1)))
