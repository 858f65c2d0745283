"""Attention with a pair bias and a mask, in Triton: no logits in memory, forward or backward.

After FlashAttention-2 (Dao 2023, arXiv 2307.08691). The bias is the same for all b, so its gradient
is a sum over them: each program of that kernel owns a tile of it and walks through its share of the
b, so that nothing as large as the logits is written and no sum depends on the order of threads.

Dims: b rows, h heads, q queries, k keys, d channels of a head, t parts of the b.
"""
# ruff: noqa: N803  # capitals are sizes fixed when a kernel is compiled

from __future__ import annotations

import torch
from torch import Tensor

from hairpin.kernels.cuda.language import jit, next_power_of_2, tl, turns

BLOCK = 64
_PROGRAMS = 512  # enough to fill a device
MASKED = -1e9


@jit
def _tile(base, rows, stride, n, channels, D: tl.constexpr):
    """Load ``[rows, channels]`` of one head, zero outside of it."""
    inside = (rows[:, None] < n) & (channels[None, :] < D)
    return tl.load(base + rows[:, None] * stride + channels[None, :], mask=inside, other=0.0)


@jit
def _logits(
    q, k, mask, bias, rows, cols, n_q, n_k, stride_bias, scale,
    MASK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Logits ``[rows, cols]`` in float32, minus infinity beyond the keys."""
    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if BIAS:
        inside = (rows[:, None] < n_q) & (cols[None, :] < n_k)
        at = bias + rows[:, None] * stride_bias + cols[None, :]
        s += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if MASK:
        kept = tl.load(mask + cols, mask=cols < n_k, other=0.0).to(tl.float32)
        s += (-1e9 * (1.0 - kept))[None, :]
    return tl.where(cols[None, :] < n_k, s, float("-inf"))


@jit
def forward_kernel(
    q, k, v, mask, bias, out, peak, total,
    n_b, n_h, n_q, n_k, scale,
    q_b, q_h, q_q, k_b, k_h, k_k, v_b, v_h, v_k, o_b, o_h, o_q, mask_b, bias_h, bias_q,
    D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of queries of one row and head; neighbours share their tiles of the bias."""
    program = tl.program_id(0)
    b = (program % n_b).to(tl.int64)
    block = (program // n_b) % tl.cdiv(n_q, M)
    h = (program // n_b // tl.cdiv(n_q, M)).to(tl.int64)
    rows, channels = block * M + tl.arange(0, M), tl.arange(0, WIDTH)
    k_at, v_at = k + b * k_b + h * k_h, v + b * v_b + h * v_h
    mask_at, bias_at = mask + b * mask_b, bias + h * bias_h
    q_tile = _tile(q + b * q_b + h * q_h, rows, q_q, n_q, channels, D)
    top = tl.full([M], float("-inf"), tl.float32)
    sum_ = tl.zeros([M], tl.float32)
    y = tl.zeros([M, WIDTH], tl.float32)
    for start in range(0, n_k, N):
        cols = start + tl.arange(0, N)
        k_tile = _tile(k_at, cols, k_k, n_k, channels, D)
        s = _logits(
            q_tile, k_tile, mask_at, bias_at, rows, cols, n_q, n_k, bias_q, scale,
            MASK, BIAS, PRECISION,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(s, 1))
        p, shrink = tl.exp(s - new[:, None]), tl.exp(top - new)
        sum_ = sum_ * shrink + tl.sum(p, 1)
        v_tile = _tile(v_at, cols, v_k, n_k, channels, D)
        y = y * shrink[:, None] + tl.dot(p.to(v_tile.dtype), v_tile, input_precision=PRECISION)
        top = new
    inside = (rows[:, None] < n_q) & (channels[None, :] < D)
    at = out + b * o_b + h * o_h + rows[:, None] * o_q + channels[None, :]
    tl.store(at, (y / sum_[:, None]).to(out.dtype.element_ty), mask=inside)
    line = (b * n_h + h) * n_q + rows
    tl.store(peak + line, top, mask=rows < n_q)
    tl.store(total + line, sum_, mask=rows < n_q)


@jit
def query_gradient_kernel(
    grad, out, q, k, v, mask, bias, peak, total, delta, grad_q,
    n_b, n_h, n_q, n_k, scale,
    g_b, g_h, g_q, o_b, o_h, o_q, q_b, q_h, q_q, k_b, k_h, k_k, v_b, v_h, v_k,
    d_b, d_h, d_q, mask_b, bias_h, bias_q,
    D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradient of one block of queries; ``delta``, the sum of gradient times output, on the way."""
    program = tl.program_id(0)
    b = (program % n_b).to(tl.int64)
    block = (program // n_b) % tl.cdiv(n_q, M)
    h = (program // n_b // tl.cdiv(n_q, M)).to(tl.int64)
    rows, channels = block * M + tl.arange(0, M), tl.arange(0, WIDTH)
    k_at, v_at = k + b * k_b + h * k_h, v + b * v_b + h * v_h
    mask_at, bias_at = mask + b * mask_b, bias + h * bias_h
    q_tile = _tile(q + b * q_b + h * q_h, rows, q_q, n_q, channels, D)
    g_tile = _tile(grad + b * g_b + h * g_h, rows, g_q, n_q, channels, D)
    o_tile = _tile(out + b * o_b + h * o_h, rows, o_q, n_q, channels, D)
    line = (b * n_h + h) * n_q + rows
    top = tl.load(peak + line, mask=rows < n_q, other=0.0)
    sum_ = tl.load(total + line, mask=rows < n_q, other=1.0)
    drop = tl.sum(g_tile.to(tl.float32) * o_tile.to(tl.float32), 1)
    tl.store(delta + line, drop, mask=rows < n_q)
    dq = tl.zeros([M, WIDTH], tl.float32)
    for start in range(0, n_k, N):
        cols = start + tl.arange(0, N)
        k_tile = _tile(k_at, cols, k_k, n_k, channels, D)
        v_tile = _tile(v_at, cols, v_k, n_k, channels, D)
        s = _logits(
            q_tile, k_tile, mask_at, bias_at, rows, cols, n_q, n_k, bias_q, scale,
            MASK, BIAS, PRECISION,
        )  # fmt: skip
        p = tl.exp(s - top[:, None]) / sum_[:, None]
        dp = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
        ds = p * (dp - drop[:, None])
        dq += tl.dot(ds.to(k_tile.dtype), k_tile, input_precision=PRECISION)
    inside = (rows[:, None] < n_q) & (channels[None, :] < D)
    at = grad_q + b * d_b + h * d_h + rows[:, None] * d_q + channels[None, :]
    tl.store(at, (dq * scale).to(grad_q.dtype.element_ty), mask=inside)


@jit
def key_gradient_kernel(
    grad, q, k, v, mask, bias, peak, total, delta, grad_k, grad_v,
    n_b, n_h, n_q, n_k, scale,
    g_b, g_h, g_q, q_b, q_h, q_q, k_b, k_h, k_k, v_b, v_h, v_k,
    d_b, d_h, d_k, e_b, e_h, e_k, mask_b, bias_h, bias_q,
    D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of keys and values."""
    program = tl.program_id(0)
    b = (program % n_b).to(tl.int64)
    block = (program // n_b) % tl.cdiv(n_k, N)
    h = (program // n_b // tl.cdiv(n_k, N)).to(tl.int64)
    cols, channels = block * N + tl.arange(0, N), tl.arange(0, WIDTH)
    q_at, g_at = q + b * q_b + h * q_h, grad + b * g_b + h * g_h
    mask_at, bias_at = mask + b * mask_b, bias + h * bias_h
    k_tile = _tile(k + b * k_b + h * k_h, cols, k_k, n_k, channels, D)
    v_tile = _tile(v + b * v_b + h * v_h, cols, v_k, n_k, channels, D)
    dk = tl.zeros([N, WIDTH], tl.float32)
    dv = tl.zeros([N, WIDTH], tl.float32)
    for start in range(0, n_q, M):
        rows = start + tl.arange(0, M)
        q_tile = _tile(q_at, rows, q_q, n_q, channels, D)
        g_tile = _tile(g_at, rows, g_q, n_q, channels, D)
        line = (b * n_h + h) * n_q + rows
        top = tl.load(peak + line, mask=rows < n_q, other=float("inf"))
        sum_ = tl.load(total + line, mask=rows < n_q, other=1.0)
        drop = tl.load(delta + line, mask=rows < n_q, other=0.0)
        s = _logits(
            q_tile, k_tile, mask_at, bias_at, rows, cols, n_q, n_k, bias_q, scale,
            MASK, BIAS, PRECISION,
        )  # fmt: skip
        p = tl.exp(s - top[:, None]) / sum_[:, None]
        dv += tl.dot(tl.trans(p).to(g_tile.dtype), g_tile, input_precision=PRECISION)
        dp = tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION)
        ds = p * (dp - drop[:, None])
        dk += tl.dot(tl.trans(ds).to(q_tile.dtype), q_tile, input_precision=PRECISION)
    inside = (cols[:, None] < n_k) & (channels[None, :] < D)
    k_out = grad_k + b * d_b + h * d_h + cols[:, None] * d_k + channels[None, :]
    v_out = grad_v + b * e_b + h * e_h + cols[:, None] * e_k + channels[None, :]
    tl.store(k_out, (dk * scale).to(grad_k.dtype.element_ty), mask=inside)
    tl.store(v_out, dv.to(grad_v.dtype.element_ty), mask=inside)


@jit
def bias_gradient_kernel(
    grad, q, k, v, mask, bias, peak, total, delta, grad_bias,
    n_b, n_h, n_q, n_k, scale, share,
    g_b, g_h, g_q, q_b, q_h, q_q, k_b, k_h, k_k, v_b, v_h, v_k, mask_b, bias_h, bias_q,
    D: tl.constexpr, WIDTH: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
    MASK: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the bias's gradient ``[t, h, q, k]``, summed over one part of the b."""
    program = tl.program_id(0)
    n_row_blocks, n_col_blocks = tl.cdiv(n_q, M), tl.cdiv(n_k, N)
    rows = (program % n_row_blocks) * M + tl.arange(0, M)
    cols = ((program // n_row_blocks) % n_col_blocks) * N + tl.arange(0, N)
    h = ((program // n_row_blocks // n_col_blocks) % n_h).to(tl.int64)
    part = (program // n_row_blocks // n_col_blocks // n_h).to(tl.int64)
    channels = tl.arange(0, WIDTH)
    db = tl.zeros([M, N], tl.float32)
    for b in range(part * share, tl.minimum(part * share + share, n_b)):
        q_tile = _tile(q + b * q_b + h * q_h, rows, q_q, n_q, channels, D)
        g_tile = _tile(grad + b * g_b + h * g_h, rows, g_q, n_q, channels, D)
        k_tile = _tile(k + b * k_b + h * k_h, cols, k_k, n_k, channels, D)
        v_tile = _tile(v + b * v_b + h * v_h, cols, v_k, n_k, channels, D)
        line = (b * n_h + h) * n_q + rows
        top = tl.load(peak + line, mask=rows < n_q, other=float("inf"))
        sum_ = tl.load(total + line, mask=rows < n_q, other=1.0)
        drop = tl.load(delta + line, mask=rows < n_q, other=0.0)
        s = _logits(
            q_tile, k_tile, mask + b * mask_b, bias + h * bias_h, rows, cols, n_q, n_k, bias_q,
            scale, MASK, BIAS, PRECISION,
        )  # fmt: skip
        p = tl.exp(s - top[:, None]) / sum_[:, None]
        db += p * (tl.dot(g_tile, tl.trans(v_tile), input_precision=PRECISION) - drop[:, None])
    inside = (rows[:, None] < n_q) & (cols[None, :] < n_k)
    at = grad_bias + ((part * n_h + h) * n_q + rows[:, None]) * n_k + cols[None, :]
    tl.store(at, db, mask=inside)


# -------------------------------------------------------------------------- operations of torch


def precision(dtype: torch.dtype) -> str:
    """How Triton multiplies: as torch's own setting has it for float32."""
    if dtype != torch.float32 or torch.get_float32_matmul_precision() == "highest":
        return "ieee"
    return "tf32"


@torch.library.custom_op("hairpin::attention", mutates_args=())
def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """``q[b, h, q, d], k[b, h, k, d], v[b, h, k, d], mask[b, k], bias[h, q, k]``.

    Returns:
        ``[b, h, q, d]`` in the dtype of ``v``; each query's greatest logit and the sum of its
        exponentials above that, both ``[b, h, q]`` in float32. They stay apart because the
        greatest logit of a row that is all masked would swallow the logarithm of the sum.
    """
    b, h, n_q, d = q.shape
    n_k = k.shape[2]
    out, peak, total = _results(q)
    if not q.numel() or not k.numel():
        return out.zero_(), peak.zero_(), total.fill_(1)
    with torch.cuda.device_of(q):
        forward_kernel[(b * h * turns(n_q, BLOCK),)](
            q, k, v, q if mask is None else mask, q if bias is None else bias, out, peak, total,
            b, h, n_q, n_k, d**-0.5,
            *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
            *_strides(mask, bias), **_sizes(q, mask, bias),
        )  # fmt: skip
    return out, peak, total


def _strides(mask: Tensor | None, bias: Tensor | None) -> tuple[int, int, int]:
    of_bias = (0, 0) if bias is None else (bias.stride(0), bias.stride(1))
    return 0 if mask is None else mask.stride(0), *of_bias


def _results(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Room for the output, heads beside channels as a linear layer wants them, and two sums."""
    b, h, n_q, d = q.shape
    out = q.new_empty(b, n_q, h, d).transpose(1, 2)
    peak = q.new_empty((b, h, n_q), dtype=torch.float32)
    return out, peak, torch.empty_like(peak)


def _sizes(q: Tensor, mask: Tensor | None, bias: Tensor | None) -> dict[str, object]:
    d = q.shape[-1]
    return {
        "D": d,
        "WIDTH": max(16, next_power_of_2(d)),
        "M": BLOCK,
        "N": BLOCK,
        "MASK": mask is not None,
        "BIAS": bias is not None,
        "PRECISION": precision(q.dtype),
        "num_warps": 4,
        "num_stages": 2,
    }


@attention.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _results(q)


@torch.library.custom_op("hairpin::attention_backward", mutates_args=())
def attention_backward(
    grad: Tensor,
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    peak: Tensor,
    total: Tensor,
    learns_bias: bool,  # noqa: FBT001  # operations of torch take their arguments by position
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of ``q``, ``k``, ``v`` and of ``bias``; the last is empty if it learns nothing."""
    b, h, n_q, d = q.shape
    n_k = k.shape[2]
    grad_q, grad_k, grad_v, grad_bias = _gradients(q, k, bias, learns_bias=learns_bias)
    if not q.numel() or not k.numel():
        return grad_q.zero_(), grad_k.zero_(), grad_v.zero_(), grad_bias.zero_()
    delta = torch.empty_like(peak)
    lengths, sizes = (b, h, n_q, n_k, d**-0.5), _sizes(q, mask, bias)
    strides, inner = _strides(mask, bias), (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
    given = (q, k, v, q if mask is None else mask, q if bias is None else bias, peak, total, delta)
    with torch.cuda.device_of(q):
        query_gradient_kernel[(b * h * turns(n_q, BLOCK),)](
            grad, out, *given, grad_q, *lengths,
            *grad.stride()[:3], *out.stride()[:3], *inner, *grad_q.stride()[:3], *strides, **sizes,
        )  # fmt: skip
        key_gradient_kernel[(b * h * turns(n_k, BLOCK),)](
            grad, *given, grad_k, grad_v, *lengths, *grad.stride()[:3], *inner,
            *grad_k.stride()[:3], *grad_v.stride()[:3], *strides, **sizes,
        )  # fmt: skip
        if learns_bias and bias is not None:
            tiles = h * turns(n_q, BLOCK) * turns(n_k, BLOCK)
            share = turns(b, min(b, turns(_PROGRAMS, tiles)))
            sums = grad.new_empty((turns(b, share), h, n_q, n_k), dtype=torch.float32)
            bias_gradient_kernel[(tiles * sums.shape[0],)](
                grad, *given, sums, *lengths, share, *grad.stride()[:3], *inner, *strides, **sizes
            )
            grad_bias = sums.sum(0).to(bias.dtype)
    return grad_q, grad_k, grad_v, grad_bias


def _gradients(
    q: Tensor, k: Tensor, bias: Tensor | None, *, learns_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    b, h, n_q, d = q.shape
    n_k = k.shape[2]
    grad_q = q.new_empty(b, n_q, h, d).transpose(1, 2)
    grad_k = k.new_empty(b, n_k, h, d).transpose(1, 2)
    grad_bias = q.new_empty(0)
    if learns_bias and bias is not None:
        grad_bias = bias.new_empty(h, n_q, n_k)
    return grad_q, grad_k, torch.empty_like(grad_k), grad_bias


@attention_backward.register_fake
def _(grad, out, q, k, v, mask, bias, peak, total, learns_bias):
    return _gradients(q, k, bias, learns_bias=learns_bias)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, grad, *_):
    q, k, v, mask, bias, out, peak, total = ctx.saved_tensors
    learns_bias = ctx.needs_input_grad[4]
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    *grads, grad_bias = attention_backward(grad, out, q, k, v, mask, bias, peak, total, learns_bias)
    return *grads, None, grad_bias if learns_bias else None


attention.register_autograd(_differentiate, setup_context=_keep)
