"""How sure the model is: pLDDT, predicted aligned error, pTM, ipTM, and the score to rank by.

Jumper et al. 2021, Suppl. Sec. 1.9.6 and 1.9.7; Evans et al. 2021, Sec. 2.5.

Dims: r, i, j residues, b bins.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hairpin.errors import DataError


def plddt(logits: Float[Tensor, "r b"]) -> Float[Tensor, " r"]:
    """Expected lDDT-CA of each residue, 0 to 100: Suppl. Alg. 29, line 4."""
    bins = logits.shape[-1]
    centres = (torch.arange(bins, device=logits.device, dtype=logits.dtype) + 0.5) / bins
    return 100 * (logits.softmax(-1) * centres).sum(-1)


def predicted_aligned_error(
    logits: Float[Tensor, "i j b"], breaks: Float[Tensor, " edges"]
) -> tuple[Float[Tensor, "i j"], float]:
    """Expected error of residue j's position where residue i's frame is aligned, in Angstrom.

    Args:
        logits: of the error's bins.
        breaks: the edges between the bins, evenly spaced, one fewer than the bins.

    Returns:
        The errors, and the greatest that can be expressed.
    """
    centres = bin_centres(breaks)
    return (logits.softmax(-1) * centres).sum(-1), float(centres.detach()[-1])


def ptm(
    logits: Float[Tensor, "i j b"],
    breaks: Float[Tensor, " edges"],
    *,
    mask: Float[Tensor, " i"] | None = None,
) -> Float[Tensor, ""]:
    """Predicted TM-score, 0 to 1: Suppl. Sec. 1.9.7, eq. 39.

    ``mask`` weights the residues, 0 to 1; all count if it is left out.
    """
    weight = logits.new_ones(len(logits)) if mask is None else mask.to(logits.dtype)
    return _expected_score(logits, breaks, weight, torch.ones_like(logits[..., 0]))


def iptm(
    logits: Float[Tensor, "i j b"],
    breaks: Float[Tensor, " edges"],
    asym_id: Int[Tensor, " i"],
    *,
    mask: Float[Tensor, " i"] | None = None,
) -> Float[Tensor, ""]:
    """Predicted TM-score of the interfaces, 0 to 1: Evans et al. 2021, eq. 2.

    As `ptm`, but each frame scores only residues of other chains; 0 for a single chain.
    """
    weight = logits.new_ones(len(logits)) if mask is None else mask.to(logits.dtype)
    between = (asym_id[:, None] != asym_id[None, :]).to(logits.dtype)
    return _expected_score(logits, breaks, weight, between)


def ranking(
    plddt: Float[Tensor, " r"],
    *,
    ptm: Float[Tensor, ""] | None = None,
    iptm: Float[Tensor, ""] | None = None,
) -> float:
    """The score to rank predictions by: of a monomer the mean pLDDT, 0 to 100.

    With ``iptm``, of a complex: 0.8 ipTM + 0.2 pTM, 0 to 1 (Evans et al. 2021, Sec. 2.5).

    Raises:
        DataError: ``iptm`` was given without ``ptm``.
    """
    if iptm is None:
        return float(plddt.detach().mean())
    if ptm is None:
        raise DataError("iptm was given without ptm; a complex is ranked by both, so give both")
    return float(0.8 * iptm.detach() + 0.2 * ptm.detach())


def bin_centres(breaks: Float[Tensor, " edges"]) -> Float[Tensor, " b"]:
    """Half a step above each of the evenly spaced ``breaks``; and one more, for the last bin.

    So DeepMind's code has it. Its first break is 0, so that bin 0 is met only by an error of
    exactly 0, and each other bin's centre stands for errors half a step to a step smaller.
    """
    step = breaks[1] - breaks[0]
    centres = breaks + step / 2
    return torch.cat([centres, centres[-1:] + step])


def _expected_score(logits: Tensor, breaks: Tensor, weight: Tensor, pairs: Tensor) -> Tensor:
    """The best frame's expected TM-score over the ``pairs[i, j]`` that count."""
    n = weight.sum().floor().clamp(min=19)  # d0 has no meaning for shorter chains
    d0 = 1.24 * (n - 15) ** (1 / 3) - 1.8
    score = 1 / (1 + (bin_centres(breaks) / d0).square())
    expected = (logits.softmax(-1) * score).sum(-1)  # [i, j]
    pairs = pairs * weight[:, None] * weight[None, :]
    by_frame = (expected * pairs).sum(-1) / (1e-8 + pairs.sum(-1))
    return by_frame[(by_frame * weight).argmax()]
