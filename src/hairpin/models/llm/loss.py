"""The training loss of a language model, as a sum and a count, so that parts can be put together.

Dims: v vocabulary, and any others that logits and labels share.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # a label that does not count


class TokenLoss(NamedTuple):
    """Cross-entropies added up, in nats, and how many; the loss is total / count."""

    total: Float[Tensor, ""]
    count: Float[Tensor, ""]  # type: ignore[assignment]  # hides tuple.count, on purpose


def token_losses(logits: Float[Tensor, "... v"], labels: Int[Tensor, "..."]) -> TokenLoss:
    """Cross-entropy of each label that is not `IGNORED`, in float32 or wider.

    Returns:
        total and count over these labels: sum both over ranks before dividing. A total of 0 that
        still has a gradient where all are ignored.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    labels = labels.flatten()
    total = F.cross_entropy(wide, labels, ignore_index=IGNORED, reduction="sum")
    return TokenLoss(total, (labels != IGNORED).sum().to(wide.dtype))
