"""HHR in: hits, their rows and which residue stands above which."""

import pytest

from hairpin.errors import FoldInputError
from hairpin.proteins.hhr import read_hhr
from proteins.tiny import hhr

TARGET = "ACDEFGHIKLMNPQRSTVWY"
HITS = [
    ("1ABC_A", 8.5, 3, "DEFGHI--KLMNPQ", 11, "DEF-HIWWKLMNPQ"),
    ("2XYZ_BB", 9.0, 1, TARGET, 5, TARGET),
]


def test_hits_as_written(write):
    first, second = read_hhr(write("a.hhr", hhr(TARGET, HITS)))
    assert (first.index, first.entry, first.chain, first.sum_probs) == (1, "1abc", "A", 8.5)
    assert (first.aligned_columns, first.target_start) == (11, 2)
    assert first.sequence == "DEFHIWWKLMNPQ"
    assert (second.entry, second.chain, second.line) == ("2xyz", "BB", 16)


def test_pairs_skip_gaps_of_either_row(write):
    first, _ = read_hhr(write("a.hhr", hhr(TARGET, HITS)))
    pairs = first.pairs()
    assert all(TARGET[i] == first.sequence[j] for i, j in pairs.items())
    assert pairs == {2: 0, 3: 1, 4: 2, 6: 3, 7: 4, 8: 7, 9: 8, 10: 9, 11: 10, 12: 11, 13: 12}


def test_rows_in_several_blocks(write):
    long = "ACDEFGHIKLMNPQRSTVWY" * 9
    (hit,) = read_hhr(write("a.hhr", hhr(long, [("1ABC_A", 1.0, 1, long, 7, long)])))
    assert hit.target == hit.template == long
    assert hit.pairs() == {i: i for i in range(180)}


def test_a_search_that_found_nothing(write):
    assert read_hhr(write("a.hhr", hhr(TARGET, []))) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: "", "the file is empty"),
        (lambda _: ">p\nACDE\n", "line 1: begins with '>p', not with 'Query'"),
        (lambda t: t.replace(">1ABC_A some protein", ""), "line 5: hit 1 has no line that begins"),
        (lambda t: t.replace("Aligned_cols=11", "Aligned_cols=x"), "line 6: Aligned_cols=x is no"),
        (lambda t: t[: t.index("T Consensus")], "line 4: hit 1 has 14 columns of the target and 0"),
        (
            lambda t: t.replace("DEF-HIWW", "DEF-HI-W"),
            "line 13: the row says residues 11 to 23 and",
        ),
    ],
)
def test_bad_files(write, change, message):
    with pytest.raises(FoldInputError, match=message):
        read_hhr(write("a.hhr", change(hhr(TARGET, HITS))))
