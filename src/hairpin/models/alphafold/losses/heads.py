"""Losses of the heads: distogram, masked MSA, pLDDT, experimentally resolved, aligned error.

Jumper et al. 2021, Suppl. Sec. 1.9.6 to 1.9.10. Each is a mean cross entropy over what is known.

Dims: s MSA rows, r, i, j residues, b bins. Distances are in Angstrom.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from hairpin.models.alphafold.geometry import Rigid, at_least_float32, distances
from hairpin.proteins import residues

_CA = residues.ATOM_TYPES.index("CA")


def distogram_loss(
    logits: Float[Tensor, "i j b"],
    edges: Float[Tensor, " edges"],
    beta: Float[Tensor, "r 3"],
    mask: Float[Tensor, " r"],
) -> tuple[Float[Tensor, ""], Float[Tensor, "i j"]]:
    """The loss over pairs of CB atoms (CA of glycine), and their true distances: Sec. 1.9.8."""
    squared = (beta[:, None] - beta[None, :]).square().sum(-1)
    bins = (squared[..., None] > edges.square()).sum(-1)
    pairs = mask[:, None] * mask[None, :]
    loss = (cross_entropy(logits, bins) * pairs).sum() / (1e-6 + pairs.sum())
    return loss, (squared + 1e-6).sqrt()


def masked_msa_loss(
    logits: Float[Tensor, "s r b"], msa: Int[Tensor, "s r"], masked: Float[Tensor, "s r"]
) -> Float[Tensor, ""]:
    """The loss over the letters of the MSA that were hidden: Sec. 1.9.9."""
    return (cross_entropy(logits, msa) * masked).sum() / (1e-8 + masked.sum())


def plddt_loss(
    logits: Float[Tensor, "r b"],
    predicted: Float[Tensor, "r 37 3"],
    known: Float[Tensor, "r 37 3"],
    mask: Float[Tensor, "r 37"],
) -> Float[Tensor, ""]:
    """The loss over the bins of each residue's own lDDT-CA: Alg. 29, lines 5 to 7."""
    ca_mask = mask[:, _CA]
    score = lddt_ca(predicted[:, _CA].detach(), known[:, _CA], ca_mask)
    bins = logits.shape[-1]
    target = (score * bins).floor().long().clamp(max=bins - 1)
    return (cross_entropy(logits, target) * ca_mask).sum() / (ca_mask.sum() + 1e-8)


def resolved_loss(
    logits: Float[Tensor, "r 37"], mask: Float[Tensor, "r 37"], exists: Float[Tensor, "r 37"]
) -> Float[Tensor, ""]:
    """The loss of telling which of the atoms that exist were seen in experiment: Sec. 1.9.10."""
    logits = at_least_float32(logits)
    loss = F.binary_cross_entropy_with_logits(logits, mask.to(logits.dtype), reduction="none")
    return (loss * exists).sum() / (1e-8 + exists.sum())


def aligned_error_loss(
    logits: Float[Tensor, "i j b"], bins: Int[Tensor, "i j"], mask: Float[Tensor, " r"]
) -> Float[Tensor, ""]:
    """The loss over the bins of each pair's aligned error: Sec. 1.9.7."""
    pairs = mask[:, None] * mask[None, :]
    return (cross_entropy(logits, bins) * pairs).sum() / (1e-8 + pairs.sum())


@torch.no_grad()
def aligned_error_bins(
    breaks: Float[Tensor, " edges"], predicted: Float[Tensor, "r 7"], known: Float[Tensor, "r 7"]
) -> Int[Tensor, "i j"]:
    """The bin of the error of j's CA as seen from frame i; 0 where the error is exactly 0.

    Frames are quaternions and translations in Angstrom.
    """
    apart = _seen_from_all(predicted) - _seen_from_all(known)
    return (apart.square().sum(-1)[..., None] > breaks.square()).sum(-1)


def _seen_from_all(frames: Tensor) -> Tensor:
    rigid = Rigid.from_tensor7(frames)
    return (rigid.translation[None, :] - rigid.translation[:, None]) @ rigid.rotation


def lddt_ca(
    predicted: Float[Tensor, "r 3"],
    known: Float[Tensor, "r 3"],
    mask: Float[Tensor, " r"],
    *,
    cutoff: float = 15.0,
) -> Float[Tensor, " r"]:
    """lDDT of each residue's CA, 0 to 1: Mariani et al. 2013.

    The part of its distances to CA atoms within ``cutoff`` of it in the known structure that is
    kept to 0.5, 1, 2 and 4 Angstrom, averaged. 1 where there is no such atom.
    """
    truth = distances(known[:, None], known[None, :], epsilon=1e-10)
    error = (truth - distances(predicted[:, None], predicted[None, :], epsilon=1e-10)).abs()
    others = 1 - torch.eye(len(mask), dtype=mask.dtype, device=mask.device)
    scored = (truth < cutoff) * mask[:, None] * mask[None, :] * others
    kept = torch.stack([(error < limit).to(mask.dtype) for limit in (0.5, 1.0, 2.0, 4.0)]).mean(0)
    return (1e-10 + (scored * kept).sum(-1)) / (1e-10 + scored.sum(-1))


def cross_entropy(logits: Float[Tensor, "... b"], target: Int[Tensor, "..."]) -> Tensor:
    """Minus the log of the probability of each ``target``: ``[...]``."""
    log_probabilities = at_least_float32(logits).log_softmax(-1)
    return -log_probabilities.gather(-1, target.long()[..., None]).squeeze(-1)
