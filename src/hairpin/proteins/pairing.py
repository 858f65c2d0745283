"""Alignments of a complex: rows of different chains paired by species, the rest side by side.

Evans et al. 2021, Sec. 7.2 and Suppl. Rows of one species are paired in the order of their
likeness to their targets; pairs of all chains come first, then those of fewer.

Dims: n rows, r residues of all chains, k chains.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hairpin.proteins.msa import Msa
from hairpin.proteins.residues import GAP

Indices = NDArray[np.int64]

_MAX_OF_SPECIES = 600  # a species with more rows than that in one chain is not paired
_UNIPROT = re.compile(
    r"^(?:tr|sp)\|[A-Za-z0-9]{6,10}(?:_\d)?\|[A-Za-z0-9]+_([A-Za-z0-9]{1,5})(?:_\d+)?$"
)
_TAXON = re.compile(r"\b(?:OX|TaxID)=(\d+)")
_UNIREF_TAXON = re.compile(r"^UniRef\d+_[A-Za-z0-9-]+_(\d+)$")


@dataclass(frozen=True, eq=False)
class ChainRows:
    """The alignments of one chain.

    Attributes:
        entity: a number that copies of one sequence share, from 1.
        msa: the rows that stand for this chain alone.
        paired: the rows that may be paired with other chains', the target first.
    """

    entity: int
    msa: Msa
    paired: Msa


def species(description: str) -> str:
    """The species that a row's name tells, "" if it does not.

    Read in this order: UniProt's mnemonic (``tr|A0A2A6|A0A2A6_9BRAD``), the taxon in ``OX=`` or
    ``TaxID=``, the taxon behind a UniRef name (``UniRef100_A0A2A6_142585/``). Mnemonics and taxa
    do not match each other.
    """
    first = (description.split() or [""])[0].partition("/")[0]
    if match := _UNIPROT.match(first):
        return match[1]
    if match := _TAXON.search(description) or _UNIREF_TAXON.match(first):
        return f"taxon {match[1]}"
    return ""


def pair_rows(chains: Sequence[Msa]) -> Indices:
    """Rows of each chain that belong together, ``[n, k]``; -1 where a chain has none.

    The first row is the targets'. Only species that occur in two chains or more are paired.
    """
    by_chain = [_rows_by_species(msa) for msa in chains]
    by_count: dict[int, list[Indices]] = {len(chains): [np.zeros((1, len(chains)), dtype=np.int64)]}
    for name in sorted(set().union(*by_chain)):
        rows = [of_chain.get(name) for of_chain in by_chain]
        present = [row for row in rows if row is not None]
        if len(present) < 2 or max(map(len, present)) > _MAX_OF_SPECIES:
            continue
        depth = min(map(len, present))
        missing = np.full(depth, -1)
        columns = [missing if row is None else row[:depth] for row in rows]
        by_count.setdefault(len(present), []).append(np.stack(columns, axis=1))
    return np.concatenate([_best_first(by_count[n]) for n in sorted(by_count, reverse=True)])


def merge_chains(chains: Sequence[ChainRows], max_rows: int) -> tuple[Msa, NDArray[np.float32]]:
    """The MSA of the complex, at most about ``max_rows`` rows, half of them paired.

    Rows of chains of different sequence are paired, and their other rows follow with gaps in the
    other chains. Copies of one sequence always share their rows.

    Returns:
        The rows ``[n, r]``, and 0 where a row has gaps for want of a partner, else 1: letters that
        tell nothing and are not to be masked.
    """
    several = len({chain.entity for chain in chains}) > 1
    paired = _paired(chains, max_rows // 2) if several else None
    blocks = {}
    for k, chain in enumerate(chains):
        if chain.entity not in blocks:
            own = None if paired is None else paired[k]
            blocks[chain.entity] = _unpaired(chain.msa, own, max_rows)
    lower, known = _side_by_side(chains, blocks)
    if paired is None:
        return lower, known
    upper = Msa(
        np.concatenate([msa.letters for msa in paired], axis=1),
        np.concatenate([msa.deletions for msa in paired], axis=1),
        paired[0].names,
    )
    whole = Msa(
        np.concatenate([upper.letters, lower.letters]),
        np.concatenate([upper.deletions, lower.deletions]),
        upper.names + lower.names,
    )
    return whole, np.concatenate([np.ones(upper.letters.shape, dtype=np.float32), known])


def _rows_by_species(msa: Msa) -> dict[str, Indices]:
    """Species -> its rows, those most like the target first. The target has no species."""
    likeness = (msa.letters == msa.letters[0]).sum(axis=1)
    rows: dict[str, list[int]] = {}
    for row, name in enumerate(msa.names[1:], start=1):
        if found := species(name):
            rows.setdefault(found, []).append(row)
    return {
        name: np.array(sorted(found, key=lambda row: -likeness[row]))
        for name, found in rows.items()
    }


def _best_first(parts: Sequence[Indices]) -> Indices:
    """Rows that stand high in all their chains first: by the product of their numbers."""
    rows = np.concatenate(parts)
    product = np.abs(rows.astype(np.float64)).prod(axis=1)
    return rows[np.argsort(product, kind="stable")]


def _paired(chains: Sequence[ChainRows], max_rows: int) -> list[Msa]:
    """The paired rows of each chain, as many for each; all gaps where a chain has none."""
    rows = pair_rows([chain.paired for chain in chains])[:max_rows]
    found = []
    for k, chain in enumerate(chains):
        letters, deletions = chain.paired.letters, chain.paired.deletions
        gaps = np.full_like(letters[:1], GAP)
        names = (*chain.paired.names, "no partner")
        found.append(
            Msa(
                np.concatenate([letters, gaps])[rows[:, k]],
                np.concatenate([deletions, np.zeros_like(deletions[:1])])[rows[:, k]],
                tuple(names[i] for i in rows[:, k]),
            )
        )
    return found


def _unpaired(msa: Msa, paired: Msa | None, max_rows: int) -> Msa:
    """The rows that are not among the paired ones, as many as these leave room for."""
    if paired is None:
        return msa.rows(range(min(len(msa), max_rows)))
    known = {row.tobytes() for row in paired.letters}
    room = max(0, max_rows - int((paired.letters != GAP).any(axis=1).sum()))
    return msa.rows([i for i, row in enumerate(msa.letters) if row.tobytes() not in known][:room])


def _side_by_side(
    chains: Sequence[ChainRows], blocks: dict[int, Msa]
) -> tuple[Msa, NDArray[np.float32]]:
    """Rows of one entity after another's; gaps in the columns of other entities."""
    heights = [len(block) for block in blocks.values()]
    tops = dict(zip(blocks, np.cumsum([0, *heights])[:-1].tolist(), strict=True))
    shape = sum(heights), sum(chain.msa.letters.shape[1] for chain in chains)
    letters = np.full(shape, GAP, dtype=np.uint8)
    deletions = np.zeros(shape, dtype=np.int32)
    known = np.zeros(shape, dtype=np.float32)
    column = 0
    for chain in chains:
        block, top = blocks[chain.entity], tops[chain.entity]
        width = chain.msa.letters.shape[1]
        here = slice(top, top + len(block)), slice(column, column + width)
        letters[here], deletions[here], known[here] = block.letters, block.deletions, 1
        column += width
    names = tuple(name for block in blocks.values() for name in block.names)
    return Msa(letters, deletions, names), known
