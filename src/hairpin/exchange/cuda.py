"""torch's own fused attention on CUDA, with its log-sum-exp."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from hairpin.exchange.port import Block, Qkv, State

_FLASH_DTYPES = (torch.float16, torch.bfloat16)
_FLASH_WIDEST = 256
_ALIGNED = 8  # channels of a head must be a multiple
_ROWS = 32  # the efficient kernel keeps log-sum-exps of so many rows at a time


def takes(q: Tensor, k: Tensor, block: Block) -> bool:
    """Whether one of torch's kernels computes this, forward and backward."""
    del k
    if block.added is not None or block.dropout or q.shape[-1] % _ALIGNED:
        return False
    return q.dtype == torch.float32 or (q.dtype in _FLASH_DTYPES and q.shape[-1] <= _FLASH_WIDEST)


def forward(qkv: Qkv, block: Block) -> State:
    """``(out, lse)`` of one block."""
    q, k, v = qkv
    k, v = repeated(q, k), repeated(q, v)
    if q.dtype in _FLASH_DTYPES:
        flash: Any = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse, *_ = flash(q, k, v, 0.0, block.causal, False, scale=block.scale)
        return out, lse
    efficient: Any = torch.ops.aten._scaled_dot_product_efficient_attention
    out, lse, *_ = efficient(q, k, v, None, True, 0.0, block.causal, scale=block.scale)
    return out, lse if lse.shape[-1] == q.shape[2] else lse[..., : q.shape[2]]


def backward(
    grad: Tensor, qkv: Qkv, state: State, block: Block
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Gradients by one block, given output and log-sum-exp over all keys."""
    (q, k, v), (out, lse) = qkv, state
    groups = k.shape[1]
    k, v = repeated(q, k), repeated(q, v)
    grad, out = grad.to(q.dtype), out.to(q.dtype)
    seed = torch.zeros((), dtype=torch.int64)  # no dropout: never read
    if q.dtype in _FLASH_DTYPES:
        flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_backward
        lengths = (None, None, q.shape[2], k.shape[2])
        grads = flash(
            *(grad, q, k, v, out, lse.contiguous(), *lengths, 0.0, block.causal, seed, seed),
            scale=block.scale,
        )
    else:
        efficient: Any = torch.ops.aten._scaled_dot_product_efficient_attention_backward
        missing = -lse.shape[-1] % _ROWS
        lse = F.pad(lse, (0, missing), value=float("inf")) if missing else lse
        wanted = [True, True, True, False]
        grads = efficient(
            *(grad, q, k, v, None, out, lse, seed, seed, 0.0, wanted, block.causal),
            scale=block.scale,
        )
    return grads[0], summed(grads[1], groups), summed(grads[2], groups), None


def repeated(q: Tensor, x: Tensor) -> Tensor:
    """Keys or values with as many heads as the queries."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], 1) if x.shape[1] != q.shape[1] else x


def summed(x: Tensor, groups: int) -> Tensor:
    """A gradient of what was repeated, with its own number of heads."""
    return x if x.shape[1] == groups else x.unflatten(1, (groups, -1)).sum(2)
