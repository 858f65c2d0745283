"""Kernels that sleep as long as a device of a given speed would compute.

Where ranks are more than cores, real work of one rank delays the transfers of another, and nothing
can be said of overlap. A sleeping rank leaves the core to those who transfer. Everything else, such
as merging states and packing messages, is done for real; what the kernels give are zeros.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.library import Library

from hairpin.kernels import linear_attention
from hairpin.kernels.linear_chunks import CHUNK

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"


@contextmanager
def virtual_attention(flops_per_s: float) -> Iterator[None]:
    """In this context torch's fused attention of the CPU sleeps instead of computing.

    Whatever calls the kernel is played alike: ours, torch's own functions, other libraries. It
    holds for the whole process, so it is for ranks that do nothing else.

    Args:
        flops_per_s: of the device that is played.
    """
    with _in_place_of(
        {
            _FORWARD: partial(_forward, flops_per_s),
            f"{_FORWARD}_backward": partial(_backward, flops_per_s),
        }
    ):
        yield


@contextmanager
def _in_place_of(played: dict[str, Callable[..., Any]]) -> Iterator[None]:
    """In this context these play torch's kernels of the CPU."""
    kernels = Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "(?s).*Overriding a previously registered", UserWarning
            )
            for name, function in played.items():
                kernels.impl(name, function, "CPU")
        yield
    finally:
        kernels._destroy()


def _forward(  # noqa: PLR0917  # the operator's own signature
    flops_per_s: float,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,  # noqa: FBT001, FBT002
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    del dropout_p, attn_mask, scale
    _sleep(flops_per_s, query, key, products=2, causal=is_causal)
    b, h, s, _ = query.shape
    out = query.new_zeros(b, s, h, value.shape[3]).transpose(1, 2)  # as the kernel lays it out
    return out, query.new_zeros(b, h, s, dtype=torch.promote_types(query.dtype, torch.float32))


def _backward(  # noqa: PLR0917
    flops_per_s: float,
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,  # noqa: FBT001
    *,
    attn_mask: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    del grad_out, out, logsumexp, dropout_p, attn_mask, scale
    _sleep(flops_per_s, query, key, products=5, causal=is_causal)
    return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)


def _sleep(flops_per_s: float, q: Tensor, k: Tensor, *, products: int, causal: bool) -> None:
    b, h, rows, d = q.shape
    scores = rows * (rows + 1) // 2 if causal else rows * k.shape[2]
    time.sleep(2 * products * b * h * scores * d / flops_per_s)


# -------------------------------------------------------------------------------- matrix products


@contextmanager
def virtual_products(flops_per_s: float) -> Iterator[None]:
    """In this context matrix products of the CPU sleep instead of computing.

    It holds for the whole process, so it is for ranks that do nothing else.

    Args:
        flops_per_s: of the device that is played.
    """

    def mm(x: Tensor, y: Tensor) -> Tensor:
        time.sleep(2 * x.numel() * y.shape[1] / flops_per_s)
        return x.new_zeros(x.shape[0], y.shape[1])

    def bmm(x: Tensor, y: Tensor) -> Tensor:
        time.sleep(2 * x.numel() * y.shape[2] / flops_per_s)
        return x.new_zeros(*x.shape[:2], y.shape[2])

    with _in_place_of({"mm": mm, "bmm": bmm}):
        yield


# ------------------------------------------------------------------------------- linear attention


@contextmanager
def virtual_linear_attention(flops_per_s: float) -> Iterator[None]:
    """In this context the three kernels of linear attention sleep instead of computing.

    States of chunks, outputs of chunks, and reading a state that came in; decays are summed up for
    real. It holds for the whole process, so it is for ranks that do nothing else.

    Args:
        flops_per_s: of the device that is played.
    """

    def states(
        k: Tensor, v: Tensor, g: Tensor | None, initial: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        del initial
        b, h, s, d = k.shape
        e = v.shape[3]
        n = max(1, -(-s // CHUNK))
        seconds = 2 * b * h * s * d * e / flops_per_s
        before, state = _Played.apply(seconds, ((b, h, n, d, e), (b, h, d, e)), k, v, g)
        return before, state

    def outputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, before: Tensor) -> Tensor:
        b, h, s, d = q.shape
        e, c = v.shape[3], min(CHUNK, s)
        seconds = 2 * b * h * s * (c * (d + e) + d * e) / flops_per_s
        out: Tensor = _Played.apply(seconds, (tuple(v.shape),), q, k, v, g, before)[0]
        return out

    def read(q: Tensor, state: Tensor) -> Tensor:
        b, h, s, d = q.shape
        seconds = 2 * b * h * s * d * state.shape[3] / flops_per_s
        out: Tensor = _Played.apply(seconds, ((b, h, s, state.shape[3]),), q, state)[0]
        return out

    with ExitStack() as stack:
        played = {"chunk_states": states, "chunk_outputs": outputs, "read_state": read}
        for name, function in played.items():
            stack.enter_context(patch.object(linear_attention, name, function))
        yield


class _Played(torch.autograd.Function):
    """Sleep, then give zeros; in the backward, which has two products for each, twice as long."""

    @staticmethod
    def forward(
        ctx: Any, seconds: float, shapes: tuple[tuple[int, ...], ...], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.seconds = seconds
        ctx.save_for_backward(*tensors)
        time.sleep(seconds)
        like = next(x for x in tensors if x is not None)
        dtype = torch.promote_types(like.dtype, torch.float32)
        return tuple(like.new_zeros(shape, dtype=dtype) for shape in shapes)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        time.sleep(2 * ctx.seconds)
        grads = (None if x is None else torch.zeros_like(x) for x in ctx.saved_tensors)
        return None, None, *grads
