"""How near a predicted structure is to another, and what is wrong with it on its own.

All in float64. Positions are in Angstrom. Dims: n atoms or residues that correspond, r residues,
k superpositions tried at once; 37 atom types in the order of `residues.ATOM_TYPES`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hairpin.proteins import residues, stereochemistry
from hairpin.proteins.structures import Chain

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]
Flags = NDArray[np.bool_]

LDDT_RADIUS = 15.0
LDDT_THRESHOLDS = (0.5, 1.0, 2.0, 4.0)
_GDT_CUTOFFS = np.array([1.0, 2.0, 4.0, 8.0])
_BLOCK = 512  # atoms whose distances to all others are held at once
_STARTS = 256  # fragments of one length that a superposition is begun from, at most
_ROUNDS = 20
_SIGMAS = 12.0  # standard deviations that a bond or an angle may stray
_OVERLAP = 1.5  # by which van der Waals spheres may overlap, in Angstrom
_DISULFIDE = (1.8, 2.3)  # between two SG, in Angstrom


# ------------------------------------------------------------------------------------------ lDDT


def lddt(
    predicted: Floats,
    true: Floats,
    *,
    groups: Indices | None = None,
    present: Flags | None = None,
    radius: float = LDDT_RADIUS,
) -> tuple[float, Floats]:
    """Local distance difference test: how many distances are kept, 0 to 1.

    Of all distances below ``radius`` in the true structure, the part that the prediction has within
    0.5, 1, 2 and 4, on average over these (Mariani et al. 2013; Jumper et al. 2021, Suppl. Alg. 27
    line 3 uses the same on C-alpha atoms).

    Args:
        predicted: ``[n, 3]``; ``true``: ``[n, 3]``.
        groups: ``[n]``, residue of each atom; distances within one are not counted. Left out, only
            the distance of an atom to itself is not.
        present: ``[n]``; distances to an atom that the prediction lacks count as not kept.

    Returns:
        the score of the whole, nan where there is no distance to count; and of each atom, ``[n]``.
    """
    n = len(true)
    groups = np.arange(n) if groups is None else groups
    present = np.ones(n, dtype=bool) if present is None else present
    kept, counted = np.zeros(n), np.zeros(n)
    for rows in _blocks(n):
        want = _distances(true[rows], true)
        close = (want < radius) & (groups[rows, None] != groups[None, :])
        error = np.abs(_distances(predicted[rows], predicted) - want)
        both = present[rows, None] & present[None, :] & close
        parts = sum((error < threshold) & both for threshold in LDDT_THRESHOLDS)
        kept[rows] = np.asarray(parts).sum(axis=1) / len(LDDT_THRESHOLDS)
        counted[rows] = close.sum(axis=1)
    total = float(kept.sum() / counted.sum()) if counted.any() else float("nan")
    with np.errstate(invalid="ignore", divide="ignore"):
        return total, kept / counted


def name_symmetric_atoms(
    predicted: Floats, true: Floats, predicted_mask: Floats, true_mask: Floats, kinds: Sequence[int]
) -> Floats:
    """The prediction ``[r, 37, 3]`` with atoms that look alike named as they fit.

    Such as the two oxygens of aspartate. Of the two namings of a residue the one is taken whose
    distances to all atoms with only one name are nearer the true ones (Jumper et al. 2021, Suppl.
    Alg. 26).
    """
    swapped = _swapped(kinds)
    twofold = swapped != np.arange(37)
    both = (predicted_mask > 0) & (true_mask > 0)
    anchors = both & ~twofold
    result = predicted.copy()
    for i in np.flatnonzero((both & twofold).any(axis=1)):
        atoms = np.flatnonzero(twofold[i] & both[i] & both[i][swapped[i]])
        want = _distances(true[i, atoms], true[anchors])
        errors = [
            np.abs(_distances(predicted[i, named], predicted[anchors]) - want).sum()
            for named in (atoms, swapped[i, atoms])
        ]
        if errors[1] < errors[0]:
            result[i, atoms] = predicted[i, swapped[i, atoms]]
    return result


def _swapped(kinds: Sequence[int]) -> Indices:
    """Index of the atom with the other name of each atom, ``[r, 37]``."""
    table = np.tile(np.arange(37), (21, 1))
    names = list(residues.ATOM_TYPES)
    for three, pairs in residues.SYMMETRIC_ATOMS.items():
        for pair in pairs:
            i, j = (names.index(name) for name in pair)
            table[residues.restype(residues.THREE_TO_ONE[three]), [i, j]] = j, i
    return table[np.asarray(kinds, dtype=np.int64)]


# --------------------------------------------------------------------------------- superposition


def superpose(
    moving: Floats, fixed: Floats, weights: Floats | None = None
) -> tuple[Floats, Floats]:
    """Rotation ``[..., 3, 3]`` and translation ``[..., 3]`` with the least square deviation.

    ``moving @ rotation.T + translation`` lies on ``fixed`` (Kabsch 1976).

    Args:
        moving: ``[..., n, 3]``; ``fixed``: ``[..., n, 3]``.
        weights: ``[..., n]``; all alike if left out.
    """
    w = np.ones(moving.shape[:-1]) if weights is None else weights
    w = w / np.maximum(w.sum(axis=-1, keepdims=True), 1e-12)
    from_centre = np.einsum("...n,...nc->...c", w, moving)
    to_centre = np.einsum("...n,...nc->...c", w, fixed)
    a, b = moving - from_centre[..., None, :], fixed - to_centre[..., None, :]
    left, _, right = np.linalg.svd(np.swapaxes(a * w[..., None], -1, -2) @ b)
    turn = np.swapaxes(left @ right, -1, -2)
    flip = np.ones((*turn.shape[:-2], 3))
    flip[..., 2] = np.sign(np.linalg.det(turn))
    rotation = np.swapaxes(right, -1, -2) * flip[..., None, :] @ np.swapaxes(left, -1, -2)
    return rotation, to_centre - np.einsum("...cd,...d->...c", rotation, from_centre)


def rmsd(predicted: Floats, true: Floats) -> float:
    """Root mean square deviation of ``[n, 3]`` from ``[n, 3]`` after superposition, in Angstrom."""
    rotation, translation = superpose(predicted, true)
    moved = predicted @ rotation.T + translation
    return float(np.sqrt(((moved - true) ** 2).sum(axis=-1).mean()))


@dataclass(frozen=True)
class Superposition:
    """Scores that are largest over superpositions, each at its own.

    Attributes:
        tm_score: divided by the length asked for.
        gdt_ts: mean part of the atoms within 1, 2, 4 and 8 Angstrom, 0 to 1, of the same length.
    """

    tm_score: float
    gdt_ts: float


def tm_score(predicted: Floats, true: Floats, length: int) -> Superposition:
    """TM-score and GDT-TS of C-alpha atoms ``[n, 3]`` that correspond.

    Zhang and Skolnick 2004: the mean over ``length`` residues of 1 / (1 + (d / d0)^2), largest over
    superpositions. Searched for as they do: begin at every fragment of n, n/2, n/4, ... residues,
    down to 4; superpose; go on with the residues within d0 (4.5 to 8 Angstrom) until they stay the
    same.

    Args:
        length: residues to divide by, and to compute d0 from.
    """
    n = len(predicted)
    if n == 0:
        return Superposition(0.0, 0.0)
    d0 = tm_d0(length)
    near = min(max(d0, 4.5), 8.0)
    best, within = 0.0, np.zeros(4)
    for chosen in _fragments(n):
        for distance in _refined(predicted, true, chosen, near):
            score = (1 / (1 + (distance / d0) ** 2)).sum(axis=-1).max()
            best = max(best, float(score))
            counts = (distance[..., None] < _GDT_CUTOFFS).sum(axis=1).max(axis=0)
            within = np.maximum(within, counts)
    return Superposition(best / length, float(within.mean() / length))


def tm_d0(length: int) -> float:
    """The distance that scores one half in a TM-score over ``length`` residues, in Angstrom."""
    return max(1.24 * np.cbrt(length - 15) - 1.8, 0.5) if length > 15 else 0.5


def _fragments(n: int) -> Iterator[Flags]:
    """Fragments to begin from, those of one length at a time: ``[k, n]``."""
    length = n
    while True:
        starts = n - length + 1
        places = np.unique(np.linspace(0, starts - 1, min(starts, _STARTS)).astype(int))
        at = np.arange(n)
        yield (at >= places[:, None]) & (at < places[:, None] + length)
        if length <= 4:
            return
        length = max(length // 2, 4)


def _refined(predicted: Floats, true: Floats, chosen: Flags, near: float) -> Iterator[Floats]:
    """Distances ``[k, n]`` after each round of superposing on the residues that were near."""
    for turn in range(_ROUNDS):
        rotation, translation = superpose(
            np.broadcast_to(predicted, (len(chosen), *predicted.shape)),
            np.broadcast_to(true, (len(chosen), *true.shape)),
            chosen.astype(np.float64),
        )
        moved = np.einsum("nd,kcd->knc", predicted, rotation) + translation[:, None]
        distance = np.sqrt(((moved - true) ** 2).sum(axis=-1))
        yield distance
        picked = _near(distance, near - 1 if turn == 0 else near + 1)
        changed = (picked != chosen).any(axis=1)
        chosen = np.unique(picked[changed], axis=0)
        if not len(chosen):
            return


def _near(distance: Floats, cutoff: float) -> Flags:
    """Residues within a cutoff, widened by 0.5 until three are: ``[k, n]``."""
    third = np.sort(distance, axis=1)[:, min(2, distance.shape[1] - 1)]
    steps = np.maximum(np.floor((third - cutoff) / 0.5) + 1, 0)
    picked: Flags = distance < (cutoff + 0.5 * steps)[:, None]
    return picked


# ------------------------------------------------------------------------------------ violations


@dataclass(frozen=True)
class Violations:
    """What cannot be in a real protein.

    Attributes:
        clashes: pairs of atoms of different residues whose spheres overlap by more than 1.5.
        bonds: peptide bonds whose length is more than 12 standard deviations off.
        angles: angles at peptide bonds, the same.
        within_residues: pairs of atoms a bond or an angle apart within a residue, the same, and
            clashes there.
        residues: residues with any of these.
        worst_overlap: of a clash, in Angstrom.
    """

    clashes: int
    bonds: int
    angles: int
    within_residues: int
    residues: int
    worst_overlap: float


def violations(chains: Sequence[Chain]) -> Violations:
    """Count what is wrong with a structure by Jumper et al. 2021, Suppl. Sec. 1.9.11."""
    bad = [np.zeros(len(chain.sequence), dtype=bool) for chain in chains]
    bonds = angles = inside = 0
    for chain, flags in zip(chains, bad, strict=True):
        counts = _peptide_bonds(chain, flags)
        bonds, angles = bonds + counts[0], angles + counts[1]
        inside += _within_residues(chain, flags)
    clashes, worst = _clashes(chains, bad)
    total = int(sum(flags.sum() for flags in bad))
    return Violations(clashes, bonds, angles, inside, total, worst)


def _peptide_bonds(chain: Chain, bad: Flags) -> tuple[int, int]:
    """Wrong lengths and angles of bonds between residues whose numbers follow each other."""
    n, ca, c = (residues.ATOM_TYPES.index(name) for name in ("N", "CA", "C"))
    known = np.asarray((chain.mask[:, [n, ca, c]] > 0).all(axis=1))
    joined = known[:-1] & known[1:] & (np.diff(chain.numbers) == 1)
    positions = chain.positions.astype(np.float64)
    before, after = positions[:-1], positions[1:]
    bond = after[:, n] - before[:, c]
    length = np.linalg.norm(bond, axis=-1)
    proline = np.array([letter == "P" for letter in chain.sequence[1:]], dtype=bool)
    ideals = stereochemistry.PEPTIDE_BOND_TO_PROLINE, stereochemistry.PEPTIDE_BOND
    want = np.where(proline[:, None], *ideals)
    wrong = joined & (np.abs(length - want[:, 0]) > _SIGMAS * want[:, 1])
    at_c = _cosine(before[:, ca] - before[:, c], bond)
    at_n = _cosine(-bond, after[:, ca] - after[:, n])
    bent_c = joined & _strays(at_c, stereochemistry.COSINE_CA_C_N)
    bent_n = joined & _strays(at_n, stereochemistry.COSINE_C_N_CA)
    any_wrong: Flags = wrong | bent_c | bent_n
    bad[:-1] |= any_wrong
    bad[1:] |= any_wrong
    return int(wrong.sum()), int(bent_c.sum() + bent_n.sum())


def _within_residues(chain: Chain, bad: Flags) -> int:
    """Distances within residues that are out of bounds."""
    lower, upper = stereochemistry.distance_bounds(
        overlap_tolerance=_OVERLAP, tolerance_factor=_SIGMAS
    )
    kinds = np.array([residues.restype(letter) for letter in chain.sequence])
    index = residues.atom14_to_atom37()[kinds]
    atoms = np.take_along_axis(chain.positions, index[..., None], axis=1)
    mask = np.take_along_axis(chain.mask, index, axis=1) * residues.atom14_exists()[kinds] > 0
    distance = np.linalg.norm(atoms[:, :, None] - atoms[:, None, :], axis=-1)
    pairs = mask[:, :, None] & mask[:, None, :] & np.triu(np.ones((14, 14), dtype=bool), 1)
    wrong = pairs & ((distance < lower[kinds]) | (distance > upper[kinds]))
    bad[wrong.any(axis=(1, 2))] = True
    return int(wrong.sum())


def _clashes(chains: Sequence[Chain], bad: Sequence[Flags]) -> tuple[int, float]:
    """Pairs of atoms of different residues that overlap, and by how much the worst does."""
    where, place, kind, bonded = _all_atoms(chains)
    radii = residues.atom37_radii()[kind]
    flags = np.zeros(sum(len(chain.sequence) for chain in chains), dtype=bool)
    clashes, worst = 0, 0.0
    for rows in _blocks(len(where)):
        distance = _distances(where[rows], where)
        overlap = radii[rows, None] + radii[None, :] - distance
        later = place[None, :] > place[rows, None]
        hit = later & (overlap > _OVERLAP) & ~_are_bonded(rows, place, kind, bonded, distance)
        clashes += int(hit.sum())
        if hit.any():
            worst = max(worst, float(overlap[hit].max()))
            i, j = np.nonzero(hit)
            flags[place[rows][i]] = flags[place[j]] = True
    for chain_flags, found in zip(bad, _split(flags, chains), strict=True):
        chain_flags[found] = True
    return clashes, worst


def _all_atoms(
    chains: Sequence[Chain],
) -> tuple[Floats, Indices, Indices, Flags]:
    """Every atom: position, residue, type; and whether a residue is bonded to the next."""
    where, place, kind, bonded = [], [], [], []
    first = 0
    for chain in chains:
        i, j = np.nonzero(chain.mask)
        where.append(chain.positions[i, j].astype(np.float64))
        place.append(i + first)
        kind.append(j)
        bonded.append(np.append(np.diff(chain.numbers) == 1, False))
        first += len(chain.sequence)
    joined = np.concatenate
    return joined(where), joined(place), joined(kind), joined(bonded)


def _are_bonded(
    rows: slice, place: Indices, kind: Indices, bonded: Flags, distance: Floats
) -> Flags:
    """Pairs at a peptide bond, C to N of the next residue, and at a disulfide bridge."""
    n, c, sulfur = (residues.ATOM_TYPES.index(name) for name in ("N", "C", "SG"))
    follows = (place[None, :] == place[rows, None] + 1) & bonded[place[rows], None]
    peptide = follows & (kind[rows, None] == c) & (kind[None, :] == n)
    bridge = (kind[rows, None] == sulfur) & (kind[None, :] == sulfur)
    low, high = _DISULFIDE
    result: Flags = peptide | (bridge & (distance > low) & (distance < high))
    return result


# ---------------------------------------------------------------------------------------- pieces


def _split(values: Flags, chains: Sequence[Chain]) -> list[Flags]:
    return np.split(values, np.cumsum([len(chain.sequence) for chain in chains])[:-1])


def _strays(value: Floats, ideal: tuple[float, float]) -> Flags:
    strays: Flags = np.abs(value - ideal[0]) > _SIGMAS * ideal[1]
    return strays


def _cosine(a: Floats, b: Floats) -> Floats:
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosine: Floats = (a * b).sum(axis=-1) / np.maximum(lengths, 1e-9)
    return cosine


def _blocks(n: int) -> Iterator[slice]:
    return (slice(i, min(i + _BLOCK, n)) for i in range(0, n, _BLOCK))


def _distances(a: Floats, b: Floats) -> Floats:
    """Distances ``[i, j]`` of ``a[i, 3]`` and ``b[j, 3]``."""
    squares = sum((a[:, None, axis] - b[None, :, axis]) ** 2 for axis in range(3))
    distances: Floats = np.sqrt(squares)
    return distances
