"""What goes through the port that every kernel of one block stands behind."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Qkv = tuple[Tensor, Tensor, Tensor]
State = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Block:
    """One tile's operands beside q, k and v.

    Attributes:
        scale: what scores are multiplied by.
        causal: row i sees keys 0..i.
        added: added to the scores, broadcastable to ``[b, h, q, k]``; -inf hides a key.
        learns: whether a gradient of ``added`` is wanted.
        heads: key/value head of each query head, where it is not ``i // (h / g)``.
        dropout: probability that a weight is dropped.
        keep: gives the weights' factors, 0 or 1 / (1 - dropout), for some rows ``[b, h, q, k]``.
        window: row i sees keys ``i + window[0]`` to one below ``i + window[1]``; set where that is
            all that ``added`` says.
    """

    scale: float
    causal: bool = False
    added: Tensor | None = None
    learns: bool = False
    heads: tuple[int, ...] | None = None
    dropout: float = 0.0
    keep: Callable[[slice], Tensor] | None = None
    window: tuple[int, int] | None = None


def wide(dtype: torch.dtype) -> torch.dtype:
    """dtype of a state."""
    return torch.promote_types(dtype, torch.float32)
