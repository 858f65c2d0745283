"""Which residues a training example keeps.

Contiguous crops: Jumper et al. 2021, Suppl. Sec. 1.2.8, and for complexes Evans et al. 2021,
Alg. 1. Spatial crops: Evans et al. 2021, Alg. 2.

Dims: r residues of all chains.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]

_INTERFACE = 15.0  # Angstrom between CA atoms of two chains
BY_ROW = frozenset(
    ["msa", "true_msa", "bert_mask", "msa_mask", "msa_feat", "deletion_matrix", "extra_msa",
     "extra_msa_mask", "extra_has_deletion", "extra_deletion_value", "template_aatype",
     "template_all_atom_positions", "template_all_atom_masks", "template_all_atom_mask",
     "template_pseudo_beta", "template_pseudo_beta_mask"]
)  # fmt: skip
"""Features whose residue dim is the second."""

WITHOUT_RESIDUES = frozenset(
    ["template_mask", "template_sum_probs", "resolution", "use_clamped_fape", "seq_length"]
)
"""Features without a residue dim."""


def contiguous(rng: np.random.Generator, lengths: Sequence[int], size: int) -> Indices:
    """One stretch of each chain, ``size`` residues in all, or all if there are fewer."""
    kept: list[Indices] = []
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    added, remaining = 0, int(offsets[-1])
    for k in rng.permutation(len(lengths)):
        remaining -= lengths[k]
        most = min(size - added, lengths[k])
        least = min(lengths[k], max(0, size - added - remaining))
        length = int(rng.integers(least, most + 1))
        start = int(offsets[k] + rng.integers(0, lengths[k] - length + 1))
        kept.append(np.arange(start, start + length))
        added += length
    return np.sort(np.concatenate(kept))


def spatial(
    rng: np.random.Generator,
    ca: NDArray[np.float32],
    seen: NDArray[np.bool_],
    asym_id: NDArray[np.int64],
    size: int,
) -> Indices:
    """The ``size`` residues nearest to a residue at an interface; anywhere if there is none.

    Args:
        rng: random numbers.
        ca: positions of CA atoms ``[r, 3]`` in Angstrom.
        seen: where there is one ``[r]``.
        asym_id: the chain of each residue ``[r]``.
        size: residues to keep.
    """
    distance = np.linalg.norm(ca[:, None] - ca[None], axis=-1)
    distance[:, ~seen] = np.inf
    other_chain = asym_id[:, None] != asym_id[None]
    near = (distance <= _INTERFACE) & other_chain & seen[:, None]
    centres = np.flatnonzero(near.any(axis=1))
    if not centres.size:
        centres = np.flatnonzero(seen) if seen.any() else np.arange(len(seen))
    order = distance[rng.choice(centres)] + 1e-3 * np.arange(len(seen))
    return np.sort(np.argsort(order, kind="stable")[:size])


def crop(batch: Mapping[str, Tensor], residues: Indices) -> dict[str, Tensor]:
    """The batch with those residues only, every feature along its own residue dim."""
    index = torch.from_numpy(residues)
    cropped = {}
    for name, value in batch.items():
        if name in WITHOUT_RESIDUES:
            cropped[name] = value
        else:
            cropped[name] = value.index_select(1 if name in BY_ROW else 0, index)
    if "seq_length" in batch:
        cropped["seq_length"] = torch.full_like(batch["seq_length"], len(residues))
    return cropped
