"""Attention kernels that sleep as long as a device of a given speed would compute.

Where ranks are more than cores, real work of one rank delays the transfers of another, and nothing
can be said of overlap. A sleeping rank leaves the core to those who transfer. Everything else, such
as merging states and packing messages, is done for real; what the kernels give are zeros.
"""

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor
from torch.library import Library

_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"


@contextmanager
def virtual_attention(flops_per_s: float) -> Iterator[None]:
    """In this context torch's fused attention of the CPU sleeps instead of computing.

    Whatever calls the kernel is played alike: ours, torch's own functions, other libraries. It
    holds for the whole process, so it is for ranks that do nothing else.

    Args:
        flops_per_s: of the device that is played.
    """
    kernels = Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "(?s).*Overriding a previously registered", UserWarning
            )
            for name, played in ((_FORWARD, _forward), (f"{_FORWARD}_backward", _backward)):
                kernels.impl(name, partial(played, flops_per_s), "CPU")
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
