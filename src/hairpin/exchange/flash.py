"""The package flash-attn on CUDA, where it is installed (Dao 2023, arXiv 2307.08691).

It takes key/value heads that are fewer than heads, and windows, as they are. It aligns the last row
with the last key, we the first row with the first key; for a causal tile, which is square, that is
the same.
"""

from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from hairpin.exchange.port import Block, Qkv, State

_DTYPES = (torch.float16, torch.bfloat16)
_WIDEST, _ALIGNED = 256, 8  # channels of a head: at most, and a multiple of
_OLDEST = (2, 7)  # the first with the calls below
_NO_LIMIT = -1


@cache
def why_not() -> str | None:
    """Why flash-attn is not used on this machine; None where it is."""
    if find_spec("flash_attn") is None:
        return "not installed"
    found = metadata.version("flash-attn")
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST:
        return f"version {found} is too old, 2.7 is the first with the calls we need"
    try:
        _interface()
    except ImportError as error:
        return f"version {found} cannot be imported: {str(error).splitlines()[0]}"
    return None


def takes(q: Tensor, k: Tensor, block: Block) -> bool:
    """Whether the package is here and computes this, forward and backward."""
    if q.dtype not in _DTYPES or q.shape[-1] > _WIDEST or q.shape[-1] % _ALIGNED:
        return False
    if block.learns or block.dropout or _limits(q, k, block) is None:
        return False
    return why_not() is None


def forward(qkv: Qkv, block: Block) -> State:
    """``(out, lse)`` of one block."""
    q, k, v = (x.transpose(1, 2) for x in qkv)
    out, lse, *_ = _interface()._flash_attn_forward(
        *(q, k, v), return_softmax=False, **_options(*qkv[:2], block)
    )
    return out.transpose(1, 2), lse


def backward(
    grad: Tensor, qkv: Qkv, state: State, block: Block
) -> tuple[Tensor, Tensor, Tensor, None]:
    """Gradients by one block, given output and log-sum-exp over all keys."""
    q, k, v = (x.transpose(1, 2) for x in qkv)
    grad, out = (x.to(q.dtype).transpose(1, 2) for x in (grad, state[0]))
    grads = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v)]
    _interface()._flash_attn_backward(
        *(grad, q, k, v, out, state[1].contiguous(), *grads),
        deterministic=torch.are_deterministic_algorithms_enabled(),
        rng_state=None,
        **_options(*qkv[:2], block),
    )
    grad_q, grad_k, grad_v = (x.transpose(1, 2) for x in grads)
    return grad_q, grad_k, grad_v, None


def _interface() -> Any:
    return import_module("flash_attn.flash_attn_interface")


def _options(q: Tensor, k: Tensor, block: Block) -> dict[str, Any]:
    limits = _limits(q, k, block)
    assert limits is not None
    return {
        "dropout_p": 0.0,
        "softmax_scale": block.scale,
        "causal": block.causal,
        "window_size_left": limits[0],
        "window_size_right": limits[1],
        "softcap": 0.0,
        "alibi_slopes": None,
    }


def _limits(q: Tensor, k: Tensor, block: Block) -> tuple[int, int] | None:
    """Keys before and after a row's own that it sees, its own counted from the last row's."""
    rows, keys = q.shape[2], k.shape[2]
    if block.causal:
        return (_NO_LIMIT, 0) if rows == keys and block.added is None else None
    if block.added is None:
        return _NO_LIMIT, _NO_LIMIT
    if block.window is None:
        return None
    first, stop = block.window
    before, after = keys - rows - first, stop - 1 - (keys - rows)
    return (before, after) if min(before, after) >= 0 else None
