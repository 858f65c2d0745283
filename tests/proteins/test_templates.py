"""Templates: which hits are used, where their residues land, what the model is given."""

from datetime import date

import numpy as np
import pytest

from hairpin.errors import FoldInputError
from hairpin.proteins import templates
from hairpin.proteins.hhr import read_hhr
from hairpin.proteins.residues import ATOM_TYPES
from proteins.tiny import atoms_of, hhr, mmcif, names_of, simple

pytest.importorskip("gemmi", reason="needs gemmi: pip install 'hairpin[fold]'")
TARGET = "ACDEFGHIKLMNPQRSTVWYACDEFGHIKLMN"
CA = ATOM_TYPES.index("CA")


@pytest.fixture
def find(write, tmp_path):
    """Templates of an HHR file made of hits."""

    def search(hits, **options):
        path = write("a.hhr", hhr(TARGET, hits))
        return templates.from_hits(TARGET, read_hhr(path), tmp_path, source=path, **options)

    return search


def test_residues_land_where_the_hit_says(write, find):
    chain = "WWWW" + "DEFHIWWKLMNPQR" + "YY"
    write("1abc.cif", simple(chain))
    hit = ("1ABC_A", 8.5, 3, "DEFGHI--KLMNPQR", 5, "DEF-HIWWKLMNPQR")
    (found,) = find([hit]).templates
    assert found.name == "1abc_A"
    assert found.sequence == "--DEF-HIKLMNPQR-----------------"
    for i, letter in enumerate(found.sequence):
        if letter == "-":
            assert not found.mask[i].any()
        else:
            x = found.positions[i, CA, 0] / 3.8
            assert chain[round(float(x))] == letter == TARGET[i]


def test_the_best_come_first_and_no_more_than_wanted(write, find):
    for entry in ("1abc", "2abc", "3abc"):
        write(f"template_{entry}.cif", simple("DEFGHIKLMNPQ", entry=entry.upper()))
    hits = [
        (f"{n}ABC_A", p, 3, "DEFGHIKLMNPQ", 1, "DEFGHIKLMNPQ")
        for n, p in ((1, 5.0), (2, 7.0), (3, 7.0))
    ]
    assert [t.name for t in find(hits).templates] == ["2abc_A", "3abc_A", "1abc_A"]
    assert [t.sum_probs for t in find(hits, max_hits=2).templates] == [7.0, 7.0]


@pytest.mark.parametrize(
    ("hit", "reason"),
    [
        (
            ("1ABC_A", 5, 3, "DEF", 1, "DEF"),
            "3 of the target's 32 residues are aligned, a tenth or",
        ),
        (("1ABC_A", 5, 1, TARGET, 1, TARGET), "it is the target itself"),
        (("1ABC_A", 5, 3, "DEFGHIKLM", 1, "DEFGHIKLM"), "it has 9 residues, fewer than 10"),
        (("nothing", 5, 3, "DEFGHIKLMNPQ", 1, "DEFGHIKLMNPQ"), "does not begin with an entry"),
        (("1ABC_A", 5, 3, "DEFGHIKLMNPQ", 1, "WWWWWWWWWWWW"), "has another sequence"),
        (("2ABC_A", 5, 3, "DEFGHIKLMNPQ", 1, "DEFGHIKLMNPQ"), "0 atoms were seen there"),
    ],
)
def test_hits_that_are_skipped_with_the_reason(write, find, hit, reason):
    write("1abc.cif", simple("DEFGHIKLMNPQ"))
    residues = names_of("DEFGHIKLMNPQW")
    write("2abc.cif", mmcif({"A": (residues, atoms_of(residues, unseen=range(12)))}, entry="2ABC"))
    found = find([hit])
    assert not found.templates
    assert reason in found.skipped[0][1]


def test_templates_released_too_late(write, find):
    write("1abc.cif", simple("DEFGHIKLMNPQ", released="2010-05-06"))
    write("2abc.cif", simple("DEFGHIKLMNPQ", released=None))
    hits = [(f"{n}ABC_A", 1.0, 3, "DEFGHIKLMNPQ", 1, "DEFGHIKLMNPQ") for n in (1, 2)]
    assert len(find(hits).templates) == 2
    assert len(find(hits, before=date(2010, 5, 6)).templates) == 1
    late = find(hits, before=date(2010, 5, 5))
    assert late.skipped == (
        ("1abc_A", "it was released on 2010-05-06, not by 2010-05-05"),
        ("2abc_A", "it was released on an unknown day, not by 2010-05-05"),
    )


def test_a_missing_file_is_an_error_or_skipped(write, find):
    write("1abc.cif", simple("DEFGHIKLMNPQ"))
    hits = [(f"{n}ABC_A", 1.0, 3, "DEFGHIKLMNPQ", 1, "DEFGHIKLMNPQ") for n in (1, 9)]
    with pytest.raises(
        FoldInputError, match=r"a.hhr, line \d+: hit 2, 9ABC_A: no structure of 9abc"
    ):
        find(hits)
    found = find(hits, missing="skip")
    assert [t.name for t in found.templates] == ["1abc_A"]
    assert found.skipped[0][0] == "9abc_A"


def test_hits_of_another_target(write, find):
    write("1abc.cif", simple("DEFGHIKLMNPQ"))
    hit = ("1ABC_A", 1.0, 4, "DEFGHIKLMNPQ", 1, "DEFGHIKLMNPQ")
    with pytest.raises(
        FoldInputError, match="aligns 'DEFGHIKLMNPQ' as residue 4 on, the target has"
    ):
        find([hit])


def test_letters_that_the_search_does_not_know_may_differ(write, tmp_path):
    """A target with selenocysteine, for which the HHR has another letter."""
    write("1abc.cif", simple("DEFGHIKLMNPQ"))
    path = write("a.hhr", hhr(TARGET, [("1ABC_A", 1.0, 3, "DEFGHIKLMNPQ", 1, "DEFGHIKLMNPQ")]))
    target = TARGET[:4] + "U" + TARGET[5:]
    assert templates.from_hits(target, read_hhr(path), tmp_path).templates


@pytest.mark.parametrize(
    ("chains", "landed"),
    [
        ({"B": "WDEFGHIKLMNPQ"}, "DEFGHIKLMNPQ"),  # the chain has another name
        ({"B": "YYYYY", "A": "DEFXHIKXMNPQ"}, "DEFXHIKXMNPQ"),  # unknown residues stand for any
        ({"A": "WDEFGHIRLMNPQWW"}, "DEFGHIRLMNPQ"),  # one residue differs: realigned
        ({"A": "WDEFGHILMNPQWW"}, "DEFGHI-LMNPQ"),  # one residue is missing: realigned
    ],
)
def test_a_structure_that_differs_from_the_hit(write, find, chains, landed):
    named = {name: (names_of(s), atoms_of(names_of(s))) for name, s in chains.items()}
    write("1abc.cif", mmcif(named))
    (found,) = find([("1ABC_A", 1.0, 3, "DEFGHIKLMNPQ", 1, "DEFGHIKLMNPQ")]).templates
    assert found.sequence[2:14] == landed


def test_files_are_found_by_the_entry_in_their_names(write, tmp_path):
    for name in ("1abc.cif", "pdb2abc.ent.gz", "template_3ABC.cif", "x-4abc.pdb", "notes.txt"):
        write(name, "")
    assert sorted(templates.structure_files(tmp_path)) == ["1abc", "2abc", "3abc", "4abc"]


def test_a_folder_without_hits_is_aligned_here(write, tmp_path):
    write("t/1abc.cif", simple(TARGET[2:18]))
    write("t/2abc.cif", simple(TARGET[:12] + "WW" + TARGET[12:], entry="2ABC"))
    found = templates.search(TARGET, tmp_path / "t")
    assert [(t.name, t.sum_probs) for t in found.templates] == [("2abc_A", 32.0), ("1abc_A", 16.0)]
    assert found.templates[0].sequence == TARGET
    assert found.templates[1].sequence.strip("-") == TARGET[2:18]


def test_search_takes_the_only_hhr_of_the_folder(write, tmp_path):
    write("t/1abc.cif", simple("DEFGHIKLMNPQ"))
    hit = ("1ABC_A", 3.5, 3, "DEFGHIKLMNPQ", 1, "DEFGHIKLMNPQ")
    write("t/a.hhr", hhr(TARGET, [hit]))
    assert templates.search(TARGET, tmp_path / "t").templates[0].sum_probs == 3.5
    write("t/b.hhr", "")
    with pytest.raises(FoldInputError, match=r"2 HHR files: a.hhr, b.hhr; say which one"):
        templates.search(TARGET, tmp_path / "t")


def test_folders_that_cannot_be(tmp_path):
    with pytest.raises(FoldInputError, match="no structure file in it"):
        templates.from_folder(TARGET, tmp_path)
    with pytest.raises(FoldInputError, match="there is no such folder"):
        templates.from_folder(TARGET, tmp_path / "none")


def test_features_are_padded_with_masked_templates(write, find):
    write("1abc.cif", simple("DEFGHIKLMNPQ"))
    used = find([("1ABC_A", 3.5, 3, "DEFGHIKLMNPQ", 1, "DEFGHIKLMNPQ")]).templates
    found = templates.features(used, len(TARGET), 4)
    assert found["template_mask"].tolist() == [1, 0, 0, 0]
    assert found["template_aatype"][0, :4].tolist() == [21, 21, 3, 6]
    assert found["template_sum_probs"].tolist() == [[3.5], [0], [0], [0]]
    beta = found["template_pseudo_beta"][0]
    np.testing.assert_array_equal(beta[5], used[0].positions[5, CA])  # glycine
    np.testing.assert_array_equal(beta[3], used[0].positions[3, ATOM_TYPES.index("CB")])
    assert found["template_pseudo_beta_mask"][0].sum() == 12


def test_drawing_for_training_gives_any_number_up_to_the_most():
    rng = np.random.default_rng(0)
    pool = [templates.Template(str(i), "", np.zeros(0), np.zeros(0), 0.0) for i in range(9)]
    sizes = {len(templates.draw(rng, pool, 4)) for _ in range(100)}
    assert sizes == {0, 1, 2, 3, 4}
    assert len({t.name for t in templates.draw(np.random.default_rng(3), pool, 9)}) > 1
