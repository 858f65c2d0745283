"""Supervision of torsion angles: Jumper et al. 2021, Suppl. Alg. 27 "torsionAngleLoss".

Dims: l layers, r residues.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hairpin.models.alphafold.atoms import by_type
from hairpin.proteins import residues


def chi_loss(
    sin_cos: Float[Tensor, "l r 7 2"],
    chi: Float[Tensor, "r 4"],
    mask: Float[Tensor, "r 4"],
    aatype: Int[Tensor, " r"],
) -> Float[Tensor, ""]:
    """Mean squared chord between predicted and known chi angles (in radians).

    An angle with a symmetry of 180 degrees counts by the nearer of its two values.
    """
    truth = torch.stack([chi.sin(), chi.cos()], dim=-1)
    sign = 1 - 2 * by_type(residues.chi_is_symmetric(), aatype, chi)[..., None]
    predicted = sin_cos[:, :, 3:]
    error = (predicted - truth).square().sum(-1)
    other = (predicted - sign * truth).square().sum(-1)
    return mean(torch.minimum(error, other), mask.expand_as(error))


def angle_norm_loss(
    unnormalized: Float[Tensor, "l r 7 2"], mask: Float[Tensor, " r"]
) -> Float[Tensor, ""]:
    """Mean distance of the angles' vectors from length 1, before they are normalised."""
    error = ((unnormalized.square().sum(-1) + 1e-6).sqrt() - 1).abs()
    return mean(error, mask[:, None].expand_as(error))


def mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of ``x`` where ``mask``, of the same shape, is 1; 0 where nothing is."""
    return (x * mask).sum() / (mask.sum() + 1e-10)
