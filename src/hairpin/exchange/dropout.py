"""Which attention weights are dropped: a function of where they are, not of who computes them."""

from dataclasses import dataclass

import torch
from torch import Tensor

from hairpin.kernels.random import uniform


@dataclass(frozen=True)
class Scores:
    """Which scores: rows of the batch, and global indices of heads, queries and keys, int64.

    Attributes:
        sizes: heads, queries and keys in all.
    """

    batch: int
    heads: Tensor
    queries: Tensor
    keys: Tensor
    sizes: tuple[int, int, int]

    def index(self) -> Tensor:
        """Index of each score among all, ``[b, h, q, k]``."""
        place = torch.arange(self.batch)[:, None, None, None]
        each = (self.heads[:, None, None], self.queries[:, None], self.keys)
        for index, size in zip(each, self.sizes, strict=True):
            place = place * size + index
        return place


def kept(probability: float, seed: int, scores: Scores) -> Tensor:
    """Factors of attention weights, 0 or ``1 / (1 - probability)``, ``[b, h, q, k]``."""
    return (uniform(scores.index(), seed) >= probability).to(torch.float64) / (1.0 - probability)
