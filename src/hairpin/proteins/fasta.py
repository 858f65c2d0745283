"""Sequences from FASTA files."""

import re
from dataclasses import dataclass
from pathlib import Path

from hairpin.errors import FoldInputError
from hairpin.proteins.residues import AMBIGUOUS_LETTERS, RESTYPES
from hairpin.proteins.text import problem, read_lines, shorten

LETTERS = RESTYPES + "X" + "".join(AMBIGUOUS_LETTERS)
"""The letters a target may have: twenty amino acids, X for unknown, and five that are ambiguous."""

_ILLEGAL = re.compile(f"[^{LETTERS}]")


@dataclass(frozen=True)
class Record:
    """One sequence of a file.

    Attributes:
        description: what follows the ``>``.
        sequence: upper-case letters of `LETTERS`.
        line: number of the line with the ``>``, from 1.
    """

    description: str
    sequence: str
    line: int

    @property
    def name(self) -> str:
        """The first word of the description; "unnamed" where there is none."""
        return (self.description.split() or ["unnamed"])[0]


def read_fasta(path: Path | str) -> tuple[Record, ...]:
    """Every sequence of a FASTA file, in its order; small letters are read as capitals.

    Raises:
        FoldInputError: the file cannot be read, is empty, begins without ``>``, has a name
            without a sequence, or a letter that stands for no amino acid.
    """
    heads: list[tuple[int, str]] = []
    bodies: list[list[str]] = []
    for number, line in enumerate(read_lines(path), start=1):
        if line.startswith(">"):
            heads.append((number, line[1:].strip()))
            bodies.append([])
        elif line.strip():
            if not heads:
                raise problem(
                    path, number, f"{shorten(line)!r} comes before any line that begins with '>'",
                    "write '>name' on a line above the sequence",
                )  # fmt: skip
            bodies[-1].append(_letters(path, number, line))
    for (number, description), body in zip(heads, bodies, strict=True):
        if not body:
            raise problem(
                path, number, f"{shorten('>' + description)!r} has no sequence",
                "the file may have been cut short; add the sequence or delete the name",
            )  # fmt: skip
    return tuple(
        Record(description, "".join(body), number)
        for (number, description), body in zip(heads, bodies, strict=True)
    )


def read_target(path: Path | str) -> Record:
    """The one sequence of a FASTA file.

    Raises:
        FoldInputError: as `read_fasta` does, or the file holds several sequences.
    """
    first, *others = read_fasta(path)
    if others:
        raise problem(
            path, others[0].line,
            f"{len(others) + 1} sequences, where one is wanted: {first.name}, {others[0].name}"
            + (", ..." if len(others) > 1 else ""),
            "write one file for each, or fold them as the chains of one complex",
        )  # fmt: skip
    return first


def check_sequence(sequence: str, source: str = "the sequence") -> str:
    """The sequence in capitals, for one that comes from no file.

    Raises:
        FoldInputError: it is empty or has a letter that stands for no amino acid.
    """
    sequence = sequence.strip().upper()
    if not sequence:
        raise FoldInputError(f"{source} is empty; give at least one amino acid")
    if illegal := _ILLEGAL.search(sequence):
        raise FoldInputError(f"{source}: {_complaint(illegal)}; {_fix(illegal[0])}")
    return sequence


def _letters(path: Path | str, number: int, line: str) -> str:
    letters = line.strip().upper()
    if illegal := _ILLEGAL.search(letters):
        raise problem(path, number, _complaint(illegal), _fix(illegal[0]))
    return letters


def _complaint(illegal: re.Match[str]) -> str:
    return f"{illegal[0]!r} at letter {illegal.start() + 1} is no amino acid"


def _fix(letter: str) -> str:
    if letter == "*":
        return "'*' marks a stop: end the sequence before it"
    if letter in "-.":
        return "a target has no gaps: delete them, or give the file as an alignment"
    return f"the letters are {LETTERS}; write X for an unknown residue"
