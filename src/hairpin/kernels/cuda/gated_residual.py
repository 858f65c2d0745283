"""Bias, gate, dropout and residual in one pass over memory, in Triton.

Dims: a and b two dims of places, c channels, t programs.
"""
# ruff: noqa: N803  # capitals are sizes fixed when a kernel is compiled

from __future__ import annotations

import torch
from torch import Tensor

from hairpin.kernels.cuda.language import jit, next_power_of_2, tl, turns

TILE = 4096  # elements of one tile
_PROGRAMS = 1024  # enough to fill a device


@jit
def _update(
    x, x_bias, gate, gate_bias, at_x, at_gate, cols, c, inside,
    GATE: tl.constexpr, X_BIAS: tl.constexpr, GATE_BIAS: tl.constexpr,
):  # fmt: skip
    """``x`` with its bias, and the gate, both in float32."""
    value = tl.load(x + at_x, mask=inside, other=0.0).to(tl.float32)
    if X_BIAS:
        value += tl.load(x_bias + cols, mask=cols < c, other=0.0).to(tl.float32)[None, :]
    opened = tl.zeros_like(value) + 1.0
    if GATE:
        logit = tl.load(gate + at_gate, mask=inside, other=0.0).to(tl.float32)
        if GATE_BIAS:
            logit += tl.load(gate_bias + cols, mask=cols < c, other=0.0).to(tl.float32)[None, :]
        opened = 1.0 / (1.0 + tl.exp(-logit))
    return value, opened


@jit
def forward_kernel(
    x, gate, x_bias, gate_bias, kept, residual, out, n_a, n_b, c,
    x_a, x_b, gate_a, gate_b, kept_a, kept_b, kept_c, residual_a, residual_b, out_a, out_b,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, GATE: tl.constexpr, X_BIAS: tl.constexpr,
    GATE_BIAS: tl.constexpr, KEPT: tl.constexpr, RESIDUAL: tl.constexpr,
):  # fmt: skip
    """``ROWS`` places, whole."""
    places = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    a, b, cols = places // n_b, places % n_b, tl.arange(0, WIDTH)
    inside = (places[:, None] < n_a * n_b) & (cols[None, :] < c)
    value, opened = _update(
        x, x_bias, gate, gate_bias,
        (a * x_a + b * x_b)[:, None] + cols[None, :],
        (a * gate_a + b * gate_b)[:, None] + cols[None, :],
        cols, c, inside, GATE, X_BIAS, GATE_BIAS,
    )  # fmt: skip
    y = value * opened
    if KEPT:
        at = kept + (a * kept_a + b * kept_b)[:, None] + cols[None, :] * kept_c
        y *= tl.load(at, mask=inside, other=0.0).to(tl.float32)
    if RESIDUAL:
        at = residual + (a * residual_a + b * residual_b)[:, None] + cols[None, :]
        y += tl.load(at, mask=inside, other=0.0).to(tl.float32)
    at = out + (a * out_a + b * out_b)[:, None] + cols[None, :]
    tl.store(at, y.to(out.dtype.element_ty), mask=inside)


@jit
def backward_kernel(
    grad, x, gate, x_bias, gate_bias, kept, grad_x, grad_gate, sums, n_a, n_b, c,
    grad_a, grad_b, x_a, x_b, gate_a, gate_b, kept_a, kept_b, kept_c,
    dx_a, dx_b, dgate_a, dgate_b, share,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, GATE: tl.constexpr, X_BIAS: tl.constexpr,
    GATE_BIAS: tl.constexpr, KEPT: tl.constexpr,
):  # fmt: skip
    """A share of the places, and its part of the gradients ``sums[2, t, c]`` of the biases."""
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, WIDTH)
    n = n_a * n_b
    of_x = tl.zeros([WIDTH], tl.float32)
    of_gate = tl.zeros([WIDTH], tl.float32)
    for start in range(program * share, tl.minimum(program * share + share, n), ROWS):
        places = start + tl.arange(0, ROWS)
        a, b = places // n_b, places % n_b
        inside = (places[:, None] < n) & (cols[None, :] < c)
        value, opened = _update(
            x, x_bias, gate, gate_bias,
            (a * x_a + b * x_b)[:, None] + cols[None, :],
            (a * gate_a + b * gate_b)[:, None] + cols[None, :],
            cols, c, inside, GATE, X_BIAS, GATE_BIAS,
        )  # fmt: skip
        at = grad + (a * grad_a + b * grad_b)[:, None] + cols[None, :]
        g = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if KEPT:
            at = kept + (a * kept_a + b * kept_b)[:, None] + cols[None, :] * kept_c
            g *= tl.load(at, mask=inside, other=0.0).to(tl.float32)
        dx = g * opened
        of_x += tl.sum(dx, 0)
        at = grad_x + (a * dx_a + b * dx_b)[:, None] + cols[None, :]
        tl.store(at, dx.to(grad_x.dtype.element_ty), mask=inside)
        if GATE:
            dgate = g * value * opened * (1.0 - opened)
            of_gate += tl.sum(dgate, 0)
            at = grad_gate + (a * dgate_a + b * dgate_b)[:, None] + cols[None, :]
            tl.store(at, dgate.to(grad_gate.dtype.element_ty), mask=inside)
    if X_BIAS:
        tl.store(sums + program * c + cols, of_x, mask=cols < c)
    if GATE_BIAS:
        at = sums + (tl.num_programs(0) + program) * c + cols
        tl.store(at, of_gate, mask=cols < c)


# -------------------------------------------------------------------------- operations of torch


def _sizes(x: Tensor, gate: Tensor | None, x_bias: Tensor | None, gate_bias: Tensor | None,
           kept: Tensor | None) -> dict[str, int]:  # fmt: skip
    width = next_power_of_2(x.shape[2])
    return {
        "ROWS": max(1, TILE // width),
        "WIDTH": width,
        "GATE": gate is not None,
        "X_BIAS": x_bias is not None,
        "GATE_BIAS": gate_bias is not None,
        "KEPT": kept is not None,
        "num_warps": 4,
    }


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if tensor is None else tensor.stride()[:count]


@torch.library.custom_op("hairpin::gated_residual", mutates_args=())
def gated_residual(
    x: Tensor,
    gate: Tensor | None,
    x_bias: Tensor | None,
    gate_bias: Tensor | None,
    kept: Tensor | None,
    residual: Tensor | None,
) -> Tensor:
    """``residual + kept * sigmoid(gate + gate_bias) * (x + x_bias)``.

    ``x``, ``gate``, ``residual`` and ``kept`` (expanded) are ``[a, b, c]``, the biases ``[c]``.
    """
    n_a, n_b, c = x.shape
    out = x.new_empty(x.shape)
    sizes = _sizes(x, gate, x_bias, gate_bias, kept)
    given = [x if t is None else t for t in (gate, x_bias, gate_bias, kept, residual)]
    if out.numel():
        with torch.cuda.device_of(x):
            forward_kernel[(turns(n_a * n_b, sizes["ROWS"]),)](
                x, *given, out, n_a, n_b, c,
                *x.stride()[:2], *_strides(gate, 2), *_strides(kept, 3), *_strides(residual, 2),
                *out.stride()[:2], RESIDUAL=residual is not None, **sizes,
            )  # fmt: skip
    return out


@gated_residual.register_fake
def _(x, gate, x_bias, gate_bias, kept, residual):
    return x.new_empty(x.shape)


@torch.library.custom_op("hairpin::gated_residual_backward", mutates_args=())
def gated_residual_backward(
    grad: Tensor,
    x: Tensor,
    gate: Tensor | None,
    x_bias: Tensor | None,
    gate_bias: Tensor | None,
    kept: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x``, of ``gate`` (empty if it is absent), and ``[2, c]`` of both biases."""
    n_a, n_b, c = x.shape
    n = n_a * n_b
    grad_x, grad_gate, _ = _gradients(x, gate)
    sizes = _sizes(x, gate, x_bias, gate_bias, kept)
    rows = sizes["ROWS"]
    share = turns(turns(n, min(max(n, 1), _PROGRAMS)), rows) * rows
    parts = turns(n, share) if n and c else 0
    sums = x.new_zeros((2, parts, c), dtype=torch.float32)
    given = [x if t is None else t for t in (gate, x_bias, gate_bias, kept)]
    if parts:
        with torch.cuda.device_of(x):
            backward_kernel[(parts,)](
                grad, x, *given, grad_x, grad_gate, sums, n_a, n_b, c,
                *grad.stride()[:2], *x.stride()[:2], *_strides(gate, 2), *_strides(kept, 3),
                *grad_x.stride()[:2], *_strides(None if gate is None else grad_gate, 2), share,
                **sizes,
            )  # fmt: skip
    return grad_x, grad_gate, sums.sum(1)


def _gradients(x: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    grad_gate = x.new_empty(0) if gate is None else gate.new_empty(gate.shape)
    return x.new_empty(x.shape), grad_gate, x.new_empty((2, x.shape[2]), dtype=torch.float32)


@gated_residual_backward.register_fake
def _(grad, x, gate, x_bias, gate_bias, kept):
    return _gradients(x, gate)


def _keep(ctx, inputs, output):
    *saved, residual = inputs
    ctx.save_for_backward(*saved)
    ctx.residual_dtype = None if residual is None else residual.dtype


def _differentiate(ctx, grad):
    x, gate, x_bias, gate_bias, kept = ctx.saved_tensors
    if grad.stride(-1) != 1:
        grad = grad.contiguous()
    grad_x, grad_gate, sums = gated_residual_backward(grad, x, gate, x_bias, gate_bias, kept)
    return (
        grad_x,
        None if gate is None else grad_gate,
        None if x_bias is None else sums[0].to(x_bias.dtype),
        None if gate_bias is None else sums[1].to(gate_bias.dtype),
        None,
        None if ctx.residual_dtype is None else grad.to(ctx.residual_dtype),
    )


gated_residual.register_autograd(_differentiate, setup_context=_keep)
