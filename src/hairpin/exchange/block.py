"""Attention of one block of queries to one block of keys, with what is needed to merge blocks.

``attend`` gives ``(out, lse)``; ``attend_backward`` takes the output and log-sum-exp over *all*
keys, whichever blocks they came from, and gives the gradients by this block alone. Back ends, by
what the tensors are:

- a CPU, values as wide as keys, no bias that learns, no dropout: torch's fused kernel;
- CUDA, half precision, no mask but causality or a window: the package flash-attn, if it is here;
- CUDA, no mask but causality: torch's flash kernel (half precision) or its memory-efficient one
  (float32);
- CUDA, a mask or a bias, also one that learns: our Triton kernel;
- everything else: plain operations, some rows at a time.

States are float32, float64 for float64 inputs. A row without any key has output 0 and lse -inf.

Dims: b batch, h heads, g key/value heads, q queries, k keys, d channels, e channels of the values.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from hairpin.exchange.port import Block, Qkv, State, wide
from hairpin.exchange.tiles import Tile

_PLAIN_SCORES = 1 << 22  # scores that the plain back end holds at once


def attend(qkv: Qkv, block: Block) -> State:
    """Output ``[b, h, q, e]`` and log-sum-exp ``[b, h, q]`` of one block."""
    q, k, v = _same_heads(qkv, block)
    forward = _backend(q, k, v, block)[0]
    out, lse = forward((q, k, v), block)
    out, lse = out.to(wide(q.dtype)), lse.to(wide(q.dtype))
    if block.added is not None:
        blind = torch.isneginf(block.added).all(-1).expand(lse.shape)
        out = out.masked_fill(blind.unsqueeze(-1), 0.0)
        lse = lse.masked_fill(blind, -math.inf)
    return out, lse


def attend_backward(
    grad: Tensor, qkv: Qkv, state: State, block: Block
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k, v and ``block.added`` by one block.

    Args:
        grad: of the whole output, ``[b, h, q, e]``.
        state: output and log-sum-exp over all keys.
    """
    groups = qkv[1].shape[1]
    q, k, v = _same_heads(qkv, block)
    out, lse = state
    lse = torch.where(torch.isneginf(lse), math.inf, lse)  # rows without a key: no weight anywhere
    backward = _backend(q, k, v, block)[1]
    grad_q, grad_k, grad_v, grad_added = backward(grad, (q, k, v), (out, lse), block)
    if block.heads is not None:
        index = torch.tensor(block.heads, device=k.device)
        grad_k, grad_v = (
            x.new_zeros(x.shape[0], groups, *x.shape[2:]).index_add_(1, index, x)
            for x in (grad_k, grad_v)
        )
    return grad_q, grad_k, grad_v, grad_added


def masked(tile: Tile, dtype: torch.dtype, device: torch.device) -> Tensor | None:
    """What a tile adds to its scores: ``[q, k]`` of 0 and -inf; None where all count."""
    if tile.kind != "masked":
        return None
    assert tile.first is not None
    assert tile.stop is not None
    keys = torch.arange(tile.keys.stop - tile.keys.start)
    seen = (keys >= tile.first[:, None]) & (keys < tile.stop[:, None])
    return hidden(~seen, dtype).to(device)


def window_of(tile: Tile) -> tuple[int, int] | None:
    """`Block.window` of a masked tile; None where its rows do not see one key further each."""
    if tile.first is None or tile.stop is None:
        return None
    rows, keys = torch.arange(len(tile.first)), tile.keys.stop - tile.keys.start
    first, stop = int(tile.first[-1]) - len(rows) + 1, int(tile.stop[0])
    as_window = (rows + first).clamp(min=0), (rows + stop).clamp(max=keys)
    same = torch.equal(tile.first, as_window[0]) and torch.equal(tile.stop, as_window[1])
    return (first, stop) if same else None


def hidden(where: Tensor, dtype: torch.dtype) -> Tensor:
    """-inf where a key does not count, else 0."""
    return torch.zeros(where.shape, dtype=dtype, device=where.device).masked_fill(where, -math.inf)


def _same_heads(qkv: Qkv, block: Block) -> Qkv:
    q, k, v = qkv
    if block.heads is None:
        return q, k, v
    index = torch.tensor(block.heads, device=k.device)
    return q, k.index_select(1, index), v.index_select(1, index)


def _backend(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Any, Any]:
    """What computes a block: forward, backward."""
    if not block.dropout and q.shape[-1] == v.shape[-1] > 0:
        if q.device.type == "cpu" and not block.learns:
            return _cpu, _cpu_backward
        if q.device.type == "cuda":
            from hairpin.exchange import biased, cuda, flash

            for kernel in (flash, cuda, biased):
                if kernel.takes(q, k, block):
                    return kernel.forward, kernel.backward
    return _plain, _plain_backward


# ------------------------------------------------------------------------------- torch, on a CPU


def _cpu(qkv: Qkv, block: Block) -> State:
    q, k, v = qkv
    flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    added = _added(q, k, block)
    out, lse = flash(q, k, v, 0.0, block.causal, attn_mask=added, scale=block.scale)
    return out, lse


def _cpu_backward(
    grad: Tensor, qkv: Qkv, state: State, block: Block
) -> tuple[Tensor, Tensor, Tensor, None]:
    (q, k, v), (out, lse) = qkv, state
    flash: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    operands = (grad.to(q.dtype), q, k, v, out.to(q.dtype), lse, 0.0, block.causal)
    grads = flash(*operands, attn_mask=_added(q, k, block), scale=block.scale)
    return grads[0], grads[1], grads[2], None


def _added(q: Tensor, k: Tensor, block: Block) -> Tensor | None:
    if block.added is None:
        return None
    shape = (*q.shape[:3], k.shape[2])
    return block.added.to(q.dtype).expand(shape) if block.added.dim() == 4 else block.added


# ------------------------------------------------------------------------------ plain operations


def _plain(qkv: Qkv, block: Block) -> State:
    q, k, v = qkv
    state = wide(q.dtype)
    out = q.new_empty(*q.shape[:3], v.shape[-1], dtype=state)
    lse = q.new_empty(q.shape[:3], dtype=state)
    for rows in _some_rows(q, k):
        scores = _scores(q, k, block, rows)
        sums = scores.logsumexp(-1)
        weights = (scores - torch.nan_to_num(sums, neginf=0.0).unsqueeze(-1)).exp()
        if block.keep is not None:
            weights = weights * block.keep(rows)
        lse[:, :, rows] = sums
        out[:, :, rows] = _times(weights, v.to(state))
    return out, lse


def _plain_backward(
    grad: Tensor, qkv: Qkv, whole: State, block: Block
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    (q, k, v), (out, lse) = qkv, whole
    state = wide(q.dtype)
    grad, out = grad.to(state), out.to(state)
    grad_q = q.new_empty(q.shape, dtype=state)
    grad_k, grad_v = (x.new_zeros(x.shape, dtype=state) for x in (k, v))
    grad_added = None
    if block.learns:
        assert block.added is not None
        grad_added = block.added.new_zeros(block.added.shape, dtype=state)
    for rows in _some_rows(q, k):
        weights = (_scores(q, k, block, rows) - lse[:, :, rows].unsqueeze(-1)).exp()
        drop = None if block.keep is None else block.keep(rows)
        mine = grad[:, :, rows]
        _add_times(grad_v, weights if drop is None else weights * drop, mine)
        of_weights = _times(mine, v.to(state).transpose(-1, -2))
        if drop is not None:
            of_weights = of_weights * drop
        delta = (mine * out[:, :, rows]).sum(-1, keepdim=True)
        of_scores = weights * (of_weights - delta)
        if grad_added is not None:
            _add_summed(grad_added, of_scores, rows)
        grad_q[:, :, rows] = _times(of_scores, k.to(state)) * block.scale
        _add_times(grad_k, of_scores * block.scale, q[:, :, rows].to(state))
    return grad_q, grad_k, grad_v, grad_added


def _some_rows(q: Tensor, k: Tensor) -> Iterator[slice]:
    step = max(1, _PLAIN_SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    for start in range(0, q.shape[2], step):
        yield slice(start, min(start + step, q.shape[2]))


def _scores(q: Tensor, k: Tensor, block: Block, rows: slice) -> Tensor:
    state = wide(q.dtype)
    scores = _times(q[:, :, rows].to(state), k.to(state).transpose(-1, -2)) * block.scale
    if block.added is not None:
        added = block.added
        scores = scores + (added if added.shape[-2] == 1 else added[..., rows, :])
    if block.causal:
        row = torch.arange(rows.start, rows.stop, device=q.device)
        key = torch.arange(k.shape[2], device=q.device)
        scores = scores.masked_fill(key > row[:, None], -math.inf)
    return scores


def _times(x: Tensor, y: Tensor) -> Tensor:
    """``x[b, h, ., .] @ y[b, g, ., .]``, each key/value head for its h / g query heads."""
    if x.shape[1] == y.shape[1]:
        return x @ y
    product: Tensor = x.unflatten(1, (y.shape[1], -1)) @ y.unsqueeze(2)
    return product.flatten(1, 2)


def _add_times(total: Tensor, x: Tensor, y: Tensor) -> None:
    """Add ``x^T y``, summed over the query heads of each key/value head."""
    product = x.transpose(-1, -2) @ y
    total += (
        product
        if product.shape == total.shape
        else product.unflatten(1, (total.shape[1], -1)).sum(2)
    )


def _add_summed(total: Tensor, term: Tensor, rows: slice) -> None:
    """Add a gradient over scores to that of what was broadcast over them."""
    into = total if total.shape[-2] == 1 else total[..., rows, :]
    into += term.sum_to_size(into.shape)
