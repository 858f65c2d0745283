"""All gated projections of a triangle multiplication from one read of ``z``, in Triton.

Dims: n places of the pair representation, k channels in, c channels out.
"""
# ruff: noqa: N803  # capitals are sizes fixed when a kernel is compiled

from __future__ import annotations

import torch
from torch import Tensor

from hairpin.kernels.cuda.attention import precision
from hairpin.kernels.cuda.language import jit, tl, turns

COLS, ROWS, INNER = 64, 64, 32  # channels out, places and channels in of one tile


@jit
def _products(
    z, weight, gate_weight, bias, gate_bias, rows, cols, n, k, c,
    N: tl.constexpr, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The projection and its gate's logits, ``[cols, rows]`` in float32."""
    value = tl.zeros([N, M], tl.float32)
    logit = tl.zeros([N, M], tl.float32)
    for start in range(0, k, K):
        inner = start + tl.arange(0, K)
        of_z = (inner[:, None] < k) & (rows[None, :] < n)
        z_tile = tl.load(z + rows[None, :] * k + inner[:, None], mask=of_z, other=0.0)
        of_w = (cols[:, None] < c) & (inner[None, :] < k)
        at = cols[:, None] * k + inner[None, :]
        w_tile = tl.load(weight + at, mask=of_w, other=0.0)
        g_tile = tl.load(gate_weight + at, mask=of_w, other=0.0)
        value += tl.dot(w_tile, z_tile, input_precision=PRECISION)
        logit += tl.dot(g_tile, z_tile, input_precision=PRECISION)
    value += tl.load(bias + cols, mask=cols < c, other=0.0).to(tl.float32)[:, None]
    logit += tl.load(gate_bias + cols, mask=cols < c, other=0.0).to(tl.float32)[:, None]
    return value, logit


@jit
def forward_kernel(
    z, mask, weight, bias, gate_weight, gate_bias, out, n, k, c,
    N: tl.constexpr, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of ``out[c, n]``; neighbours share their rows of ``z``."""
    blocks = tl.cdiv(c, N)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * M + tl.arange(0, M)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * N + tl.arange(0, N)
    value, logit = _products(
        z, weight, gate_weight, bias, gate_bias, rows, cols, n, k, c, N, M, K, PRECISION
    )
    kept = tl.load(mask + rows, mask=rows < n, other=0.0).to(tl.float32)
    y = value / (1.0 + tl.exp(-logit)) * kept[None, :]
    inside = (cols[:, None] < c) & (rows[None, :] < n)
    tl.store(out + cols[:, None] * n + rows[None, :], y.to(out.dtype.element_ty), mask=inside)


@jit
def backward_kernel(
    grad, z, mask, weight, bias, gate_weight, gate_bias, grad_value, grad_logit, n, k, c,
    N: tl.constexpr, M: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of the gradients of the projection and of the gate's logits, both ``[n, c]``."""
    blocks = tl.cdiv(c, N)
    rows = (tl.program_id(0) // blocks).to(tl.int64) * M + tl.arange(0, M)
    cols = (tl.program_id(0) % blocks).to(tl.int64) * N + tl.arange(0, N)
    value, logit = _products(
        z, weight, gate_weight, bias, gate_bias, rows, cols, n, k, c, N, M, K, PRECISION
    )
    inside = (cols[:, None] < c) & (rows[None, :] < n)
    kept = tl.load(mask + rows, mask=rows < n, other=0.0).to(tl.float32)
    g = tl.load(grad + cols[:, None] * n + rows[None, :], mask=inside, other=0.0).to(tl.float32)
    g *= kept[None, :]
    opened = 1.0 / (1.0 + tl.exp(-logit))
    of_value = tl.trans((g * opened).to(grad_value.dtype.element_ty))
    of_logit = tl.trans((g * value * opened * (1.0 - opened)).to(grad_logit.dtype.element_ty))
    at = rows[:, None] * c + cols[None, :]
    whole = (rows[:, None] < n) & (cols[None, :] < c)
    tl.store(grad_value + at, of_value, mask=whole)
    tl.store(grad_logit + at, of_logit, mask=whole)


# -------------------------------------------------------------------------- operations of torch


def _sizes(z: Tensor) -> dict[str, object]:
    tile = {"N": COLS, "M": ROWS, "K": INNER}
    return {**tile, "PRECISION": precision(z.dtype), "num_warps": 4, "num_stages": 2}


@torch.library.custom_op("hairpin::gated_projections", mutates_args=())
def gated_projections(
    z: Tensor, mask: Tensor, weight: Tensor, bias: Tensor, gate_weight: Tensor, gate_bias: Tensor
) -> Tensor:
    """``sigmoid(z gate_weight^T + gate_bias) * (z weight^T + bias) * mask``, as ``[c, n]``.

    ``z[n, k], mask[n]``, weights ``[c, k]`` and biases ``[c]``, all contiguous.
    """
    n, k = z.shape
    c = weight.shape[0]
    out = z.new_empty(c, n)
    if out.numel():
        with torch.cuda.device_of(z):
            forward_kernel[(turns(n, ROWS) * turns(c, COLS),)](
                z, mask, weight, bias, gate_weight, gate_bias, out, n, k, c, **_sizes(z)
            )
    return out


@gated_projections.register_fake
def _(z, mask, weight, bias, gate_weight, gate_bias):
    return z.new_empty(weight.shape[0], z.shape[0])


@torch.library.custom_op("hairpin::gated_projections_backward", mutates_args=())
def gated_projections_backward(
    grad: Tensor,
    z: Tensor,
    mask: Tensor,
    weight: Tensor,
    bias: Tensor,
    gate_weight: Tensor,
    gate_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gradients of the projection and of the gate's logits, both ``[n, c]``, from ``[c, n]``."""
    n, k = z.shape
    c = weight.shape[0]
    grad_value, grad_logit = z.new_empty(n, c), z.new_empty(n, c)
    if grad_value.numel():
        with torch.cuda.device_of(z):
            backward_kernel[(turns(n, ROWS) * turns(c, COLS),)](
                grad, z, mask, weight, bias, gate_weight, gate_bias, grad_value, grad_logit,
                n, k, c, **_sizes(z),
            )  # fmt: skip
    return grad_value, grad_logit


@gated_projections_backward.register_fake
def _(grad, z, mask, weight, bias, gate_weight, gate_bias):
    shape = (z.shape[0], weight.shape[0])
    return z.new_empty(shape), z.new_empty(shape)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, grad):
    z, mask, weight, bias, gate_weight, gate_bias = ctx.saved_tensors
    of_value, of_logit = gated_projections_backward(
        grad.contiguous(), z, mask, weight, bias, gate_weight, gate_bias
    )
    return (
        torch.addmm(of_value @ weight, of_logit, gate_weight),
        None,
        of_value.T @ z,
        of_value.sum(0),
        of_logit.T @ z,
        of_logit.sum(0),
    )


gated_projections.register_autograd(_differentiate, setup_context=_keep)
