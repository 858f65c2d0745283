"""FASTA in, and what is said of files that are not."""

import gzip

import pytest

from hairpin.errors import FoldInputError
from hairpin.proteins.fasta import check_sequence, read_fasta, read_target


def test_several_records_with_wrapped_lines(write):
    path = write("a.fasta", ">one first protein\nACDE\nFG\n\n>two\nklmnX\n")
    one, two = read_fasta(path)
    assert (one.name, one.description, one.sequence, one.line) == (
        "one", "one first protein", "ACDEFG", 1,
    )  # fmt: skip
    assert (two.name, two.sequence, two.line) == ("two", "KLMNX", 5)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("packed", [False, True])
def test_line_ends_byte_order_mark_and_gzip(write, end, packed):
    data = "\ufeff>p\nACD\nEFG\n".replace("\n", end).encode()
    path = write("a.fasta.gz" if packed else "a.fasta", gzip.compress(data) if packed else data)
    assert read_target(path).sequence == "ACDEFG"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "a.fasta: the file is empty; write it again"),
        ("\n \n", "the file is empty"),
        ("ACDE\n", r"a.fasta, line 1: 'ACDE' comes before any line that begins with '>'"),
        (">p\nACDE\n>q\n", r"line 3: '>q' has no sequence; the file may have been cut short"),
        (">p", "line 1: '>p' has no sequence"),
        (">p\nACDE\nAC1E\n", r"line 3: '1' at letter 3 is no amino acid; the letters are ARND"),
        (">p\nAC DE\n", r"line 2: ' ' at letter 3 is no amino acid"),
        (">p\nACDE*\n", r"line 2: '\*' at letter 5 .* marks a stop: end the sequence before it"),
        (">p\nAC-DE\n", r"line 2: '-' at letter 3 .* a target has no gaps"),
        (">p\nAC\n>q\nDE\n", r"line 3: 2 sequences, where one is wanted: p, q; write one file"),
        (b">p\nAC\xff\n", r"line 2: byte 0xff is not text"),
        (gzip.compress(b">p\nACDEFG\n" * 9, mtime=0)[:-9], "gzip file is cut short or damaged"),
    ],
)
def test_bad_files(write, content, message):
    with pytest.raises(FoldInputError, match=message):
        read_target(write("a.fasta", content))


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FoldInputError, match=r"none.fasta: there is no such file; check the name"):
        read_fasta(tmp_path / "none.fasta")
    with pytest.raises(FoldInputError, match="this is a folder"):
        read_fasta(tmp_path)


def test_sequences_that_come_from_no_file():
    assert check_sequence(" acdx\n") == "ACDX"
    with pytest.raises(FoldInputError, match="the sequence is empty"):
        check_sequence(" ")
    with pytest.raises(FoldInputError, match="chain 2: '7' at letter 2 is no amino acid"):
        check_sequence("A7", "chain 2")
