"""What a prediction is trained and judged against: the atoms of an experimental structure.

Dims: r residues of the target, 37 atoms as in `ATOM_TYPES`. Positions in Angstrom.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from hairpin.proteins.residues import restype
from hairpin.proteins.structures import Chain, Structure
from hairpin.proteins.templates import aligned_pairs, pseudo_beta
from hairpin.proteins.text import problem

_MIN_IDENTITY = 0.9


def label_features(
    target: str, structure: Structure, chain: Chain, *, clamped: bool = True
) -> dict[str, NDArray[Any]]:
    """Positions and masks in the target's numbering, under DeepMind's names.

    A chain whose sequence differs from the target is aligned to it; residues that are not aligned
    or were not seen are masked.

    Args:
        target: the target's sequence.
        structure: for the resolution.
        chain: one of its chains.
        clamped: whether the backbone FAPE is to be clamped.

    Returns:
        ``all_atom_positions[r, 37, 3]``, ``all_atom_mask[r, 37]``, ``pseudo_beta[r, 3]``,
        ``pseudo_beta_mask[r]``, ``resolution`` (0 if unknown) and ``use_clamped_fape``, float32.

    Raises:
        FoldInputError: fewer than nine in ten of the residues of the shorter sequence agree.
    """
    positions = np.zeros((len(target), 37, 3), dtype=np.float32)
    mask = np.zeros((len(target), 37), dtype=np.float32)
    pairs = _pairs(target, structure, chain)
    here, there = list(pairs), list(pairs.values())
    positions[here], mask[here] = chain.positions[there], chain.mask[there]
    beta, beta_mask = pseudo_beta(np.array([restype(a) for a in target]), positions, mask)
    return {
        "all_atom_positions": positions,
        "all_atom_mask": mask,
        "pseudo_beta": beta,
        "pseudo_beta_mask": beta_mask,
        "resolution": np.array(structure.resolution or 0, dtype=np.float32),
        "use_clamped_fape": np.array(clamped, dtype=np.float32),
    }


def _pairs(target: str, structure: Structure, chain: Chain) -> dict[int, int]:
    """Residue of the target -> residue of the chain."""
    if chain.sequence == target:
        return {i: i for i in range(len(target))}
    if (start := chain.sequence.find(target)) >= 0:
        return {i: start + i for i in range(len(target))}
    pairs = aligned_pairs(target, chain.sequence)
    same = sum(target[i] == chain.sequence[j] for i, j in pairs.items())
    shorter = min(len(target), len(chain.sequence))
    if same < _MIN_IDENTITY * shorter:
        raise problem(
            structure.path, None,
            f"chain {chain.name} has another sequence: {same} of {shorter} residues agree with "
            f"the target, {_MIN_IDENTITY:.0%} are wanted",
            f"name another chain; there are {', '.join(structure.chains)}",
        )  # fmt: skip
    return pairs
