"""Random numbers that depend on where they are used, not on who draws them."""

import torch
from torch import Tensor

_MULTIPLIERS = (-4658895280553007687, -7723592293110705685)  # splitmix64 (Steele et al. 2014)
_GOLDEN = -7046029254386353131


def uniform(index: Tensor, seed: int) -> Tensor:
    """A number in [0, 1) for each index: the splitmix64 hash of seed and index, its top 24 bits.

    Args:
        index: int64, any shape.
    """
    z = index * _GOLDEN + seed
    z = (z ^ _shift(z, 30)) * _MULTIPLIERS[0]
    z = (z ^ _shift(z, 27)) * _MULTIPLIERS[1]
    z = z ^ _shift(z, 31)
    return _shift(z, 40).to(torch.float32) / 2**24


def _shift(z: Tensor, bits: int) -> Tensor:
    """Logical shift right of a signed 64-bit integer."""
    return (z >> bits) & ((1 << (64 - bits)) - 1)
