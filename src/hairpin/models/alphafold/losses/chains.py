"""Complexes: which copy of a chain is which in the known structure, and how far chains are apart.

Evans et al. 2021, Sec. 2.4 and 7.3.

Dims: r residues of the prediction, n residues of the known structure. Distances are in Angstrom.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hairpin.errors import DataError
from hairpin.models.alphafold.config import LossConfig
from hairpin.models.alphafold.geometry import distances, superposition

ABSENT = -1


@dataclass(frozen=True)
class Chains:
    """Residues of a complex, in any order.

    Attributes:
        asym_id: chain of each residue ``[n]``.
        entity_id: the same for chains of the same sequence ``[n]``.
        residue_index: number within the chain ``[n]``.
        ca: CA positions ``[n, 3]``.
        mask: 1 where CA is known ``[n]``.
    """

    asym_id: Tensor
    entity_id: Tensor
    residue_index: Tensor
    ca: Tensor
    mask: Tensor

    def members(self) -> dict[int, list[int]]:
        """Chains of each entity, in ascending order."""
        pairs = torch.stack([self.entity_id, self.asym_id], dim=1).unique(dim=0).tolist()
        entities = sorted({entity for entity, _ in pairs})
        return {e: [asym for entity, asym in pairs if entity == e] for e in entities}


@torch.no_grad()
def align_chains(predicted: Chains, known: Chains) -> Int[Tensor, " r"]:
    """For each predicted residue its row in the known structure, or `ABSENT`.

    Copies of a chain are alike, so each may be labelled by any of them. A copy that is least
    ambiguous is laid on each predicted copy in turn; then every predicted chain takes the nearest
    copy left, by the centre of its CA atoms; the arrangement with the least deviation of CA wins
    (Evans et al. 2021, Sec. 7.3). ``known`` may hold residues that were cropped from the
    prediction, and must have each entity at least as often.

    Raises:
        DataError: an entity has more copies in the prediction than are known.
    """
    ours, theirs = predicted.members(), known.members()
    for entity, chains in ours.items():
        if len(theirs.get(entity, [])) < len(chains):
            raise DataError(
                f"entity {entity} has {len(chains)} chains in the prediction but "
                f"{len(theirs.get(entity, []))} in the known structure; give the labels of all"
            )
    rows = {
        (p, k): _rows(predicted, known, p, k)
        for entity, chains in ours.items()
        for p in chains
        for k in theirs[entity]
    }
    candidates = [
        _match(predicted, known, rows, pairs=(p, k)) for p, k in _anchors(predicted, known, rows)
    ]
    _, best = min(candidates, key=lambda found: found[0])
    index = torch.full_like(predicted.residue_index, ABSENT)
    for p, k in best.items():
        index[predicted.asym_id == p] = rows[p, k]
    return index


def take_labels(
    positions: Float[Tensor, "n 37 3"], mask: Float[Tensor, "n 37"], index: Int[Tensor, " r"]
) -> tuple[Float[Tensor, "r 37 3"], Float[Tensor, "r 37"]]:
    """Known atoms in the prediction's order, by `align_chains`; absent residues are masked."""
    present = (index != ABSENT).to(mask.dtype)[:, None]
    rows = index.clamp(min=0)
    return positions[rows] * present[..., None], mask[rows] * present


_Rows = dict[tuple[int, int], Tensor]


def _rows(predicted: Chains, known: Chains, p: int, k: int) -> Tensor:
    """Rows of chain ``k`` that have the residue indices of chain ``p``, or `ABSENT`."""
    wanted = predicted.residue_index[predicted.asym_id == p]
    at = (known.asym_id == k).nonzero()[:, 0]
    same = wanted[:, None] == known.residue_index[at][None, :]
    first = same.to(torch.uint8).argmax(1)
    return torch.where(same.any(1), at[first], torch.full_like(wanted, ABSENT))


def _anchors(predicted: Chains, known: Chains, rows: _Rows) -> list[tuple[int, int]]:
    """Pairs of a predicted and a known chain to start from.

    All predicted copies of one entity with one known copy: of the entity with fewest copies (the
    longest of those), the copy with most known residues.
    """
    ours, theirs = predicted.members(), known.members()

    def rank(entity: int) -> tuple[int, int]:
        return len(theirs[entity]), -int((known.entity_id == entity).sum())

    entity = min(ours, key=rank)
    anchor = max(theirs[entity], key=lambda k: float(known.mask[known.asym_id == k].sum()))
    return [(p, anchor) for p in ours[entity] if (p, anchor) in rows]


def _match(
    predicted: Chains, known: Chains, rows: _Rows, *, pairs: tuple[int, int]
) -> tuple[float, dict[int, int]]:
    """Mean squared deviation and the known chain of each predicted one, from one pair laid over."""
    p, k = pairs
    a, b, seen = _common(predicted, known, rows, p, k)
    moved = superposition(b, a, seen).apply(known.ca)
    laid = Chains(known.asym_id, known.entity_id, known.residue_index, moved, known.mask)
    chosen = {p: k}
    for entity, chains in predicted.members().items():
        for chain in (c for c in chains if c not in chosen):
            free = [c for c in known.members()[entity] if c not in chosen.values()]
            chosen[chain] = min(free, key=lambda c: _apart(predicted, laid, rows, chain, c))
    squares, count = 0.0, 0.0
    for chain, copy in chosen.items():
        a, b, seen = _common(predicted, laid, rows, chain, copy)
        squares += float(((a - b).square().sum(-1) * seen).sum())
        count += float(seen.sum())
    return squares / max(count, 1.0), chosen


def _apart(predicted: Chains, known: Chains, rows: _Rows, p: int, k: int) -> float:
    """Distance of the centres of two chains; infinite where they share no known residue."""
    a, b, seen = _common(predicted, known, rows, p, k)
    if not bool(seen.any()):
        return float("inf")
    return float((((a - b) * seen[:, None]).sum(0) / seen.sum()).norm())


def _common(
    predicted: Chains, known: Chains, rows: _Rows, p: int, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """CA atoms of a predicted chain and of its known copy, and which of them count."""
    at = rows[p, k]
    here = predicted.asym_id == p
    seen = (at != ABSENT).to(known.mask.dtype) * known.mask[at.clamp(min=0)] * predicted.mask[here]
    return predicted.ca[here], known.ca[at.clamp(min=0)], seen


def chain_centre_loss(
    config: LossConfig,
    predicted: Float[Tensor, "r 3"],
    known: Float[Tensor, "r 3"],
    mask: Float[Tensor, " r"],
    asym_id: Int[Tensor, " r"],
) -> Float[Tensor, ""]:
    """Square of how much nearer two chains' centres are than they should be, over all pairs.

    ``chain_centre_slack`` Angstrom too near are free. CA positions; only those in ``mask`` count.
    Keeps chains from being laid into one another early in training (Evans et al. 2021, Sec. 2.4).
    """
    chains = asym_id.unique()
    member = (asym_id[None, :] == chains[:, None]) * mask[None, :]  # [chains, r]
    size = member.sum(1)
    weight = member / size.clamp(min=1)[:, None]
    ours, truth = (
        distances((weight @ x)[:, None], (weight @ x)[None, :], epsilon=1e-6)
        for x in (predicted, known)
    )
    present = (size > 0).to(mask.dtype)
    pairs = present[:, None] * present[None, :] * (1 - torch.eye(len(chains)).to(mask))
    short = (truth - ours - config.chain_centre_slack).clamp(min=0).square()
    loss: Tensor = (short * pairs).sum() / pairs.sum().clamp(min=1)
    return loss
