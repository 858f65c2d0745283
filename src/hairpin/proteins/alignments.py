"""Multiple sequence alignments from A3M and Stockholm files.

Columns are those of the target, which is the first row. Letters between two columns (insertions
relative to the target) are counted and dropped, as DeepMind's pipeline does (Jumper et al. 2021,
Suppl. Sec. 1.2.1).

Dims: s sequences, r residues of the target.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hairpin.proteins.text import problem, read_lines, shorten

Letters = NDArray[np.uint8]
Counts = NDArray[np.int32]

_GAP = ord("-")
_COLUMN, _INSERT, _SKIP = 1, 2, 3  # kinds of characters in an A3M row
_STOCKHOLM = "# STOCKHOLM"
_SUFFIXES = {".a3m": "a3m", ".fasta": "a3m", ".fa": "a3m", ".sto": "sto", ".stockholm": "sto"}


@dataclass(frozen=True, eq=False)
class Alignment:
    """Sequences aligned to a target.

    Attributes:
        path: the file it came from.
        names: what the file says of each row; the first is the target.
        letters: capitals and ``-`` as ASCII, ``[s, r]``, uint8.
        deletions: letters dropped just before each column, ``[s, r]``, int32.
    """

    path: str
    names: tuple[str, ...]
    letters: Letters
    deletions: Counts

    @property
    def target(self) -> str:
        """The first row."""
        return str(self.letters[0].tobytes(), "ascii")

    def first(self, rows: int) -> "Alignment":
        """The alignment cut after that many rows."""
        return Alignment(self.path, self.names[:rows], self.letters[:rows], self.deletions[:rows])


def read_alignment(path: Path | str, target: str | None = None) -> Alignment:
    """An alignment by the ending of its name, ``.a3m`` or ``.sto``, a ``.gz`` behind it or not.

    Args:
        path: the file.
        target: the sequence that the first row must be, if given.

    Raises:
        FoldInputError: an unknown ending, or as `read_a3m` and `read_stockholm` do.
    """
    endings = [ending.lower() for ending in Path(path).suffixes if ending.lower() != ".gz"]
    kind = _SUFFIXES.get(endings[-1] if endings else "")
    if kind is None:
        raise problem(path, None, "the ending tells no format", "name it .a3m or .sto")
    return (read_a3m if kind == "a3m" else read_stockholm)(path, target)


def check_target(alignment: Alignment, target: str) -> None:
    """Raise `FoldInputError` unless the first row of the alignment is the target."""
    found = alignment.target
    if found == target:
        return
    if len(found) != len(target):
        what = f"the first row has {len(found)} columns and the target {len(target)} residues"
    else:
        at = next(i for i, pair in enumerate(zip(found, target, strict=True)) if len({*pair}) > 1)
        what = f"the first row has {found[at]!r} at residue {at + 1}, the target {target[at]!r}"
    name = shorten(alignment.names[0]) or "unnamed"
    raise problem(
        alignment.path, None, f"{what}: row {name!r} is not the target",
        "the first row must be the target, without gaps; give the alignment of this sequence",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------- A3M


def read_a3m(path: Path | str, target: str | None = None) -> Alignment:
    """An A3M file: small letters are insertions, dots are skipped, lines with ``#`` are remarks.

    Raises:
        FoldInputError: the file cannot be read, a row is empty, has an illegal letter or another
            number of columns than the first, or the first row is not ``target``.
    """
    lines = read_lines(path)
    names, rows, numbers = _a3m_rows(path, lines)
    characters = np.frombuffer("".join(rows).encode("latin-1", "replace"), dtype=np.uint8)
    kinds = _a3m_kinds()[characters]
    if not kinds.all():
        raise _illegal_letter(path, lines)
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])[:-1]])
    is_column = kinds == _COLUMN
    columns = np.add.reduceat(is_column, starts, dtype=np.int64)
    _check_columns(path, columns, names, numbers)

    letters = characters[is_column].reshape(len(rows), columns[0])
    is_insert = kinds == _INSERT
    inserted = np.cumsum(is_insert, dtype=np.int32)
    before = inserted[starts] - is_insert[starts]
    counts = inserted[is_column].reshape(letters.shape)
    deletions = np.diff(counts, axis=1, prepend=before[:, None])
    return _checked(Alignment(str(path), tuple(names), letters, deletions), target)


def _a3m_rows(path: Path | str, lines: Sequence[str]) -> tuple[list[str], list[str], list[int]]:
    """Names, rows and line numbers of the names."""
    names: list[str] = []
    bodies: list[list[str]] = []
    numbers: list[int] = []
    for number, line in enumerate(lines, start=1):
        if line.startswith(">"):
            names.append(line[1:].strip())
            bodies.append([])
            numbers.append(number)
        elif line.strip() and not line.startswith("#"):
            if not names:
                raise problem(
                    path, number, f"{shorten(line)!r} comes before any line that begins with '>'",
                    "this is no A3M file, or its beginning is missing",
                )  # fmt: skip
            bodies[-1].append(line.strip())
    rows = ["".join(body) for body in bodies]
    if not rows:
        raise problem(path, None, "no sequence in it", "give an alignment with the target in it")
    for number, name, row in zip(numbers, names, rows, strict=True):
        if not row:
            raise problem(
                path, number, f"{shorten('>' + name)!r} has no sequence",
                "the file may have been cut short; make it again",
            )  # fmt: skip
    return names, rows, numbers


def _a3m_kinds() -> Letters:
    """What each of 256 characters is in an A3M row; 0 is illegal."""
    kinds = np.zeros(256, dtype=np.uint8)
    capitals = np.arange(ord("A"), ord("Z") + 1)
    kinds[capitals] = kinds[_GAP] = _COLUMN
    kinds[capitals + 32] = _INSERT
    kinds[ord(".")] = _SKIP
    return kinds


def _illegal_letter(path: Path | str, lines: Sequence[str]) -> Exception:
    rows = ((i, line) for i, line in enumerate(lines, start=1) if not line.startswith((">", "#")))
    found = ((i, re.search(r"[^A-Za-z.-]", line.strip())) for i, line in rows)
    number, letter = next((i, match) for i, match in found if match)
    return problem(
        path, number, f"{letter[0]!r} at character {letter.start() + 1} is no amino acid or gap",
        "rows hold letters, '-' for a gap and small letters for insertions",
    )  # fmt: skip


def _check_columns(
    path: Path | str, columns: NDArray[np.int64], names: Sequence[str], numbers: Sequence[int]
) -> None:
    wrong = np.flatnonzero(columns != columns[0])
    if wrong.size:
        at = int(wrong[0])
        raise problem(
            path, numbers[at],
            f"row {at + 1}, {shorten(names[at])!r}, has {columns[at]} columns (capitals and "
            f"gaps), the first row has {columns[0]}",
            "all rows must align to the first; insertions are small letters",
        )  # fmt: skip


# ------------------------------------------------------------------------------------- Stockholm


def read_stockholm(path: Path | str, target: str | None = None) -> Alignment:
    """A Stockholm file, its rows in one block or many.

    The names hold the row's description (``#=GS ... DE``) behind a space, where there is one.

    Raises:
        FoldInputError: the file cannot be read, has no ``# STOCKHOLM`` at its beginning or no
            ``//`` at its end, a row with an illegal letter or another number of columns than the
            first, or the first row is not ``target``.
    """
    lines = read_lines(path)
    _check_frame(path, lines)
    rows: dict[str, list[str]] = {}
    numbers: dict[str, int] = {}
    about: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        if line.startswith("#=GS"):
            words = line.split(maxsplit=3)
            if len(words) == 4 and words[2] == "DE":
                about[words[1]] = words[3]
        elif line.strip() and not line.startswith(("#", "//")):
            name, letters = _stockholm_row(path, number, line)
            rows.setdefault(name, []).append(letters)
            numbers.setdefault(name, number)
    if not rows:
        raise problem(path, None, "no sequence in it", "give an alignment with the target in it")
    whole = ["".join(parts) for parts in rows.values()]
    names = [f"{name} {about[name]}" if name in about else name for name in rows]
    columns = np.array([len(row) for row in whole])
    _check_columns(path, columns, names, list(numbers.values()))

    table = np.frombuffer("".join(whole).encode(), dtype=np.uint8).reshape(len(whole), columns[0])
    return _checked(_without_insertions(str(path), tuple(names), table), target)


def _without_insertions(path: str, names: tuple[str, ...], table: Letters) -> Alignment:
    """Drop the columns in which the first row has a gap, and count what was in them."""
    kept = table[0] != _GAP
    inserted = np.cumsum((table != _GAP) & ~kept, axis=1, dtype=np.int32)
    deletions = np.diff(inserted[:, kept], axis=1, prepend=np.int32(0))
    return Alignment(path, names, table[:, kept], deletions)


def _check_frame(path: Path | str, lines: Sequence[str]) -> None:
    number, first = next((i, line) for i, line in enumerate(lines, start=1) if line.strip())
    if not first.startswith(_STOCKHOLM):
        raise problem(
            path, number, f"begins with {shorten(first)!r}, not with {_STOCKHOLM!r}",
            "this is no Stockholm file; name an A3M file .a3m",
        )  # fmt: skip
    if not any(line.startswith("//") for line in lines):
        raise problem(
            path, len(lines), "no '//' at the end", "the file was cut short; make it again"
        )


def _stockholm_row(path: Path | str, number: int, line: str) -> tuple[str, str]:
    parts = line.split()
    if len(parts) != 2:
        raise problem(
            path, number, f"{shorten(line)!r} has {len(parts)} words",
            "a line holds a name and a row, without spaces in them",
        )  # fmt: skip
    name, letters = parts[0], parts[1].upper().replace(".", "-")
    if illegal := re.search(r"[^A-Z-]", letters):
        raise problem(
            path, number, f"{illegal[0]!r} in the row of {shorten(name)!r} is no amino acid or gap",
            "rows hold letters and '-' or '.' for a gap",
        )  # fmt: skip
    return name, letters


def _checked(alignment: Alignment, target: str | None) -> Alignment:
    if target is not None:
        check_target(alignment, target)
    return alignment
