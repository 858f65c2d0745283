"""A3M and Stockholm in, deletions counted, bad files named."""

import gzip

import numpy as np
import pytest

from hairpin.errors import FoldInputError
from hairpin.proteins.alignments import read_a3m, read_alignment, read_stockholm

A3M = ">target\nACDEF\n>one some text\naaAC-EFkk\n>two\n-Cd\nddDEwF\n"
STOCKHOLM = """# STOCKHOLM 1.0
#=GF ID x

#=GS one/3-9 DE [subseq from] Some protein OX=9606
target     AC-DE-
one/3-9    aCwDE-
two        ...D-w
#=GC RF    xx.xx.

target     F-
one/3-9    Fk
two        -k
//
"""


def rows(alignment):
    return [row.tobytes().decode() for row in alignment.letters]


def test_a3m_counts_what_is_dropped(write):
    found = read_a3m(write("a.a3m", A3M), "ACDEF")
    assert rows(found) == ["ACDEF", "AC-EF", "-CDEF"]
    assert found.deletions.tolist() == [[0, 0, 0, 0, 0], [2, 0, 0, 0, 0], [0, 0, 3, 0, 1]]
    assert found.names == ("target", "one some text", "two")
    assert rows(found.first(2)) == ["ACDEF", "AC-EF"]


def test_stockholm_drops_columns_where_the_target_has_a_gap(write):
    found = read_stockholm(write("a.sto", STOCKHOLM), "ACDEF")
    assert rows(found) == ["ACDEF", "ACDEF", "--D--"]
    assert found.deletions.tolist() == [[0, 0, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0, 1]]
    assert found.names[1] == "one/3-9 [subseq from] Some protein OX=9606"


def test_counting_agrees_with_counting_letter_by_letter(write):
    """The vectorised count against the obvious loop, on random rows."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        text, expected = ">t\n" + "A" * 7 + "\n", [[0] * 7]
        for _ in range(5):
            row, counts, waiting = "", [], 0
            while len(counts) < 7:
                if rng.random() < 0.3:
                    row, waiting = row + rng.choice([*"acd"]), waiting + 1
                else:
                    row, waiting = row + rng.choice([*"AC-"]), (counts.append(waiting), 0)[1]
            text += f">x\n{row}\n"
            expected.append(counts)
        assert read_a3m(write("a.a3m", text)).deletions.tolist() == expected


@pytest.mark.parametrize("name", ["a.a3m", "a.A3M.gz", "a.sto", "a.sto.gz", "a.fasta"])
def test_the_ending_tells_the_format(write, name):
    text = (STOCKHOLM if "sto" in name else A3M).replace("\n", "\r\n").encode()
    path = write(name, gzip.compress(text) if name.endswith("gz") else text)
    assert read_alignment(path, "ACDEF").target == "ACDEF"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", A3M, "a.txt: the ending tells no format; name it .a3m or .sto"),
        ("a.a3m", "", "the file is empty"),
        ("a.a3m", "# remark\n", "no sequence in it"),
        ("a.a3m", "ACDEF\n", "line 1: 'ACDEF' comes before any line that begins with '>'"),
        ("a.a3m", A3M + ">three\n", "line 8: '>three' has no sequence; the file may have been cut"),
        ("a.a3m", A3M + ">three\nAC7EF\n", "line 9: '7' at character 3 is no amino acid or gap"),
        ("a.a3m", A3M + ">three\nACDé-\n", "line 9: 'é' at character 4"),
        (
            "a.a3m", A3M + ">three\nACDE\n>four\nACDE\n",
            "line 8: row 4, 'three', has 4 columns .* the first row has 5",
        ),
        (
            "a.a3m", ">other\nACDEY\n",
            "has 'Y' at residue 5, the target 'F': row 'other' is not the target; the first",
        ),
        ("a.a3m", ">other\nACDE\n", "the first row has 4 columns and the target 5 residues"),
        ("a.sto", "", "the file is empty"),
        ("a.sto", A3M, "line 1: begins with '>target', not with '# STOCKHOLM'"),
        ("a.sto", STOCKHOLM.replace("//", ""), "no '//' at the end; the file was cut short"),
        ("a.sto", STOCKHOLM.replace("Fk", "F"), "row 2, 'one/3-9 .*, has 7 columns .* has 8"),
        ("a.sto", STOCKHOLM.replace("Fk", "F k"), "line 11: 'one/3-9    F k' has 3 words"),
        ("a.sto", STOCKHOLM.replace("Fk", "F1"), "line 11: '1' in the row of 'one/3-9'"),
        ("a.sto", "# STOCKHOLM 1.0\n//\n", "no sequence in it"),
    ],
)  # fmt: skip
def test_bad_files(write, name, content, message):
    with pytest.raises(FoldInputError, match=message):
        read_alignment(write(name, content), "ACDEF")
