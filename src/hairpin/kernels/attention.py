"""Attention with a bias that all rows share and a mask of keys.

The inner part of Jumper et al. 2021, Suppl. Algs 7, 8, 13, 14 and 17.

Dims: b rows that attention treats alike, h heads, q queries, k keys, d channels of a head.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from hairpin.kernels.choice import learns, why_not

MASKED = -1e9  # added to the logits of masked keys
WIDEST = 128  # channels of a head that the Triton kernel takes


def attention(
    q: Tensor, k: Tensor, v: Tensor, *, mask: Tensor | None = None, bias: Tensor | None = None
) -> Tensor:
    """``softmax(q k^T / sqrt(d) + bias + mask) v``.

    Args:
        q: queries ``[b, h, q, d]``, not yet scaled.
        k: keys ``[b, h, k, d]``.
        v: values ``[b, h, k, d]``.
        mask: 1 where a key counts, ``[b, k]``; a row with no key attends as if all counted.
        bias: added to the logits, ``[h, q, k]``; its gradient is summed over b.

    Returns:
        ``[b, h, q, d]``.
    """
    if why_not_triton(q, k, v, mask, bias) is None:
        return _on_cuda(q, k, v, mask, bias)
    if mask is not None and q.dtype == torch.float16:  # it cannot hold a logit low enough
        wide = None if bias is None else bias.float()
        return attention(q.float(), k.float(), v.float(), mask=mask, bias=wide).to(v.dtype)
    if bias is None:
        added = None if mask is None else key_bias(mask, q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=added)
    if learns(bias):  # torch's fused kernels give it no gradient
        return _attend_plainly(q, k, v, mask, bias)
    return _attend_fused(q, k, v, mask, bias)


def why_not_triton(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None
) -> str | None:
    """Why torch's own operations compute this; None where Triton does."""
    reason = why_not(q, k, v, mask, bias)
    if reason is not None:
        return reason
    if q.dtype != k.dtype or q.dtype != v.dtype:
        return "queries, keys and values differ in dtype"
    if not 1 <= q.shape[-1] <= WIDEST or q.shape[-1] != v.shape[-1]:
        return f"the heads have {q.shape[-1]} and {v.shape[-1]} channels"
    if q.dim() != 4 or k.shape != v.shape or k.shape[:2] != q.shape[:2]:
        return "some rows or heads are broadcast"
    return "the mask learns" if learns(mask) else None


def _on_cuda(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None) -> Tensor:
    from hairpin.kernels.cuda import attention as twin

    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    if mask is not None:
        mask = _with_a_key(mask).expand(k.shape[0], k.shape[2]).contiguous()
    if bias is not None:
        bias = bias.expand(q.shape[1], q.shape[2], k.shape[2]).contiguous()
    out: Tensor = twin.attention(q, k, v, mask, bias)[0]
    return out


def _attend_plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor) -> Tensor:
    logits: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2) + bias
    if mask is not None:
        logits = logits + key_bias(mask, q.dtype)
    return logits.softmax(-1) @ v


def _attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor) -> Tensor:
    """The same without logits in memory: the mask is one more channel, of queries 1.

    So the bias is never added to the mask, which would make it as large as the logits.
    """
    d = q.shape[-1]
    q = q * d**-0.5
    if mask is not None:
        masked = key_bias(mask, q.dtype).transpose(-1, -2).expand(*k.shape[:-1], 1)
        q, k, v = F.pad(q, (0, 1), value=1.0), torch.cat([k, masked], -1), F.pad(v, (0, 1))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None], scale=1.0)
    return y[..., :d]


def _with_a_key(mask: Tensor) -> Tensor:
    """The mask, with all keys of a row that has none: ``[b, k]``.

    It is what a low logit for each of them means. As float32 has it, adding 1e9 rounds the logits
    away, and fused kernels then lose the sum of their exponentials and give wrong gradients.
    """
    return torch.where((mask != 0).any(-1, keepdim=True), mask, 1.0).to(mask.dtype)


def key_bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """What a key's mask adds to its logits: ``[b, k] -> [b, 1, 1, k]``."""
    mask = _with_a_key(mask)
    if mask.dtype != dtype:
        mask = mask.to(dtype)
    return (MASKED * (1 - mask))[:, None, None, :]
