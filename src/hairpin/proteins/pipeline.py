"""From sequences, alignments and templates to what the model takes.

Jumper et al. 2021, Suppl. Sec. 1.2; Evans et al. 2021 for complexes. Nothing here asks a database
or a server. A batch holds tensors under DeepMind's names, without a batch dim.

Dims: n all sequences, s clusters, e extra sequences, t templates, r residues.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hairpin.errors import FoldInputError
from hairpin.proteins import cropping, msa, pairing, residues, templates
from hairpin.proteins.alignments import Alignment, check_target
from hairpin.proteins.fasta import check_sequence
from hairpin.proteins.sizes import Sizes
from hairpin.proteins.templates import Template

Batch = dict[str, Tensor]
Arrays = Mapping[str, NDArray[Any]]

_SHALLOW = 30  # sequences; below that accuracy drops steeply (Jumper et al. 2021, Fig. 5a)
_MULTIMER_ROWS = 2048
_CROP_KEY = 0  # the random numbers of the crop; those of recycle k have the key k + 1


@dataclass(frozen=True, eq=False)
class Target:
    """A chain and all that is known about it, the same for every model and seed.

    Attributes:
        sequence: letters of the amino acids; anything but the twenty is unknown to the model.
        msa: the merged alignments, the target first.
        templates: the best first.
        labels: `labels.label_features`, for training; none otherwise.
    """

    sequence: str
    msa: msa.Msa
    templates: tuple[Template, ...] = ()
    labels: Arrays | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """What will make the prediction worse, in words; empty if nothing is known to."""
        return _warnings(self.sequence, len(self.msa))

    def batches(self, sizes: Sizes, seed: int) -> list[Batch]:
        """One batch for each recycle and one for the last run; they differ in the MSA alone.

        The same seed gives the same batches. Features that do not differ are the same tensors.
        """
        fixed = _tensors(self._fixed(sizes))
        kept = self._crop(sizes, seed)
        found = []
        for recycle in range(sizes.recycles + 1):
            rng = np.random.default_rng([seed, recycle + 1])
            drawn = msa.features(
                rng, self.msa,
                clusters=sizes.clusters, extra=sizes.max_extra_msa, masking=sizes.masking,
            )  # fmt: skip
            found.append((fixed if kept is None else {}) | _tensors(drawn))
        if kept is None:
            return found
        cropped = cropping.crop(fixed, kept)
        return [cropped | cropping.crop(batch, kept) for batch in found]

    def _fixed(self, sizes: Sizes) -> dict[str, NDArray[Any]]:
        arrays = _sequence_features(self.sequence)
        aatype = np.eye(21, dtype=np.float32)[arrays["aatype"]]
        no_break = np.zeros((len(self.sequence), 1), dtype=np.float32)
        arrays["target_feat"] = np.concatenate([no_break, aatype], axis=1)
        if sizes.max_templates:
            arrays |= templates.features(self.templates, len(self.sequence), sizes.max_templates)
        return arrays | dict(self.labels or {})

    def _crop(self, sizes: Sizes, seed: int) -> NDArray[np.int64] | None:
        if sizes.crop_size is None or sizes.crop_size >= len(self.sequence):
            return None
        rng = np.random.default_rng([seed, _CROP_KEY])
        return cropping.contiguous(rng, [len(self.sequence)], sizes.crop_size)


@dataclass(frozen=True, eq=False)
class ChainInput:
    """One chain of a complex.

    Attributes:
        sequence: letters of the amino acids.
        alignments: of this chain alone.
        pairing: alignments whose rows may be paired with other chains' by species; None for the
            same as ``alignments``.
        templates: the best first.
        labels: `labels.label_features` of this chain, for training; none otherwise.
    """

    sequence: str
    alignments: Sequence[Alignment] = ()
    pairing: Sequence[Alignment] | None = None
    templates: Sequence[Template] = ()
    labels: Arrays | None = None


def monomer_target(
    sequence: str,
    alignments: Sequence[Alignment] = (),
    templates: Sequence[Template] = (),
    *,
    labels: Arrays | None = None,
) -> Target:
    """A chain with its alignments merged.

    Raises:
        FoldInputError: the sequence is empty or has an illegal letter, or the first row of an
            alignment is another sequence.
    """
    sequence = check_sequence(sequence)
    for alignment in alignments:
        check_target(alignment, sequence)
    return Target(sequence, msa.merge(sequence, alignments), tuple(templates), labels)


def monomer_features(
    sequence: str,
    alignments: Sequence[Alignment] = (),
    templates: Sequence[Template] = (),
    *,
    sizes: Sizes,
    seed: int = 0,
) -> list[Batch]:
    """What the monomer model takes: a batch for each recycle and one for the last run.

    Args:
        sequence: letters of the amino acids.
        alignments: in the order in which rows are wanted; repeated rows are dropped.
        templates: the best first.
        sizes: how much of them the model sees.
        seed: of the sampling and masking.

    Returns:
        Dicts with ``aatype[r]``, ``residue_index[r]``, ``seq_mask[r]``, ``target_feat[r, 22]``,
        ``msa_feat[s, r, 49]``, ``msa_mask[s, r]``, ``extra_msa[e, r]``, ``template_*`` and more.

    Raises:
        FoldInputError: as `monomer_target` does.
    """
    return monomer_target(sequence, alignments, templates).batches(sizes, seed)


def multimer_features(
    chains: Sequence[ChainInput],
    *,
    sizes: Sizes,
    seed: int = 0,
    max_rows: int = _MULTIMER_ROWS,
) -> list[Batch]:
    """What the multimer model takes: one batch, because this model samples its MSA itself.

    Residues stand in the order of the chains given. There are always ``sizes.max_templates``
    template rows, because the model takes a mean over them.

    Args:
        chains: the chains of the complex; copies of one sequence are given several times.
        sizes: templates, and the crop for training.
        seed: of the crop: spatial or contiguous, each in half of the cases, where there are labels.
        max_rows: rows of the MSA, about; half of them may be paired.

    Returns:
        A list of one dict with ``aatype[r]``, ``residue_index[r]`` (from 0 in each chain),
        ``asym_id[r]``, ``entity_id[r]``, ``sym_id[r]`` (from 1), ``seq_mask[r]``, ``msa[n, r]``,
        ``deletion_matrix[n, r]``, ``msa_mask[n, r]``, ``bert_mask[n, r]`` (0 where a letter tells
        nothing and need not be predicted), ``template_*``, and labels where all chains have them.

    Raises:
        FoldInputError: there is no chain, or as `monomer_target` does.
    """
    if not chains:
        raise FoldInputError("a complex of no chains; give at least one sequence")
    targets = [
        monomer_target(chain.sequence, chain.alignments, chain.templates, labels=chain.labels)
        for chain in chains
    ]
    places = _entities([target.sequence for target in targets])
    rows = [
        pairing.ChainRows(entity, target.msa, _may_be_paired(chain, target))
        for chain, target, (entity, _) in zip(chains, targets, places, strict=True)
    ]
    merged, known = pairing.merge_chains(rows, max_rows)
    arrays = _complex_features(targets, places, sizes) | {
        "msa": merged.letters.astype(np.int64),
        "deletion_matrix": merged.deletions.astype(np.float32),
        "msa_mask": np.ones(merged.letters.shape, dtype=np.float32),
        "bert_mask": known,
    }
    batch = _tensors(arrays)
    kept = _complex_crop(arrays, [len(target.sequence) for target in targets], sizes, seed)
    return [batch if kept is None else cropping.crop(batch, kept)]


def multimer_warnings(chains: Sequence[ChainInput]) -> tuple[str, ...]:
    """`Target.warnings` of every chain, with the number of the chain before each."""
    return tuple(
        f"chain {number}: {warning}"
        for number, chain in enumerate(chains, start=1)
        for warning in monomer_target(chain.sequence, chain.alignments).warnings
    )


# ---------------------------------------------------------------------------------------- pieces


def _warnings(sequence: str, depth: int) -> tuple[str, ...]:
    found = []
    if depth == 1:
        found.append(
            "no alignment: the model sees this one sequence alone, and its accuracy will suffer "
            "much; search a database for related sequences and give the alignment"
        )
    elif depth < _SHALLOW:
        found.append(
            f"the alignment has {depth} different sequences; below {_SHALLOW} accuracy drops"
        )
    if unknown := [i for i, letter in enumerate(sequence, 1) if letter not in residues.RESTYPES]:
        places = ", ".join(f"{sequence[i - 1]}{i}" for i in unknown[:5])
        more = ", ..." if len(unknown) > 5 else ""
        found.append(
            f"{len(unknown)} residues are none of the twenty amino acids ({places}{more}): "
            "they are folded as unknown, without side chains"
        )
    return tuple(found)


def _sequence_features(sequence: str) -> dict[str, NDArray[Any]]:
    """What follows from the sequence alone; anything but the twenty amino acids is unknown."""
    found = np.array([residues.RESTYPES.find(letter) for letter in sequence])
    aatype = np.where(found < 0, residues.UNKNOWN, found)
    length = len(sequence)
    return {
        "aatype": aatype,
        "residue_index": np.arange(length),
        "seq_mask": np.ones(length, dtype=np.float32),
        "seq_length": np.asarray(length),
        "residx_atom14_to_atom37": residues.atom14_to_atom37()[aatype],
        "residx_atom37_to_atom14": residues.atom37_to_atom14()[aatype],
        "atom14_atom_exists": residues.atom14_exists()[aatype].astype(np.float32),
        "atom37_atom_exists": residues.atom37_exists()[aatype].astype(np.float32),
    }


def _entities(sequences: Sequence[str]) -> list[tuple[int, int]]:
    """(Entity, which copy of it) of each chain, both from 1."""
    numbers: dict[str, int] = {}
    copies: dict[str, int] = {}
    found = []
    for sequence in sequences:
        entity = numbers.setdefault(sequence, len(numbers) + 1)
        copies[sequence] = copies.get(sequence, 0) + 1
        found.append((entity, copies[sequence]))
    return found


def _may_be_paired(chain: ChainInput, target: Target) -> msa.Msa:
    if chain.pairing is None:
        return target.msa
    return monomer_target(target.sequence, chain.pairing).msa


def _complex_features(
    targets: Sequence[Target], places: Sequence[tuple[int, int]], sizes: Sizes
) -> dict[str, NDArray[Any]]:
    """Everything but the MSA, the chains one after another."""
    chains = []
    for number, (target, (entity, copy)) in enumerate(zip(targets, places, strict=True), start=1):
        arrays = _sequence_features(target.sequence)
        for name, value in (("asym_id", number), ("entity_id", entity), ("sym_id", copy)):
            arrays[name] = np.full(len(target.sequence), value)
        arrays |= templates.features(target.templates, len(target.sequence), sizes.max_templates)
        arrays["template_all_atom_mask"] = arrays.pop("template_all_atom_masks")
        if all(target.labels for target in targets):
            arrays |= dict(target.labels or {})
        chains.append(arrays)
    return {name: _join(name, [arrays[name] for arrays in chains]) for name in chains[0]}


def _join(name: str, parts: Sequence[NDArray[Any]]) -> NDArray[Any]:
    """One feature of all chains, along its residue dim where it has one."""
    if name == "seq_length":
        return np.asarray(np.sum(parts))
    if name in cropping.WITHOUT_RESIDUES:
        return np.asarray(np.max(parts, axis=0))
    return np.concatenate(parts, axis=1 if name in cropping.BY_ROW else 0)


def _complex_crop(
    arrays: Arrays, lengths: Sequence[int], sizes: Sizes, seed: int
) -> NDArray[np.int64] | None:
    if sizes.crop_size is None or sizes.crop_size >= sum(lengths):
        return None
    rng = np.random.default_rng([seed, _CROP_KEY])
    if "all_atom_positions" not in arrays or rng.random() < 0.5:
        return cropping.contiguous(rng, lengths, sizes.crop_size)
    ca = residues.ATOM_TYPES.index("CA")
    return cropping.spatial(
        rng,
        arrays["all_atom_positions"][:, ca],
        arrays["all_atom_mask"][:, ca] > 0,
        arrays["asym_id"],
        sizes.crop_size,
    )


def _tensors(arrays: Arrays) -> Batch:
    """The arrays as tensors: numbers of things in int64, the rest in float32."""
    return {name: torch.as_tensor(np.array(value)) for name, value in arrays.items()}
