"""Which attention weights are dropped: a function of where they are, not of who computes them."""

from dataclasses import dataclass

import torch
from torch import Tensor

_ODD = (-7046029254386353131, -4658895280553007687, -7723592293110705685)  # splitmix64's, signed
_BITS = 53


@dataclass(frozen=True)
class Scores:
    """Which scores: rows of the batch, and global indices of heads, queries, keys, all int64."""

    batch: int
    heads: Tensor
    queries: Tensor
    keys: Tensor


def kept(probability: float, seed: int, scores: Scores) -> Tensor:
    """Factors of attention weights, 0 or ``1 / (1 - probability)``, ``[b, h, q, k]``."""
    rows = torch.arange(scores.batch)[:, None, None, None]
    place = _mixed(rows + seed * 1_000_003)
    for index in (scores.heads[:, None, None], scores.queries[:, None], scores.keys):
        place = _mixed(place + _mixed(index + 1))
    uniform = ((place >> 1) & ((1 << _BITS) - 1)).to(torch.float64) * 2.0**-_BITS
    return (uniform >= probability).to(torch.float64) / (1.0 - probability)


def _mixed(x: Tensor) -> Tensor:
    """Steele, Lea and Flood 2014, splitmix64: neighbouring integers become unrelated ones."""
    x = x * _ODD[0]
    x = (x ^ _shifted(x, 30)) * _ODD[1]
    x = (x ^ _shifted(x, 27)) * _ODD[2]
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """Shift to the right as if unsigned."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
