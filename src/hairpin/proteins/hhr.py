"""Template hits from the HHR files of HHsearch and HHblits.

Residues are numbered from 0 here and from 1 in the files.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from hairpin.proteins.text import problem, read_lines, shorten

_HIT = re.compile(r"No\s+(\d+)\s*$")
_NUMBERS = re.compile(r"([A-Za-z_-]+)=\s*([^\s%]+)")
_BLOCK = re.compile(r"^([QT]) (\S+)\s+(\d+)\s+([A-Za-z.-]+)\s+(\d+)\s+\(\d+\)\s*$")
_OTHER_ROWS = ("Consensus", "ss_dssp", "ss_pred", "ss_conf", "sa_dssp")
_NAME = re.compile(r"([a-zA-Z\d]{4})_([a-zA-Z0-9.]+)")


@dataclass(frozen=True)
class Hit:
    """One template that HHsearch aligned to the target.

    Attributes:
        index: the number of the hit in its file, from 1.
        line: the line where it begins, from 1.
        name: what follows the ``>``, such as "3U8V_A Metal-binding protein".
        aligned_columns: how many columns are aligned.
        sum_probs: sum of the columns' posterior probabilities; more is better. 0 if not given.
        target_start: number of the first aligned residue of the target.
        target: the target's part of the alignment, ``-`` for gaps.
        template: the template's part, as long.
    """

    index: int
    line: int
    name: str
    aligned_columns: int
    sum_probs: float
    target_start: int
    target: str
    template: str

    @property
    def sequence(self) -> str:
        """The template's part without gaps."""
        return self.template.replace("-", "")

    @property
    def entry(self) -> str:
        """The PDB entry in small letters, "" if the name does not begin with one."""
        match = _NAME.match(self.name)
        return match[1].lower() if match else ""

    @property
    def chain(self) -> str:
        """The chain within the entry, "" if the name does not begin with an entry and chain."""
        match = _NAME.match(self.name)
        return match[2] if match else ""

    def pairs(self) -> dict[int, int]:
        """Residue of the target -> place in `sequence`, where both have a residue."""
        found: dict[int, int] = {}
        i, j = self.target_start, 0
        for a, b in zip(self.target, self.template, strict=True):
            if a != "-" and b != "-":
                found[i] = j
            i += a != "-"
            j += b != "-"
        return found


def read_hhr(path: Path | str) -> tuple[Hit, ...]:
    """Every hit of an HHR file in its order; none where the search found none.

    Raises:
        FoldInputError: the file cannot be read, is no HHR file, or a hit in it is malformed.
    """
    lines = read_lines(path)
    if not any(line.startswith("Query") for line in lines[:5]):
        raise problem(
            path, 1, f"begins with {shorten(lines[0])!r}, not with 'Query'",
            "this is no HHR file of HHsearch or HHblits",
        )  # fmt: skip
    starts = [i for i, line in enumerate(lines) if _HIT.match(line)]
    return tuple(
        _hit(path, start, lines[start:end]) for start, end in pairwise([*starts, len(lines)])
    )


def _hit(path: Path | str, start: int, lines: Sequence[str]) -> Hit:
    """The hit in those lines, of which the first is number ``start`` from 0."""
    number = _HIT.match(lines[0])
    assert number is not None
    if len(lines) < 3 or not lines[1].startswith(">"):
        raise problem(
            path, start + 2, f"hit {number[1]} has no line that begins with '>'",
            "the file was cut short; make it again",
        )  # fmt: skip
    values = dict(_NUMBERS.findall(lines[2]))
    columns = _number(path, start + 3, values, "Aligned_cols")
    sum_probs = _number(path, start + 3, values, "Sum_probs") if "Sum_probs" in values else 0.0
    rows = list(_rows(path, start, lines))
    target = "".join(text for which, _, text in rows if which == "Q")
    template = "".join(text for which, _, text in rows if which == "T")
    if not target or len(target) != len(template):
        raise problem(
            path, start + 1,
            f"hit {number[1]} has {len(target)} columns of the target and {len(template)} of the "
            "template",
            "the file was cut short; make it again",
        )  # fmt: skip
    first = next(begin for which, begin, _ in rows if which == "Q")
    return Hit(
        int(number[1]), start + 1, lines[1][1:].strip(), int(columns), sum_probs, first - 1,
        target, template,
    )  # fmt: skip


def _number(path: Path | str, line: int, values: dict[str, str], name: str) -> float:
    try:
        return float(values[name])
    except (KeyError, ValueError) as error:
        raise problem(
            path, line, f"{name}={values.get(name, '')} is no number",
            "the line below '>' must give it; make the file again",
        ) from error  # fmt: skip


def _rows(path: Path | str, start: int, lines: Sequence[str]) -> Iterator[tuple[str, int, str]]:
    """("Q" or "T", number of its first residue, letters) of each row of the alignment."""
    for at, line in enumerate(lines[3:], start=start + 4):
        match = _BLOCK.match(line)
        if match is None or match[2] in _OTHER_ROWS:
            continue
        which, _, begin, text, end = match.groups()
        text = text.upper().replace(".", "-")
        residues = len(text) - text.count("-")
        if int(end) - int(begin) + 1 != residues:
            raise problem(
                path, at, f"the row says residues {begin} to {end} and has {residues}",
                "the file is damaged; make it again",
            )  # fmt: skip
        yield which, int(begin), text
