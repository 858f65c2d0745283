"""Layer normalisation of rows in Triton, which may lie in memory channel by channel.

Dims: n rows, c channels, t programs.
"""
# ruff: noqa: N803  # capitals are sizes fixed when a kernel is compiled

from __future__ import annotations

import torch
from torch import Tensor

from hairpin.kernels.cuda.language import jit, next_power_of_2, tl, turns

TILE = 4096  # elements of one tile
_PROGRAMS = 512  # enough to fill a device


@jit
def forward_kernel(
    x, weight, bias, out, mean, scale, n, c, x_n, x_c, eps,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """``ROWS`` rows, whole."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, WIDTH)
    inside = (rows[:, None] < n) & (cols[None, :] < c)
    at = x + rows[:, None] * x_n + cols[None, :] * x_c
    values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    middle = tl.sum(values, 1) / c
    centred = tl.where(cols[None, :] < c, values - middle[:, None], 0.0)
    factor = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / c + eps)
    w = tl.load(weight + cols, mask=cols < c, other=0.0).to(tl.float32)
    b = tl.load(bias + cols, mask=cols < c, other=0.0).to(tl.float32)
    y = centred * factor[:, None] * w[None, :] + b[None, :]
    tl.store(out + rows[:, None] * c + cols[None, :], y.to(out.dtype.element_ty), mask=inside)
    tl.store(mean + rows, middle, mask=rows < n)
    tl.store(scale + rows, factor, mask=rows < n)


@jit
def backward_kernel(
    grad, x, weight, mean, scale, grad_x, grad_weight, grad_bias, n, c, g_n, g_c, x_n, x_c, share,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """A share of the rows, and its part of the sums over rows."""
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, WIDTH)
    w = tl.load(weight + cols, mask=cols < c, other=0.0).to(tl.float32)
    dw = tl.zeros([WIDTH], tl.float32)
    db = tl.zeros([WIDTH], tl.float32)
    for start in range(program * share, tl.minimum(program * share + share, n), ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows[:, None] < n) & (cols[None, :] < c)
        g = tl.load(grad + rows[:, None] * g_n + cols[None, :] * g_c, mask=inside, other=0.0)
        g = g.to(tl.float32)
        at = x + rows[:, None] * x_n + cols[None, :] * x_c
        values = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        middle = tl.load(mean + rows, mask=rows < n, other=0.0)
        factor = tl.load(scale + rows, mask=rows < n, other=0.0)
        normed = tl.where(inside, (values - middle[:, None]) * factor[:, None], 0.0)
        dw += tl.sum(g * normed, 0)
        db += tl.sum(g, 0)
        inner = g * w[None, :]
        along, level = tl.sum(inner * normed, 1) / c, tl.sum(inner, 1) / c
        dx = (inner - normed * along[:, None] - level[:, None]) * factor[:, None]
        out = grad_x + rows[:, None] * x_n + cols[None, :] * x_c
        tl.store(out, dx.to(grad_x.dtype.element_ty), mask=inside)
    tl.store(grad_weight + program * c + cols, dw, mask=cols < c)
    tl.store(grad_bias + program * c + cols, db, mask=cols < c)


# -------------------------------------------------------------------------- operations of torch


def _sizes(c: int) -> dict[str, int]:
    width = next_power_of_2(c)
    return {"ROWS": max(1, TILE // width), "WIDTH": width, "num_warps": 4}


@torch.library.custom_op("hairpin::layer_norm", mutates_args=())
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``x[n, c], weight[c], bias[c]`` to ``[n, c]``, and mean and scale ``[n]`` in float32."""
    n, c = x.shape
    out, mean, scale = _results(x)
    sizes = _sizes(c)
    if n:
        with torch.cuda.device_of(x):
            forward_kernel[(turns(n, sizes["ROWS"]),)](
                x, weight, bias, out, mean, scale, n, c, *x.stride(), eps, **sizes
            )
    return out, mean, scale


def _results(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    mean = x.new_empty(x.shape[0], dtype=torch.float32)
    return x.new_empty(x.shape), mean, torch.empty_like(mean)


@layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return _results(x)


@torch.library.custom_op("hairpin::layer_norm_backward", mutates_args=())
def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x`` (in its layout), ``weight`` and ``bias``."""
    n, c = x.shape
    sizes = _sizes(c)
    share = turns(turns(n, min(max(n, 1), _PROGRAMS)), sizes["ROWS"]) * sizes["ROWS"]
    parts = turns(n, share) if n else 0
    grad_x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    sums = x.new_empty((2, parts, c), dtype=torch.float32)
    if n:
        with torch.cuda.device_of(x):
            backward_kernel[(parts,)](
                grad, x, weight, mean, scale, grad_x, sums[0], sums[1], n, c,
                *grad.stride(), *x.stride(), share, **sizes,
            )  # fmt: skip
    grad_weight, grad_bias = sums.sum(1)
    return grad_x, grad_weight.to(weight.dtype, copy=True), grad_bias.to(bias.dtype, copy=True)


@layer_norm_backward.register_fake
def _(grad, x, weight, bias, mean, scale):
    grad_x = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device)
    return grad_x, torch.empty_like(weight), torch.empty_like(bias)


def _keep(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.mark_non_differentiable(*output[1:])


def _differentiate(ctx, grad, *_):
    return *layer_norm_backward(grad, *ctx.saved_tensors), None


layer_norm.register_autograd(_differentiate, setup_context=_keep)
