"""Linear attention with decay in Triton: states from chunk to chunk, then all chunks at once.

The two steps of `hairpin.kernels.linear_chunks`, with the same care: an exponent is a sum of
decays between two positions, never a difference of sums. Tiles are widened to float32 when they are
read, so a state that grows along the sequence overflows in no dtype; products then go by TF32 for
half precision, and for float32 as torch's own setting has it. The backward is torch's, of the plain
operations.

Dims: b batch, h heads, s positions, d key channels, e value channels, n chunks, j 1 or d.
"""
# ruff: noqa: N803  # capitals are sizes fixed when a kernel is compiled

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hairpin.kernels import linear_chunks as plain
from hairpin.kernels.cuda.language import jit, next_power_of_2, tl, turns

CHUNK = plain.CHUNK
ROWS_BY_CHANNEL = 16  # positions of a block whose decays differ by channel
_WIDEST_E = 64  # value channels of one program
_NONE, _BY_POSITION, _BY_CHANNEL = 0, 1, 2


@jit
def _tile(base, rows, stride, last, channels, D: tl.constexpr):
    """Load ``[rows, channels]`` of one head in float32, zero from row ``last`` on."""
    inside = (rows < last)[:, None] & (channels[None, :] < D)
    at = base + rows.to(tl.int64)[:, None] * stride + channels[None, :]
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@jit
def _decays(g, rows, g_s, g_j, last, channels, D: tl.constexpr, KIND: tl.constexpr):
    """Log decays of rows below ``last``, zero elsewhere: ``[rows]`` or ``[rows, channels]``."""
    at = g + rows.to(tl.int64) * g_s
    inside = rows < last
    if KIND == 2:
        at = at[:, None] + channels[None, :] * g_j
        inside = inside[:, None] & (channels[None, :] < D)
    return tl.load(at, mask=inside, other=0.0).to(tl.float32)


@jit
def states_kernel(
    k, v, g, initial, before, state,
    n_h, n_s, n_e, n_n, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_s, g_j,
    D: tl.constexpr, WIDTH: tl.constexpr, E_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    KIND: tl.constexpr, INITIAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The state before each chunk and after the last, for some value channels of one head."""
    n_blocks = tl.cdiv(n_e, E_WIDTH)
    line = (tl.program_id(0) // n_blocks).to(tl.int64)
    b, h = line // n_h, line % n_h
    channels = tl.arange(0, WIDTH)
    values = (tl.program_id(0) % n_blocks) * E_WIDTH + tl.arange(0, E_WIDTH)
    k_at, v_at, g_at = k + b * k_b + h * k_h, v + b * v_b + h * v_h, g + b * g_b + h * g_h
    held = (channels[:, None] < D) & (values[None, :] < n_e)
    place = channels[:, None] * n_e + values[None, :]
    total = tl.zeros([WIDTH, E_WIDTH], tl.float32)
    if INITIAL:
        total += tl.load(initial + line * D * n_e + place, mask=held, other=0.0).to(tl.float32)
    for chunk in range(n_n):
        tl.store(before + (line * n_n + chunk) * D * n_e + place, total, mask=held)
        rows = chunk * CHUNK + tl.arange(0, CHUNK)
        last = tl.minimum(n_s, chunk * CHUNK + CHUNK)
        k_tile = _tile(k_at, rows, k_s, last, channels, D)
        v_tile = _tile(v_at, rows, v_s, last, values, n_e)
        if KIND == 1:
            later = _decays(g_at, rows + 1, g_s, g_j, last, channels, D, KIND)
            k_tile *= tl.exp(tl.cumsum(later, 0, reverse=True))[:, None]
            all_ = tl.sum(_decays(g_at, rows, g_s, g_j, last, channels, D, KIND), 0)
            total *= tl.exp(all_)
        if KIND == 2:
            later = _decays(g_at, rows + 1, g_s, g_j, last, channels, D, KIND)
            k_tile *= tl.exp(tl.cumsum(later, 0, reverse=True))
            all_ = tl.sum(_decays(g_at, rows, g_s, g_j, last, channels, D, KIND), 0)
            total *= tl.exp(all_)[:, None]
        total += tl.dot(tl.trans(k_tile), v_tile, input_precision=PRECISION)
    tl.store(state + line * D * n_e + place, total, mask=held)


@jit
def _scores_key_by_key(
    q, decay, k_at, k_s, first, n_s, channels, D: tl.constexpr, ROWS: tl.constexpr
):
    """Scores ``[ROWS, ROWS]`` of a block whose decays ``[ROWS, channels]`` differ by channel."""
    own = tl.arange(0, ROWS)
    scores = tl.zeros([ROWS, ROWS], tl.float32)
    for i in range(ROWS):
        at = k_at + (first + i).to(tl.int64) * k_s + channels
        key = tl.load(at, mask=(channels < D) & (first + i < n_s), other=0.0).to(tl.float32)
        since = tl.cumsum(tl.where(own[:, None] > i, decay, 0.0), 0)
        column = tl.sum(q * key[None, :] * tl.exp(since), 1)
        is_here = (own[None, :] == i) & (own[:, None] >= i)
        scores = tl.where(is_here, column[:, None], scores)
    return scores


@jit
def _earlier_blocks(
    q, k_at, v_at, g_at, rows, n_earlier, k_s, v_s, g_s, g_j, n_s, n_e, channels, values,
    D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, E_WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """What earlier blocks of a chunk give to queries decayed since the edge of theirs.

    Also the decay of all those blocks together.
    """
    y = tl.zeros([ROWS, E_WIDTH], tl.float32)
    passed = tl.zeros([WIDTH], tl.float32)
    edge = tl.min(rows, 0)
    for _ in range(n_earlier):
        cols = edge - ROWS + tl.arange(0, ROWS)
        later = _decays(g_at, cols + 1, g_s, g_j, edge, channels, D, 2)
        fade = tl.exp(tl.cumsum(later, 0, reverse=True) + passed[None, :])
        k_tile = _tile(k_at, cols, k_s, n_s, channels, D) * fade
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        v_tile = _tile(v_at, cols, v_s, n_s, values, n_e)
        y += tl.dot(scores, v_tile, input_precision=PRECISION)
        passed += tl.sum(_decays(g_at, cols, g_s, g_j, edge, channels, D, 2), 0)
        edge -= ROWS
    return y, passed


@jit
def outputs_kernel(
    q, k, v, g, before, out,
    n_h, n_s, n_e, n_n, q_b, q_h, q_s, k_b, k_h, k_s, v_b, v_h, v_s, g_b, g_h, g_s, g_j,
    D: tl.constexpr, WIDTH: tl.constexpr, E_WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    ROWS: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some value channels of a block of rows: from its chunk up to it, and from the state before.

    A block is a chunk, except where decays differ by channel: there the scores within a block are
    formed key by key, and earlier blocks of the chunk are joined at the edge of this one.
    """
    n_blocks, n_parts = tl.cdiv(n_s, ROWS), tl.cdiv(n_e, E_WIDTH)
    program = tl.program_id(0)
    part, block = program % n_parts, (program // n_parts) % n_blocks
    line = (program // n_parts // n_blocks).to(tl.int64)
    b, h = line // n_h, line % n_h
    chunk, own = block * ROWS // CHUNK, tl.arange(0, ROWS)
    rows, channels = block * ROWS + own, tl.arange(0, WIDTH)
    values = part * E_WIDTH + tl.arange(0, E_WIDTH)
    k_at, v_at, g_at = k + b * k_b + h * k_h, v + b * v_b + h * v_h, g + b * g_b + h * g_h
    q_tile = _tile(q + b * q_b + h * q_h, rows, q_s, n_s, channels, D)
    v_tile = _tile(v_at, rows, v_s, n_s, values, n_e)
    y = tl.zeros([ROWS, E_WIDTH], tl.float32)
    if KIND == 2:
        decay = _decays(g_at, rows, g_s, g_j, n_s, channels, D, KIND)
        scores = _scores_key_by_key(q_tile, decay, k_at, k_s, block * ROWS, n_s, channels, D, ROWS)
        q_tile *= tl.exp(tl.cumsum(decay, 0))
        y, passed = _earlier_blocks(
            q_tile, k_at, v_at, g_at, rows, block % (CHUNK // ROWS), k_s, v_s, g_s, g_j,
            n_s, n_e, channels, values, D, ROWS, WIDTH, E_WIDTH, PRECISION,
        )  # fmt: skip
        q_tile *= tl.exp(passed)[None, :]
    else:
        k_tile = _tile(k_at, rows, k_s, n_s, channels, D)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION)
        seen = own[:, None] >= own[None, :]
        if KIND == 1:
            decay = _decays(g_at, rows, g_s, g_j, n_s, channels, D, KIND)
            steps = tl.where(own[:, None] > own[None, :], decay[:, None], 0.0)
            scores *= tl.exp(tl.where(seen, tl.cumsum(steps, 0), 0.0))
            q_tile *= tl.exp(tl.cumsum(decay, 0))[:, None]
        scores = tl.where(seen, scores, 0.0)
    y += tl.dot(scores, v_tile, input_precision=PRECISION)
    held = (channels[:, None] < D) & (values[None, :] < n_e)
    place = channels[:, None] * n_e + values[None, :]
    state = tl.load(before + (line * n_n + chunk) * D * n_e + place, mask=held, other=0.0)
    y += tl.dot(q_tile, state, input_precision=PRECISION)
    at = out + (line * n_s + rows)[:, None] * n_e + values[None, :]
    tl.store(at, y, mask=(rows < n_s)[:, None] & (values[None, :] < n_e))


# -------------------------------------------------------------------------- operations of torch


def precision(dtype: torch.dtype) -> str:
    """How Triton multiplies: half precision by TF32, float32 as torch's own setting has it."""
    if dtype == torch.float32 and torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


def _kind(g: Tensor | None) -> int:
    if g is None:
        return _NONE
    return _BY_POSITION if g.shape[-1] == 1 else _BY_CHANNEL


def _sizes(k: Tensor, v: Tensor, g: Tensor | None) -> dict[str, Any]:
    d, e = k.shape[-1], v.shape[-1]
    return {
        "D": d,
        "WIDTH": max(16, next_power_of_2(d)),
        "E_WIDTH": min(_WIDEST_E, max(16, next_power_of_2(e))),
        "CHUNK": CHUNK,
        "KIND": _kind(g),
        "PRECISION": precision(k.dtype),
        "num_warps": 4,
    }


def _along_channels(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors with channels side by side, as the kernels read them."""
    return tuple(t if t.stride(-1) == 1 else t.contiguous() for t in tensors)


def _decay_strides(k: Tensor, g: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0, 0) if g is None else g.expand(*k.shape[:3], -1).stride()


@torch.library.custom_op("hairpin::linear_attention_states", mutates_args=())
def chunk_states(
    k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``k[b, h, s, d], v[b, h, s, e], g[b, h, s, j], initial[b, h, d, e]``, s at least 1.

    Returns:
        The state before each chunk ``[b, h, n, d, e]`` and after the last, in float32.
    """
    k, v = _along_channels(k, v)
    (b, h, s, _), e = k.shape, v.shape[-1]
    before, state = _state_results(k, v)
    sizes = _sizes(k, v, g)
    initial = None if initial is None else initial.contiguous()
    with torch.cuda.device_of(k):
        states_kernel[(b * h * turns(e, sizes["E_WIDTH"]),)](
            k, v, k if g is None else g, k if initial is None else initial, before, state,
            h, s, e, before.shape[2], *k.stride()[:3], *v.stride()[:3], *_decay_strides(k, g),
            INITIAL=initial is not None, **sizes,
        )  # fmt: skip
    return before, state


def _state_results(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    (b, h, s, d), e = k.shape, v.shape[-1]
    before = k.new_empty((b, h, turns(s, CHUNK), d, e), dtype=torch.float32)
    return before, k.new_empty((b, h, d, e), dtype=torch.float32)


@chunk_states.register_fake
def _(k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None) -> tuple[Tensor, Tensor]:
    return _state_results(k, v)


@torch.library.custom_op("hairpin::linear_attention", mutates_args=())
def chunk_outputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, before: Tensor) -> Tensor:
    """``[b, h, s, e]`` in float32, from ``q, k[b, h, s, d]``, ``v``, ``g`` and the states."""
    q, k, v, before = _along_channels(q, k, v, before.contiguous())
    (b, h, s, _), e = k.shape, v.shape[-1]
    out = _output(q, v)
    sizes = _sizes(k, v, g)
    rows = ROWS_BY_CHANNEL if sizes["KIND"] == _BY_CHANNEL else CHUNK
    with torch.cuda.device_of(k):
        outputs_kernel[(b * h * turns(s, rows) * turns(e, sizes["E_WIDTH"]),)](
            q, k, v, k if g is None else g, before, out, h, s, e, before.shape[2],
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *_decay_strides(k, g),
            ROWS=rows, **sizes,
        )  # fmt: skip
    return out


def _output(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(v.shape, dtype=torch.float32)


@chunk_outputs.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, before: Tensor) -> Tensor:
    return _output(q, v)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gradients(ctx, function, grads):
    """Gradients by torch, of the plain operations, for those inputs that need them."""
    with torch.enable_grad():
        given = [
            None if x is None else x.detach().requires_grad_(needed)
            for x, needed in zip(ctx.saved_tensors, ctx.needs_input_grad, strict=True)
        ]
        outputs = function(*given)
    outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    learning = [x for x in given if x is not None and x.requires_grad]
    found = iter(torch.autograd.grad(outputs, learning, grads, allow_unused=True))
    return tuple(next(found) if x is not None and x.requires_grad else None for x in given)


chunk_states.register_autograd(
    lambda ctx, *grads: _gradients(ctx, plain.chunk_states, grads), setup_context=_keep
)
chunk_outputs.register_autograd(
    lambda ctx, *grads: _gradients(ctx, plain.chunk_outputs, grads), setup_context=_keep
)
