"""A prediction against a structure: which residues correspond, and every score of them.

Residues are matched by aligning the sequences, so numbering may differ and residues be missing.
Dims: r residues of the structure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import permutations

import numpy as np
from numpy.typing import NDArray

from hairpin.errors import FoldInputError
from hairpin.proteins import metrics
from hairpin.proteins.metrics import Violations
from hairpin.proteins.residues import ATOM_TYPES, restype
from hairpin.proteins.structures import Chain
from hairpin.proteins.templates import aligned_pairs

CA = ATOM_TYPES.index("CA")
_LEAST_IDENTITY = 0.3  # of the shorter of two sequences; chains that are less alike do not pair
_MOST_ORDERS = 5040  # of chains with alike sequences that are tried


@dataclass(frozen=True)
class Scores:
    """A prediction's scores against a structure, and by itself.

    Attributes:
        chains: name in the prediction of each chain of the structure.
        residues: with C-alpha in the structure; ``matched``: of those, in the prediction too.
        predicted_residues: in the prediction's chains that were compared.
        identity: part of the aligned residues that are alike.
        lddt: all atoms; ``lddt_ca``: C-alpha alone. 0 to 1; missing atoms count as wrong.
        ca_rmsd: after superposition of the matched residues, in Angstrom.
        tm_score: divided by the length of the structure; ``tm_score_predicted``: of the prediction.
        gdt_ts: divided by the length of the structure, 0 to 1.
        plddt: the prediction's own mean pLDDT, 0 to 100; None where it has none.
        violations: of the prediction.
    """

    chains: Mapping[str, str]
    residues: int
    matched: int
    predicted_residues: int
    identity: float
    lddt: float
    lddt_ca: float
    ca_rmsd: float
    tm_score: float
    tm_score_predicted: float
    gdt_ts: float
    plddt: float | None
    violations: Violations


def compare(predicted: Sequence[Chain], true: Sequence[Chain]) -> Scores:
    """Every score of a prediction against a structure.

    Chains pair by their sequences; of copies of one chain the pairing with the least deviation is
    taken.

    Raises:
        FoldInputError: no chain of the one is like a chain of the other.
    """
    pairs = _best_pairs(predicted, true)
    ours, theirs = [p for p, _ in pairs], [t for _, t in pairs]
    onto = [_onto(p, t) for p, t in pairs]
    both = np.concatenate([(o.mask * t.mask)[:, CA] > 0 for o, t in zip(onto, theirs, strict=True)])
    a = np.concatenate([o.positions[:, CA] for o in onto])[both].astype(np.float64)
    b = np.concatenate([t.positions[:, CA] for t in theirs])[both].astype(np.float64)
    alike = [x == y for o, t in zip(onto, theirs, strict=True) for x, y in _aligned(o, t)]
    length = int(sum((t.mask[:, CA] > 0).sum() for t in theirs))
    ours_length = int(sum((p.mask[:, CA] > 0).sum() for p in ours))
    by_structure = metrics.tm_score(a, b, length)
    plddt = mean_plddt(ours)
    return Scores(
        chains={t.name: p.name for p, t in pairs},
        residues=length,
        matched=int(both.sum()),
        predicted_residues=ours_length,
        identity=float(np.mean(alike)),
        lddt=_lddt(onto, theirs),
        lddt_ca=_lddt(onto, theirs, atoms=[CA]),
        ca_rmsd=metrics.rmsd(a, b),
        tm_score=by_structure.tm_score,
        tm_score_predicted=metrics.tm_score(a, b, ours_length).tm_score,
        gdt_ts=by_structure.gdt_ts,
        plddt=plddt,
        violations=metrics.violations(ours),
    )


def mean_plddt(chains: Sequence[Chain]) -> float | None:
    """Mean pLDDT over the residues of all chains; None where B-factors are something else."""
    scores = [score for chain in chains if (score := plddt_of(chain)) is not None]
    return float(np.concatenate(scores).mean()) if len(scores) == len(chains) else None


def plddt_of(chain: Chain) -> NDArray[np.float64] | None:
    """pLDDT of each residue that has atoms, if the B-factors can be that, else None.

    A prediction writes one value, 0 to 100, at all atoms of a residue; crystallographic B-factors
    differ between them.
    """
    known = chain.mask[chain.mask.any(axis=1)] > 0
    factors = chain.b_factors[chain.mask.any(axis=1)].astype(np.float64)
    low = np.where(known, factors, np.inf).min(axis=1, initial=np.inf)
    high = np.where(known, factors, -np.inf).max(axis=1, initial=-np.inf)
    alike = (known.sum(axis=1) > 1).any() and np.allclose(low, high, atol=1e-6)
    return high if alike and low.min() >= 0 and 0 < high.max() <= 100 else None


def _lddt(onto: Sequence[Chain], true: Sequence[Chain], *, atoms: list[int] | None = None) -> float:
    """Over the structure's atoms, with those that look alike named as they fit."""
    positions = np.concatenate([chain.positions for chain in onto]).astype(np.float64)
    mask = np.concatenate([chain.mask for chain in onto])
    want = np.concatenate([chain.positions for chain in true]).astype(np.float64)
    want_mask = np.concatenate([chain.mask for chain in true])
    kinds = [restype(letter) for chain in true for letter in chain.sequence]
    named = metrics.name_symmetric_atoms(positions, want, mask, want_mask, kinds)
    counted = want_mask > 0
    if atoms is not None:
        chosen = np.zeros(37, dtype=bool)
        chosen[atoms] = True
        counted = counted & chosen
    place, kind = np.nonzero(counted)
    score, _ = metrics.lddt(
        named[place, kind], want[place, kind], groups=place, present=mask[place, kind] > 0
    )
    return score


# ------------------------------------------------------------------------------------- matching


def _aligned(onto: Chain, true: Chain) -> list[tuple[str, str]]:
    """Letters of the residues that correspond."""
    pairs = zip(onto.sequence, true.sequence, strict=True)
    return [(a, b) for a, b in pairs if a != "-"]


def _onto(predicted: Chain, true: Chain) -> Chain:
    """The prediction's residues in the places of the structure's; absent ones have no atoms."""
    match = _match(predicted.sequence, true.sequence)
    found = match >= 0
    take = np.where(found, match, 0)
    letters = [predicted.sequence[i] if i >= 0 else "-" for i in match]
    return replace(
        predicted,
        sequence="".join(letters),
        positions=predicted.positions[take] * found[:, None, None],
        mask=predicted.mask[take] * found[:, None],
        b_factors=predicted.b_factors[take] * found[:, None],
        numbers=true.numbers,
    )


def _match(predicted: str, true: str) -> NDArray[np.int64]:
    """Index in the prediction of each residue of the structure, ``[r]``; -1 for none."""
    if predicted == true:
        return np.arange(len(true))
    found = np.full(len(true), -1)
    for i, j in aligned_pairs(predicted, true).items():
        found[j] = i
    return found


def _identity(predicted: str, true: str) -> float:
    """Identical residues of the alignment as a part of the shorter sequence."""
    match = _match(predicted, true)
    same = sum(predicted[i] == letter for i, letter in zip(match, true, strict=True) if i >= 0)
    return same / min(len(predicted), len(true))


def _best_pairs(predicted: Sequence[Chain], true: Sequence[Chain]) -> list[tuple[Chain, Chain]]:
    """Chains of the prediction beside those of the structure."""
    alike = {
        (i, j): _identity(p.sequence, t.sequence)
        for i, p in enumerate(predicted)
        for j, t in enumerate(true)
    }
    pairs: list[tuple[int, int]] = []
    for (i, j), identity in sorted(alike.items(), key=lambda item: -item[1]):
        if identity < _LEAST_IDENTITY:
            break
        if all(i != a and j != b for a, b in pairs):
            pairs.append((i, j))
    if not pairs:
        raise FoldInputError(
            f"no chain of the prediction ({_named(predicted)}) is like one of the structure "
            f"({_named(true)}): less than {_LEAST_IDENTITY:.0%} of the residues are the same; "
            "give two files of one protein, or pick chains with --chain"
        )
    pairs.sort(key=lambda pair: pair[1])
    order = [i for i, _ in pairs]
    options = _orders(order, [j for _, j in pairs], alike)
    structures = [true[j] for _, j in pairs]
    best = min(options, key=lambda o: _deviation([predicted[i] for i in o], structures))
    return [(predicted[i], t) for i, t in zip(best, structures, strict=True)]


def _orders(
    order: Sequence[int], structures: Sequence[int], alike: Mapping[tuple[int, int], float]
) -> list[tuple[int, ...]]:
    """Other ways to pair the same chains that are alike just as much."""
    if len(order) == 1:
        return [tuple(order)]
    found = []
    for tried, option in enumerate(permutations(order)):
        if tried >= _MOST_ORDERS:
            break
        if all(
            alike[i, j] >= alike[k, j] - 1e-9
            for i, k, j in zip(option, order, structures, strict=True)
        ):
            found.append(option)
    return found


def _deviation(predicted: Sequence[Chain], true: Sequence[Chain]) -> float:
    onto = [_onto(p, t) for p, t in zip(predicted, true, strict=True)]
    both = [(o.mask * t.mask)[:, CA] > 0 for o, t in zip(onto, true, strict=True)]
    a = np.concatenate([o.positions[k, CA] for o, k in zip(onto, both, strict=True)])
    b = np.concatenate([t.positions[k, CA] for t, k in zip(true, both, strict=True)])
    return metrics.rmsd(a, b) if len(a) else float("inf")


def _named(chains: Sequence[Chain]) -> str:
    return ", ".join(f"{chain.name} with {len(chain.sequence)} residues" for chain in chains)
