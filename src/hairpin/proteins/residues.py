"""The twenty amino acids: names, atoms, torsions, rigid groups and their ideal geometry.

Facts in three parts: the data, look-ups by name, and tables to gather from by residue type.
Sources: atom names, wwPDB; chi angles, IUPAC-IUB 1970; the orders of 37 and of 14 atoms, rigid
groups and ideal positions, Jumper et al. 2021, Suppl. Sec. 1.2 and 1.8.4, Tables 1 to 3. Bond
lengths and angles are in `stereochemistry`.

Residue types are numbered as in `RESTYPES`, alphabetically by three-letter name; 20 is unknown.
The tables are read-only; positions are in Angstrom.

Dims: a residue types (21), g rigid groups (8), k chi angles (4).
"""

from functools import cache
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
_Table = TypeVar("_Table", Floats, Indices)

# ------------------------------------------------------------------------------------------ data

RESTYPES = "ARNDCQEGHILKMFPSTWYV"
"""The twenty residue types by one letter, in the order of their numbers."""

UNKNOWN = 20
"""The number of an unknown residue, X."""

GAP = 21
"""The number of a gap in an alignment."""

HHBLITS_ORDER = "ACDEFGHIKLMNPQRSTVWYX-"
"""Letters in the order that HHblits numbers them, which is how alignments are coded at first."""

AMBIGUOUS_LETTERS = {"B": "D", "J": "X", "O": "X", "U": "C", "Z": "E"}
"""Letters that stand for two residues or a rare one, and the letter that each is read as."""

_THREE = "ALA ARG ASN ASP CYS GLN GLU GLY HIS ILE LEU LYS MET PHE PRO SER THR TRP TYR VAL UNK"

ONE_TO_THREE = dict(zip(RESTYPES + "X", _THREE.split(), strict=True))
"""Three-letter name of each one-letter code; X is UNK."""

THREE_TO_ONE = {three: one for one, three in ONE_TO_THREE.items()}
"""One-letter code of each of the twenty-one three-letter names."""

_ATOMS = """
    N CA C CB O CG CG1 CG2 OG OG1 SG CD CD1 CD2 ND1 ND2 OD1 OD2 SD CE CE1 CE2 CE3
    NE NE1 NE2 OE1 OE2 CH2 NH1 NH2 OH CZ CZ2 CZ3 NZ OXT
"""

ATOM_TYPES = tuple(_ATOMS.split())
"""The 37 heavy atoms that a protein may have, in the order of atom37."""

GROUPS = ("backbone", "pre-omega", "phi", "psi", "chi1", "chi2", "chi3", "chi4")
"""The rigid groups of a residue, each turned by the torsion of its name. Two hold no heavy atom."""

CHI_PATHS = {
    "ALA": "",
    "ARG": "N CA CB CG CD NE CZ",
    "ASN": "N CA CB CG OD1",
    "ASP": "N CA CB CG OD1",
    "CYS": "N CA CB SG",
    "GLN": "N CA CB CG CD OE1",
    "GLU": "N CA CB CG CD OE1",
    "GLY": "",
    "HIS": "N CA CB CG ND1",
    "ILE": "N CA CB CG1 CD1",
    "LEU": "N CA CB CG CD1",
    "LYS": "N CA CB CG CD CE NZ",
    "MET": "N CA CB CG SD CE",
    "PHE": "N CA CB CG CD1",
    "PRO": "N CA CB CG CD",
    "SER": "N CA CB OG",
    "THR": "N CA CB OG1",
    "TRP": "N CA CB CG CD1",
    "TYR": "N CA CB CG CD1",
    "VAL": "N CA CB CG1",
}
"""Atoms along each side chain: chi k is the torsion of the k-th to the (k + 3)-th of them."""

SYMMETRIC_ATOMS = {
    "ASP": (("OD1", "OD2"),),
    "GLU": (("OE1", "OE2"),),
    "PHE": (("CD1", "CD2"), ("CE1", "CE2")),
    "TYR": (("CD1", "CD2"), ("CE1", "CE2")),
}
"""Pairs whose names can be swapped, because the last chi angle has a symmetry of 180 degrees."""

RADII = {"C": 1.7, "N": 1.55, "O": 1.52, "S": 1.8}
"""Van der Waals radius of each element (Bondi 1964), in Angstrom."""

CA_CA_DISTANCE = 3.80209737096
"""Distance of neighbouring CA atoms across a trans peptide bond, in Angstrom."""

_IDEAL_ATOMS = {
    "ALA": """
        N 0 -0.525 1.363 0 | CA 0 0 0 0 | C 0 1.526 0 0 | O 3 0.627 1.062 0
        CB 0 -0.529 -0.774 -1.205
    """,
    "ARG": """
        N 0 -0.524 1.362 0 | CA 0 0 0 0 | C 0 1.525 0 0 | O 3 0.626 1.062 0
        CB 0 -0.524 -0.778 -1.209 | CG 4 0.616 1.39 0 | CD 5 0.564 1.414 0
        NE 6 0.539 1.357 0 | CZ 7 0.758 1.093 0 | NH1 7 0.206 2.301 0 | NH2 7 2.078 0.978 0
    """,
    "ASN": """
        N 0 -0.536 1.357 0 | CA 0 0 0 0 | C 0 1.526 0 0 | O 3 0.625 1.062 0
        CB 0 -0.531 -0.787 -1.2 | CG 4 0.584 1.399 0 | OD1 5 0.633 1.059 0
        ND2 5 0.593 -1.188 0.001
    """,
    "ASP": """
        N 0 -0.525 1.362 0 | CA 0 0 0 0 | C 0 1.527 0 0 | O 3 0.626 1.062 0
        CB 0 -0.526 -0.778 -1.208 | CG 4 0.593 1.398 0 | OD1 5 0.61 1.091 0
        OD2 5 0.592 -1.101 -0.003
    """,
    "CYS": """
        N 0 -0.522 1.362 0 | CA 0 0 0 0 | C 0 1.524 0 0 | O 3 0.625 1.062 0
        CB 0 -0.519 -0.773 -1.212 | SG 4 0.728 1.653 0
    """,
    "GLN": """
        N 0 -0.526 1.361 0 | CA 0 0 0 0 | C 0 1.526 0 0 | O 3 0.626 1.062 0
        CB 0 -0.525 -0.779 -1.207 | CG 4 0.615 1.393 0 | CD 5 0.587 1.399 0
        OE1 6 0.634 1.06 0 | NE2 6 0.593 -1.189 -0.001
    """,
    "GLU": """
        N 0 -0.528 1.361 0 | CA 0 0 0 0 | C 0 1.526 0 0 | O 3 0.626 1.062 0
        CB 0 -0.526 -0.781 -1.207 | CG 4 0.615 1.392 0 | CD 5 0.6 1.397 0
        OE1 6 0.607 1.095 0 | OE2 6 0.589 -1.104 -0.001
    """,
    "GLY": """
        N 0 -0.572 1.337 0 | CA 0 0 0 0 | C 0 1.517 0 0 | O 3 0.626 1.062 0
    """,
    "HIS": """
        N 0 -0.527 1.36 0 | CA 0 0 0 0 | C 0 1.525 0 0 | O 3 0.625 1.063 0
        CB 0 -0.525 -0.778 -1.208 | CG 4 0.6 1.37 0 | ND1 5 0.744 1.16 0
        CD2 5 0.889 -1.021 0.003 | CE1 5 2.03 0.851 0.002 | NE2 5 2.145 -0.466 0.004
    """,
    "ILE": """
        N 0 -0.493 1.373 0 | CA 0 0 0 0 | C 0 1.527 0 0 | O 3 0.627 1.062 0
        CB 0 -0.536 -0.793 -1.213 | CG1 4 0.534 1.437 0 | CG2 4 0.54 -0.785 -1.199
        CD1 5 0.619 1.391 0
    """,
    "LEU": """
        N 0 -0.52 1.363 0 | CA 0 0 0 0 | C 0 1.525 0 0 | O 3 0.625 1.063 0
        CB 0 -0.522 -0.773 -1.214 | CG 4 0.678 1.371 0 | CD1 5 0.53 1.43 0
        CD2 5 0.535 -0.774 1.2
    """,
    "LYS": """
        N 0 -0.526 1.362 0 | CA 0 0 0 0 | C 0 1.526 0 0 | O 3 0.626 1.062 0
        CB 0 -0.524 -0.778 -1.208 | CG 4 0.619 1.39 0 | CD 5 0.559 1.417 0
        CE 6 0.56 1.416 0 | NZ 7 0.554 1.387 0
    """,
    "MET": """
        N 0 -0.521 1.364 0 | CA 0 0 0 0 | C 0 1.525 0 0 | O 3 0.625 1.062 0
        CB 0 -0.523 -0.776 -1.21 | CG 4 0.613 1.391 0 | SD 5 0.703 1.695 0
        CE 6 0.32 1.786 0
    """,
    "PHE": """
        N 0 -0.518 1.363 0 | CA 0 0 0 0 | C 0 1.524 0 0 | O 3 0.626 1.062 0
        CB 0 -0.525 -0.776 -1.212 | CG 4 0.607 1.377 0 | CD1 5 0.709 1.195 0
        CD2 5 0.706 -1.196 0 | CE1 5 2.102 1.198 0 | CE2 5 2.098 -1.201 0
        CZ 5 2.794 -0.003 -0.001
    """,
    "PRO": """
        N 0 -0.566 1.351 0 | CA 0 0 0 0 | C 0 1.527 0 0 | O 3 0.621 1.066 0
        CB 0 -0.546 -0.611 -1.293 | CG 4 0.382 1.445 0 | CD 5 0.477 1.424 0
    """,
    "SER": """
        N 0 -0.529 1.36 0 | CA 0 0 0 0 | C 0 1.525 0 0 | O 3 0.626 1.062 0
        CB 0 -0.518 -0.777 -1.211 | OG 4 0.503 1.325 0
    """,
    "THR": """
        N 0 -0.517 1.364 0 | CA 0 0 0 0 | C 0 1.526 0 0 | O 3 0.626 1.062 0
        CB 0 -0.516 -0.793 -1.215 | OG1 4 0.472 1.353 0 | CG2 4 0.55 -0.718 -1.228
    """,
    "TRP": """
        N 0 -0.521 1.363 0 | CA 0 0 0 0 | C 0 1.525 0 0 | O 3 0.627 1.062 0
        CB 0 -0.523 -0.776 -1.212 | CG 4 0.609 1.37 0 | CD1 5 0.824 1.091 0
        CD2 5 0.854 -1.148 -0.005 | NE1 5 2.14 0.69 -0.004 | CE2 5 2.186 -0.678 -0.007
        CE3 5 0.622 -2.53 -0.007 | CZ2 5 3.283 -1.543 -0.011 | CZ3 5 1.715 -3.389 -0.011
        CH2 5 3.028 -2.89 -0.013
    """,
    "TYR": """
        N 0 -0.522 1.362 0 | CA 0 0 0 0 | C 0 1.524 0 0 | O 3 0.627 1.062 0
        CB 0 -0.522 -0.776 -1.213 | CG 4 0.607 1.382 0 | CD1 5 0.716 1.195 0
        CD2 5 0.713 -1.194 -0.001 | CE1 5 2.107 1.2 -0.002 | CE2 5 2.104 -1.201 -0.003
        CZ 5 2.791 -0.001 -0.003 | OH 5 4.168 -0.002 -0.005
    """,
    "VAL": """
        N 0 -0.494 1.373 0 | CA 0 0 0 0 | C 0 1.527 0 0 | O 3 0.627 1.062 0
        CB 0 -0.533 -0.795 -1.213 | CG1 4 0.54 1.429 0 | CG2 4 0.533 -0.776 1.203
    """,
}
"""Each residue's atoms in the order of atom14: name, rigid group, x, y, z within the group.

A group's x axis is the bond that its torsion turns about and its origin is the end of that bond;
the torsion's last atom lies in the xy plane with positive y. In the backbone group CA is the
origin, C lies on x and N in the xy plane.
"""

# -------------------------------------------------------------------------------------- look-ups


def restype(letter: str) -> int:
    """The number of a one-letter code, with ambiguous letters resolved; others are `UNKNOWN`."""
    index = RESTYPES.find(AMBIGUOUS_LETTERS.get(letter, letter))
    return index if letter and index >= 0 else UNKNOWN


def atom14_names(residue: str) -> tuple[str, ...]:
    """Names of a residue's heavy atoms, such as of "ALA", in the order of atom14; UNK has none."""
    return tuple(name for name, _, _ in _ideal_atoms(residue))


def chi_atoms(residue: str) -> tuple[tuple[str, str, str, str], ...]:
    """The four atoms of each chi angle of a residue; arginine's fifth, always flat, is left out."""
    path = CHI_PATHS.get(residue, "").split()
    return tuple(zip(path, path[1:], path[2:], path[3:], strict=False))


def _ideal_atoms(residue: str) -> list[tuple[str, int, Floats]]:
    words = _IDEAL_ATOMS.get(residue, "").replace("|", " ").split()
    return [
        (words[i], int(words[i + 1]), np.array(words[i + 2 : i + 5], dtype=np.float64))
        for i in range(0, len(words), 5)
    ]


# ---------------------------------------------------------------------------------------- tables


@cache
def atom14_to_atom37() -> Indices:
    """Index in atom37 of each atom of atom14, [a, 14]; 0 where there is no atom."""
    table = np.zeros((21, 14), dtype=np.int64)
    for a, residue in enumerate(ONE_TO_THREE.values()):
        for i, name in enumerate(atom14_names(residue)):
            table[a, i] = ATOM_TYPES.index(name)
    return _frozen(table)


@cache
def atom37_to_atom14() -> Indices:
    """Index in atom14 of each atom of atom37, [a, 37]; 0 where there is no atom."""
    table = np.zeros((21, 37), dtype=np.int64)
    for a, residue in enumerate(ONE_TO_THREE.values()):
        for i, name in enumerate(atom14_names(residue)):
            table[a, ATOM_TYPES.index(name)] = i
    return _frozen(table)


@cache
def atom14_exists() -> Floats:
    """1 where a residue type has the atom, else 0, [a, 14]."""
    table = np.zeros((21, 14))
    for a, residue in enumerate(ONE_TO_THREE.values()):
        table[a, : len(atom14_names(residue))] = 1
    return _frozen(table)


@cache
def atom37_exists() -> Floats:
    """1 where a residue type has the atom, else 0, [a, 37]; OXT counts as absent."""
    table = np.zeros((21, 37))
    for a, residue in enumerate(ONE_TO_THREE.values()):
        table[a, [ATOM_TYPES.index(name) for name in atom14_names(residue)]] = 1
    return _frozen(table)


@cache
def atom14_group() -> Indices:
    """Rigid group that each atom belongs to, [a, 14]."""
    table = np.zeros((21, 14), dtype=np.int64)
    for a, residue in enumerate(ONE_TO_THREE.values()):
        for i, (_, group, _) in enumerate(_ideal_atoms(residue)):
            table[a, i] = group
    return _frozen(table)


@cache
def atom14_ideal_positions() -> Floats:
    """Position of each atom in the frame of its rigid group, [a, 14, 3]."""
    table = np.zeros((21, 14, 3))
    for a, residue in enumerate(ONE_TO_THREE.values()):
        for i, (_, _, position) in enumerate(_ideal_atoms(residue)):
            table[a, i] = position
    return _frozen(table)


@cache
def atom14_swap() -> Indices:
    """Index of the atom that carries each atom's name under the other naming, [a, 14]."""
    table = np.tile(np.arange(14), (21, 1))
    for residue, pairs in SYMMETRIC_ATOMS.items():
        names = atom14_names(residue)
        for pair in pairs:
            i, j = (names.index(name) for name in pair)
            table[_number(residue), [i, j]] = j, i
    return _frozen(table)


@cache
def atom14_is_ambiguous() -> Floats:
    """1 for the atoms that `atom14_swap` moves, [a, 14]."""
    return _frozen((atom14_swap() != np.arange(14)).astype(np.float64))


@cache
def chi_atom37() -> Indices:
    """Index in atom37 of the four atoms of each chi angle, [a, k, 4]; 0 where there is no angle."""
    table = np.zeros((21, 4, 4), dtype=np.int64)
    for a, residue in enumerate(ONE_TO_THREE.values()):
        for k, names in enumerate(chi_atoms(residue)):
            table[a, k] = [ATOM_TYPES.index(name) for name in names]
    return _frozen(table)


@cache
def chi_exists() -> Floats:
    """1 where a residue type has the chi angle, [a, k]."""
    table = np.zeros((21, 4))
    for a, residue in enumerate(ONE_TO_THREE.values()):
        table[a, : len(chi_atoms(residue))] = 1
    return _frozen(table)


@cache
def chi_is_symmetric() -> Floats:
    """1 for the chi angles that a turn of 180 degrees leaves alike, [a, k]."""
    table = np.zeros((21, 4))
    for residue in SYMMETRIC_ATOMS:
        table[_number(residue), len(chi_atoms(residue)) - 1] = 1
    return _frozen(table)


@cache
def group_exists() -> Floats:
    """1 for the rigid groups that hold heavy atoms and have a frame, [a, g]."""
    return _frozen(np.concatenate([np.tile([1.0, 0.0, 0.0, 1.0], (21, 1)), chi_exists()], axis=1))


@cache
def group_atom37() -> Indices:
    """Three atoms that define a group's frame, [a, g, 3]; zeros where there is no frame.

    The first lies on the negative x axis, the second is the origin, the third lies in the xy
    plane. The backbone's are C, CA, N: its x and z axes are reversed afterwards.
    """
    table = np.zeros((21, 8, 3), dtype=np.int64)
    table[:, 0] = [ATOM_TYPES.index(name) for name in ("C", "CA", "N")]
    table[:, 3] = [ATOM_TYPES.index(name) for name in ("CA", "C", "O")]
    table[:, 4:] = chi_atom37()[:, :, 1:]
    return _frozen(table)


@cache
def group_frames() -> Floats:
    """Each group's frame in its parent's at torsion 0, [a, g, 4, 4] with last rows 0 0 0 1.

    The parent of chi 2 to 4 is the chi before it; of all others, the backbone. The pre-omega group
    has the identity, groups that do not exist a rotation of zeros. UNK has the backbone of alanine,
    because its backbone is known even though its side chain is not.
    """
    table = np.tile(np.eye(4), (21, 8, 1, 1))
    table[:, 4:, :3, :3] = 0
    for a, residue in enumerate(ONE_TO_THREE.values()):
        known = "ALA" if residue == "UNK" else residue
        at = {name: position for name, _, position in _ideal_atoms(known)}
        table[a, 2] = _frame(at["N"] - at["CA"], np.array([1.0, 0, 0]), at["N"])
        table[a, 3] = _frame(at["C"] - at["CA"], at["CA"] - at["N"], at["C"])
        for k, (first, second, third, _) in enumerate(chi_atoms(residue)):
            if k == 0:
                table[a, 4] = _frame(at[third] - at[second], at[first] - at[second], at[third])
            else:
                table[a, 4 + k] = _frame(at[third], np.array([-1.0, 0, 0]), at[third])
    return _frozen(table)


@cache
def atom37_radii() -> Floats:
    """Van der Waals radius of each of the 37 atoms, in Angstrom."""
    return _frozen(np.array([RADII[name[0]] for name in ATOM_TYPES]))


def _frame(x_axis: Floats, in_xy_plane: Floats, origin: Floats) -> Floats:
    """A frame as a 4 x 4 matrix, by Gram and Schmidt."""
    x = x_axis / np.linalg.norm(x_axis)
    y = in_xy_plane - (in_xy_plane @ x) * x
    y = y / np.linalg.norm(y)
    frame = np.eye(4)
    frame[:3] = np.stack([x, y, np.cross(x, y), origin], axis=1)
    return frame


def _number(residue: str) -> int:
    return list(ONE_TO_THREE.values()).index(residue)


def _frozen(table: _Table) -> _Table:
    table.setflags(write=False)
    return table
