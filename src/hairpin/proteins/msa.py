"""The MSA as numbers: merged and without repeats, then sampled, masked and clustered.

Jumper et al. 2021, Suppl. Sec. 1.2.6 (sampling), 1.2.7 (masking and clustering) and 1.2.9
(features, Table 1). A letter is a number: 0 to 19 as in `RESTYPES`, 20 unknown, 21 gap, 22 mask.

Dims: n all sequences, s clusters, e extra sequences, r residues.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hairpin.proteins.alignments import Alignment
from hairpin.proteins.residues import AMBIGUOUS_LETTERS, GAP, RESTYPES, UNKNOWN

Floats = NDArray[np.float32]
Indices = NDArray[np.int64]
Bytes = NDArray[np.uint8]

MASK = 22
"""The number of a letter that is hidden from the model."""

CLASSES = MASK + 1
"""Amino acids, unknown, gap and mask."""

_BYTES_AT_ONCE = 2**23  # of extra sequences that are compared at a time


@dataclass(frozen=True, eq=False)
class Msa:
    """Sequences aligned to the target, each once, the target first.

    Attributes:
        letters: numbers of letters, ``[n, r]``, uint8.
        deletions: letters dropped before each column, ``[n, r]``, int32.
        names: what the files say of each row.
    """

    letters: Bytes
    deletions: NDArray[np.int32]
    names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.letters)

    @cached_property
    def profile(self) -> Floats:
        """How often each letter stands in each column, ``[r, 22]``."""
        rows, residues = self.letters.shape
        classes = GAP + 1
        at = np.arange(residues) * classes + self.letters
        counts = np.bincount(at.ravel(), minlength=residues * classes)
        return np.asarray(counts.reshape(residues, classes) / rows, dtype=np.float32)

    def rows(self, which: Sequence[int] | Indices) -> "Msa":
        """The rows of those numbers, in that order."""
        index = np.asarray(which, dtype=np.int64)
        names = tuple(self.names[i] for i in index)
        return Msa(self.letters[index], self.deletions[index], names)


@dataclass(frozen=True)
class Masking:
    """How the masked MSA is made (Suppl. Sec. 1.2.7).

    Attributes:
        fraction: part of all letters that is chosen.
        uniform: part of the chosen that becomes any amino acid.
        profile: part of the chosen that becomes a letter drawn from its column.
        same: part of the chosen that stays. The rest becomes the mask.
    """

    fraction: float = 0.15
    uniform: float = 0.1
    profile: float = 0.1
    same: float = 0.1


def numbers_of_letters() -> Bytes:
    """The number of each of 256 characters; capitals that are no amino acid are unknown."""
    table = np.full(256, UNKNOWN, dtype=np.uint8)
    for number, letter in enumerate(RESTYPES):
        table[ord(letter)] = number
    for letter, read_as in AMBIGUOUS_LETTERS.items():
        table[ord(letter)] = table[ord(read_as)]
    table[ord("-")] = GAP
    return table


def merge(target: str, alignments: Sequence[Alignment]) -> Msa:
    """All rows of the alignments in order, rows that repeat an earlier one left out.

    Rows are compared as they stand in the columns; letters dropped between columns do not count.
    Without alignments the target stands alone.
    """
    first = np.frombuffer(target.encode(), dtype=np.uint8)
    seen = {first.tobytes()}
    letters = [first]
    deletions = [np.zeros(len(target), dtype=np.int32)]
    names = ["target"]
    for alignment in alignments:
        for row, counts, name in zip(
            alignment.letters, alignment.deletions, alignment.names, strict=True
        ):
            key = row.tobytes()
            if key not in seen:
                seen.add(key)
                letters.append(row)
                deletions.append(counts)
                names.append(name)
    return Msa(numbers_of_letters()[np.stack(letters)], np.stack(deletions), tuple(names))


def sample(rng: np.random.Generator, sequences: int, clusters: int) -> tuple[Indices, Indices]:
    """Numbers of the cluster centres, the target first, and of all others in random order.

    Suppl. Sec. 1.2.6.
    """
    order = np.concatenate([[0], 1 + rng.permutation(sequences - 1)])
    return order[:clusters], order[clusters:]


def mask(
    rng: np.random.Generator, letters: Bytes, column_profile: Floats, masking: Masking
) -> tuple[Bytes, Floats]:
    """Hide or replace letters.

    Args:
        rng: random numbers.
        letters: ``[s, r]``.
        column_profile: `Msa.profile`, ``[r, 22]``.
        masking: how many, and by what.

    Returns:
        The letters with some replaced ``[s, r]``, and 1 where one was chosen ``[s, r]``.
    """
    chosen = rng.random(letters.shape) < masking.fraction
    kind = rng.random(letters.shape)
    any_letter = rng.integers(0, len(RESTYPES), letters.shape, dtype=np.uint8)
    from_profile = _draw(rng, column_profile, letters.shape)

    ends = np.cumsum([masking.uniform, masking.profile, masking.same])
    replaced = np.full_like(letters, MASK)
    for end, source in zip(ends[::-1], (letters, from_profile, any_letter), strict=True):
        replaced = np.where(kind < end, source, replaced)
    return np.where(chosen, replaced, letters), chosen.astype(np.float32)


def _draw(rng: np.random.Generator, column_profile: Floats, shape: tuple[int, ...]) -> Bytes:
    """A letter for each place from its column's profile, ``[s, r]``."""
    cumulative = np.cumsum(column_profile.astype(np.float64), axis=1)  # [r, 22]
    drawn = np.empty(shape, dtype=np.uint8)
    points = rng.random(shape)
    for column, steps in enumerate(cumulative):
        drawn[:, column] = np.searchsorted(steps[:-1], points[:, column] * steps[-1], "right")
    return drawn


def nearest(centres: Bytes, others: Bytes) -> Indices:
    """The most similar centre of each other sequence, ``[e]``; the first of equals.

    Similarity is the number of columns with the same letter; gaps and masks do not count.
    """
    width = centres.shape[1] * GAP
    wanted = _one_hot(centres, GAP).reshape(len(centres), width)
    block = np.zeros((max(1, _BYTES_AT_ONCE // (4 * width)), width), dtype=np.float32)
    found = np.zeros(len(others), dtype=np.int64)
    for start in range(0, len(others), len(block)):
        part = others[start : start + len(block)]
        row, column = np.nonzero(part < GAP)
        block.fill(0)
        block[row, column * GAP + part[row, column]] = 1
        found[start : start + len(block)] = (block[: len(part)] @ wanted.T).argmax(axis=1)
    return found


def cluster_means(
    centres: Bytes, centre_deletions: Floats, others: Bytes, other_deletions: Floats
) -> tuple[Floats, Floats]:
    """Letter frequencies ``[s, r, 23]`` and mean deletions ``[s, r]`` of the clusters.

    Every other sequence joins the `nearest` centre; the centre counts as a member.
    """
    clusters, residues = centres.shape
    owner = nearest(centres, others)
    counts = np.zeros(clusters * residues * CLASSES, dtype=np.float32)
    for rows, letters in ((np.arange(clusters), centres), (owner, others)):
        at = (rows[:, None] * residues + np.arange(residues)) * CLASSES + letters
        counts += np.bincount(at.ravel(), minlength=counts.size).astype(np.float32)
    deletions = centre_deletions.astype(np.float32)
    np.add.at(deletions, owner, other_deletions.astype(np.float32))

    members = (1 + np.bincount(owner, minlength=clusters)).astype(np.float32) + np.float32(1e-6)
    frequencies = counts.reshape(clusters, residues, CLASSES) / members[:, None, None]
    return frequencies, deletions / members[:, None]


def squash(deletions: NDArray[Any]) -> Floats:
    """Numbers of deletions brought into 0 to 1: 2 / pi * arctan(d / 3)."""
    return (np.arctan(deletions.astype(np.float32) / 3) * (2 / np.pi)).astype(np.float32)


def features(
    rng: np.random.Generator,
    msa: Msa,
    *,
    clusters: int,
    extra: int,
    masking: Masking,
) -> dict[str, NDArray[Any]]:
    """The model's MSA features for one recycle (Suppl. Table 1), under DeepMind's names.

    Args:
        rng: random numbers.
        msa: all sequences.
        clusters: most rows of the clustered MSA.
        extra: most rows of the extra MSA.
        masking: how letters are hidden.

    Returns:
        ``true_msa[s, r]``, ``bert_mask[s, r]``, ``msa_mask[s, r]``, ``msa_feat[s, r, 49]``,
        ``extra_msa[e, r]``, ``extra_msa_mask``, ``extra_has_deletion``, ``extra_deletion_value``,
        all ``[e, r]``. Where no sequence is left over, there is one extra row that is masked.
    """
    chosen, rest = sample(rng, len(msa), clusters)
    true_letters = msa.letters[chosen]
    letters, bert_mask = mask(rng, true_letters, msa.profile, masking)
    deletions = msa.deletions[chosen].astype(np.float32)
    frequencies, mean_deletions = cluster_means(
        letters, deletions, msa.letters[rest], msa.deletions[rest].astype(np.float32)
    )
    parts = [
        _one_hot(letters, CLASSES),
        deletions.clip(0, 1)[..., None],
        squash(deletions)[..., None],
        frequencies,
        squash(mean_deletions)[..., None],
    ]
    return {
        "true_msa": true_letters.astype(np.int64),
        "bert_mask": bert_mask,
        "msa_mask": np.ones(letters.shape, dtype=np.float32),
        "msa_feat": np.concatenate(parts, axis=-1),
        **_extra_features(msa, rng.permutation(rest)[:extra]),
    }


def _extra_features(msa: Msa, rows: Indices) -> dict[str, NDArray[Any]]:
    """Features of those rows, or one masked row of zeros where there are none."""
    there = len(rows) > 0
    letters = msa.letters[rows] if there else np.zeros_like(msa.letters[:1])
    deletions = msa.deletions[rows] if there else np.zeros_like(msa.deletions[:1])
    return {
        "extra_msa": letters.astype(np.int64),
        "extra_msa_mask": np.full(letters.shape, there, dtype=np.float32),
        "extra_has_deletion": deletions.clip(0, 1).astype(np.float32),
        "extra_deletion_value": squash(deletions),
    }


def _one_hot(letters: Bytes, classes: int) -> Floats:
    """``[..., classes]``; letters beyond the classes are all zeros."""
    return np.eye(CLASSES, classes, dtype=np.float32)[letters]
