"""Ideal bond lengths and angles of proteins, with their spread in crystals.

Source: Engh and Huber 2001, International Tables for Crystallography F, 18.3, as used for the
structural violations of Jumper et al. 2021, Suppl. Sec. 1.9.11. Lengths are in Angstrom, angles in
degrees; each mean is followed by its standard deviation.

Dims: a residue types (21), as in `residues`.
"""

from dataclasses import dataclass
from functools import cache
from math import cos, radians, sin, sqrt

import numpy as np

from hairpin.proteins import residues
from hairpin.proteins.residues import Floats

_BACKBONE = """
    N-CA 1.459 .020 | CA-C 1.525 .026 | C-O 1.229 .019 | CA-CB 1.535 .022
    N-CA-C 111.0 2.7 | CA-C-O 120.1 2.1 | N-CA-CB 110.6 1.8 | CB-CA-C 110.4 2.0
"""

_RESIDUES = {
    "ALA": "CA-CB 1.520 .021 | N-CA-CB 110.1 1.4 | CB-CA-C 110.1 1.5",
    "ARG": """
        CB-CG 1.521 .027 | CG-CD 1.515 .025 | CD-NE 1.460 .017 | NE-CZ 1.326 .013
        CZ-NH1 1.326 .013 | CZ-NH2 1.326 .013 | CA-CB-CG 113.4 2.2 | CB-CG-CD 111.6 2.6
        CG-CD-NE 111.8 2.1 | CD-NE-CZ 123.6 1.4 | NE-CZ-NH1 120.3 0.5 | NE-CZ-NH2 120.3 0.5
        NH1-CZ-NH2 119.4 1.1
    """,
    "ASN": """
        CA-CB 1.527 .026 | CB-CG 1.506 .023 | CG-OD1 1.235 .022 | CG-ND2 1.324 .025
        CA-CB-CG 113.4 2.2 | CB-CG-ND2 116.7 2.4 | CB-CG-OD1 121.6 2.0 | ND2-CG-OD1 121.9 2.3
    """,
    "ASP": """
        CB-CG 1.513 .021 | CG-OD1 1.249 .023 | CG-OD2 1.249 .023
        CA-CB-CG 113.4 2.2 | CB-CG-OD1 118.3 0.9 | CB-CG-OD2 118.3 0.9 | OD1-CG-OD2 123.3 1.9
    """,
    "CYS": """
        CA-CB 1.526 .013 | CB-SG 1.812 .016
        N-CA-CB 110.8 1.5 | CB-CA-C 111.5 1.2 | CA-CB-SG 114.2 1.1
    """,
    "GLN": """
        CB-CG 1.521 .027 | CG-CD 1.506 .023 | CD-OE1 1.235 .022 | CD-NE2 1.324 .025
        CA-CB-CG 113.4 2.2 | CB-CG-CD 111.6 2.6 | CG-CD-OE1 121.6 2.0 | CG-CD-NE2 116.7 2.4
        OE1-CD-NE2 121.9 2.3
    """,
    "GLU": """
        CB-CG 1.517 .019 | CG-CD 1.515 .015 | CD-OE1 1.252 .011 | CD-OE2 1.252 .011
        CA-CB-CG 113.4 2.2 | CB-CG-CD 114.2 2.7 | CG-CD-OE1 118.3 2.0 | CG-CD-OE2 118.3 2.0
        OE1-CD-OE2 123.3 1.2
    """,
    "GLY": """
        N-CA 1.456 .015 | CA-C 1.514 .016 | C-O 1.232 .016 | N-CA-C 113.1 2.5 | CA-C-O 120.6 1.8
    """,
    "HIS": """
        CB-CG 1.492 .016 | CG-ND1 1.369 .015 | CG-CD2 1.353 .017 | ND1-CE1 1.343 .025
        CD2-NE2 1.415 .021 | CE1-NE2 1.322 .023 | CA-CB-CG 113.6 1.7 | CB-CG-ND1 123.2 2.5
        CB-CG-CD2 130.8 3.1 | CG-ND1-CE1 108.2 1.4 | ND1-CE1-NE2 109.9 2.2 | CE1-NE2-CD2 106.6 2.5
        NE2-CD2-CG 109.2 1.9 | CD2-CG-ND1 106.0 1.4
    """,
    "ILE": """
        CA-CB 1.544 .023 | CB-CG1 1.536 .028 | CB-CG2 1.524 .031 | CG1-CD1 1.500 .069
        N-CA-CB 110.8 2.3 | CB-CA-C 111.6 2.0 | CA-CB-CG1 111.0 1.9 | CB-CG1-CD1 113.9 2.8
        CA-CB-CG2 110.9 2.0 | CG1-CB-CG2 111.4 2.2
    """,
    "LEU": """
        CA-CB 1.533 .023 | CB-CG 1.521 .029 | CG-CD1 1.514 .037 | CG-CD2 1.514 .037
        N-CA-CB 110.4 2.0 | CB-CA-C 110.2 1.9 | CA-CB-CG 115.3 2.3 | CB-CG-CD1 111.0 1.7
        CB-CG-CD2 111.0 1.7 | CD1-CG-CD2 110.5 3.0
    """,
    "LYS": """
        CB-CG 1.521 .027 | CG-CD 1.520 .034 | CD-CE 1.508 .025 | CE-NZ 1.486 .025
        CA-CB-CG 113.4 2.2 | CB-CG-CD 111.6 2.6 | CG-CD-CE 111.9 3.0 | CD-CE-NZ 111.7 2.3
    """,
    "MET": """
        CB-CG 1.509 .032 | CG-SD 1.807 .026 | SD-CE 1.774 .056
        CA-CB-CG 113.3 1.7 | CB-CG-SD 112.4 3.0 | CG-SD-CE 100.2 1.6
    """,
    "PHE": """
        CB-CG 1.509 .017 | CG-CD1 1.383 .015 | CG-CD2 1.383 .015 | CD1-CE1 1.388 .020
        CD2-CE2 1.388 .020 | CE1-CZ 1.369 .019 | CE2-CZ 1.369 .019 | CA-CB-CG 113.9 2.4
        CB-CG-CD1 120.8 0.7 | CB-CG-CD2 120.8 0.7 | CD1-CG-CD2 118.3 1.3 | CG-CD1-CE1 120.8 1.1
        CG-CD2-CE2 120.8 1.1 | CD1-CE1-CZ 120.1 1.2 | CD2-CE2-CZ 120.1 1.2 | CE1-CZ-CE2 120.0 1.8
    """,
    "PRO": """
        N-CA 1.468 .017 | CA-C 1.524 .020 | C-O 1.228 .020 | CA-CB 1.531 .020
        CB-CG 1.495 .050 | CG-CD 1.502 .033 | CD-N 1.474 .014 | N-CA-C 112.1 2.6 | CA-C-O 120.2 2.4
        N-CA-CB 103.3 1.2 | CB-CA-C 111.7 2.1 | CA-CB-CG 104.8 1.9 | CB-CG-CD 106.5 3.9
        CG-CD-N 103.2 1.5 | CA-N-CD 111.7 1.4
    """,
    "SER": """
        CA-CB 1.525 .015 | CB-OG 1.418 .013
        N-CA-CB 110.5 1.5 | CB-CA-C 110.1 1.9 | CA-CB-OG 111.2 2.7
    """,
    "THR": """
        CA-CB 1.529 .026 | CB-OG1 1.428 .020 | CB-CG2 1.519 .033 | N-CA-CB 110.3 1.9
        CB-CA-C 111.6 2.7 | CA-CB-OG1 109.0 2.1 | CA-CB-CG2 112.4 1.4 | OG1-CB-CG2 110.0 2.3
    """,
    "TRP": """
        CB-CG 1.498 .018 | CG-CD1 1.363 .014 | CG-CD2 1.432 .017 | CD1-NE1 1.375 .017
        NE1-CE2 1.371 .013 | CD2-CE2 1.409 .012 | CD2-CE3 1.399 .015 | CE2-CZ2 1.393 .017
        CE3-CZ3 1.380 .017 | CZ2-CH2 1.369 .019 | CZ3-CH2 1.396 .016 | CA-CB-CG 113.7 1.9
        CB-CG-CD1 127.0 1.3 | CB-CG-CD2 126.6 1.3 | CD1-CG-CD2 106.3 0.8 | CG-CD1-NE1 110.1 1.0
        CD1-NE1-CE2 109.0 0.9 | NE1-CE2-CD2 107.3 1.0 | CE2-CD2-CG 107.3 0.8 | CG-CD2-CE3 133.9 0.9
        NE1-CE2-CZ2 130.4 1.1 | CE3-CD2-CE2 118.7 1.2 | CD2-CE2-CZ2 122.3 1.2
        CE2-CZ2-CH2 117.4 1.0 | CZ2-CH2-CZ3 121.6 1.2 | CH2-CZ3-CE3 121.2 1.1
        CZ3-CE3-CD2 118.8 1.3
    """,
    "TYR": """
        CB-CG 1.512 .015 | CG-CD1 1.387 .013 | CG-CD2 1.387 .013 | CD1-CE1 1.389 .015
        CD2-CE2 1.389 .015 | CE1-CZ 1.381 .013 | CE2-CZ 1.381 .013 | CZ-OH 1.374 .017
        CA-CB-CG 113.4 1.9 | CB-CG-CD1 121.0 0.6 | CB-CG-CD2 121.0 0.6 | CD1-CG-CD2 117.9 1.1
        CG-CD1-CE1 121.3 0.8 | CG-CD2-CE2 121.3 0.8 | CD1-CE1-CZ 119.8 0.9 | CD2-CE2-CZ 119.8 0.9
        CE1-CZ-CE2 119.8 1.6 | CE1-CZ-OH 120.1 2.7 | CE2-CZ-OH 120.1 2.7
    """,
    "VAL": """
        CA-CB 1.543 .021 | CB-CG1 1.524 .021 | CB-CG2 1.524 .021 | N-CA-CB 111.5 2.2
        CB-CA-C 111.4 1.9 | CA-CB-CG1 110.9 1.5 | CA-CB-CG2 110.9 1.5 | CG1-CB-CG2 110.9 1.6
    """,
}
"""What each residue adds to the backbone's values, or has instead of them."""

PEPTIDE_BOND = (1.329, 0.014)
"""Length of the bond from C to the next residue's N."""

PEPTIDE_BOND_TO_PROLINE = (1.341, 0.016)
"""The same where the next residue is proline."""

COSINE_CA_C_N = (-0.4473, 0.0311)
"""Cosine of the angle at C of a peptide bond: 116.568 +- 1.995 degrees."""

COSINE_C_N_CA = (-0.5203, 0.0353)
"""Cosine of the angle at N of a peptide bond: 121.352 +- 2.315 degrees."""


@dataclass(frozen=True)
class Distance:
    """The ideal distance of two atoms of a residue: its mean and standard deviation."""

    atoms: tuple[str, str]
    mean: float
    spread: float


def bonds(residue: str) -> tuple[Distance, ...]:
    """The covalent bonds between heavy atoms of a residue, such as "ALA"; UNK has none."""
    return tuple(
        Distance((names[0], names[1]), mean, spread)
        for names, (mean, spread) in _values(residue).items()
        if len(names) == 2
    )


def distances_across_angles(residue: str) -> tuple[Distance, ...]:
    """The distance of the two outer atoms of each bond angle, by the law of cosines.

    Spreads of the two bonds and the angle are taken as independent.
    """
    values = _values(residue)
    lengths = {frozenset(names): value for names, value in values.items() if len(names) == 2}
    return tuple(
        _across(names, value, lengths) for names, value in values.items() if len(names) == 3
    )


@cache
def distance_bounds(
    *, overlap_tolerance: float = 1.5, tolerance_factor: float = 12.0
) -> tuple[Floats, Floats]:
    """Least and greatest allowed distance of two atoms of one residue, each [a, 14, 14].

    Atoms a bond or an angle apart may stray ``tolerance_factor`` standard deviations from the
    ideal; others may overlap by ``overlap_tolerance`` Angstrom and be as far apart as they like.
    Jumper et al. 2021, Suppl. Sec. 1.9.11, eq. 46.
    """
    lower, upper = np.zeros((21, 14, 14)), np.zeros((21, 14, 14))
    for a, residue in enumerate(residues.ONE_TO_THREE.values()):
        names = residues.atom14_names(residue)
        n = len(names)
        radii = np.array([residues.RADII[name[0]] for name in names])
        others = ~np.eye(n, dtype=bool)
        lower[a, :n, :n] = others * (radii[:, None] + radii[None, :] - overlap_tolerance)
        upper[a, :n, :n] = others * 1e10
        for distance in (*bonds(residue), *distances_across_angles(residue)):
            i, j = (names.index(name) for name in distance.atoms)
            slack = tolerance_factor * distance.spread
            lower[a, [i, j], [j, i]] = distance.mean - slack
            upper[a, [i, j], [j, i]] = distance.mean + slack
    lower.setflags(write=False)
    upper.setflags(write=False)
    return lower, upper


_Values = dict[tuple[str, ...], tuple[float, float]]


def _values(residue: str) -> _Values:
    """Mean and spread of every bond and angle of a residue, by the names of its atoms."""
    if residue not in _RESIDUES:
        return {}
    own = set(residues.atom14_names(residue))
    found = _parsed(_BACKBONE) | _parsed(_RESIDUES[residue])
    return {names: value for names, value in found.items() if own.issuperset(names)}


def _parsed(text: str) -> _Values:
    words = text.replace("|", " ").split()
    return {
        tuple(words[i].split("-")): (float(words[i + 1]), float(words[i + 2]))
        for i in range(0, len(words), 3)
    }


def _across(
    names: tuple[str, ...],
    angle: tuple[float, float],
    lengths: dict[frozenset[str], tuple[float, float]],
) -> Distance:
    first, middle, last = names
    (a, a_spread), (b, b_spread) = (
        lengths[frozenset((first, middle))],
        lengths[frozenset((middle, last))],
    )
    gamma, gamma_spread = radians(angle[0]), radians(angle[1])
    c = sqrt(a * a + b * b - 2 * a * b * cos(gamma))
    parts = (
        a * b * sin(gamma) / c * gamma_spread,
        (a - b * cos(gamma)) / c * a_spread,
        (b - a * cos(gamma)) / c * b_spread,
    )
    return Distance((first, last), c, sqrt(sum(part * part for part in parts)))
